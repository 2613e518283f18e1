"""What kind of device code works for: that of its tensors, or the one that a plan is made for.

A plan traces the code of a step on tensors without memory (`lowres.memory.trace`). These are CPU tensors
whatever the plan is for, so code that does something else on CUDA asks `kind_of`, not the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUDA, CPU = "cuda", "cpu"
# chunks of a loop that a brief trace goes through: in the second one what the first left behind is still
# there, and so it stays, as all but the last are equally large
ENOUGH_CHUNKS = 2


class _Planned:
    kind: str | None = None
    brief = False


def kind_of(device: torch.device) -> str:
    """cuda or cpu: what to do on a device."""
    return _Planned.kind or device.type


@contextmanager
def planned_for(kind: str, brief: bool = False) -> Iterator[None]:
    """Work as on the other kind of device. brief: where a loop takes equal chunks of a tensor one after
    another, a few are enough, as only the memory is of interest."""
    before = _Planned.kind, _Planned.brief
    _Planned.kind, _Planned.brief = kind, brief
    try:
        yield
    finally:
        _Planned.kind, _Planned.brief = before


def chunks(numel: int, size: int) -> list[slice]:
    """Ranges of `size`, the last one perhaps shorter, that together cover `numel`; in a brief trace the
    first few."""
    starts = range(0, numel, size)
    return [slice(i, min(i + size, numel)) for i in (starts[:ENOUGH_CHUNKS] if _Planned.brief else starts)]
