"""A run whose batch or length changes on resume: the data, the learning rate, the cooldown."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lowres import metrics
from lowres.cli import main
from lowres.data import TokenData

FEW = [
    "--set",
    "train.eval_every=0",
    "--set",
    "train.checkpoint_every=4",
    "--set",
    "train.keep_checkpoints=0",
]


def train(*arguments: object, code: int = 0) -> None:
    """As `lowres train`, in this process."""
    assert main(["train", *map(str, arguments)]) == code


def of_steps(run: Path, *keys: str) -> list[list[float]]:
    return [[r[k] for k in keys] for r in metrics.read(run / "metrics.jsonl") if "loss" in r]


def test_an_offset_moves_the_sequences(prepared: Path) -> None:
    data = TokenData(prepared, seq_len=64, seed=0)
    straight = data.batch(0, 80)
    # 3 steps of 16 sequences, then 2 of 8 and 1 of 16
    parts = [data.batch(step, 16) for step in range(3)]
    parts += [data.batch(step, 8, offset=3 * 16 - 3 * 8) for step in (3, 4)]
    parts += [data.batch(5, 16, offset=3 * 16 + 2 * 8 - 5 * 16)]
    assert torch.equal(torch.cat(parts), straight)


@pytest.mark.parametrize("policy, factor", [("linear", 2.0), ("sqrt", 2**0.5), ("fixed", 1.0)])
def test_a_batch_that_changes_on_resume(
    config: Path, tmp_path: Path, policy: str, factor: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every token once, the rate by the policy, the same however often it is resumed."""
    run = tmp_path / "run"
    options: list[object] = [config, *FEW, "--run", run, "--set", f"optim.batch_policy={policy}"]
    options += ["--set", "schedule.name=constant", "--set", "schedule.warmup_steps=0"]
    train(*options, "--set", "train.steps=4")
    shutil.copytree(run, tmp_path / "copy")

    # by --set, which the file's policy follows ...
    larger = ["--set", "train.batch_tokens=2048", "--resume"]
    capfd.readouterr()
    train(*options, *larger, "--set", "train.steps=12")
    error = capfd.readouterr().err
    assert "note: the batch goes from 16 to 32 sequences" in error
    assert f"optim.batch_policy is {policy}" in error
    assert [tokens for (tokens,) in of_steps(run, "tokens")] == [1024 * s for s in (1, 2, 3, 4)] + [
        4096 + 2048 * s for s in range(1, 9)
    ]
    rates = of_steps(run, "lr", "lr_over_batch")
    assert rates[3] == [0.01, 0.01 / 16]
    assert rates[4] == rates[11] == pytest.approx([0.01 * factor, 0.01 * factor / 32])
    batch = json.loads((run / "summary.json").read_text())["batch"]
    assert batch["policy"] == policy and batch["tokens"] == 2048 and batch["sequences"] == 32
    assert batch["started_with"] == {"batch_tokens": 1024, "lr": 0.01, "embed_lr": None, "norm_lr": None}

    # ... or by hand, with a stop on the way: the same run
    again = tmp_path / "copy"
    by_hand = tmp_path / "by_hand.toml"
    by_hand.write_text(config.read_text().replace("batch_tokens = 1024", "batch_tokens = 2048"))
    options[0], options[options.index(run)] = by_hand, again
    train(*options, "--set", "train.steps=9", "--resume")
    train(*options, "--set", "train.steps=12", "--resume")
    assert of_steps(again, "step", "tokens", "loss", "lr") == of_steps(run, "step", "tokens", "loss", "lr")

    # and back
    options[0] = config
    train(*options, "--set", "train.steps=13", "--resume")
    assert of_steps(again, "tokens", "lr")[-1] == [4096 + 8 * 2048 + 1024, 0.01]


def test_the_length_in_tokens_holds_when_the_batch_changes(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options: list[object] = [config, *FEW, "--run", run]
    train(*options, "--set", "train.steps=4")
    longer = ["--set", "train.tokens=8192", "--set", "train.batch_tokens=2048", "--resume"]
    train(*options, *longer)
    assert [step for (step,) in of_steps(run, "step")] == [1, 2, 3, 4, 5, 6]
    assert of_steps(run, "tokens")[-1] == [8192]
    train(*options, *longer)
    assert "is finished" in capfd.readouterr().out


def test_another_rate_is_a_new_start(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither that of the start nor the one that follows from the batch."""
    run = tmp_path / "run"
    options: list[object] = [config, *FEW, "--run", run]
    train(*options, "--set", "train.steps=2")
    changed = ["--set", "train.batch_tokens=2048", "--set", "optim.lr=0.03", "--set", "train.steps=4"]
    capfd.readouterr()
    train(*options, *changed, "--resume")
    assert "note: optim.lr: 0.01 -> 0.03 from step 2 on" in capfd.readouterr().err


def test_a_cooldown_from_any_checkpoint(config: Path, tmp_path: Path) -> None:
    """WSD: branches of one trunk, and the trunk goes on."""
    trunk = tmp_path / "trunk"
    wsd = ["--set", "schedule.name=wsd", "--set", "schedule.warmup_steps=0", "--set", "schedule.min_ratio=0"]
    wsd += ["--set", "schedule.cooldown_steps=0"]
    options: list[object] = [config, *FEW, *wsd]
    train(*options, "--set", "train.steps=12", "--run", trunk)
    assert {lr for (lr,) in of_steps(trunk, "lr")} == {0.01}
    for at in (4, 8):
        branch = tmp_path / f"branch-{at}"
        (branch / "checkpoints").mkdir(parents=True)
        shutil.copy(trunk / "config.toml", branch)
        shutil.copy(trunk / "metrics.jsonl", branch)
        step = Path("checkpoints") / f"step_{at:08}"
        shutil.copytree(trunk / step, branch / step)
        cooldown = ["--set", f"train.steps={at + 4}", "--set", "schedule.cooldown_steps=4"]
        train(*options, *cooldown, "--run", branch, "--resume")
        rates = [lr for (lr,) in of_steps(branch, "lr")]
        assert rates == pytest.approx([0.01] * at + [0.01, 0.0075, 0.005, 0.0025])
        # the same as if it had been planned
        assert of_steps(branch, "step", "loss")[: at + 1] == of_steps(trunk, "step", "loss")[: at + 1]
        straight = tmp_path / f"straight-{at}"
        train(*options, *cooldown, "--run", straight)
        assert of_steps(branch, "step", "loss", "lr") == of_steps(straight, "step", "loss", "lr")
    train(*options, "--set", "train.steps=14", "--run", trunk, "--resume")
    assert len(of_steps(trunk, "lr")) == 14
