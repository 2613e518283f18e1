"""Brings units from host memory to the GPU one visit ahead, and writes them back after their update.

There are two slots on the GPU, used in turn. While one visit computes, the units of the next one arrive in
the other slot, and updated units are copied back. A unit whose home is the GPU is used where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lowres.rooms import Event, Homes, Mover
from lowres.storage import Unit


@dataclass(frozen=True)
class Visit:
    """Units that are needed together. update: they are changed, so their state is needed too."""

    units: tuple[str, ...]
    update: bool = False


class Residence:
    """Brings the units of every visit to the GPU, in the order given to `begin`."""

    def __init__(
        self,
        units: Mapping[str, Unit],
        homes: Homes,
        slots: list[Tensor],
        mover: Mover,
    ) -> None:
        """slots: two, each large enough for the hosted units of any visit; none if all are on the GPU."""
        self._units, self._homes, self._slots, self._mover = units, homes, slots, mover
        # when the last copy out of a slot, and into the home of a unit, is done. The engine does not need
        # the second, as a step updates a unit once and ends after all copies; other orders of visits do
        self._left: list[Event] = [None, None]
        self._written: dict[str, Event] = {}
        self._visits: list[Visit] = []
        self._at = 0
        # the units of the next visit on the GPU, and when they are complete
        self._coming: tuple[list[Unit], Event] = ([], None)

    def begin(self, visits: Sequence[Visit]) -> None:
        """Set the visits that follow, in order. The first is fetched now, every other one when the visit
        before it begins. So two neighbouring visits must not update the same units."""
        self._visits, self._at = list(visits), 0
        self._coming = self._fetch(0)

    @contextmanager
    def visit(self) -> Iterator[list[Unit]]:
        """The units of the next visit, on the GPU until the end of the block."""
        visit, (units, event), slot = self._visits[self._at], self._coming, self._at % 2
        self._at += 1
        self._mover.wait(event)
        if self._at < len(self._visits):
            self._coming = self._fetch(self._at)
        yield units
        changed = [
            (home, here)
            for name, unit in zip(visit.units, units, strict=True)
            for home, here in _slabs(self._units[name], unit)
            if visit.update and home is not here
        ]
        if changed:
            self._left[slot] = self._mover.store(changed)
            self._written.update(dict.fromkeys(visit.units, self._left[slot]))

    def _fetch(self, index: int) -> tuple[list[Unit], Event]:
        visit = self._visits[index]
        free = self._slots[index % 2] if self._slots else None
        units, copies = [], []
        for name in visit.units:
            unit = self._units[name]
            weights, state = unit.weights_slab, unit.state_slab if visit.update else None
            if name in self._homes.weights:
                weights, free = _cut(free, weights)
                copies.append((weights, unit.weights_slab))
            if name in self._homes.state and state is not None:
                home = state
                state, free = _cut(free, home)
                copies.append((state, home))
            units.append(unit.over(weights, state) if copies else unit)
        after = [self._left[index % 2], *(self._written.get(name) for name in visit.units)]
        return units, self._mover.fetch(copies, after) if copies else None


def _cut(free: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    assert free is not None
    return free[: like.numel()], free[like.numel() :]


def _slabs(home: Unit, here: Unit) -> Iterator[tuple[Tensor, Tensor]]:
    yield home.weights_slab, here.weights_slab
    if home.state_slab is not None and here.state_slab is not None:
        yield home.state_slab, here.state_slab
