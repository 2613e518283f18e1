"""metrics.jsonl: one JSON object per line, written as a whole and flushed.

A step has step, tokens, loss, lr, lr_over_batch, grad_norm, tokens_per_s, wall_s, peak_mem_gib, host_mem_gib,
peak_rss_gib (`lowres.meter`), skipped, and every so often update/UNIT (`Optimizer.readings`); an evaluation
has step, val_loss, val_ppl and, if tokens stand for text, val_bits_per_byte; val_loss/NAME and
val_bits_per_byte/NAME of each part of a mixture and of each validation text with a name; and every so often
task/TASK/METRIC with task/TASK/METRIC_stderr (`train.eval_tasks`). lr is the learning rate of the update that
led to `step`; lr_over_batch is lr divided by the sequences in a batch; wall_s is how many seconds the run has
taken, with evaluations and saves, where a resumed run goes on from its last record; skipped is the number of
units (embedding, blocks, head) that a step did not update because its loss or a gradient was not finite, or
was a spike that is refused. A number that is not finite is null.

Lines that cannot be read are passed over, kept, and counted: they never keep a run from going on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from lowres import disk, ranks

Record = dict[str, Any]


class StepLog:
    """Appends records of steps to a file of a run, on the first rank only. Opening it removes records after
    `step` (-1: all records), so a resumed run has every step exactly once.

    pending: records that could not be written; a checkpoint takes them along. digest: BLAKE2b of the file.
    newest: step of the last record in it, or -1. notes: on what is not as it was written, after opening.
    """

    @staticmethod
    def is_record(record: Record) -> bool:
        """Whether a JSON object with a step is a record of this file."""
        raise NotImplementedError

    def __init__(
        self, path: Path, step: int, pending: Iterable[Record] = (), digest: str | None = None
    ) -> None:
        """pending, digest: of the checkpoint of this step. Raises DiskError."""
        self.path, self.pending, self.notes = path, list[Record](), list[str]()
        self.last = step  # step of the last record, or of the checkpoint
        self.newest = -1
        self._file: FileIO | None = None
        self._digest = hashlib.blake2b(digest_size=16)
        if not ranks.is_first():
            return
        with disk.named(path, "written"):
            self._cut(step, digest)
            self._file = disk.open_to_write(path, os.O_APPEND)
        for record in pending:
            self.write(record)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def write(self, *records: Record) -> None:
        """Append records of a step, all or none. Raises DiskError; the records are then pending."""
        if self._file is None:
            return
        text = b"".join(map(_line, records))
        before = len(self.pending)
        self.pending += records
        with disk.named(self.path, "written"):
            disk.retried(lambda: self._append(text))
        del self.pending[before:]
        self.last = self.newest = records[-1]["step"]
        self._digest.update(text)

    def sync(self) -> None:
        """Wait until the disk has all records. Raises DiskError."""
        file = self._file
        if file is not None:
            with disk.named(self.path, "written"):
                disk.retried(lambda: os.fsync(file.fileno()))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, text: bytes) -> None:
        assert self._file is not None
        end = os.fstat(self._file.fileno()).st_size
        try:
            disk.write_all(self._file, text)
        except OSError:
            os.ftruncate(self._file.fileno(), end)  # a full disk has taken a part
            raise

    def _cut(self, step: int, digest: str | None) -> None:
        """Remove the records after a step. Lines between kept records stay even if they cannot be read."""
        lines = _lines(self.path)
        steps = [self._step(line) for line in lines]
        last = max((i for i, at in enumerate(steps) if at is not None and at <= step), default=-1)
        left = [line for line, at in zip(lines[: last + 1], steps, strict=False) if at is None or at <= step]
        content = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in left)
        if left != lines or not self.path.exists():
            disk.retried(lambda: disk.write_whole(self.path, content))
        self._digest.update(content)
        self.newest = max((at for at in steps if at is not None and at <= step), default=-1)
        if step < 0:
            return
        # a kill may leave a last line that is incomplete
        unread = [i for i, line in enumerate(lines, 1) if line.endswith(b"\n") and self._step(line) is None]
        if unread:
            self.notes.append(f"{self.path}: {_listed(unread, 'line')} cannot be read")
        elif digest not in (None, self.digest):
            self.notes.append(f"{self.path}: was changed since step {step} was saved")

    def _step(self, line: bytes) -> int | None:
        record = _record(line, self.is_record)
        return None if record is None else int(record["step"])


class MetricsLog(StepLog):
    """The metrics of a run. before: the last step and the last evaluation that the file had before it was
    opened; -1 for none. wall_s: of the last record that has one."""

    def __init__(
        self, path: Path, step: int, pending: Iterable[Record] = (), digest: str | None = None
    ) -> None:
        self.before, self.wall_s = _newest(path) if ranks.is_first() else (-1, -1), 0.0
        super().__init__(path, step, pending, digest)
        if ranks.is_first():
            self._look_back(step)

    def write(self, *records: Record) -> None:
        super().write(*records)
        self.wall_s = records[-1].get("wall_s", self.wall_s)

    @staticmethod
    def is_record(record: Record) -> bool:
        numbers = all(value is None or isinstance(value, int | float) for value in record.values())
        return numbers and ("val_loss" in record or {"loss", "tokens"} <= record.keys())

    def _look_back(self, step: int) -> None:
        """Find the last time, and missing steps."""
        logged = set()
        for record in read(self.path):
            self.wall_s = record.get("wall_s", self.wall_s) or 0.0
            if "loss" in record:
                logged.add(record["step"])
        missing = [at for at in range(1, step + 1) if at not in logged]
        if missing:
            self.notes.append(f"{self.path}: {_listed(missing, 'step')} of {step} missing")


def _newest(path: Path) -> tuple[int, int]:
    """The last step and the last evaluation in a file."""
    found = [-1, -1]
    for line in _lines(path):
        if (record := _record(line, MetricsLog.is_record)) is not None:
            kind = "val_loss" in record
            found[kind] = max(found[kind], record["step"])
    return found[0], found[1]


def _listed(numbers: list[int], what: str) -> str:
    """ "step 3", "steps 3, 5", "17 steps from 3 to 40" """
    if len(numbers) > 4:
        return f"{len(numbers)} {what}s from {numbers[0]} to {numbers[-1]}"
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def read(path: Path, log: type[StepLog] = MetricsLog) -> list[Record]:
    """All records of a metrics file, or of another log; lines that cannot be read are left out."""
    return [record for line in _lines(path) if (record := _record(line, log.is_record)) is not None]


def _lines(path: Path) -> list[bytes]:
    try:
        return disk.read_whole(path, limit=1 << 40).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk.DiskError(path, error, "read") from None


def _record(line: bytes, is_record: Callable[[Record], bool]) -> Record | None:
    """The record in a line; None if the line is incomplete or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    if type(step) is not int or step < 0:
        return None
    return record if is_record(record) else None


def _line(record: Record) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return (json.dumps(finite, allow_nan=False) + "\n").encode()
