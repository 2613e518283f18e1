"""What a resumed run accepts, refuses, finds and keeps."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowres import checkpoint, disk, events, metrics, samples
from lowres.engine.layerwise import LayerwiseEngine
from lowres.records import SAMPLES
from lowres.trainer import MOST_ROLLBACKS
from tests.helpers import lowres_here

SHORT = ["--set", "train.steps=8", "--set", "train.eval_every=0", "--set", "train.checkpoint_every=3"]


def trained(config: Path, run: Path, *options: object, code: int = 0) -> Any:
    return lowres_here("train", config, *SHORT, "--run", run, *options, code=code)


def tensors_of(run: Path) -> dict[str, bytes]:
    folder = checkpoint.find(run / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(run / "metrics.jsonl") if "loss" in record]


@pytest.fixture
def straight(config: Path, tmp_path: Path) -> Path:
    run = tmp_path / "straight"
    trained(config, run, "--set", "train.keep_checkpoints=0")
    return run


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """As a kill after step 7 leaves it."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:7]))
    return run


def same(run: Path, straight: Path) -> None:
    assert tensors_of(run) == tensors_of(straight) and losses(run) == losses(straight)


@pytest.mark.parametrize("content", ["", "x", "[model]\ndim = 32\n", None])
def test_the_config_of_the_checkpoint_counts(
    config: Path, stopped: Path, straight: Path, content: str | None
) -> None:
    """Whatever happened to config.toml, and to the tokenizer beside it."""
    (stopped / "tokenizer.model").write_bytes(b"damaged")
    if content is None:
        (stopped / "config.toml").unlink()
    else:
        (stopped / "config.toml").write_text(content)
    lowres_here("eval", stopped)
    trained(config, stopped, "--resume")
    same(stopped, straight)


