"""What several test files share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowres.config import Config, ModelConfig, parse_config
from lowres.model import Weights, empty_weights, initialize
from lowres.storage import Dense, Storage

CPU = torch.device("cpu")
SMALL = ModelConfig(dim=64, n_layers=3, n_heads=4, ffn_dim=172, vocab_size=300)


def make_weights(
    config: ModelConfig,
    kind: str = "fp32",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device = CPU,
) -> Weights:
    """Initialised weights; with a dtype, dense in that one."""
    weights = empty_weights(config, kind, "bf16" if kind == "bf16" else "fp32", device)
    initialize(weights, config, seed, device)
    if dtype is not None:
        for unit in weights.values():
            for storage in unit.values():
                assert isinstance(storage, Dense)
                storage.value = storage.value.to(dtype)
    return weights


def make_config(**sections: Mapping[str, object]) -> Config:
    """A small config with the given sections changed."""
    base: dict[str, dict[str, object]] = {
        "model": {"dim": 64, "n_layers": 3, "n_heads": 4, "ffn_dim": 172, "vocab_size": 300},
        "data": {"seq_len": 32},
        "train": {"batch_tokens": 7 * 32, "steps": 20},
    }
    for section, keys in sections.items():
        base[section] = base.get(section, {}) | dict(keys)
    return parse_config(base)[0]


def make_batch(sequences: int = 7, length: int = 32, vocab: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (sequences, length + 1), generator=generator)


def dense_copy(weights: Weights) -> dict[str, Tensor]:
    return {name: s.dense(torch.float64).clone() for unit in weights.values() for name, s in unit.items()}


class Recorder:
    """In the place of an optimizer: keeps the gradients and changes nothing."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.accepted: dict[str, bool] = {}

    def update(
        self,
        unit: str,
        weights: Mapping[str, Storage],
        grads: Mapping[str, Tensor],
        step: int,
        schedule: float,
        accepted: Tensor,
    ) -> None:
        assert weights.keys() == grads.keys()
        self.accepted[unit] = bool(accepted)
        for name, grad in grads.items():
            assert name not in self.grads, f"{name} was updated twice"
            self.grads[name] = grad.clone()


def lowres(*arguments: object, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; fails if it does not exit with `code`."""
    command = [sys.executable, "-m", "lowres", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **more)
    assert done.returncode == code, f"{command}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done
