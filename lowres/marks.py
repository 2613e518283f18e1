"""Marks what a part of a step is for, so that a profile can tell.

`torch.profiler` sees operations, not their purpose: dequantising a matrix is a product of two tensors like
any other, and a C function that is called through ctypes is not seen at all. A mark is an event
`lowres::KIND: name` around them. It exists only while a profile runs, so it costs nothing otherwise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

PREFIX = "lowres::"
# kinds of work
QUANTISE, DEQUANTISE, NORM, SWIGLU, ROPE, LOSS = "quantise", "dequantise", "norm", "swiglu", "rope", "loss"
GEMM, UPDATE, TRANSFER = "gemm", "update", "transfer"

_NOTHING: AbstractContextManager[None] = nullcontext()


def mark(kind: str, name: str) -> AbstractContextManager[object]:
    """A block of code that does this kind of work."""
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(f"{PREFIX}{kind}: {name}")


def kind_in(event: str) -> str | None:
    """The kind in the name of a mark; None if it is no mark."""
    return event[len(PREFIX) :].split(":", 1)[0].strip() if event.startswith(PREFIX) else None
