"""The kind of device that code works for: the device of its tensors, or the one that a plan is made for.

A plan traces the code of a step on tensors without memory (`lowres.memory.trace`). These are always CPU
tensors, so code that behaves differently on CUDA must ask `kind_of` and not the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUDA, CPU = "cuda", "cpu"
# how many chunks of a loop a brief trace runs: during the second one, what the first left is still alive;
# later ones need no more, because all chunks but the last have the same size
ENOUGH_CHUNKS = 2
# elements whose fp32 temporaries exist at one time: as fits the L2 cache of a CPU core, or fills a GPU
CHUNK_CPU, CHUNK_CUDA = 1 << 17, 1 << 22


class _Planned:
    kind: str | None = None
    brief = False


def kind_of(device: torch.device) -> str:
    """cuda or cpu: as which of them code must behave on this device."""
    return _Planned.kind or device.type


@contextmanager
def planned_for(kind: str, brief: bool = False) -> Iterator[None]:
    """Code in the block behaves as on this kind of device. brief: loops over equal chunks of a tensor run
    only the first few, because only the memory is of interest."""
    before = _Planned.kind, _Planned.brief
    _Planned.kind, _Planned.brief = kind, brief
    try:
        yield
    finally:
        _Planned.kind, _Planned.brief = before


def chunks(numel: int, size: int) -> list[slice]:
    """Ranges of `size` that together cover `numel`; the last one may be shorter. In a brief trace, only the
    first few."""
    starts = range(0, numel, size)
    return [slice(i, min(i + size, numel)) for i in (starts[:ENOUGH_CHUNKS] if _Planned.brief else starts)]


def chunk_elements(device: torch.device) -> int:
    """How many elements may have temporaries at one time on a device."""
    return CHUNK_CUDA if kind_of(device) == CUDA else CHUNK_CPU


def row_chunks(shape: tuple[int, ...], device: torch.device) -> list[slice]:
    """Slices of rows that together cover a tensor, none much larger than the chunk size."""
    length = 1 if len(shape) == 1 else shape[1]
    return chunks(shape[0], max(1, chunk_elements(device) // length))
