"""Which form of a kernel runs.

    plain   operations of PyTorch: the definition
    native  compiled C++, on a CPU
    triton  on CUDA
    traced  nothing runs: a plan traces tensors without memory, and a compiled kernel has only its outputs

Compiled forms are off until `enable` turns them on: a small run does not pay for a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowres.kernels import native
from lowres.target import CPU, CUDA, kind_of

PLAIN, NATIVE, TRITON, TRACED = "plain", "native", "triton", "traced"
COMPILED = {CPU: NATIVE, CUDA: TRITON}

# Triton compiles no INT8 product for an older GPU
TENSOR_CORES = (8, 0)
# the state of this process: the form by kind of device, and where compiled forms have failed
_forms = {CPU: PLAIN, CUDA: PLAIN}
_failed: set[str] = set()


def form_of(x: Tensor) -> str:
    """The form for this tensor."""
    found = _forms[kind_of(x.device)]
    return TRACED if found != PLAIN and isinstance(x, FakeTensor) else found


def enable(kind: str) -> str:
    """Use compiled forms on a kind of device (cpu or cuda) from now on. If that is not possible, returns a
    line that says why, and plain forms remain."""
    try:
        if kind == CPU:
            native.load()
        else:
            _require_triton()
    except native.UnavailableError as error:
        _failed.add(kind)
        disable(kind)
        return f"{error}; PyTorch's operations are used instead, which is slower"
    _failed.discard(kind)
    _forms[kind] = COMPILED[kind]
    return ""


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError:
        raise native.UnavailableError("Triton is not installed (pip install triton)") from None
    found = torch.cuda.get_device_capability()
    if found < TENSOR_CORES:
        raise native.UnavailableError(
            f"kernels need compute capability 8.0, and this GPU has {found[0]}.{found[1]}"
        )


def possible(kind: str) -> bool:
    """Whether compiled forms can be used on a kind of device, as far as is known: plans for a GPU do not need
    one."""
    return kind not in _failed


def disable(kind: str) -> None:
    """Use plain forms on a kind of device from now on."""
    _forms[kind] = PLAIN


def compiled(kind: str) -> bool:
    """Whether compiled forms are used on a kind of device."""
    return _forms[kind] != PLAIN


@contextmanager
def using(kind: str, wanted: bool) -> Iterator[None]:
    """In the block, compiled forms are used on a kind of device, or plain ones. For plans, which need no
    compiler, and for tests."""
    before = _forms[kind]
    _forms[kind] = COMPILED[kind] if wanted else PLAIN
    try:
        yield
    finally:
        _forms[kind] = before
