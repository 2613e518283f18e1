"""Reads the Chrome traces that `torch.profiler` writes: what the host and the device did, and when."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Span:
    """An event. start, end: microseconds. correlation: shared by a kernel and its launch."""

    name: str
    start: float
    end: float
    correlation: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A time in which a thread did one thing: the last of `path`, which the others contain."""

    start: float
    end: float
    path: tuple[str, ...]

    @property
    def leaf(self) -> str:
        return self.path[-1] if self.path else ""


@dataclass(frozen=True)
class Trace:
    """host: spans by thread. device: kernels and copies of all streams."""

    host: dict[Any, list[Span]] = field(default_factory=lambda: defaultdict(list))
    device: list[Span] = field(default_factory=list)


def read(path: Path) -> Trace:
    """A trace in JSON, also compressed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return of_events(json.load(file)["traceEvents"])


def of_events(events: Iterable[dict[str, Any]]) -> Trace:
    found = Trace()
    for event in events:
        kind = event.get("cat")
        if event.get("ph") != "X" or kind not in ON_HOST + ON_DEVICE:
            continue
        start = float(event["ts"])
        correlation = event.get("args", {}).get("correlation")
        span = Span(event["name"], start, start + float(event["dur"]), correlation)
        if kind in ON_DEVICE:
            found.device.append(span)
        else:
            found.host[event["tid"]].append(span)
    return found


def pieces(spans: Iterable[Span], start: float, end: float) -> Iterator[Piece]:
    """The time from start to end, without gaps or overlaps, by the innermost span at each moment. An empty
    path: no span."""
    inside = sorted(
        (span for span in spans if span.start < end and span.end > start), key=lambda s: (s.start, -s.end)
    )
    stack: list[Span] = []
    path: tuple[str, ...] = ()
    now = start

    def until(moment: float) -> Iterator[Piece]:
        nonlocal now
        moment = min(max(moment, now), end)
        if moment > now:
            yield Piece(now, moment, path)
            now = moment

    for span in inside:
        while stack and stack[-1].end <= span.start:
            yield from until(stack[-1].end)
            stack.pop()
            path = path[:-1]
        yield from until(span.start)
        stack.append(span)
        path = (*path, span.name)
    while stack:
        yield from until(stack[-1].end)
        stack.pop()
        path = path[:-1]
    yield from until(end)
