"""ReLoRA for a user: plans, runs of two parts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lowres import memory
from lowres.cli import main
from lowres.config_file import load_config
from lowres.engine import Choice, make_engine
from lowres.exchange import initialize_from, open_model
from lowres.model import empty_units
from lowres.runs import open_run
from tests.helpers import ROOMS, lowres_here, make_batch, make_config, train_and_kill


def test_7b_with_rank_128_fits_its_card() -> None:
    config, _ = load_config("configs/relora_7b_24gb.toml")
    plans = memory.make_plans(config, torch.device("cuda"))
    assert list(plans) == ["warm start", "adapters"] and not any(p.problems for p in plans.values())
    adapters = plans["adapters"].size("adapters: fp32")
    assert adapters == pytest.approx(4 * 128 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)), rel=1e-3)


TRAINED = {
    "relora.enabled": "true",
    "relora.rank": "4",
    "relora.start_step": "2",
    "relora.cycle_steps": "3",
    "relora.rewarmup_steps": "1",
    "relora.log_rank": "true",
    "relora.dropout": "0.1",
    "train.steps": "9",
    "data.seq_len": "16",
    "data.vocab_size": "300",
    "train.batch_tokens": "64",
    "train.eval_every": "3",
    "train.checkpoint_every": "1",
    "train.keep_checkpoints": "0",
    "model.dim": "32",
    "model.n_layers": "2",
    "model.n_heads": "2",
    "model.ffn_dim": "64",
    "log.sample_tokens": "0",
}


def options_in(folder: Path, **changed: str) -> list[str]:
    """A config with its `--set` options, on its own text. changed: section__key=value."""
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 400)
    (folder / "c.toml").write_text("")
    keys = TRAINED | {"data.source": str(folder / "text.txt"), "data.cache": str(folder / "cache")}
    keys |= {key.replace("__", "."): value for key, value in changed.items()}
    return [str(folder / "c.toml"), *(part for key in keys for part in ("--set", f"{key}={keys[key]}"))]


def comparable(run: Path) -> list[tuple[object, ...]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("val_loss"), r.get("merge_norm")) for r in found]


def last_weights(run: Path) -> dict[str, bytes]:
    last = max((run / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def test_a_run_resumes_in_every_part(tmp_path: Path) -> None:
    options, run = options_in(tmp_path), tmp_path / "run"
    lowres_here("train", *options, "--run", run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "merge_cosine" in r] == [5, 8]
    assert all("effective_rank" in r for r in records if "merge_cosine" in r)

    for stop in (2, 5, 6):  # where adapters start, on a merge, inside a cycle
        again = tmp_path / f"again{stop}"
        shutil.copytree(run, again)
        (again / "summary.json").unlink()
        for folder in (again / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step_")) > stop:
                shutil.rmtree(folder)
        lowres_here("train", *options, "--run", again, "--resume")
        assert comparable(again) == comparable(run) and last_weights(again) == last_weights(run)

    scores = json.loads(lowres_here("eval", run, "--json").stdout)
    assert scores["val_loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-6)
    # sampling and evaluation use the adapters: the result equals that of a copy with merged adapters
    config, engine, _ = open_run(run)
    merged = empty_units(config.model, "fp32", "fp32", ROOMS)
    initialize_from(merged.values(), open_model(run))
    plain = make_engine(make_config(model=config.model.model_dump()), merged, None, ROOMS, Choice(4))
    tokens = make_batch(3, 16)[:, :-1]
    torch.testing.assert_close(engine.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-5)
    # and so does another run that starts from this one
    warm = options_in(tmp_path, relora__enabled="false", memory__weights="fp32", memory__embeddings="bf16")
    lowres_here("train", *warm, "--run", tmp_path / "warm", "--init-from", run)
    first = json.loads((tmp_path / "warm" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-5)


def test_a_run_killed_three_times_is_the_same_run(tmp_path: Path) -> None:
    """In the first cycle, after a merge and inside a later cycle, with low-precision state."""
    options = options_in(
        tmp_path,
        relora__start_step="6",
        relora__cycle_steps="6",
        relora__reset="random",
        relora__log_rank="false",
        memory__moments="bf16",
        optim__name="adamw",
        train__steps="30",
        train__checkpoint_every="4",
        train__eval_every="10",
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    lowres_here("train", *options, "--run", straight)
    resume: list[str] = []
    # the last checkpoint is of the warm start's end, on a merge, inside a cycle
    for after, saved in ((7, 6), (13, 12), (22, 20)):
        train_and_kill([*options, "--run", broken, *resume], after)
        assert max(path.name for path in (broken / "checkpoints").iterdir()) == f"step_{saved:08}"
        resume = ["--resume"]
    lowres_here("train", *options, "--run", broken, "--resume")
    assert comparable(broken) == comparable(straight) and last_weights(broken) == last_weights(straight)


def test_what_does_not_fit_another_run_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, run, other = options_in(tmp_path, train__steps="3"), tmp_path / "run", tmp_path / "other"
    assert main(["train", *options, "--run", str(run)]) == 0
    shape = ["--set", "model.ffn_dim=96", "--run", str(other), "--init-from", str(run)]
    assert main(["train", *options, *shape]) == 2
    assert "model.ffn_dim: 96 here" in capsys.readouterr().err and not other.exists()
    longer = ["--set", "train.steps=4", "--set", "relora.cycle_steps=4", "--run", str(run), "--resume"]
    assert main(["train", *options, *longer]) == 2
    assert "relora.cycle_steps: the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, text",
    [
        ("relora.rank=0", "relora.rank: Input should be"),
        ("relora.rewarmup_steps=2000", "relora.rewarmup_steps: 2000 steps fill the whole cycle of 3"),
        ("relora.rewarmup_steps=0", "relora.rewarmup_steps: Input should be"),
        ("relora.cycle_steps=-1", "relora.cycle_steps: Input should be"),
        ("relora.start_step=-1", "relora.start_step: Input should be"),
        ("relora.reset_keep=1", "relora.reset_keep: Input should be"),
        ("relora.dropout=1", "relora.dropout: Input should be"),
        (
            'relora.targets=["z"]',
            "relora.targets: Input should be 'q', 'k', 'v', 'o', 'gate', 'up' or 'down'",
        ),
        ('relora.targets=["q", "q"]', "relora.targets: name at least one matrix, and none twice"),
        ("relora.targets=[]", "relora.targets: name at least one matrix"),
    ],
)
def test_bad_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, text: str
) -> None:
    assert main(["plan", *options_in(tmp_path), "--set", key]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "key, text",
    [
        ("relora.start_step=9", "relora.start_step 9 is not before the end of the run"),
        ("relora.cycle_steps=8", "the run ends before the first merge"),
        ("relora.rank=64", "relora.rank 64 is larger than the smaller side of some matrices; their rank is"),
        ("schedule.name=cosine", "schedule.name cosine has no warm-up after a merge"),
        ("schedule.cycle_steps=5", "schedule.cycle_steps is not used; relora.cycle_steps replaces it"),
    ],
)
def test_doubtful_settings_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, text: str
) -> None:
    assert main(["plan", *options_in(tmp_path), "--set", key]) == 0
    assert text in capsys.readouterr().err


def test_the_plan_shows_what_each_part_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_in(tmp_path, relora__lr_factor="3", optim__lr="0.01", relora__log_rank="false")
    assert main(["plan", *options, "--optimizer", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert list(parts) == ["warm start", "adapters"]
    first, second = ({row["role"]: row for row in part["optimizer"]} for part in parts.values())
    assert first["q"]["lr"] == 0.01 and "q.lora_a" not in first
    assert second["q"] | {"optimizer": "frozen", "lr": 0.0, "state": "none", "state_bytes": 0} == second["q"]
    assert second["q.lora_a"]["lr"] == second["q.lora_b"]["lr"] == pytest.approx(0.03)
    assert second["embedding"] == first["embedding"] and second["norm"] == first["norm"]
    for part in parts.values():  # all of the state, except the counts of updates
        state = sum(c["bytes"] for c in part["components"] if c["name"] == "optimizer state")
        counts = state - sum(row["tensors"] * row["state_bytes"] for row in part["optimizer"])
        assert 0 < counts <= 2 * 256 * 10
    assert main(["plan", *options, "--optimizer"]) == 0
    printed = capsys.readouterr().out
    assert "--- warm start ---" in printed and "--- adapters ---" in printed and " frozen " in printed
    assert main(["plan", *options, "--probe"]) == 2
    assert "--probe: it measures no adapters" in capsys.readouterr().err
