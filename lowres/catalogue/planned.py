"""What fits which graphics card and how fast it is: planned and predicted by `scripts/write_presets.py`, with
what was measured. In a file, because planning all of it takes a minute.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "planned.json"


@dataclass(frozen=True)
class Planned:
    """A preset on a card, planned and predicted; or without a card a preset on a CPU, measured.

    gpu_gib, host_gib: peaks of the plan; None if it does not fit. int8, bf16: tokens/s with these products.
    """

    preset: str
    parameters: int
    card: str | None
    gpu_gib: float | None
    host_gib: float | None
    int8: float | None
    bf16: float | None


@dataclass(frozen=True)
class Everything:
    """All rows. host_budget_gib: what they may take of the host. cpu, source: the machine of the measured
    ones, and the file with them."""

    planned: list[Planned]
    measured: list[Planned]
    host_budget_gib: float
    cpu: str
    source: str


def read() -> Everything:
    values: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    for key in ("planned", "measured"):
        values[key] = [Planned(**row) for row in values[key]]
    return Everything(**values)
