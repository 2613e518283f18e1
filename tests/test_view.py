"""What a run's folder tells is read once, in bounded memory, while another process writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowres.errors import UserError
from lowres.records import Lines
from lowres.view import Columns, View, duration, find_runs
from lowres.view.folder import FINISHED, KILLED, STOPPED, TRAINING
from lowres.view.history import MOST_SAMPLES, History, Samples
from tests.folders import evaluation, lines, records, step_record, write_run

NOBODY = 2**22 + 1  # above the largest pid of Linux


def made(numbers: list[Any]) -> list[dict[str, Any]]:
    return [{"step": i, "a": number, **({"b": i} if i % 7 == 0 else {})} for i, number in enumerate(numbers)]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 500, 4097])
@pytest.mark.parametrize("piece", [1, 13, 4096])
def test_buckets_hold_what_a_table_of_all_holds(count: int, piece: int) -> None:
    generator = np.random.default_rng(count)
    values = generator.normal(size=count)
    values[::11] = np.nan
    rows = made([None if np.isnan(v) else float(v) for v in values])
    columns = Columns(16)
    for start in range(0, count, piece):
        columns.add(rows[start : start + piece])
    stride = columns.stride
    assert columns.count == count and count <= 16 * stride and (stride == 1 or count > 8 * stride)
    whole = np.full(16 * stride, np.nan)
    whole[:count] = values
    table = whole.reshape(16, stride)
    there = ~np.isnan(table).all(1)
    curve = columns.curve("a")
    assert curve.at.tolist() == np.flatnonzero(there).tolist()
    np.testing.assert_allclose(curve.mean, np.nanmean(table[there], 1), rtol=1e-12)
    np.testing.assert_array_equal(curve.least, np.nanmin(table[there], 1))
    np.testing.assert_array_equal(curve.greatest, np.nanmax(table[there], 1))
    assert columns.number_of("a") == int((~np.isnan(values)).sum())
    assert columns.curve("b").greatest.max() == (count - 1) // 7 * 7
    assert len(columns.curve("c").at) == 0


@pytest.mark.parametrize("odd", ["text", True, [1], {"x": 1}, 10**400, None, float("inf")])
def test_what_is_no_number_does_not_count(odd: Any) -> None:
    columns = Columns(8)
    columns.add([{"a": 1.0}, {"a": odd}, {"a": 3.0}])
    numbers = [1.0, 1.0, 3.0] if odd is True else [1.0, 3.0]
    assert columns.curve("a").mean.tolist() == numbers and columns.count == 3


def read(found: Lines) -> list[Any]:
    return [one["step"] for block in found.more() for one in block]


def test_lines_are_read_once_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    found = Lines(path)
    assert read(found) == []
    with path.open("a") as file:
        file.write('{"step": 1}\n{"step": 2}\n{"ste')
        file.flush()
        assert read(found) == [1, 2] and read(found) == []
        file.write('p": 3}\nno json\n\n[4]\n{"step": 5}\n')
        file.flush()
        assert read(found) == [3, 5] and found.unread == 3
    # a run that is resumed replaces the file; one that is restarted may make a shorter one
    (tmp_path / "b").write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n' + " " * 100)
    (tmp_path / "b").replace(path)
    assert read(found) == [1, 2, 9] and (found.restarts, found.unread) == (1, 0)
    path.write_text('{"step": 7}\n')
    assert read(found) == [7] and found.restarts == 2
    found.close()


@pytest.mark.parametrize("block", [1, 7, 64])
def test_lines_may_be_cut_by_a_block_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("lowres.records.BLOCK", block)
    (tmp_path / "a").write_text(lines({"step": i, "text": "ä" * i} for i in range(20)))
    assert read(Lines(tmp_path / "a")) == list(range(20))


def test_of_a_huge_file_evenly_spread_parts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowres.records.BLOCK", 100)
    (tmp_path / "a").write_text(lines({"step": i} for i in range(1000)))
    found = Lines(tmp_path / "a", most=3000)
    steps = read(found)
    assert found.skips == 5 and found.unread == 0
    assert 150 < len(steps) < 300 and steps == sorted(set(steps)) and steps[-1] > 950
    assert max(np.diff(steps)) < 60


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records(50), pid=os.getpid())
    view = View(run)
    assert (view.step, view.total, view.skipped, view.lost, view.unread) == (50, 100, 0, 0, 0)
    assert view.tokens_per_s == pytest.approx(4096) and view.seconds_left == pytest.approx(12.5)
    assert view.evaluated["step"] == 40 and view.key("optim.name") == "adamw"
    assert view.state().name == TRAINING
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines([step_record(51, loss=None), step_record(52, skipped=2), evaluation(52)]))
    view.refresh()
    assert (view.step, view.skipped, view.lost, view.evaluations.count) == (52, 1, 1, 4)
    # the run goes back to step 10
    (run / "other").write_text(lines(records(11)))
    (run / "other").replace(run / "metrics.jsonl")
    view.refresh()
    assert (view.step, view.steps.count, view.skipped, view.evaluations.count) == (11, 11, 0, 1)
    assert (run / "run.lock").exists() and len(list(run.iterdir())) == 6  # nothing was written


def test_what_a_run_is_doing(tmp_path: Path) -> None:
    stopped = {"time": "t", "event": "stopped", "text": "stopped by SIGTERM: step 7 is saved"}
    cases: dict[str, dict[str, Any]] = {
        TRAINING: {"pid": os.getpid()},
        KILLED: {"pid": NOBODY},
        STOPPED: {"events": [stopped]},
        FINISHED: {"summary": {"step": 5}},
    }
    for name, more in cases.items():
        assert View(write_run(tmp_path / name, records(5), **more)).state().name == name
    assert "SIGTERM" in View(tmp_path / STOPPED).state().text
    # on another machine, where a process cannot be seen, what counts is whether lines come
    holder = json.loads((tmp_path / TRAINING / "run.lock").read_text()) | {"host": "elsewhere"}
    (tmp_path / TRAINING / "run.lock").write_text(json.dumps(holder))
    assert View(tmp_path / TRAINING).state().name == TRAINING
    os.utime(tmp_path / TRAINING / "metrics.jsonl", (0, 0))
    assert View(tmp_path / TRAINING).state().name == KILLED


@pytest.mark.parametrize("damage", ["config.toml", "plan.json", "summary.json", "events.jsonl", "run.lock"])
def test_a_damaged_file_hides_only_itself(tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run", records(5), summary={"step": 5})
    (run / damage).write_bytes(b"\xff[[[{" * 1000 + b"\n")
    assert View(run).step == 5


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        View(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "missing"])
    for point in ("lr-1", "lr-2"):
        write_run(tmp_path / "sweep" / point, records(2))
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert [run.name for run in find_runs([tmp_path / "sweep", tmp_path / "sweep" / "lr-1"])] == [
        "lr-1",
        "lr-2",
    ]


def test_samples_and_events_are_thinned_out() -> None:
    samples, history = Samples(), History()
    samples.add([{"step": i, "prompt": p, "text": f"{p}{i}"} for i in range(3000) for p in ("a", "b")])
    samples.add([{"step": 2999, "prompt": "a", "text": "again"}, {"step": "x", "text": 1}, {"text": "y"}])
    found = samples.by_prompt(5)
    assert [[s.step for s in own][:: len(own) - 1] for own in found.values()] == [[0, 2999]] * 2
    assert [len(own) for own in found.values()] == [5, 5] and found["a"][-1].text == "again"
    assert all(len(kept._kept) <= MOST_SAMPLES for kept in samples._kept.values())
    history.add([{"event": "spike", "step": i} for i in range(5000)] + [{"event": "started", "step": 9}])
    steps = [event["step"] for event in history.of("spike")]
    assert history.counts["spike"] == 5000 and len(steps) <= 401 and steps[0] == 0 and steps[-1] == 4999
    assert history.last == history.started == {"event": "started", "step": 9}


def test_durations() -> None:
    cases = {0.4: "0 s", 59: "59 s", 61: "1 min 1 s", 7200: "2 h", 90_000: "1 d 1 h", None: "-"}
    assert {seconds: duration(seconds) for seconds in cases} == cases


def test_looking_at_a_run_imports_no_torch() -> None:
    code = "import sys, lowres.report, lowres.watch, lowres.watch.screen; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