def test_without_a_checkpoint_a_damaged_config_is_named(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    refused = trained(config, run, "--resume", code=2).stderr
    assert "config.toml" in refused and "it has no [run]" in refused and len(refused.splitlines()) == 1


def test_damage_is_set_aside_and_nothing_starts_over(config: Path, stopped: Path, straight: Path) -> None:
    newest, older = (stopped / "checkpoints" / f"step_0000000{step}" for step in (6, 3))
    (newest / "state.json").unlink()
    done = trained(config, stopped, "--resume")
    assert f"{newest} is damaged (state.json is missing)" in done.stderr
    assert "at step 3" in done.stderr and newest.with_name("step_00000006.damaged").exists()
    assert any(event["event"] == "set aside" for event in events.read(stopped))
    same(stopped, straight)
    # all of them
    for folder in checkpoint.find(stopped / "checkpoints"):
        (folder / "manifest.json").write_text("{}")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    refused = trained(config, stopped, "--resume", "--set", "train.steps=9", code=2).stderr
    assert "trained to step 8" in refused and "manifest.json" in refused and "--restart" in refused
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert not older.exists()
    trained(config, stopped, "--restart")
    same(stopped, straight)
    kept = {p.relative_to(stopped): c for p, c in before.items()}
    assert {Path("old-1") / p: c for p, c in kept.items()}.items() <= {
        p.relative_to(stopped): p.read_bytes() for p in stopped.rglob("*") if p.is_file()
    }.items()


def test_a_branch_of_links_leaves_the_other_run_alone(config: Path, straight: Path, tmp_path: Path) -> None:
    branch, before = tmp_path / "branch", {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()}
    (branch / "checkpoints").mkdir(parents=True)
    (branch / "checkpoints" / "step_00000006").symlink_to(straight / "checkpoints" / "step_00000006")
    shutil.copy(straight / "metrics.jsonl", branch)
    trained(config, branch, "--resume", "--set", "train.keep_checkpoints=1", "--set", "train.steps=12")
    assert losses(branch)[:6] == losses(straight)[:6]
    assert before == {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()}


def test_the_data_may_be_elsewhere(
    prepared: Path,
    config: Path,
    stopped: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(prepared, copy)
    trained(config, stopped, "--resume", "--set", f"data.source={copy}")
    same(stopped, straight)
    # a relative path works from any folder
    run, here, there = tmp_path / "relative", copy.parent, tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(here)
    trained(config, run, "--set", "data.source=copy", "--set", "train.steps=5")
    monkeypatch.chdir(there)
    trained(config, run, "--set", "data.source=copy", "--resume")
    assert len(losses(run)) == 8
    (copy / "val_00000.bin").rename(tmp_path / "val")
    more = ["--set", "train.steps=9", "--set", "data.source=copy", "--resume"]
    assert f"{copy}/val_00000.bin" in trained(config, run, *more, code=2).stderr


def test_rates_and_limits_may_change_on_purpose(config: Path, stopped: Path, straight: Path) -> None:
    changes = ["--set", "optim.lr=0.003", "--set", "optim.limiter=0", "--set", "optim.grad_clip=0.5"]
    said = trained(config, stopped, "--resume", *changes).stderr
    for change in ("optim.lr: 0.01 -> 0.003", "optim.limiter: 1.01 -> 0.0", "optim.grad_clip: 0.0 -> 0.5"):
        assert f"note: {change} from step 6 on" in said
    started = [event for event in events.read(stopped) if event["event"] == "started"][-1]
    assert started["step"] == 6 and started["changed"]["optim.lr"] == {"before": 0.01, "after": 0.003}
    assert {"threads", "micro_batch", "torch", "processor"} <= started.keys()
    assert losses(stopped)[:7] == losses(straight)[:7] and losses(stopped)[7] != losses(straight)[7]
    # back again, with a limiter that has no state yet
    trained(config, stopped, "--resume", "--set", "train.steps=10", "--set", "optim.lr=0.003")


def test_a_record_that_the_disk_did_not_take_comes_back(
    config: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, append, left = tmp_path / "run", metrics.MetricsLog._append, [5]
    monkeypatch.setattr(disk, "PAUSES", ())

    def full(self: metrics.MetricsLog, text: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        append(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "_append", full)
        ended = trained(config, run, code=2).stderr.splitlines()[-1]
    assert f"{run}/metrics.jsonl" in ended and "make room" in ended and "Step 6 is saved" in ended
    assert len(losses(run)) == 5
    resumed = trained(config, run, "--resume")
    assert "missing" not in resumed.stderr
    same(run, straight)


SAMPLED = [
    "--set",
    "train.sample_every=2",
    "--set",
    "log.sample_tokens=5",
    "--set",
    'log.sample_prompt=["def ", "class "]',
]


def test_samples_are_kept_once(
    config: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends a run, and they change nothing else."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = trained(config, whole, *SAMPLED)
    wanted = (whole / SAMPLES).read_bytes()
    found = samples.read(whole / SAMPLES)
    assert [one["step"] for one in found] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert all(one["text"].startswith(one["prompt"]) for one in found)
    assert len({one["text"] for one in found}) > 5
    assert f"after 8 steps ---\n{found[-2]['text']}\n---\n{found[-1]['text']}\n---\n" in done.stdout
    assert f"step 2: wrote {found[2]['text']!r}" in done.stderr
    same(whole, straight)

    # a kill between the last samples and their checkpoint
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    (run / SAMPLES).write_bytes(wanted[:-9])
    trained(config, run, *SAMPLED, "--resume")
    assert (run / SAMPLES).read_bytes() == wanted
    same(run, straight)

    # a disk that is full when the samples of a step are written, or its metrics: then they are drawn later
    monkeypatch.setattr(disk, "PAUSES", ())
    for log, before in ((samples.SampleLog, 3), (metrics.MetricsLog, 5)):
        run, append, left = tmp_path / log.__name__, log._append, [before]

        def full(self: metrics.StepLog, text: bytes, append: Any = append, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            append(self, text)

        with monkeypatch.context() as patch:
            patch.setattr(log, "_append", full)
            assert "Step 6 is saved" in trained(config, run, *SAMPLED, code=2).stderr
        trained(config, run, *SAMPLED, "--resume")
        assert (run / SAMPLES).read_bytes() == wanted
        same(run, straight)


def test_what_cannot_be_saved_in_its_folder_is_saved_elsewhere(
    config: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rescue, step = tmp_path / "run", tmp_path / "rescue", LayerwiseEngine.step
    monkeypatch.setattr(disk, "PAUSES", ())

    def then_deleted(self: Any, batch: Any, at: int, *more: Any, **keys: Any) -> Any:
        if at == 4:
            shutil.rmtree(run)
        return step(self, batch, at, *more, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(LayerwiseEngine, "step", then_deleted)
        ended = trained(config, run, "--set", f"run.rescue={rescue}", code=2).stderr.splitlines()[-1]
    (place,) = rescue.iterdir()
    assert "put it back" in ended and str(place / "checkpoints" / "step_00000005") in ended
    assert not run.exists()
    # it is a run, and it goes on
    trained(config, place, "--resume")
    assert tensors_of(place) == tensors_of(straight)


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
def test_policies_on_a_poisoned_batch(
    policy: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch has a gradient a million times too large."""
    run, seen = tmp_path / "run", dict[str, Any]()
    step, head = LayerwiseEngine.step, LayerwiseEngine._loss_and_backward

    def watched(self: Any, batch: Any, at: int, *more: Any, **keys: Any) -> Any:
        seen.update(at=at, batch=batch)
        if at == 22 and "poisoned" not in seen:
            seen["poisoned"] = batch
        return step(self, batch, at, *more, **keys)

    def poisoned(self: Any, w: Any, kept: Any, targets: Any, count: Any) -> Any:
        factor = 1e6 if seen.get("poisoned") is not None and seen["batch"].equal(seen["poisoned"]) else 1.0
        return head(self, w, kept, targets, count / factor) / factor

    monkeypatch.setattr(LayerwiseEngine, "step", watched)
    monkeypatch.setattr(LayerwiseEngine, "_loss_and_backward", poisoned)
    options = [
        "--set",
        f"health.spikes={policy}",
        "--set",
        "train.steps=30",
        "--set",
        "train.checkpoint_every=5",
        "--set",
        "run.seed=1",  # without a spike of its own
    ]
    done = lowres_here("train", config, *options, "--run", run)
    found = [event for event in events.read(run) if event["event"] == "spike"]
    assert [event["step"] for event in found] == [23] and "gradient norm" in found[0]["text"]
    records = [record for record in metrics.read(run / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 31))
    assert [record["step"] for record in records if record["skipped"]] == ([23] if policy == "skip" else [])
    assert ("went back to step 20; the batch of step 23 is passed over" in done.stderr) == (
        policy == "rollback"
    )
    if policy == "rollback":
        state = checkpoint.load(checkpoint.find(run / "checkpoints")[-1])
        assert [(one.step, one.sequences) for one in state.passed] == [(22, 16)]
        # the place in the data is kept when the run goes on
        batches = []

        def recorded(self: Any, batch: Any, *more: Any, **keys: Any) -> Any:
            batches.append(batch)
            return step(self, batch, *more, **keys)

        monkeypatch.setattr(LayerwiseEngine, "step", recorded)
        lowres_here("train", config, *options, "--set", "train.steps=31", "--run", run, "--resume")
        straight = tmp_path / "straight"
        lowres_here("train", config, "--set", "run.seed=1", "--set", "train.steps=32", "--run", straight)
        assert batches[-33].equal(batches[-1])


def test_a_spike_that_is_not_in_the_data_ends_the_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, head, step, seen = tmp_path / "run", LayerwiseEngine._loss_and_backward, LayerwiseEngine.step, [0]

    def watched(self: Any, batch: Any, at: int, *more: Any, **keys: Any) -> Any:
        seen[0] = at
        return step(self, batch, at, *more, **keys)

    def poisoned(self: Any, w: Any, kept: Any, targets: Any, count: Any) -> Any:
        factor = 1e6 if seen[0] == 22 else 1.0
        return head(self, w, kept, targets, count / factor) / factor

    monkeypatch.setattr(LayerwiseEngine, "step", watched)
    monkeypatch.setattr(LayerwiseEngine, "_loss_and_backward", poisoned)
    ended = lowres_here("train", config, "--set", "health.spikes=rollback", "--run", run, code=1).stderr
    assert f"{MOST_ROLLBACKS + 1} different batches" in ended and "the checkpoint of step 20 is kept" in ended
    assert "health.spikes=warn" in ended
    assert checkpoint.verify(run / "checkpoints" / "step_00000020") == []


def test_a_dead_run_is_named_and_its_last_good_checkpoint_stays(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lowres_here("train", config, "--set", "train.steps=10", "--run", run)
    options = ["--set", "train.steps=100", "--set", "optim.lr=1e6", "--set", "health.patience=12"]
    ended = lowres_here("train", config, *options, "--run", run, "--resume", code=1).stderr.splitlines()[-1]
    assert "the run is dead: 12 bad steps in a row" in ended and "guessing evenly is 6.215" in ended
    assert "--resume and a lower optim.lr than 1e+06" in ended
    good = checkpoint.newest_valid(run / "checkpoints")[0]
    assert good is not None and json.loads((good / "state.json").read_text())["step"] < 20


@pytest.mark.parametrize(
    "name", ["events.jsonl", "loss.png", "summary.json", "metrics.jsonl", "tokenizer.model"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_something_else_in_the_place_of_a_file(
    name: str, kind: str, config: Path, stopped: Path, straight: Path
) -> None:
    """No waiting, and the weights are what counts."""
    path = stopped / name
    path.unlink(missing_ok=True)
    (os.mkfifo if kind == "pipe" else Path.mkdir)(path)
    needed = {"pipe": {"metrics.jsonl"}, "folder": {"metrics.jsonl", "tokenizer.model", "summary.json"}}[kind]
    done = trained(config, stopped, "--resume", code=2 if name in needed else 0)
    if name in needed:
        assert str(path) in done.stderr.splitlines()[-1]
        path.unlink() if kind == "pipe" else path.rmdir()
        trained(config, stopped, "--resume")
    assert tensors_of(stopped) == tensors_of(straight)


def test_a_finished_run_is_only_finished_with_its_last_checkpoint(config: Path, straight: Path) -> None:
    wanted, last = tensors_of(straight), straight / "checkpoints" / "step_00000008"
    keep = ["--set", "train.keep_checkpoints=0", "--resume"]
    assert "is finished" in trained(config, straight, *keep).stdout
    assert "has done 8 steps" in trained(config, straight, *keep, "--set", "train.steps=7", code=2).stderr
    refused = trained(config, straight, *keep, "--set", "data.seq_len=32", code=2).stderr
    assert "data.seq_len: the run in" in refused and "may not change on resume" in refused
    content = bytearray((last / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "head.safetensors").write_bytes(content)
    assert "continuing" in trained(config, straight, *keep).stderr
    assert tensors_of(straight) == wanted
    shutil.rmtree(straight / "checkpoints")
    assert "--restart" in trained(config, straight, *keep, code=2).stderr


def test_a_checkpoint_of_another_run_is_not_taken(
    config: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    trained(config, other, "--set", "optim.lr=0.003", "--set", "train.steps=7")
    shutil.copytree(other / "checkpoints" / "step_00000007", stopped / "checkpoints" / "step_00000007")
    done = trained(config, stopped, "--resume", "--set", "train.keep_checkpoints=0")
    assert "it is of another run" in done.stderr and "at step 6" in done.stderr
    same(stopped, straight)


@pytest.mark.parametrize("kind", ["link", "loop", "file"])
def test_a_place_for_checkpoints_that_is_none(config: Path, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    place = run / "checkpoints"
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to("/nonexistent/disk" if kind == "link" else "checkpoints")
    for options in ([], ["--resume"]):
        refused = trained(config, run, *options, code=2).stderr
        assert f"{place}" in refused and "is its disk mounted?" in refused
    assert list(run.iterdir()) == [place]


def test_what_a_restart_moves_aside_cannot_give_the_weights(config: Path, stopped: Path) -> None:
    before = sorted(stopped.rglob("*"))
    assert "--init-from" in trained(config, stopped, "--restart", "--init-from", stopped, code=2).stderr
    assert sorted(stopped.rglob("*")) == before


def test_a_ruined_start_pushes_out_no_checkpoint(config: Path, tmp_path: Path) -> None:
    """And the advice works."""
    run = tmp_path / "run"
    keys = ["train.steps=60", "health.patience=20", "train.checkpoint_every=2", "schedule.warmup_steps=5"]
    keys += ["optim.name=adamw", "train.eval_every=0", "memory.weights=fp32"]
    keys += ["run.seed=2"]  # it learns something before it is ruined
    options = [option for key in keys for option in ("--set", key)]
    ended = lowres_here("train", config, *options, "--set", "optim.lr=1.0", "--run", run, code=1).stderr
    kept = [checkpoint.step_of(path) for path in checkpoint.find(run / "checkpoints")]
    assert max(step or 0 for step in kept) <= 12
    assert f"the checkpoint of step {kept[-1]} is kept; go on from it with --resume and a lower" in ended
    lowres_here("train", config, *options, "--set", "optim.lr=0.001", "--run", run, "--restart")
