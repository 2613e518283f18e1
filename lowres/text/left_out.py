"""What is not read, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_EXAMPLES = 3


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read. data: whether it looks as if it should be."""

    name: str
    size: int
    reason: str
    data: bool = False


def some(left_out: Sequence[LeftOut]) -> str:
    """What is left out in a few words: "a.bin and 3 others, 1,200 bytes (unknown type)"."""
    first = [each.name for each in left_out[:_EXAMPLES]]
    more = len(left_out) - len(first)
    reasons = list(dict.fromkeys(each.reason for each in left_out))
    size = sum(each.size for each in left_out)
    listed = ", ".join(first) + (f" and {more:,} more" if more else "")
    return f"{listed}, {size:,} bytes ({'; '.join(reasons[:_EXAMPLES])})"
