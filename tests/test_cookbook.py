"""The figures of docs/cookbook.md are those that `lowres plan --card` prints."""

from __future__ import annotations

import tomllib
from typing import Any

import torch

from lowres import pace
from lowres.catalogue import CARDS
from lowres.config import Config
from lowres.config_file import load_config, parse_config
from lowres.memory import GIB, make_plan
from lowres.probe.forecast import for_card
from lowres.probe.roofline import estimate
from tests.documented import HERE, blocks

PAGE = (HERE / "docs" / "cookbook.md").read_text("utf-8")
# what --init-from reads of the models that the page downloads
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-360M": {
        "dim": 960,
        "n_layers": 32,
        "n_heads": 15,
        "n_kv_heads": 5,
        "ffn_dim": 2560,
        "vocab_size": 49152,
        "tie_embeddings": True,
        "max_positions": 8192,
        "rope_theta": 100000.0,
    },
    "Qwen2.5-7B": {
        "dim": 3584,
        "n_layers": 28,
        "n_heads": 28,
        "n_kv_heads": 4,
        "ffn_dim": 18944,
        "vocab_size": 152064,
        "qkv_bias": True,
        "max_positions": 131072,
        "rope_theta": 1000000.0,
    },
}


def begun(name: str) -> Config:
    """The config of a block, with the model that it begins with."""
    (text,) = (block.text for block in blocks("cookbook", PAGE) if block.name == name)
    values = tomllib.loads(text)
    return parse_config(values | {"model": MODELS[values["run"].pop("init_from")]})[0]


def from_nothing() -> Config:
    keys = [
        "model.preset=60m",
        "data.vocab_size=16000",
        "train.batch_tokens=32768",
        "train.tokens=800_000_000",
    ]
    return load_config(HERE / "configs" / "llama_1b_8gb.toml", keys)[0].with_vocab(16000)


def planned(config: Config, card: str, compute: str) -> tuple[float, float, float, float]:
    """GiB of the GPU and of the host, tokens/s, seconds of a step."""
    config, name = for_card(config, card)
    config = config.model_copy(update={"memory": config.memory.model_copy(update={"compute": compute})})
    plan = make_plan(config, torch.device("cuda"))
    assert not plan.problems
    found = estimate(config, plan, CARDS[name])
    return plan.peak("gpu") / GIB, plan.peak("host") / GIB, found.tokens_per_s, found.step_s


def rows(section: str) -> dict[str, str]:
    """The rows of two columns in a section."""
    own = PAGE[PAGE.index(f"\n## {section}") :].split("\n## ")[1]
    lines = (line.strip("| ").split(" | ") for line in own.splitlines() if line.startswith("| "))
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_a_model_of_my_own_text() -> None:
    config, found = from_nothing(), rows("1.")
    fast, slow = (planned(config, "RTX 4060", compute) for compute in ("auto", "bf16"))
    assert found["GPU memory"] == f"{fast[0]:.1f} GiB of 6.5"
    assert found["tokens/s"] == f"{pace.count(fast[2])} to {pace.count(slow[2])}"
    ends = (pace.in_words(800e6 / rate) for rate in (fast[2], slow[2]))
    assert found["the run, 800 M tokens"] == " to ".join(ends)


def test_smollm2() -> None:
    config, found = begun("law.toml"), rows("2.")
    gpu, host, rate, _ = planned(config, "RTX 4060", "bf16")
    assert found["GPU and host memory"] == f"{gpu:.1f} and {host:.1f} GiB"
    assert found["tokens/s"].startswith(f"{pace.count(rate)} (")
    assert found["the run, 200 M tokens"] == pace.in_words(200e6 / rate)


def test_seven_billion() -> None:
    config, found = begun("sft.toml"), rows("3.")
    fast, slow = (planned(config, "RTX 4070", compute) for compute in ("auto", "bf16"))
    assert found["GPU and host memory"] == f"{fast[0]:.1f} and {fast[1]:.1f} GiB"
    assert found["tokens/s"] == f"{pace.count(fast[2])} to {pace.count(slow[2])}"
    assert found["a step of 32 full chats"] == f"{fast[3]:.0f} to {slow[3]:.0f} s"
    ends = (pace.in_words(10e6 / rate) for rate in (fast[2], slow[2]))
    assert found["10,000 chats of 500 tokens, twice: 10 M tokens"] == " to ".join(ends)
