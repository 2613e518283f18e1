"""Trackers are told every step once, whatever happens to the run, and cannot hurt it."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lowres import metrics
from lowres.trackers import TRACKERS, Opening, Trackers
from lowres.trackers.base import Kind
from lowres.trackers.steps import KNOWN, named
from tests.helpers import lowres_here, train_and_kill

IDENTITY = "0123456789abcdef"


@dataclass
class Fake:
    """Remembers what it was told."""

    opening: Opening
    told: list[int] = field(default_factory=list)
    closed: bool = False
    fails_at: int = 1 << 60

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self.fails_at:
            raise RuntimeError("no connection")
        self.told.append(step)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Two kinds that are no package: one replaces what it has, the other does not."""
    made: list[Fake] = []

    def open_one(opening: Opening) -> Fake:
        made.append(Fake(opening))
        return made[-1]

    for name, replaces in (("replacing", True), ("adding", False)):
        monkeypatch.setitem(TRACKERS, name, Kind(name, "json", "", open_one, replaces=replaces))
    return made


def opening(folder: Path, step: int = -1) -> Opening:
    return Opening(folder, "r", IDENTITY, "tests", step, again=False, config={"optim": {"lr": 0.1}})


def step_record(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 8 * step, "loss": 5.0 - step / 10}


def test_steps_that_are_done_again(tmp_path: Path, fakes: list[Fake]) -> None:
    notes: list[str] = []
    trackers = Trackers(["replacing", "adding"], notes.append)
    trackers.begin(opening(tmp_path), (-1, -1))
    for step in (1, 2, 3):
        trackers.write(step_record(step))
    # killed before the evaluation of step 3; resumed from step 1
    again = Trackers(["replacing", "adding"], notes.append)
    again.begin(opening(tmp_path, 1), (3, 0))
    for step in (2, 3):
        again.write(step_record(step))
    again.write({"step": 3, "val_loss": 4.0})
    # rolled back to step 2 in the same process
    again.begin(opening(tmp_path, 2), (3, 3))
    for step in (3, 4):
        again.write(step_record(step))
    again.close()
    assert [(f.told, f.opening.step, f.opening.again, f.closed) for f in fakes[2:]] == [
        ([2, 3, 3], 1, True, True),
        ([3, 4], 1, True, True),  # the evaluation, which it had not seen, and then what is new
        ([3, 4], 2, True, True),
    ]
    assert not fakes[0].opening.again and not notes
    assert json.loads((tmp_path / KNOWN).read_text()) == ["adding", "replacing"]


def test_a_tracker_that_is_new_to_a_run_gets_all(tmp_path: Path, fakes: list[Fake]) -> None:
    trackers = Trackers(["adding"], print)
    trackers.begin(opening(tmp_path, 1), (3, 0))
    trackers.write(step_record(2))
    assert fakes[0].told == [2]


def test_one_that_fails_is_left_alone(tmp_path: Path, fakes: list[Fake]) -> None:
    pytest.importorskip("tensorboard")
    notes: list[str] = []
    trackers = Trackers(["adding", "replacing"], notes.append)
    trackers.begin(opening(tmp_path), (-1, -1))
    fakes[0].fails_at = 2
    for step in (1, 2, 3):
        trackers.write(step_record(step))
    assert [fake.told for fake in fakes] == [[1], [1, 2, 3]]
    assert len(notes) == 1 and "adding" in notes[0] and "no connection" in notes[0]
    trackers.begin(opening(tmp_path, 2), (3, 0))  # a rollback does not try it again
    assert len(fakes) == 3 and len(notes) == 1
    (tmp_path / "tensorboard").write_text("a file")  # so this cannot even be opened
    Trackers(["tensorboard"], notes.append).begin(opening(tmp_path), (-1, -1))
    assert len(notes) == 2 and "tensorboard" in notes[1]


