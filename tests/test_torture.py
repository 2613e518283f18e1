"""A few cases of every attack of scripts/torture.py, and that the attacks would notice."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import torture  # noqa: E402
from attacks import children, faults, mutations, soak, world  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> world.World:
    return world.World(tmp_path_factory.mktemp("torture") / "world")


@pytest.mark.parametrize("name", torture.ATTACKS)
def test_no_case_of_an_attack_fails(name: str, tiny: world.World) -> None:
    found = torture.attack(tiny, name, full=False, seed=0, jobs=1)
    assert found["failures"] == {}
    assert found["tried"] == found["exact"] + found["detected"] + found["without_effect"] >= 2


# ---- whether the attacks work


def test_a_run_that_differs_is_not_exact(tiny: world.World) -> None:
    truth = tiny.truth()
    with tiny.place() as place:
        folder = place / "run"
        assert children.run(tiny.train(folder), world.no_picture).code == 0
        assert tiny.differs(folder, truth) == ""
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_bytes(b"".join([*lines, lines[-2]]))
        assert "metrics.jsonl differs" in tiny.differs(folder, truth)
        (folder / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
        assert "metrics.jsonl differs" in tiny.differs(folder, truth)
        (folder / "metrics.jsonl").write_bytes(b"".join(lines))
        mutations.damage(folder / "checkpoints/step_00000012/embed.safetensors", "flip", random.Random(0))
        assert tiny.differs(folder, truth) == "step_00000012: other tensors in embed.safetensors"
        other = place / "other"
        children.run(tiny.train(other, "run.seed=1"), world.no_picture)
        assert "other tensors" in tiny.differs(other, truth)


@pytest.mark.parametrize(
    "action, ill",
    [
        (lambda: 0, ""),
        (lambda: 1 // 0, "traceback: ZeroDivisionError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by signal 9"),
        (signal.pause, "hangs"),
        (lambda: print("lowres: a\nlowres: b", file=sys.stderr) or 2, "exit 2 with 2 lines"),
        (lambda: print("lowres: a", file=sys.stderr) or 2, ""),
    ],
)
def test_what_no_command_may_do_is_seen(action: Any, ill: str) -> None:
    found = children.run(action, patience=2).ill()
    assert found.startswith(ill) and bool(found) == bool(ill)


def test_a_case_that_raises_or_hangs_is_a_failure() -> None:
    cases = [("good", lambda: ("exact", "")), ("bad", lambda: 1 // 0), ("slow", signal.pause)]
    found = dict(children.each(cases, jobs=2, patience=2))
    assert found["good"] == ["exact", ""]
    assert "ZeroDivisionError" in str(found["bad"]) and "hung" in str(found["slow"])


def _write(folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * 10)
    with (folder / "b").open("a", encoding="utf-8") as file:
        file.write("y" * 10)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "b", folder / "c")
    (folder / "a").unlink()


EXPECTED = ["open a", "write a", "open b", "write b", "fsync b", "replace b", "unlink a"]


def test_every_operation_is_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "run"
    folder.mkdir()
    assert children.run(partial(_write, folder), partial(faults.Faults, folder, log=log)).code == 0
    assert faults.count(log) == EXPECTED
    assert [path.name for path in folder.iterdir()] == ["c"] and (folder / "c").read_text() == "y" * 10
    other = tmp_path / "other"
    other.mkdir()
    children.run(partial(_write, other), partial(faults.Faults, folder, 1))
    assert (other / "c").exists()  # nothing happens to what is elsewhere


@pytest.mark.parametrize("at", range(1, len(EXPECTED) + 1))
def test_a_kill_is_before_its_operation(at: int, tmp_path: Path) -> None:
    done = children.run(partial(_write, tmp_path), partial(faults.Faults, tmp_path, at))
    assert done.code == -signal.SIGKILL
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    ten = {"a": "x" * 10, "b": "y" * 10}
    expected = [{}, {"a": ""}, {"a": ten["a"]}, ten | {"b": ""}, ten, ten, {"a": ten["a"], "c": ten["b"]}]
    assert there == expected[at - 1]


def test_a_full_disk_takes_a_part_and_an_error_may_pass(tmp_path: Path) -> None:
    full = partial(faults.Faults, tmp_path, 2, errno.ENOSPC, True, faults.TAKE_ROOM)
    done = children.run(partial(_write, tmp_path), full)
    assert "No space left" in done.line and (tmp_path / "a").read_text() == "x" * 5

    def twice() -> None:
        with pytest.raises(OSError, match="Input/output"):
            _write(tmp_path)
        _write(tmp_path)

    assert children.run(twice, partial(faults.Faults, tmp_path, 2, errno.EIO)).code == 0
    torn = partial(faults.Faults, tmp_path, 2, "torn")
    assert children.run(partial(_write, tmp_path), torn).code == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "x" * 5


def test_growth_is_seen() -> None:
    flat = [{"rss_bytes": 10**9 + i % 7, "threads": 2 + i % 2, "open_files": 6} for i in range(90)]
    assert soak._growth(flat) == {}
    for name, more in (("rss_bytes", 10**7), ("threads", 1), ("open_files", 1)):
        growing = [one | {name: one[name] + more * (i // 10)} for i, one in enumerate(flat)]
        assert [*soak._growth(growing)] == [name]
