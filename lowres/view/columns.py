"""Numbers of any number of records in one pass and bounded memory: their mean, least and greatest in buckets.

A bucket holds `stride` records in a row. When all buckets are full, two and two become one and the stride
doubles; so there are always between half and all of them, however long the run is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Buckets = NDArray[np.int64]
BUCKETS = 2048
# keys of all records together; more are left out, as nobody can look at them
MOST_KEYS = 2000


class Curve(NamedTuple):
    """A key in the buckets that have it. at: their indices. All arrays have one number per bucket."""

    at: Buckets
    mean: Numbers
    least: Numbers
    greatest: Numbers


class _Column:
    def __init__(self, buckets: int) -> None:
        self.number = np.zeros(buckets)
        self.sum = np.zeros(buckets)
        self.least = np.full(buckets, np.inf)
        self.greatest = np.full(buckets, -np.inf)

    def add(self, where: Buckets, number: Numbers, total: Numbers, least: Numbers, greatest: Numbers) -> None:
        """where: the bucket of each number of the other arrays, no two the same."""
        self.number[where] += number
        self.sum[where] += total
        self.least[where] = np.minimum(self.least[where], least)
        self.greatest[where] = np.maximum(self.greatest[where], greatest)

    def halve(self) -> None:
        """Make one bucket of two."""
        ways = (("number", np.add, 0.0), ("sum", np.add, 0.0))
        for name, join, empty in (*ways, ("least", np.minimum, np.inf), ("greatest", np.maximum, -np.inf)):
            pairs = getattr(self, name).reshape(-1, 2)
            joined = join(pairs[:, 0], pairs[:, 1])
            setattr(self, name, np.concatenate([joined, np.full(len(joined), empty)]))


class Columns:
    """The numbers of records by key. count: records. stride: of them in a bucket."""

    def __init__(self, buckets: int = BUCKETS) -> None:
        assert buckets % 2 == 0
        self.count, self.stride, self.buckets = 0, 1, buckets
        self._columns: dict[str, _Column] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    @property
    def keys(self) -> list[str]:
        return list(self._columns)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Add records, in their order. What is no finite number does not count."""
        for start in range(0, len(records), self.buckets):
            self._add(records[start : start + self.buckets])

    def _add(self, records: list[dict[str, Any]]) -> None:
        end = self.count + len(records)
        while end > self.buckets * self.stride:
            self.stride *= 2
            for column in self._columns.values():
                column.halve()
        at = np.arange(self.count, end) // self.stride
        self.count = end
        alike: dict[tuple[str, ...], list[int]] = {}  # records with the same keys are one table
        for index, record in enumerate(records):
            alike.setdefault(tuple(record), []).append(index)
        for keys, own in alike.items():
            self._add_table(keys, at[own], _table([[*records[index].values()] for index in own]))

    def _add_table(self, keys: tuple[str, ...], at: Buckets, table: Numbers) -> None:
        """table: [records, keys]. at: the bucket of each record, ascending."""
        first, there = np.flatnonzero(np.diff(at, prepend=-1)), np.isfinite(table)
        parts = (
            np.add.reduceat(there, first, dtype=np.float64),
            np.add.reduceat(np.where(there, table, 0.0), first),
            np.minimum.reduceat(np.where(there, table, np.inf), first),
            np.maximum.reduceat(np.where(there, table, -np.inf), first),
        )
        for column in np.flatnonzero(there.any(0)):
            key = keys[column]
            if key not in self._columns:
                if len(self._columns) >= MOST_KEYS:
                    continue
                self._columns[key] = _Column(self.buckets)
            self._columns[key].add(at[first], *(part[:, column] for part in parts))

    def curve(self, key: str) -> Curve:
        """Empty for a key that no record has."""
        own = self._columns.get(key)
        if own is None:
            return Curve(np.zeros(0, dtype=np.int64), *(np.zeros(0) for _ in range(3)))
        at = np.flatnonzero(own.number)
        return Curve(at, own.sum[at] / own.number[at], own.least[at], own.greatest[at])

    def number_of(self, key: str) -> int:
        """Records in which the key is a finite number."""
        return int(self._columns[key].number.sum()) if key in self._columns else 0


def _table(rows: list[list[Any]]) -> Numbers:
    """The rows as numbers; NaN for what is none."""
    try:
        return np.array(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([[_number(value) for value in row] for row in rows])


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else np.nan
    except OverflowError:
        return np.nan
