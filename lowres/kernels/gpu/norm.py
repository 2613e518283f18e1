"""RMSNorm and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import block_of, blocks, launch, quantise_row, warps_of
from lowres.kernels.norm import ROWS

_NUMBERS = 8192  # of x that a program of the backward pass holds at one time


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, codes: Tensor | None, scales: Tensor | None
) -> None:
    assert x.is_contiguous() and weight.is_contiguous()
    assert all(t is None or t.is_contiguous() for t in (out, codes, scales))
    rows, n = x.shape
    block = block_of(n)
    launch(_rms_norm, (rows,), x, weight, eps, out, codes, scales, n, block, warps=warps_of(block))


@triton.jit
def _rms_norm(x, weight, eps, out, codes, scales, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    wide = tl.load(x + row.to(tl.int64) * n + columns, mask=mask, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    wide *= tl.load(weight + columns, mask=mask, other=0.0)
    if out is not None:
        tl.store(out + row.to(tl.int64) * n + columns, wide.to(out.dtype.element_ty), mask=mask)
    if codes is not None:
        quantise_row(wide, mask, codes + row.to(tl.int64) * n, scales, row, columns)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor, d_weight: Tensor, partial: Tensor
) -> None:
    """partial: fp32 [blocks of ROWS rows, n], for sums that are the same every time."""
    assert all(t.is_contiguous() for t in (x, weight, dx, d_weight, partial))
    rows, n = x.shape
    block = block_of(n)
    height = max(1, min(ROWS, _NUMBERS // block))
    launch(
        *(_rms_norm_backward, (len(partial),), dy.contiguous(), x, weight, eps, dx, partial, rows, n),
        *(ROWS, height, block),
        warps=warps_of(height * block),
    )
    launch(_add_columns, (blocks(n, 64),), partial, d_weight, len(partial), n, 32, 64, warps=4)


@triton.jit
def _rms_norm_backward(
    dy, x, weight, eps, dx, partial, rows, n, ROWS: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows of x, HEIGHT at one time."""
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    own = tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    total = tl.zeros([HEIGHT, BLOCK], tl.float32)
    # 64 bits only in the scalars, as pointers need many registers
    first = tl.program_id(0) * ROWS
    x += first.to(tl.int64) * n
    dy += first.to(tl.int64) * n
    dx += first.to(tl.int64) * n
    for start in range(0, ROWS, HEIGHT):
        i = start + tl.arange(0, HEIGHT)
        mask = (first + i < rows)[:, None] & inside[None, :]
        places = i[:, None] * n + columns[None, :]
        value = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + places, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / n + eps)
        # times the row, it is the part of the gradient along the normalised row
        part = tl.sum(grad * own * value, 1) * inverse * inverse / n
        total += tl.where(mask, grad * value * inverse[:, None], 0.0)
        found = (grad * own - value * part[:, None]) * inverse[:, None]
        tl.store(dx + places, found.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * n + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def _add_columns(partial, out, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out += the sums of the columns."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        i = start + tl.arange(0, ROWS)
        mask = (i < rows)[:, None] & inside[None, :]
        total += tl.load(partial + i.to(tl.int64)[:, None] * n + columns[None, :], mask=mask, other=0.0)
    before = tl.load(out + columns, mask=inside, other=0.0)
    tl.store(out + columns, before + tl.sum(total, 0), mask=inside)
