"""From text to chats to preferences: one model, three runs."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lowres import checkpoint, metrics, samples
from lowres.baseline import key_of
from lowres.data import ChatData
from tests.helpers import CPU, lowres_here, make_config, make_units

WORDS = ("red", "blue", "green", "small", "large", "old", "new", "cold", "warm", "dark")
MODEL = {"dim": 48, "n_layers": 2, "n_heads": 2, "ffn_dim": 96}


def toml(path: Path, **sections: Any) -> Path:
    common: dict[str, Any] = {
        "run": {"device": "cpu"},
        "memory": {"weights": "fp32", "compute": "fp32"},
        "optim": {"name": "adamw", "lr": 0.01},
        "log": {"progress": False, "sample_tokens": 0},
    }
    data = {"seq_len": 48, "cache": str(path.parent / "cache")} | sections.pop("data")
    lines = []
    for section, keys in (common | sections | {"data": data}).items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines))
    return path


def instruction(draw: random.Random) -> tuple[str, str, str]:
    """A question, its answer, and a wrong one."""
    first, second = draw.sample(WORDS, 2)
    return f"say {first} then {second}", f"{first} {second}", f"{second} {first}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices((*WORDS, "say", "then"), k=12)) for _ in range(4000))
    (folder / "text.txt").write_text(text)
    rows = [instruction(draw) for _ in range(400)]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a, _ in rows
    ]
    pairs = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in rows]
    for name, found in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    base = toml(
        folder / "base.toml",
        model=MODEL | {"vocab_size": 300},
        data={"source": str(folder / "text.txt")},
        train={"batch_tokens": 16 * 48, "steps": 40, "eval_every": 0},
    )
    lowres_here("train", base, "--run", folder / "base")
    return folder


def last(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def said_by_steps(run: Path) -> list[list[float]]:
    keys = ("step", "loss", "margin", "reward_chosen", "drift")
    return [[one[k] for k in keys] for one in metrics.read(run / "metrics.jsonl") if "margin" in one]


def test_instructions_then_preferences(world: Path) -> None:
    sft = toml(
        world / "sft.toml",
        data={"source": str(world / "chats.jsonl"), "chat_template": "tulu"},
        objective={"name": "sft"},
        schedule={"name": "linear", "warmup_ratio": 0.1, "min_ratio": 0.0},
        train={"batch_tokens": 16 * 48, "epochs": 4.0, "eval_every": 50, "sample_every": 50},
        log={"progress": False, "sample_tokens": 12, "sample_prompt": "say red then cold"},
    )
    lowres_here("train", sft, "--init-from", world / "base", "--run", world / "sft")
    tuned = last(world / "sft")
    assert 4 * 300 / 16 <= tuned["step"] <= 4 * 400 / 16
    assert tuned["val_loss"] < 0.5 * tuned["first_val_loss"]
    assert 0 < tuned["padding"] < 0.5 and 0 < tuned["targets"] < 16 * 48
    question = ("--chat", "--prompt", "say red then cold", "--tokens", 12)
    asked = lowres_here("sample", world / "sft", *question).stdout
    written = samples.read(world / "sft" / "samples.jsonl")
    assert asked.strip() and written[-1]["text"] == asked.strip()
    assert [one["step"] for one in written] == [*range(0, tuned["step"], 50), tuned["step"]]

    dpo = toml(
        world / "dpo.toml",
        data={"source": str(world / "pairs.jsonl"), "chat_template": "tulu"},
        objective={"name": "dpo"},
        optim={"name": "adamw", "lr": 0.003},
        schedule={"name": "linear", "warmup_ratio": 0.1, "min_ratio": 0.0},
        train={"batch_tokens": 8 * 48, "steps": 60, "eval_every": 60, "checkpoint_every": 40},
    )
    run = world / "dpo"
    lowres_here("train", dpo, "--init-from", world / "sft", "--run", run)
    records = metrics.read(run / "metrics.jsonl")
    first, end = (next(r for r in rows if "val_loss" in r) for rows in (records, records[::-1]))
    # the reference is the model itself
    assert first["val_loss"] == pytest.approx(0.6931, abs=1e-3) and first["val_margin"] == pytest.approx(
        0, abs=1e-3
    )
    assert end["val_accuracy"] > 0.8 and end["val_loss"] < first["val_loss"]
    steps = [
        (r["step"], r["loss"], r["margin"], r["reward_chosen"], r["drift"]) for r in records if "margin" in r
    ]
    assert len(steps) == 60

    # what the model before thought is not computed again, and is the same if it is lost
    shutil.rmtree(checkpoint.step_folder(run / "checkpoints", 60))
    kept = (run / "baseline.json").read_bytes()
    (run / "baseline.json").write_bytes(kept[:-9])
    for path in (world / "cache").glob("baseline-*"):
        path.unlink()
    lowres_here("train", dpo, "--run", run, "--resume")
    assert (run / "baseline.json").read_bytes() == kept
    records = metrics.read(run / "metrics.jsonl")
    again = [
        (r["step"], r["loss"], r["margin"], r["reward_chosen"], r["drift"]) for r in records if "margin" in r
    ]
    assert again == steps


def test_a_baseline_is_kept_for_one_model_and_arithmetic() -> None:
    units = make_units(make_config().model).values()
    data = cast(ChatData, SimpleNamespace(fingerprint="a", validation_fingerprint="b", seq_len=32))

    def place(**changed: dict[str, Any]) -> str:
        return key_of(make_config(**changed), CPU, units, data)

    assert place(optim={"lr": 0.5}) == place()
    others: list[dict[str, Any]] = [
        {"model": {"rope_theta": 500.0}},
        {"model": {"norm_eps": 1e-3}},
        {"memory": {"compute": "bf16"}},
        {"memory": {"stash_dtype": "int8"}},
    ]
    assert len({place(), *(place(**changed) for changed in others)}) == 1 + len(others)
