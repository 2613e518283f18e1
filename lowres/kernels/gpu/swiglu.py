"""SwiGLU and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import block_of, blocks, launch, quantise_row, warps_of

_FLAT = 2048  # numbers of a program that has no rows


def swiglu(gate: Tensor, up: Tensor, out: Tensor | None, codes: Tensor | None, scales: Tensor | None) -> None:
    assert gate.is_contiguous() and up.is_contiguous()
    assert all(t is None or t.is_contiguous() for t in (out, codes, scales))
    if out is not None:
        count = gate.numel()
        launch(_swiglu, (blocks(count, _FLAT),), gate, up, out, count, _FLAT, warps=warps_of(_FLAT))
    if codes is not None:
        rows, n = gate.shape
        block = block_of(n)
        launch(_swiglu_quantised, (rows,), gate, up, codes, scales, n, block, warps=warps_of(block))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _product(gate, up, places, mask):
    g = tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
    return g * _sigmoid(g) * tl.load(up + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    tl.store(out + places, _product(gate, up, places, mask).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_quantised(gate, up, codes, scales, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    first = row.to(tl.int64) * n
    quantise_row(_product(gate, up, first + columns, mask), mask, codes + first, scales, row, columns)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> None:
    assert gate.is_contiguous() and up.is_contiguous()
    count = gate.numel()
    grid = (blocks(count, _FLAT),)
    launch(_swiglu_backward, grid, dy.contiguous(), gate, up, count, _FLAT, warps=warps_of(_FLAT))


@triton.jit
def _swiglu_backward(dy, gate, up, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    g = tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + places, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + places, mask=mask, other=0.0).to(tl.float32)
    s = _sigmoid(g)
    d_gate = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(gate + places, d_gate.to(gate.dtype.element_ty), mask=mask)
    tl.store(up + places, (d * g * s).to(up.dtype.element_ty), mask=mask)
