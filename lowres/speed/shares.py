"""Divides the wall time of profiled steps into kinds of work, without gaps or overlaps.

On a CPU every moment belongs to the innermost event of the thread that does the step. On CUDA it belongs to
the kernel that runs (the one that started first, if there are several), else to a copy between GPU and host,
else to what the host does: it waits, or it prepares the next launch. So a copy that runs beside a kernel
costs nothing here; `hidden_transfers` says how long such copies took.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lowres.speed.kinds import KINDS, OVERHEAD, TRANSFER, WAITING, kind_on_device, kind_on_host, phase_in
from lowres.speed.phases import BETWEEN
from lowres.speed.trace import Piece, Span, Trace, pieces

STEP = "step: "  # the event of a whole step
LARGEST = 15


@dataclass
class Shares:
    """Microseconds of all profiled steps together, by phase and kind, and of the largest operations or
    kernels."""

    steps: int = 0
    wall: float = 0.0
    by_phase: dict[str, dict[str, float]] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    hidden_transfers: float = 0.0

    @property
    def by_kind(self) -> dict[str, float]:
        """In the order of KINDS, also those that take no time. Their sum is `wall`."""
        return {kind: sum(own.get(kind, 0.0) for own in self.by_phase.values()) for kind in KINDS}

    def add(self, phase: str, kind: str, operation: str, time: float) -> None:
        own = self.by_phase.setdefault(phase or BETWEEN, {})
        own[kind] = own.get(kind, 0.0) + time
        if kind not in (OVERHEAD, WAITING):
            name = operation[:100]
            self.operations[name] = self.operations.get(name, 0.0) + time

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds of one step."""

        def ms(times: dict[str, float]) -> dict[str, float]:
            largest = sorted(times.items(), key=lambda item: -item[1])
            return {name: round(time / 1e3 / self.steps, 3) for name, time in largest}

        return {
            "steps": self.steps,
            "step_ms": round(self.wall / 1e3 / self.steps, 3),
            "ms_by_kind": ms(self.by_kind),
            "ms_by_phase_and_kind": {phase: ms(own) for phase, own in self.by_phase.items()},
            "ms_of_the_largest": dict(itertools.islice(ms(self.operations).items(), LARGEST)),
            "ms_of_hidden_transfers": round(self.hidden_transfers / 1e3 / self.steps, 3),
        }

    def table(self) -> str:
        """The share of a step by kind, and of each kind by phase."""
        phases = sorted(self.by_phase, key=lambda phase: -sum(self.by_phase[phase].values()))
        width = max(map(len, KINDS))
        lines = [f"{'share of a step':<{width}}   total  " + "  ".join(f"{phase:>8}" for phase in phases)]
        for kind, time in self.by_kind.items():
            cells = "  ".join(
                f"{self.by_phase[phase].get(kind, 0.0) / self.wall:>{max(8, len(phase))}.1%}"
                for phase in phases
            )
            lines.append(f"{kind:<{width}}  {time / self.wall:>6.1%}  {cells}")
        return "\n".join(lines)


def shares_of(trace: Trace) -> Shares:
    """All steps of a trace."""
    found = Shares()
    for spans in trace.host.values():
        for step in (span for span in spans if span.name.startswith(STEP)):
            found.steps += 1
            found.wall += step.end - step.start
            host = list(pieces(spans, step.start, step.end))
            if any(span.end > step.start and span.start < step.end for span in trace.device):
                _add_device(found, trace, step, host)
            else:
                for piece in host:
                    kind = kind_on_host(piece.path)
                    found.add(phase_in(piece.path), kind, piece.leaf, piece.end - piece.start)
    return found


def _add_device(found: Shares, trace: Trace, step: Span, host: list[Piece]) -> None:
    launches = _launches(trace, step)
    starts = [piece.start for piece in host]

    def phase_at(moment: float) -> str:
        return phase_in(host[max(0, bisect.bisect_right(starts, moment) - 1)].path)

    for start, end, running in _timeline(trace.device, step):
        kinds = []
        for span in running:
            moment, path = launches.get(span.correlation, (span.start, ()))
            kinds.append((kind_on_device(span.name, path), moment, span.name))
        work = [own for own in kinds if own[0] != TRANSFER]
        found.hidden_transfers += (end - start) * (len(kinds) > len(work) > 0)
        if kinds:
            # a kernel counts to the phase in which the host launched it; the host is ahead of the device
            kind, moment, name = (work or kinds)[0]
            found.add(phase_at(moment), kind, name, end - start)
            continue
        for piece in host[max(0, bisect.bisect_right(starts, start) - 1) :]:
            if piece.start >= end:
                break
            kind = WAITING if kind_on_host(piece.path) == WAITING else OVERHEAD
            found.add(phase_in(piece.path), kind, "", min(end, piece.end) - max(start, piece.start))


def _launches(trace: Trace, step: Span) -> dict[int | None, tuple[float, tuple[str, ...]]]:
    """By correlation: when a kernel was launched, and the events that contained it."""
    found: dict[int | None, tuple[float, tuple[str, ...]]] = {}
    for spans in trace.host.values():
        calls = [span for span in spans if span.correlation is not None]
        around = list(pieces((s for s in spans if s.correlation is None), step.start, step.end))
        starts = [piece.start for piece in around]
        for call in calls:
            if step.start <= call.start < step.end:
                piece = around[max(0, bisect.bisect_right(starts, call.start) - 1)]
                found[call.correlation] = call.start, piece.path
    return found


def _timeline(spans: Iterable[Span], step: Span) -> Iterator[tuple[float, float, list[Span]]]:
    """The time of a step in parts during which the same spans run; those that started first come first."""
    changes: list[tuple[float, bool, int, Span]] = []
    for i, span in enumerate(spans):
        start, end = max(span.start, step.start), min(span.end, step.end)
        if end > start:
            changes += [(start, True, i, span), (end, False, i, span)]
    running: dict[int, Span] = {}
    now = step.start
    for moment, begins, i, span in sorted(changes, key=lambda change: change[:3]):
        if moment > now:
            yield now, moment, list(running.values())
            now = moment
        if begins:
            running[i] = span
        else:
            del running[i]
    if step.end > now:
        yield now, step.end, list(running.values())
