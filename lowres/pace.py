"""How long a run takes, in words: durations, when it ends, and what can be reached in the time one has.

Pure functions of numbers. `lowres.outlook` has the sentences about a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

MINUTE, HOUR, DAY = 60, 3600, 86400
YEAR = 365 * DAY
# a run of more than a few days
LONG = 3 * DAY
# of compute-optimal training (arXiv 2203.15556), and operations for each parameter and token
TOKENS_A_PARAMETER, OPERATIONS = 20, 6


def in_words(seconds: float) -> str:
    """A duration with two or three digits: "45 s", "12 min", "3 h 20 min", "5.5 days", "1.4 years"."""
    if not math.isfinite(seconds):
        return "for ever"
    for size, unit, part, smaller in ((HOUR, "h", MINUTE, "min"), (MINUTE, "min", 1, "s")):
        whole = round(seconds / part)
        if size <= whole * part < 10 * size and seconds >= 89.5:
            large, rest = divmod(whole, size // part)
            return f"{large} {unit} {rest} {smaller}" if rest else f"{large} {unit}"
    below = (
        (9.95, 1, ".2g", "s"),
        (89.5, 1, ".0f", "s"),
        (60 * MINUTE, MINUTE, ".0f", "min"),
        (47.5 * HOUR, HOUR, ".0f", "h"),
        (9.95 * DAY, DAY, ".1f", "days"),
        (364.5 * DAY, DAY, ".0f", "days"),
        (math.inf, YEAR, ",.1f", "years"),
    )
    size, form, unit = next(row[1:] for row in below if seconds < row[0])
    return _counted(f"{seconds / size:{form}}".removesuffix(".0"), unit)


def _counted(number: str, unit: str) -> str:
    return f"1 {unit.rstrip('s')}" if number == "1" and len(unit) > 3 else f"{number} {unit}"


def per_billion(tokens_per_s: float) -> str:
    """How long a billion tokens take, always in days, so that cards compare."""
    days = 1e9 / tokens_per_s / DAY
    return _counted(f"{days:.2g}" if days < 99.5 else f"{days:,.0f}", "days")


def ends(now: datetime, seconds: float) -> str:
    """When something ends that takes so long from now: "at 18:40", "tomorrow at 03:10", "on Tue 1 Dec at
    18:40"; without the time of day if that is more than a month away, and with the year if it is another."""
    try:
        end = now + timedelta(seconds=seconds)
    except (OverflowError, ValueError):
        return "never"
    clock = f"at {end:%H:%M}"
    days = (end.date() - now.date()).days
    if days < 2:
        return f"tomorrow {clock}" if days else clock
    if days < 31:
        return f"on {end:%a} {end.day} {end:%b} {clock}"
    year = f" {end.year}" if end.year != now.year else ""
    return f"on {end.day} {end:%B}{year}"


def count(number: float) -> str:
    """A large number with three digits: "850", "52,400", "5.24 M", "19.7 billion"."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "M")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{float(f'{number:.3g}'):,.0f}"


@dataclass(frozen=True)
class Goal:
    """What is compute-optimal for some number of operations."""

    parameters: float
    tokens: float

    @property
    def operations(self) -> float:
        return OPERATIONS * self.parameters * self.tokens


def optimal(operations: float) -> Goal:
    """The model that these operations train best: 6 N D of them, with D = 20 N."""
    parameters = math.sqrt(operations / (OPERATIONS * TOKENS_A_PARAMETER))
    return Goal(parameters, TOKENS_A_PARAMETER * parameters)


def optimal_in(seconds: float, parameters: float, tokens_per_s: float) -> Goal:
    """What is compute-optimal in this time, at the operations a second of this model and rate. Smaller models
    reach a little less."""
    return optimal(OPERATIONS * parameters * tokens_per_s * seconds)


def nearest(parameters: float, sizes: Mapping[str, int]) -> str:
    """The name of the size that is closest, by ratio."""
    return min(sizes, key=lambda name: abs(math.log(sizes[name] / parameters)))
