"""A curve of dots: each character of braille has two columns of four of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EMPTY = 0x2800
# the bit of each dot, by column and row from the top
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
# above this share of the values, the highest are cut off: the first steps would make all others look flat
SHOWN = 0.97


def curve(values: Sequence[float], width: int, height: int) -> tuple[list[str], float, float]:
    """The values, evenly spaced, as `height` lines of `width` characters; and the values at the bottom and at
    the top. Values must be finite, and there must be at least one."""
    there = np.asarray(values, dtype=np.float64)
    low, high = float(there.min()), float(np.quantile(there, SHOWN))
    columns, rows = 2 * width, 4 * height
    parts = np.array_split(there, min(columns, len(there)))
    means = np.array([part.mean() for part in parts])
    place = np.rint(np.linspace(0, columns - 1, len(means))).astype(int)
    filled = np.interp(np.arange(columns), place, means)
    spread = high - low or 1.0
    level = np.rint((np.clip(filled, low, high) - low) / spread * (rows - 1)).astype(int)
    cells = np.full((height, width), EMPTY)
    before = level[0]
    for column, now in enumerate(level):
        # a vertical stroke where neighbours are apart, so the curve has no gaps
        step = 1 if now >= before else -1
        for at in range(before + step if now != before else now, now + step, step):
            row = rows - 1 - at
            cells[row // 4, column // 2] |= DOTS[column % 2][row % 4]
        before = now
    return ["".join(map(chr, line)) for line in cells], low, high
