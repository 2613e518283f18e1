"""Profiles a few steps of a run that goes on: where their time goes, and a trace to look at.

The profiler watches and changes nothing, so the losses of the run are the same, bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lowres.errors import UserError
from lowres.rooms import Rooms
from lowres.speed.phases import Marks, following
from lowres.speed.shares import STEP, Shares, shares_of
from lowres.speed.trace import read

# steps before the profile: on a CPU memory is counted in the first one, on CUDA kernels are loaded
WARM_UP = 2
VIEWER = "https://ui.perfetto.dev"


class Profiler:
    """Profiles steps one after another, between `start` and `finish`."""

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the first profiler of a process reads it; be quiet
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])

    def start(self) -> None:
        self._profile.start()

    @contextmanager
    def step(self, rooms: Rooms, step: int) -> Iterator[None]:
        """One step; the device must be done at its end."""
        with record_function(f"{STEP}{step}"), following(rooms, Marks().enter):
            yield

    def finish(self, path: Path) -> Shares:
        """Stop, write the trace, and read from it where the time went."""
        self._profile.stop()
        unfinished = path.with_name("unfinished." + path.name)
        self._profile.export_chrome_trace(str(unfinished))  # compressed, if the name ends with .gz
        unfinished.replace(path)
        return shares_of(read(path))


class RunProfile:
    """The profile of a run's steps after its first few; does nothing if 0 steps are asked for."""

    def __init__(self, steps: int, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._done = self._first = 0  # of the steps of this process; the first profiled one
        self._plain = 0.0  # seconds of the last step before the profile
        self._profiler: Profiler | None = None

    def require(self, left: int) -> None:
        """Raise UserError if the run has fewer steps left than the profile needs."""
        if self._steps and left < WARM_UP + self._steps:
            raise UserError(
                f"--profile: {self._steps} steps, after {WARM_UP} without the profiler, are more than the "
                f"{max(0, left)} that the run still has; lower it or raise train.steps"
            )

    @contextmanager
    def step(self, rooms: Rooms, step: int) -> Iterator[None]:
        """A step of the run; its number counts completed steps."""
        if not WARM_UP <= self._done < WARM_UP + self._steps:
            began = time.perf_counter()
            yield
            self._plain = time.perf_counter() - began
        else:
            if self._profiler is None:
                self._profiler, self._first = Profiler(rooms.device), step
                self._profiler.start()
            with self._profiler.step(rooms, step + 1):
                yield
        self._done += 1

    @property
    def running(self) -> bool:
        """Whether the last step was profiled, which takes longer."""
        return self._profiler is not None

    def report(self) -> str | None:
        """Right after the last profiled step: where the time went, and where the trace is."""
        if self._profiler is None or self._done < WARM_UP + self._steps:
            return None
        path = self._folder / f"trace_step_{self._first + 1:08d}.json.gz"
        found, self._profiler = self._profiler.finish(path), None
        mean = found.wall / 1e6 / found.steps
        last = self._first + self._steps
        of = f"step {last}" if self._steps == 1 else f"steps {self._first + 1} to {last}"
        lines = [
            f"profile of {of}: {mean:.3g} s a step with the profiler, {self._plain:.3g} s before it",
            found.table(),
        ]
        if found.hidden_transfers:
            hidden = found.hidden_transfers / found.wall
            lines.append(f"transfers beside computation took another {hidden:.1%} and cost nothing")
        lines.append(f"trace: {path}; open it at {VIEWER}")
        return "\n".join(lines)
