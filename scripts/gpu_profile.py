"""Where the time of a step goes: by kind of kernel, by phase of the step, and in overlapping copies."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from gpu_steps import Subject
from torch.profiler import ProfilerActivity, profile, record_function

Interval = tuple[float, float]  # microseconds

# kinds by the name of a kernel, or on a CPU of an operation; the first match counts
KINDS = (
    ("copy between gpu and host", r"memcpy (htod|dtoh)|hosttodevice|devicetohost"),
    ("attention", r"flash|fmha|attention|sdpa|mha_"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitk|^aten::(mm|addmm|bmm|baddbmm|matmul)$"),
    ("copy and fill", r"memcpy|memset|copy|fill|aten::(zero_|clone|contiguous)$"),
    ("reduction", r"reduce|softmax|norm|aten::(sum|amax|mean|dot)$"),
    ("gather and scatter", r"index|gather|scatter|embedding"),
)
POINTWISE = "pointwise and other"
PHASE = "phase: "


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), POINTWISE)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in union(intervals))


class Phases:
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
            found[phase or "between"] += start.elapsed_time(end) * 1e3 if self._cuda else (end - start) * 1e6
        return _ms(found)


def measure(subject: Subject, micro_batches: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step by phase, without the profiler; then by kind, and by phase and kind, with the
    profiler. On a GPU also the overlap of copies and computation."""
    cuda = subject.device.type == "cuda"
    subject.step(micro_batches, 0)
    clock = Clock(cuda)
    subject.rooms.on_phase.append(clock.enter)
    seconds, _ = subject.step(micro_batches, 1)
    subject.rooms.on_phase.clear()
    yield {"micro_batches": micro_batches, "step_ms": seconds * 1e3, "ms_by_phase": clock.ms_by_phase()}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        marks = Phases()
        subject.rooms.on_phase.append(marks.enter)
        seconds, _ = subject.step(micro_batches, 2)
        subject.rooms.on_phase.clear()
        marks.enter("")
    yield {"profiled_step_ms": seconds * 1e3, **summary(profiled.events(), cuda)}


def summary(events: Any, cuda: bool) -> dict[str, Any]:
    """Time by kind, from the events of torch.profiler."""
    windows = [
        (e.time_range.start, e.time_range.end, e.name.removeprefix(PHASE))
        for e in events
        if e.name.startswith(PHASE) and e.device_type == torch.autograd.DeviceType.CPU
    ]

    def phase_at(moment: float) -> str:
        return next((name for start, end, name in windows if start <= moment <= end), "between")

    kinds: Counter[str] = Counter()
    by_phase: dict[str, Counter[str]] = {}
    largest: Counter[str] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU or event.name.startswith(PHASE):
            continue
        # a kernel counts to the phase in which the host launched it; the host is ahead of the device
        own = [(k.name, k.duration) for k in event.kernels] if cuda else []
        if not cuda and event.name.startswith("aten::"):
            own = [(event.name, event.self_cpu_time_total)]
        for name, duration in own:
            kinds[kind_of(name)] += duration
            largest[name[:100]] += duration
            by_phase.setdefault(phase_at(event.time_range.start), Counter())[kind_of(name)] += duration
    found: dict[str, Any] = {
        "ms_by_kind": _ms(kinds),
        "ms_by_phase_and_kind": {phase: _ms(own) for phase, own in by_phase.items()},
        "ms_of_the_largest": _ms(Counter(dict(largest.most_common(15)))),
    }
    return found | (_overlap(events) if cuda else {})


def _ms(times: Counter[str]) -> dict[str, float]:
    return {name: round(time / 1e3, 3) for name, time in times.most_common()}


def _overlap(events: Any) -> dict[str, Any]:
    """How long the device computed, copied, only copied, and was idle."""
    computing: list[Interval] = []
    copying: list[Interval] = []
    for event in events:
        own = event.device_type == torch.autograd.DeviceType.CUDA
        if own and not event.name.startswith(PHASE) and not getattr(event, "is_user_annotation", False):
            span = event.time_range.start, event.time_range.end
            (copying if kind_of(event.name) == KINDS[0][0] else computing).append(span)
    if not computing:
        return {"overlap": "the profiler saw no kernel"}
    both = union([*computing, *copying])
    busy, whole = length(computing), both[-1][1] - both[0][0]
    only_copying = length(both) - busy
    times = {
        "span": whole,
        "computing": busy,
        "copying": length(copying),
        "only copying": only_copying,
        "idle": whole - length(both),
    }
    return {"ms_of_the_device": _ms(Counter(times))}
