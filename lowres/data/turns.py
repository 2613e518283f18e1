"""Whose turn it is: which part of a mixture gives which sequence of a run.

The rule for fixed weights (`Turns`) is an apportionment: after any number of turns, every part has had its
share of them to within less than one turn. Among the schedules that hold to this, the seed draws one. Turns
repeat their counts, but not their order, after a block of some thousand, so any turn is found at once.

`Schedule` adds what changes the weights: a part that is used up leaves its weight to the others.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from lowres.errors import UserError
from lowres.rng import make_key, random_bits

# weights that need a larger common denominator are rounded to it
LARGEST_DENOMINATOR = 1 << 16
_LEAST_BLOCK = 1024
_SWAPS = 32  # bits of a random number

# how many sequences a part may give in all. Of a stream that is not read to its end: a function, which
# returns that number, or None if it is at least the argument
Limit = int | Callable[[int], int | None] | None


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The weights, all above 0, as whole numbers in the same proportions. Exact for decimal fractions of
    usual length; otherwise to 1 / LARGEST_DENOMINATOR of the whole, but at least that."""
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    whole = math.lcm(*(part.denominator for part in parts))
    if whole <= LARGEST_DENOMINATOR:
        return [int(part * whole) for part in parts]
    found = [max(1, int(part * LARGEST_DENOMINATOR)) for part in parts]
    while (left := LARGEST_DENOMINATOR - sum(found)) != 0:
        off = [part * LARGEST_DENOMINATOR - count for part, count in zip(parts, found, strict=True)]
        found[off.index(max(off) if left > 0 else min(off))] += 1 if left > 0 else -1
    divisor = math.gcd(*found)
    return [count // divisor for count in found]


class Turns:
    """Turn t of parts with fixed shares: whole numbers above 0. key: `make_key` without a step."""

    def __init__(self, shares: Sequence[int], seed: int, name: str) -> None:
        self.shares = np.array(shares, np.int64)
        self._whole = int(self.shares.sum())
        repeats = -(-_LEAST_BLOCK // self._whole)
        self.length = self._whole * repeats  # turns in a block
        self.per_block = self.shares * repeats
        self._fair = np.tile(_fair(list(map(int, shares))), repeats)

        @lru_cache(maxsize=2)
        def block(number: int) -> np.ndarray:
            return self._shuffled(make_key(seed, "mixture", name, number))

        self.block = block

    def between(self, start: int, end: int) -> np.ndarray:
        """int16 [end - start]: the part of each turn."""
        blocks = range(start // self.length, -(-end // self.length))
        return np.concatenate([self.block(b) for b in blocks])[start - blocks.start * self.length :][
            : end - start
        ]

    def counts(self, turns: int) -> np.ndarray:
        """int64 [parts]: how many of the first `turns` each part has."""
        block, rest = divmod(turns, self.length)
        return self.per_block * block + np.bincount(self.block(block)[:rest], minlength=len(self.shares))

    def turn_of(self, part: int, number: int) -> int:
        """The turn at which a part gives for the (number + 1)th time."""
        block, rest = divmod(number, int(self.per_block[part]))
        return block * self.length + int(np.flatnonzero(self.block(block) == part)[rest])

    def _shuffled(self, key: tuple[int, int]) -> np.ndarray:
        """The turns of a block, after random swaps of neighbours that leave every part within one turn of its
        share."""
        parts = self._fair.copy()
        numbers = np.empty(self.length, np.int64)  # how often the part had its turn before
        for part, count in enumerate(self.per_block):
            numbers[parts == part] = np.arange(count)
        bits = random_bits(key, 0, self.length // 2).numpy()
        for i in range(_SWAPS):
            first = np.arange(i % 2, self.length - 1, 2)
            first = first[(bits[: len(first)] >> i) & 1 == 1]
            a, b = parts[first], parts[first + 1]
            later = (numbers[first] + 1) * self._whole > self.shares[a] * (first + 1)
            earlier = numbers[first + 1] * self._whole < self.shares[b] * (first + 1)
            first = first[(a != b) & later & earlier]
            for array in (parts, numbers):
                array[first], array[first + 1] = array[first + 1], array[first]
        return parts


def _fair(shares: list[int]) -> np.ndarray:
    """int16 [sum of the shares]: turns such that after any number of them, a part is at most
    1 - 1 / (2 n - 2) of a turn from its share (R. Tijdeman, "The chairman assignment problem", 1980)."""
    count, whole = len(shares), sum(shares)
    if count == 1:
        return np.zeros(whole, np.int16)
    unit = 2 * count - 2
    given, turns = [0] * count, np.empty(whole, np.int16)
    for turn in range(whole):
        best, deadline = 0, math.inf
        for part, share in enumerate(shares):
            behind = unit * (share * (turn + 1) - whole * given[part])
            if behind >= whole and ((unit - 1) * whole - behind) / share < deadline:
                best, deadline = part, ((unit - 1) * whole - behind) / share
        turns[turn] = best
        given[best] += 1
    return turns


@dataclass(frozen=True)
class _Phase:
    """What holds from sequence `start` of the run on: `before` sequences of each part were given already, and
    the `active` parts take turns. ends: sequences from which on parts would be used up, as far as known."""

    start: int
    before: tuple[int, ...]
    active: tuple[int, ...]
    turns: Turns | None  # None if every part is used up
    ends: dict[int, int] = field(default_factory=dict)

    def given(self, sequence: int) -> tuple[int, ...]:
        """How many sequences of each part come before this one of the run."""
        found = np.array(self.before, np.int64)
        if self.turns is not None:
            found[list(self.active)] += self.turns.counts(sequence - self.start)
        return tuple(map(int, found))

    def end_of(self, part: int, limit: int) -> int:
        """The sequence of the run at which a part would give more than its limit."""
        if part not in self.ends:
            assert self.turns is not None
            left = max(0, limit - self.before[part])
            turn = self.turns.turn_of(self.active.index(part), left) if left else 0
            self.ends[part] = self.start + turn
        return self.ends[part]


class Schedule:
    """Sequence g of the run -> (part, its sequence k), from sequence `since` on.

    weights: not all 0; a part of weight 0 gives nothing. limits: see `Limit`. before: how many sequences each
    part gave before `since`. A limit is asked only about sequences up to the one that is wanted.
    """

    def __init__(
        self, weights: Sequence[float], limits: Sequence[Limit], seed: int, since: int, before: Sequence[int]
    ) -> None:
        self._weights, self._limits, self._seed = weights, limits, seed
        self._lock = threading.Lock()
        active = tuple(part for part, weight in enumerate(weights) if weight > 0)
        self._phases = [self._phase(since, tuple(before), active)]

    def turns(self, start: int, count: int) -> list[tuple[np.ndarray, int]]:
        """For each part: which of the `count` sequences from `start` on are its (indices), and its own number
        of the first of them; the others follow. Raises UserError if all parts are used up before the end."""
        rows: list[list[np.ndarray]] = [[] for _ in self._weights]
        first = self.given(start)
        at = start
        while at < start + count:
            phase, end = self._reach(at, start + count)
            if phase.turns is None:
                raise UserError(
                    f"data.mixture: all parts are used up after {phase.start:,} sequences; raise their "
                    "epochs, or resume with another mixture"
                )
            parts = phase.turns.between(at - phase.start, end - phase.start)
            for index, part in enumerate(phase.active):
                rows[part].append(np.flatnonzero(parts == index) + (at - start))
            at = end
        return [
            (np.concatenate(found) if found else np.empty(0, np.int64), k)
            for found, k in zip(rows, first, strict=True)
        ]

    def given(self, sequence: int) -> tuple[int, ...]:
        """How many sequences of each part come before sequence `sequence` of the run."""
        return self._reach(sequence, sequence)[0].given(sequence)

    def ends(self) -> list[tuple[int, int]]:
        """(part, sequence of the run from which on it is used up), in this order, as far as is known before
        streams with a limit are read to their ends."""
        while True:
            last = self._phases[-1]
            known = {part: self._limits[part] for part in last.active}
            found = [(last.end_of(part, n), part) for part, n in known.items() if isinstance(n, int)]
            if not found or any(callable(limit) for limit in known.values()):
                break
            self._append(last, *min(found))
        return [
            (part, after.start)
            for before, after in pairwise(self._phases)
            for part in before.active
            if part not in after.active
        ]

    @property
    def over(self) -> int | None:
        """The sequence from which on all parts are used up; None if that is never, or not known."""
        self.ends()
        last = self._phases[-1]
        return last.start if last.turns is None else None

    def _reach(self, sequence: int, end: int) -> tuple[_Phase, int]:
        """The phase of a sequence, and the end of the phase or `end`, whichever is first."""
        while (last := self._phases[-1]).start < end and (found := self._first_end(last, end)):
            self._append(last, *found)
        i = bisect_right(self._phases, sequence, key=lambda phase: phase.start) - 1
        assert i >= 0, "this was before the mixture was changed"
        following = [phase.start for phase in self._phases[i + 1 : i + 2]]
        return self._phases[i], min([end, *following])

    def _first_end(self, phase: _Phase, until: int) -> tuple[int, int] | None:
        """The sequence, before `until`, at which the first part is used up, and the part; None if none is."""
        found = []
        for part in phase.active:
            limit = self._limits[part]
            if callable(limit):
                limit = limit(phase.given(until)[part])
            if limit is not None and (end := phase.end_of(part, limit)) < until:
                found.append((end, part))
        return min(found, default=None)

    def _append(self, last: _Phase, sequence: int, part: int) -> None:
        active = tuple(other for other in last.active if other != part)
        following = self._phase(sequence, last.given(sequence), active)
        with self._lock:  # the next batch is read in a thread
            if self._phases[-1] is last:
                self._phases.append(following)

    def _phase(self, start: int, before: tuple[int, ...], active: tuple[int, ...]) -> _Phase:
        if not active:
            return _Phase(start, before, active, None)
        shares = whole_shares([self._weights[part] for part in active])
        return _Phase(start, before, active, Turns(shares, self._seed, f"from {start}"))
