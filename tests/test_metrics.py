"""metrics.jsonl is valid JSON, flushed line by line, and cut back on resume."""

import json
from pathlib import Path

import pytest

from lowres import disk
from lowres.errors import UserError
from lowres.metrics import MetricsLog, read


def test_lines_are_flushed_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write({"step": 0, "val_loss": 3.0})
    log.write({"step": 1, "tokens": 8, "loss": float("nan"), "grad_norm": float("inf")})
    lines = path.read_text().splitlines()  # without closing
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "val_loss": 3.0},
        {"step": 1, "tokens": 8, "loss": None, "grad_norm": None},
    ]


def test_resuming_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "tokens": step, "loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(path, 3)
    log.write({"step": 4, "tokens": 4, "loss": 40.0})
    assert [r["loss"] for r in read(path)] == [1.0, 2.0, 3.0, 40.0]
    assert log.notes == []


def logged(path: Path, steps: int) -> list[bytes]:
    lines = [
        json.dumps({"step": n, "tokens": n, "loss": float(n)}).encode() + b"\n" for n in range(1, steps + 1)
    ]
    path.write_bytes(b"".join(lines))
    return lines


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff\n",
        b"\n",
        b"[" * 100_000 + b"\n",
        b"7" * 9999 + b"\n",
        b'{"step": "3", "loss": 1, "tokens": 3}\n',
        b'{"step": true, "loss": 1, "tokens": 3}\n',
        b'{"step": -3, "loss": 1, "tokens": 1}\n',
        b'{"step": 3, "loss": "low", "tokens": 3}\n',
        b'{"step": 3, "lpss": 1, "tokens": 3}\n',
    ],
)
def test_a_damaged_line_stays_and_is_noted(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = logged(path, 6)
    lines[2] = damaged
    path.write_bytes(b"".join(lines))
    assert [r["step"] for r in read(path)] == [1, 2, 4, 5, 6]
    log = MetricsLog(path, 5)
    assert log.notes == [f"{path}: line 3 cannot be read", f"{path}: step 3 of 5 missing"]
    assert path.read_bytes() == b"".join(lines[:5])


def test_missing_records_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logged(path, 20)
    assert MetricsLog(path, 30).notes == [f"{path}: 10 steps from 21 to 30 of 30 missing"]
    path.unlink()
    assert MetricsLog(path, 2).notes == [f"{path}: steps 1, 2 of 2 missing"]


def test_a_record_that_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a part of it that a full disk took is removed first."""
    monkeypatch.setattr(disk, "PAUSES", (0.0, 0.0))
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.write({"step": 0, "val_loss": 3.0})
    before, tries = path.read_bytes(), []
    append = log._append

    def short(text: bytes) -> None:
        tries.append(text)
        assert log._file is not None
        real = log._file

        class Full:
            def fileno(self) -> int:
                return real.fileno()

            def write(self, text: bytes) -> int:
                return real.write(text[: len(text) // 2])

        monkeypatch.setattr(log, "_file", Full() if len(tries) < 3 else real)
        try:
            append(text)
        finally:
            log._file = real

    monkeypatch.setattr(log, "_append", short)
    log.write({"step": 1, "val_loss": 2.0})
    assert len(tries) == 3 and path.read_bytes() == before + b'{"step": 1, "val_loss": 2.0}\n'
    tries.clear()
    monkeypatch.setattr(disk, "PAUSES", ())
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left.*make room"):
        log.write({"step": 2, "val_loss": 2.0})
    assert path.read_bytes().count(b"\n") == 2 and path.read_bytes().endswith(b"\n")


def test_a_changed_digit_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    for step in range(1, 6):
        log.write({"step": step, "tokens": step, "loss": float(step)})
        if step == 4:
            digest = log.digest
    log.close()
    assert MetricsLog(path, 4, digest=digest).notes == []
    path.write_bytes(path.read_bytes().replace(b"2.0", b"7.0"))
    assert MetricsLog(path, 4, digest=digest).notes == [f"{path}: was changed since step 4 was saved"]


def test_pending_records_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSES", ())
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.write({"step": 0, "val_loss": 2.0})
    monkeypatch.setattr(log, "_append", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    for step in (1, 2):
        with pytest.raises(UserError):
            log.write({"step": step, "tokens": step, "loss": 1.0})
    assert [record["step"] for record in log.pending] == [1, 2] and log.last == 0
    assert MetricsLog(path, 2, log.pending, log.digest).notes == []
    assert [record["step"] for record in read(path)] == [0, 1, 2]
