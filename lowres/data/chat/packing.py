"""Packing: examples of different lengths into few windows of one length, none of them cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which examples, by their numbers, go into which window: best-fit decreasing. From the longest down,
    those of one length in order, each goes where it leaves the least room, or else into a new window. At most
    11/9 of the fewest windows possible, and one more. No length is above `size`."""
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left, window), sorted
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[example]
        at = bisect_left(room, (length, 0))
        left, window = room.pop(at) if at < len(room) else (size, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window].append(example)
        insort(room, (left - length, window))
    return windows
