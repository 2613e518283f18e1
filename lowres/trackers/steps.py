"""What the trackers of a run are told. A tracker that fails is left alone from then on, with a note: the run
does not need it.

A resumed or rolled back run does some steps again. Trackers that cannot replace them are not told twice: of
steps that are repeated exactly, nothing is missing; of a rollback they keep the first version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowres import disk
from lowres.errors import first_line
from lowres.trackers.base import TRACKERS, Opening, Tracker

KNOWN = "trackers.json"  # in the folder of a run: the trackers that have had it
GROUPED = "/"
TRAINING, VALIDATION, VAL = "train", "val", "val_"


class Trackers:
    """The open trackers of a run. tell: gets a note if one fails."""

    def __init__(self, names: Collection[str], tell: Callable[[str], None]) -> None:
        self._names, self._tell = list(dict.fromkeys(names)), tell
        self._open: dict[str, Tracker] = {}
        # the last step and evaluation that each tracker has, of those that cannot replace them
        self._has: dict[str, tuple[int, int]] = {}

    def begin(self, opening: Opening, logged: tuple[int, int]) -> None:
        """Open all of them, or open them again for steps after `opening.step`. logged: the last step and the
        last evaluation that the metrics had before; -1 for none."""
        if not self._names:
            return
        known = _known(opening.folder)
        for name in list(self._names):
            kind, again = TRACKERS[name], name in known
            self._has[name] = logged if again and not kind.replaces else (-1, -1)
            if name in self._open and not kind.replaces:
                continue
            with self._guarded(name):
                if name in self._open:
                    self._open.pop(name).close()
                self._open[name] = kind.open(replace(opening, again=again))
        with suppress(OSError):
            both = sorted({*known, *self._open})
            disk.write_whole(opening.folder / KNOWN, json.dumps(both).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Tell all of them a record of the metrics."""
        if not self._open:
            return
        step, evaluated = record["step"], "val_loss" in record
        numbers = named(record)
        for name, tracker in list(self._open.items()):
            if step > self._has[name][evaluated]:
                with self._guarded(name):
                    tracker.write(step, numbers)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close()
        self._open = {}

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Give the tracker up if it fails in the block."""
        try:
            yield
        except Exception as error:  # from another program, which may fail in any way
            self._open.pop(name, None)
            self._names.remove(name)
            self._tell(
                f"note: log.trackers: {name} is no longer written to, because it failed: {first_line(error)}"
            )


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, by names in groups: train/loss, val/loss, update/embed."""
    group = VALIDATION if "val_loss" in record else TRAINING
    found = {}
    for key, value in record.items():
        if key == "step" or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        own = key.removeprefix(VAL)
        found[own if GROUPED in own and own == key else f"{group}/{own}"] = value
    return found


def _known(folder: Path) -> list[str]:
    try:
        found = json.loads(disk.read_whole(folder / KNOWN, limit=1 << 16))
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in found if name in TRACKERS] if isinstance(found, list) else []
