"""`lowres sweep`: the grid, its table and its pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lowres import metrics
from lowres.cli import main
from lowres.plots import _loss_axis, draw_loss, draw_sweep
from lowres.sweep import parse_grid, table
from tests.helpers import lowres_here

QUICK = ["--set", "train.checkpoint_every=2", "--set", "train.eval_tokens=256"]


def test_grid_syntax() -> None:
    assert parse_grid(["optim.lr=1e-3,0.003", "optim.name=adamw,apollo-mini"]) == {
        "optim.lr": [0.001, 0.003],
        "optim.name": ["adamw", "apollo-mini"],
    }
    assert parse_grid(["train.micro_batch=1,auto", "optim.betas=[0.9, 0.95],[0.9, 0.99]"]) == {
        "train.micro_batch": [1, "auto"],
        "optim.betas": [[0.9, 0.95], [0.9, 0.99]],
    }


BAD = {
    "no values": (["optim.lr="], "2048", "--grid optim.lr=: write it as section.key=value,value"),
    "no section": (["lr=1"], "2048", "--grid lr=1: write it as section.key=value,value"),
    "a hole": (["optim.lr=1,,2"], "2048", "--grid optim.lr=1,,2: a value is missing"),
    "twice": (["optim.lr=1", "optim.lr=2"], "2048", "optim.lr is given twice"),
    "same value": (["optim.lr=1,1"], "2048", "2 points are called lr-1"),
    "length": (
        ["train.steps=1,2"],
        "2048",
        "every point trains for --tokens or --epochs; leave train.steps out",
    ),
    "unknown key": (["optim.lrr=1,2"], "2048", "optim.lrr: unknown key; did you mean lr?"),
    "bad value": (["optim.lr=0.1,-1"], "2048", "optim.lr: Input should be greater than 0"),
    "bad batch": (
        ["optim.lr_over_batch=0.001,0.003", "optim.lr=0.01"],
        "2048",
        "train.batch_tokens: optim.lr 0.01 / optim.lr_over_batch 0.003 gives 3.33333 sequences",
    ),
    "too short": (
        ["train.batch_tokens=1024,4096"],
        "2048",
        "--tokens: 2048 is less than one step of 4096 tokens (train.batch_tokens)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids(case: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grids, tokens, message = BAD[case]
    out = tmp_path / "sweep"
    arguments = ["sweep", str(config), "--tokens", tokens, "--run", str(out)]
    assert main(arguments + [a for grid in grids for a in ("--grid", grid)]) == 2
    error = capfd.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "optim.lr=0.1", "--tokens", "2048", "--run", str(config)]
    assert main(["sweep", str(config), *grid]) == 2
    assert f"--run {config}: cannot be created (File exists); choose another folder" in capfd.readouterr().err


def test_a_sweep_from_nothing_to_pictures(config: Path, tmp_path: Path, points_here: None) -> None:
    """Two axes; one point fails, one was interrupted; then again, when all is mended."""
    out = tmp_path / "sweep"
    arguments: list[object] = ["sweep", config, "--tokens", 4096, "--run", out, *QUICK]
    arguments += ["--grid", "optim.lr=0.003,0.03", "--grid", "train.batch_tokens=1024,2048"]
    # a file where a folder should be: that point cannot be written
    broken = out / "lr-0.03_batch_tokens-2048" / "checkpoints"
    broken.parent.mkdir(parents=True)
    broken.write_text("")
    done = lowres_here(*arguments, code=1)
    assert "1 of 4 points failed" in done.stderr
    lines = done.stdout.splitlines()
    head = ["batch_tokens", "lr", "batch", "lr/batch", "bits/byte", "val", "loss", "perplexity", "tokens/s"]
    assert lines[0].split() == head
    assert len(lines) == 6 and "failed: " in lines[4]
    assert sum(line.endswith("best") for line in lines) == 1
    found = json.loads((out / "sweep.json").read_text())
    assert [point["error"] is None for point in found["points"]] == [True, True, True, False]
    assert found["tokens"] == 4096 and found["grid"]["train.batch_tokens"] == [1024, 2048]
    point = found["points"][1]
    assert point["values"] == {"optim.lr": 0.003, "train.batch_tokens": 2048}
    assert point["batch_sequences"] == 32 and point["steps"] == 2 and point["tokens"] == 4096
    assert point["lr"] == 0.003 and point["lr_over_batch"] == 0.003 / 32 and point["tokens_per_s"] > 0
    summary = json.loads((Path(point["run"]) / "summary.json").read_text())
    assert point["val_loss"] == summary["val_loss"] and point["val_ppl"] == summary["val_ppl"]
    for picture in ("loss.png", "lr_over_batch.png"):
        assert (out / picture).stat().st_size > 10_000

    # mended, and another point as if it had been killed before its last step was saved
    broken.unlink()
    stopped = out / "lr-0.003_batch_tokens-1024"
    (stopped / "summary.json").unlink()
    (stopped / "checkpoints" / "step_00000004" / "state.json").unlink()
    finished = out / "lr-0.003_batch_tokens-2048"
    before = (finished / "summary.json").stat().st_mtime_ns
    again = lowres_here(*arguments)
    assert "failed" not in again.stdout
    assert (finished / "summary.json").stat().st_mtime_ns == before
    assert "at step 2" in (stopped / "train.log").read_text()
    assert [r["step"] for r in metrics.read(stopped / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert all(point["error"] is None for point in points)
    assert points[0]["val_loss"] == found["points"][0]["val_loss"]

    # what is there was made with other settings
    for change in (["--tokens", 8192], ["--set", "run.seed=3"], ["--set", "schedule.cooldown_steps=1"]):
        refused = lowres_here(*arguments, *change, code=2)
        assert "was started with another" in refused.stderr and len(refused.stderr.splitlines()) == 1


def points_of(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    (first, firsts), (second, seconds) = axes.items()
    return [
        {
            "values": {first: x, second: y},
            "lr": 0.001 * (i + 1),
            "batch_sequences": 8,
            "lr_over_batch": 0.001 * (i + 1) / 8,
            "val_loss": None if (i, j) == (1, 1) else 3 + (i - 1) ** 2 + j * 0.1,
            "val_ppl": None if (i, j) == (1, 1) else 20.0,
            "tokens_per_s": 1000.0,
            "error": "out of memory" if (i, j) == (1, 1) else None,
        }
        for i, x in enumerate(firsts)
        for j, y in enumerate(seconds)
    ]


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    """matplotlib reads text between two dollars as mathematics, and refuses what it does not understand."""
    pytest.importorskip("matplotlib", reason="pip install lowres[plots]")
    folder = tmp_path / r"cost $\frac$ x"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 5.0}\n')
    assert draw_loss(folder) == folder / "loss.png"
    axes: dict[str, list[Any]] = {"optim.lr": [0.001, 0.01, 0.1], "run.seed": [0]}
    assert draw_sweep(folder, axes, points_of(axes)) == [folder / "loss.png", folder / "lr_over_batch.png"]


def test_pictures_and_table_of_other_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, list[Any]] = {"optim.lr": [0.001, 0.002, 0.003], "optim.name": ["adamw", "apollo-mini"]}
    both = [tmp_path / "loss.png", tmp_path / "lr_over_batch.png"]
    assert draw_sweep(tmp_path, names, points_of(names)) == both[1:]
    numbers: dict[str, list[Any]] = {"optim.lr": [0.001, 0.01, 0.1], "train.batch_tokens": [1024, 2048]}
    assert draw_sweep(tmp_path, numbers, points_of(numbers)) == both
    one: dict[str, list[Any]] = {"optim.lr": [0.001, 0.01, 0.1], "run.seed": [0]}
    assert draw_sweep(tmp_path, one, points_of(one)) == both
    failed = [point | {"val_loss": None} for point in points_of(one)]
    assert draw_sweep(tmp_path, one, failed) == []
    # one run that went wrong does not flatten the others
    figure = pytest.importorskip("matplotlib.figure").Figure
    for losses, top, label in (([3.0, 3.1, 3.2], 3.21, "token)"), ([3.0, 3.1, 60.0], 3.42, "60 outside")):
        plot = figure().subplots()
        plot.plot(losses)
        _loss_axis(plot, losses)
        assert plot.get_ylim()[1] == pytest.approx(top, abs=0.01) and label in plot.get_ylabel()
    diverged = [point | {"val_loss": None, "val_ppl": None, "error": None} for point in points_of(one)]
    assert all(line.endswith("diverged") for line in table(one, diverged).splitlines()[1:])
    shown = table(names, points_of(names)).splitlines()
    assert len(shown) == 7 and shown[4].endswith("failed: out of memory") and shown[3].endswith("best")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_sweep(tmp_path, one, points_of(one)) is None
