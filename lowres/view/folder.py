"""The view of a run: its folder, read without trust, without waiting and without changing anything."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lowres import disk, lock
from lowres.errors import UserError
from lowres.records import CHECKPOINTS, CONFIG, EVENTS, METRICS, PLAN, SAMPLES, SUMMARY, Lines
from lowres.scores import TASK
from lowres.view.columns import BUCKETS, Columns
from lowres.view.history import History, Samples

GIB = 1 << 30
# the last steps from which the present speed follows
RECENT = 200
# seconds without a new line after which a run of another machine no longer counts as training
SILENT = 900.0
SWEEP = "sweep.json"
TRAINING, FINISHED, STOPPED, KILLED, IMPORTED = "training", "finished", "stopped", "killed", "imported"


@dataclass(frozen=True)
class State:
    """What a run is doing. name: training, finished, stopped, killed or imported. text: the same for people,
    with the reason."""

    name: str
    text: str


class View:
    """A run, as far as its folder tells. `refresh` reads what has been added.

    config: sections of the resolved config. plan: plan.json. steps, evaluations: the numbers in the metrics.
    last: the newest record of a step. skipped: steps that did not update every unit. lost: steps whose loss
    was not finite. Raises UserError if the folder is no run.
    """

    def __init__(self, folder: Path, buckets: int = BUCKETS) -> None:
        self.folder, self._buckets = folder, buckets
        self.name = folder.resolve().name or str(folder)
        self._metrics, self._events, self._samples = (
            Lines(folder / name) for name in (METRICS, EVENTS, SAMPLES)
        )
        self._begin_metrics()
        self.history, self.samples = History(), Samples()
        if not any((folder / name).is_file() for name in (CONFIG, METRICS)):
            raise UserError(f"{folder} is not a run: it has neither {CONFIG} nor {METRICS}")
        self.refresh()

    def refresh(self) -> None:
        """Read what has been added since the last time."""
        self.config = _toml(self.folder / CONFIG)
        self.plan, self.summary = _json(self.folder / PLAN), _json(self.folder / SUMMARY)
        restarts = self._metrics.restarts
        for records in self._metrics.more():
            if self._metrics.restarts != restarts:
                self._begin_metrics()
                restarts = self._metrics.restarts
            self._add(records)
        for lines, found, kind in (
            (self._events, "history", History),
            (self._samples, "samples", Samples),
        ):
            before = lines.restarts
            for records in lines.more():
                if lines.restarts != before:
                    setattr(self, found, kind())
                    before = lines.restarts
                getattr(self, found).add(records)

    def _begin_metrics(self) -> None:
        self.steps, self.evaluations = Columns(self._buckets), Columns(self._buckets)
        self.skipped, self.last = 0, dict[str, Any]()
        self.evaluated: dict[str, Any] = {}  # the newest record of an evaluation
        self.tasks: dict[str, Any] = {}  # the newest scores of tasks
        self._recent: list[dict[str, Any]] = []

    def _add(self, records: list[dict[str, Any]]) -> None:
        steps = [record for record in records if "loss" in record and type(record.get("step")) is int]
        self.steps.add(steps)
        self.skipped += sum(1 for record in steps if record.get("skipped"))
        scored = [record for record in records if "val_loss" in record and type(record.get("step")) is int]
        self.evaluations.add(scored)
        self._recent = (self._recent + steps)[-RECENT:]
        self.last = (self._recent or [{}])[-1]
        self.evaluated = scored[-1] if scored else self.evaluated
        for record in scored:
            self.tasks = {key: x for key, x in record.items() if key.startswith(TASK)} or self.tasks

    # ---- what it is

    def key(self, name: str, default: Any = None) -> Any:
        """The value of `section.key` in the config."""
        section, _, key = name.partition(".")
        found = self.config.get(section)
        return found.get(key, default) if isinstance(found, dict) else default

    @property
    def step(self) -> int:
        """Completed steps."""
        return int(self.last.get("step", 0))

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None if the config does not tell."""
        steps, tokens, batch = (self.key(f"train.{key}") for key in ("steps", "tokens", "batch_tokens"))
        if isinstance(tokens, int) and isinstance(batch, int) and batch > 0:
            left = tokens - int(self.last.get("tokens") or 0)  # the batch may have changed on the way
            return self.step + max(0, math.ceil(left / batch))
        return steps if isinstance(steps, int) else 1000 if self.config else None

    @property
    def lost(self) -> int:
        """Steps without a finite loss."""
        return self.steps.count - self.steps.number_of("loss")

    @property
    def tokens_per_s(self) -> float | None:
        """Of the last steps, with what happens between them."""
        rates = [r["tokens_per_s"] for r in self._recent if isinstance(r.get("tokens_per_s"), int | float)]
        first, last = (self._recent or [{}])[0], self.last
        spans = [_difference(first, last, key) for key in ("tokens", "wall_s")]
        if all(spans):
            return spans[0] / spans[1]
        return sum(rates) / len(rates) if rates else None

    @property
    def seconds_left(self) -> float | None:
        """Until the run ends, at its present speed."""
        rate, total, tokens = self.tokens_per_s, self.total, self.last.get("tokens")
        if not rate or total is None or not self.step or not isinstance(tokens, int | float):
            return None
        batch = self.key("train.batch_tokens") or tokens / self.step
        return max(0, total - self.step) * batch / rate

    @property
    def unread(self) -> int:
        """Lines that could not be read."""
        return self._metrics.unread + self._events.unread + self._samples.unread

    @property
    def sampled(self) -> bool:
        """Whether a file is so large that only a part of it was read."""
        return any(lines.skips > 1 for lines in (self._metrics, self._events, self._samples))

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(self.folder / CHECKPOINTS):
                if match := re.fullmatch(r"step_(\d{8,18})", entry.name):
                    found.append(int(match[1]))
        return sorted(found)

    def state(self) -> State:
        """What the run is doing now."""
        holder, stopped = lock.holder(self.folder), self.history.last
        silent = time.time() - _changed(self.folder / METRICS)
        if holder is not None and _works(holder, silent):
            return State(TRAINING, f"training: process {holder.pid} on {holder.host} since {holder.since}")
        if self.summary:
            return State(FINISHED, f"finished after {self.step:,} steps")
        if stopped.get("event") == "imported":
            return State(IMPORTED, "imported, and not trained")
        if stopped.get("event") == "stopped":
            return State(
                STOPPED, f"stopped: {stopped.get('error') or stopped.get('text') or 'it was asked to'}"
            )
        return State(KILLED, f"killed after {self.step:,} steps: no process has it, and it did not say why")


