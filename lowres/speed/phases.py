"""Follows the phases of a step (`Rooms.on_phase`): how long each one takes, and marks for a profiler."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from lowres.rooms import Rooms

PHASE = "phase: "
BETWEEN = "between"  # what belongs to no phase


@contextmanager
def following(rooms: Rooms, told: Callable[[str], None]) -> Iterator[None]:
    """In the block, `told` is called with every phase that begins; at its end with none."""
    rooms.on_phase.append(told)
    try:
        yield
    finally:
        rooms.on_phase.remove(told)
        told("")


class Marks:
    """Marks the phases of a step for the profiler."""

    def __init__(self) -> None:
        self._open: Any = None

    def enter(self, phase: str) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = record_function(PHASE + phase) if phase else None
        if self._open is not None:
            self._open.__enter__()


class Clock:
    """When phases began, on the time line of the device."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        mark: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            mark.record()
        self._marks.append((phase, mark))

    def ms_by_phase(self) -> dict[str, float]:
        """Call it when the device is done. Waits and gaps count to the phase in which they occur."""
        found: Counter[str] = Counter()
        for (phase, start), (_, end) in itertools.pairwise(self._marks):
            found[phase or BETWEEN] += start.elapsed_time(end) if self._cuda else (end - start) * 1e3
        return {phase: round(ms, 3) for phase, ms in found.most_common()}
