"""Activations and gradients as INT8 codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import (
    block_of,
    blocks,
    code_of,
    launch,
    magnitude,
    nearest,
    quantise_row,
    scale_of,
    warps_of,
)

# rows and columns of x that a program reads at one time: both rows of x and rows of codes are whole sectors
_ROWS, _COLUMNS = 128, 64


def quantise_rows(x: Tensor, fold: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    assert x.is_contiguous() and codes.is_contiguous() and scales.is_contiguous()
    assert fold is None or fold.is_contiguous()
    rows, n = x.shape
    block = block_of(n)
    launch(_quantise_rows, (rows,), x, fold, codes, scales, n, block, warps=warps_of(block))


@triton.jit
def _quantise_rows(x, fold, codes, scales, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    wide = tl.load(x + row.to(tl.int64) * n + columns, mask=mask, other=0.0).to(tl.float32)
    if fold is not None:
        wide *= tl.load(fold + columns, mask=mask, other=0.0)
    quantise_row(wide, mask, codes + row.to(tl.int64) * n, scales, row, columns)


def quantise_columns(x: Tensor, fold: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The scales hold the bits of the largest magnitudes first, so that no other memory is needed."""
    assert x.is_contiguous() and fold.is_contiguous() and codes.is_contiguous() and scales.is_contiguous()
    rows, n = x.shape
    largest = scales.zero_().view(torch.int32)
    grid = blocks(rows, _ROWS), blocks(n, _COLUMNS)
    launch(_column_maxima, grid, x, fold, largest, rows, n, _ROWS, _COLUMNS, warps=8)
    launch(_quantise_columns, grid, x, fold, codes, largest, rows, n, _ROWS, _COLUMNS, warps=8)
    launch(_column_scales, (blocks(n, 1024),), largest, scales, n, 1024, warps=4)


@triton.jit
def _tile(x, fold, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The numbers that this program works on, with the factors of their rows, and where they are."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (i < rows)[:, None] & (j < n)[None, :]
    wide = tl.load(x + i.to(tl.int64)[:, None] * n + j[None, :], mask=mask, other=0.0).to(tl.float32)
    wide *= tl.load(fold + i, mask=i < rows, other=0.0)[:, None]
    return wide, mask, i, j


@triton.jit
def _column_maxima(x, fold, largest, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    wide, _, _, j = _tile(x, fold, rows, n, ROWS, COLUMNS)
    tl.atomic_max(largest + j, tl.max(magnitude(wide), 0), mask=j < n, sem="relaxed")


@triton.jit
def _quantise_columns(x, fold, codes, largest, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    wide, mask, i, j = _tile(x, fold, rows, n, ROWS, COLUMNS)
    _, inverse = scale_of(tl.load(largest + j, mask=j < n, other=0))
    found = code_of(nearest(wide * inverse[None, :]))
    tl.store(codes + j.to(tl.int64)[:, None] * rows + i[None, :], tl.trans(found), mask=tl.trans(mask))


@triton.jit
def _column_scales(largest, scales, n, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    scale, _ = scale_of(tl.load(largest + columns, mask=mask, other=0))
    tl.store(scales + columns, scale, mask=mask)