def test_names_of_numbers() -> None:
    record = {"step": 3, "loss": 2.0, "grad_norm": float("nan"), "lr": None, "update/embed": 0.5}
    assert named(record) == {"train/loss": 2.0, "update/embed": 0.5}
    scores = {"step": 3, "val_loss": 2.0, "val_loss/code": 1.0, "share/code": 0.5}
    assert named(scores) == {"val/loss": 2.0, "val/loss/code": 1.0, "share/code": 0.5}


def test_a_missing_package_is_named_before_the_run_begins(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", Kind("wandb", "no_such_package", "", Fake))
    asked = ["--set", 'log.trackers=["wandb"]', "--run", tmp_path / "run"]
    said = lowres_here("train", config, *asked, code=2).stderr
    assert "log.trackers" in said and "pip install no_such_package" in said
    assert not (tmp_path / "run").exists()
    asked[1] = 'log.trackers=["neptune"]'
    assert "tensorboard" in lowres_here("train", config, *asked, code=2).stderr


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_tensorboard_shows_a_killed_run_once(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    asked = [config, "--run", run]
    keys = ("log.tensorboard=true", "train.eval_every=4", "train.checkpoint_every=4", "log.update_every=4")
    asked += [part for key in (*keys, "train.steps=12") for part in ("--set", key)]
    train_and_kill(asked, after=7)
    lowres_here("train", *asked, "--resume")
    records = [r for r in metrics.read(run / "metrics.jsonl") if "loss" in r]
    assert scalars(run, "train/loss") == [(r["step"], pytest.approx(r["loss"])) for r in records]
    assert [step for step, _ in scalars(run, "val/loss")] == [0, 4, 8, 12]
    assert [step for step, _ in scalars(run, "update/embed")] == [4, 8, 12]
    times = [r["wall_s"] for r in records]
    assert len(times) == 12 and times == sorted(times) and times[0] > 0  # it goes on where it was
    lowres_here("train", *asked, "--restart", "--set", "train.steps=1")
    assert [step for step, _ in scalars(run, "train/loss")] == [1]


# a process of a run: its steps are done up to the first number, it was killed after the second, and it goes
# on to the third
PROCESS = """
import sys
from pathlib import Path
from lowres.trackers import Opening, Trackers

folder, (name, *numbers) = Path(sys.argv[1]), sys.argv[2:]
step, killed, end = map(int, numbers)
trackers = Trackers([name], sys.exit)
opening = Opening(folder, "r", "0123456789abcdef", "tests", step, again=False, config={"optim": {"lr": 0.1}})
trackers.begin(opening, (killed, -1))
for now in range(max(step, 0) + 1, end + 1):
    trackers.write({"step": now, "tokens": 8 * now, "loss": 5.0 - now / 10})
trackers.write({"step": end, "val_loss": 4.0})
trackers.close()
assert "torch" not in sys.modules
"""


def resumed(folder: Path, name: str, **environment: str) -> None:
    """Steps 1 to 6 in one process, and 4 to 8 in the next, each told as a run does."""
    for step, killed, end in ((-1, -1, 6), (3, 6, 8)):
        command = [sys.executable, "-c", PROCESS, str(folder), name, *map(str, (step, killed, end))]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_trackio_offline(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    resumed(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "kept"))
    with sqlite3.connect(next((tmp_path / "kept").glob("*.db"))) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {row[0] for row in rows} == {"r-01234567"}
    assert [row[1] for row in rows] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 8]
    assert json.loads(rows[0][2]) == {"train/tokens": 8, "train/loss": 4.9}


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    resumed(tmp_path, "wandb", WANDB_MODE="offline")
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{IDENTITY}.wandb"))
    histories = [row for file in files for row in wandb_history(file)]
    assert [row["_step"] for row in histories] == [*range(1, 9)]
    assert histories[0]["train/loss"] == 4.9 and histories[-1]["val/loss"] == 4.0


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows in a file of W&B: a log of LevelDB (blocks of 32 KiB; records with a checksum, a length and a
    kind: whole, first, middle or last part), after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (1 << 15) - at % (1 << 15) < 7:
            at += (1 << 15) - at % (1 << 15)
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                row = {key: json.loads(value) for key, value in items.items()}
                rows.append(row | {"_step": record.history.step.num})
    return rows
