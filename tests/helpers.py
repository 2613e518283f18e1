"""Helpers that several test files use."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from lowres import checkpoint
from lowres.cli import main
from lowres.config import Config, ModelConfig
from lowres.config_file import parse_config, to_toml, to_values
from lowres.engine import Choice, Engine, make_engine
from lowres.metrics import MetricsLog
from lowres.model import Units, empty_units, initialize
from lowres.optim import Optimizer
from lowres.optim import make_optimizer as optimizer_of
from lowres.relora import Relora
from lowres.rooms import Rooms
from lowres.runs import CHECKPOINTS, CONFIG
from lowres.storage import FORMATS, Dense, Storage, Unit

CPU = torch.device("cpu")
ROOMS = Rooms(CPU)
# heads whose widths do not add up to that of the model, and positions for longer texts; the short original
# length is within the sequences of tests
LLAMA3: dict[str, Any] = {
    "head_dim": 24,
    "rope_scaling": "llama3",
    "rope_theta": 500.0,
    "rope_factor": 8.0,
    "rope_original_length": 16,
}
SMALL = ModelConfig(dim=64, n_layers=3, n_heads=4, ffn_dim=172, vocab_size=300)


def make_units(
    config: ModelConfig,
    kind: str = "fp32",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device = CPU,
) -> Units:
    """Initialised weights; with a dtype, all are dense in it."""
    units = empty_units(config, kind, "bf16" if kind == "bf16" else "fp32", Rooms(device))
    initialize(units.values(), seed, device)
    if dtype is not None:
        for unit in units.values():
            for storage in unit.weights.values():
                assert isinstance(storage, Dense)
                storage.value = storage.value.to(dtype)
    return units


def new_storage(kind: str, shape: tuple[int, ...], device: torch.device = CPU) -> Storage:
    """A storage of a kind, all zero bytes."""
    fields = FORMATS[kind].fields(shape)
    return FORMATS[kind].over({k: torch.zeros(s, dtype=d, device=device) for k, (d, s) in fields.items()})


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


def make_optimizer(
    config: Config, units: Units, rooms: Rooms = ROOMS, on_host: Collection[str] = ()
) -> Optimizer:
    """The optimizer of a config, with state for the units."""
    optimizer = optimizer_of(config)
    optimizer.attach(units.values(), rooms, on_host)
    return optimizer


def dense_copy(units: Units) -> dict[str, Tensor]:
    return {n: s.dense(torch.float64).clone() for unit in units.values() for n, s in unit.weights.items()}


class Recorder:
    """Replaces an optimizer: keeps the gradients and changes nothing."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.accepted: dict[str, bool] = {}

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        assert {spec.name for spec in unit.spec.trained} == grads.keys()
        self.accepted[unit.spec.name] = bool(accepted)
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


def lowres_here(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Like `lowres`, but in this process, which saves the seconds to import torch. If the process itself is
    tested (signals, environment, memory), use `lowres`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = main([*map(str, arguments)])
    assert found == code, f"{arguments}\nexit {found}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess([*map(str, arguments)], found, out.getvalue(), err.getvalue())


def train_and_kill(arguments: list[object], after: int) -> None:
    """Train in another process, which is killed without warning when it has logged a step and written the
    checkpoints before it."""
    # a fork saves the seconds to import torch, but CUDA does not survive it
    how: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    # as many threads as this process, because its results are compared with results of this process
    command, threads = ["train", *map(str, arguments)], torch.get_num_threads()
    process = how.Process(target=_train_until, args=(command, after, threads))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # pytest has threads, which the child does not use
        process.start()
    process.join(600)
    ended, _ = process.exitcode, process.kill()
    assert ended == -signal.SIGKILL, f"it ended with {ended} before it could be killed"


def _train_until(command: list[str], after: int, threads: int) -> None:
    write = MetricsLog.write

    def write_and_die(log: MetricsLog, record: dict[str, Any]) -> None:
        write(log, record)
        if record["step"] >= after:
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint "):
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(threads)
    tqdm.set_lock(
        threading.RLock()
    )  # the default is shared with the parent, and a kill would leave it locked
    with mock.patch.object(MetricsLog, "write", write_and_die):
        sys.exit(main(command))


RELORA = {"enabled": True, "rank": 4, "alpha": 8.0, "cycle_steps": 3, "rewarmup_steps": 1}


def with_adapters(config: Config, micro_batch: int = 3, band: int = 1) -> tuple[Units, Relora, Engine]:
    kept = config.memory
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, ROOMS, adapters=config.relora)
    relora = Relora(config.relora, make_optimizer(config, units))
    initialize(units.values(), config.run.seed, ROOMS.device)
    return units, relora, make_engine(config, units, relora, ROOMS, Choice(micro_batch, band))


def relora_config(weights: str = "fp32", engine: str = "layerwise", **more: Any) -> Config:
    """more: section__key=value."""
    sections: dict[str, dict[str, Any]] = {
        "relora": dict(RELORA),
        "memory": {"weights": weights, "engine": engine},
        "optim": {"name": "adamw", "lr": 0.01},
    }
    for key, value in more.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    return make_config(**sections)


def save_checkpoint(
    checkpoints: Path, step: int, units: Iterable[tuple[str, Mapping[str, Tensor]]], keep: int = 0
) -> Path:
    """Write a checkpoint, and delete what the rule does not keep; earlier ones count as good."""
    good = {at for path in checkpoint.find(checkpoints) if (at := checkpoint.step_of(path)) is not None}
    kept = checkpoint.Kept(checkpoints, keep, good=good)
    place = kept.make_way(step)
    checkpoint.write(
        place,
        units,
        checkpoint.State(step=step, tokens=step * 10, data="", start=checkpoint.Start(batch_tokens=1)),
        {},
    )
    kept.add(step)
    return place


def stored_tensors(units: Units) -> dict[str, Tensor]:
    return {n: t.clone() for unit in units.values() for n, t in unit.tensors().items()}


def weights_by_unit(units: Units) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and stored weights of each unit."""
    return ((name, unit.weight_tensors()) for name, unit in units.items())


def save_run(
    folder: Path, config: Config, units: Iterable[tuple[str, Mapping[str, Tensor]]], step: int = 3
) -> Path:
    """A run that has these weights at a step, and neither data nor optimizer state; returns its folder."""
    state = checkpoint.State(
        step=step,
        tokens=step * config.train.batch_tokens,
        data="",
        start=checkpoint.Start(batch_tokens=config.train.batch_tokens),
        config=to_values(config),
    )
    checkpoint.write(checkpoint.step_folder(folder / CHECKPOINTS, step), units, state, {})
    (folder / CONFIG).write_text(to_toml(config))
    return folder
