"""Where the time of a step goes: by phase without the profiler, then by kind of work with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_steps import Subject

from lowres.speed.phases import Clock, following
from lowres.speed.profile import Profiler


def measure(subject: Subject, micro_batches: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step by phase, without the profiler; then by kind, and by phase and kind, with the
    profiler."""
    subject.step(micro_batches, 0)
    clock = Clock(subject.device.type == "cuda")
    with following(subject.rooms, clock.enter):
        seconds, _ = subject.step(micro_batches, 1)
    yield {"micro_batches": micro_batches, "step_ms": seconds * 1e3, "ms_by_phase": clock.ms_by_phase()}
    profiler = Profiler(subject.device)
    profiler.start()
    with profiler.step(subject.rooms, 2):
        subject.step(micro_batches, 2)
    with tempfile.TemporaryDirectory() as folder:
        found = profiler.finish(Path(folder) / "trace.json.gz").as_dict()
    yield {"profiled_step_ms": found.pop("step_ms"), **found}