def _difference(first: dict[str, Any], last: dict[str, Any], key: str) -> float:
    values = first.get(key), last.get(key)
    return values[1] - values[0] if all(isinstance(x, int | float) for x in values) else 0.0  # type: ignore[operator]


def _works(holder: lock.Holder, silent: float) -> bool:
    """Whether the process that has written the lock's file still works. silent: seconds since the last
    line."""
    if holder.host != socket.gethostname():
        return silent < SILENT
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True


def _changed(path: Path) -> float:
    """When a file was last written; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file; empty if it cannot be read."""
    try:
        return tomllib.loads(disk.read_whole(path, limit=1 << 24).decode())
    except (OSError, ValueError, RecursionError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty if it cannot be read."""
    try:
        found = json.loads(disk.read_whole(path, limit=1 << 24))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def duration(seconds: Any) -> str:
    """ "3 d 4 h", "2 h 5 min", "40 s", or "-" for what is no number"""
    if not isinstance(seconds, int | float):
        return "-"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, name), (smaller, below) in pairwise(units):
        if seconds >= size:
            whole, rest = divmod(round(seconds / smaller), size // smaller)
            return f"{whole:,} {name}" + (f" {rest} {below}" if rest else "")
    return f"{seconds:.0f} s"


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The runs that the folders mean: themselves, or the points of a sweep. Raises UserError."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give the folder of a run")
        points = [one for one in sorted(folder.iterdir()) if (one / METRICS).is_file()]
        found += points if (folder / SWEEP).is_file() and points else [folder]
    return list(dict.fromkeys(found))
