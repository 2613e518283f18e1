"""Updates of stored weights. A row is read twice; the second time it comes from a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres import rng
from lowres.kernels.gpu.common import (
    block_of,
    blocks,
    code_of,
    launch,
    magnitude,
    random_bits,
    round_to_bf16,
    round_to_integer,
    signed,
    warps_of,
)
from lowres.kernels.update import MAX_CODE, PER_COLUMN, PER_ROW, RESCALED_CODE

_PER_ROW, _PER_COLUMN = tl.constexpr(PER_ROW), tl.constexpr(PER_COLUMN)
_MAX_CODE, _HALF = tl.constexpr(float(MAX_CODE)), tl.constexpr(float(MAX_CODE // 2 + 1))
_RESCALED = tl.constexpr(float(RESCALED_CODE))


def int8_update(
    codes: Tensor,
    scales: Tensor,
    direction: Tensor,
    factor: Tensor,
    mode: int,
    decay: Tensor | None,
    key: rng.Key,
) -> None:
    assert codes.is_contiguous() and scales.is_contiguous()
    rows, n = codes.shape
    block = block_of(n, 4096)
    launch(
        *(_int8_update, (rows,), codes, scales, direction.contiguous(), factor.contiguous(), decay),
        *(signed(key[0]), signed(key[1]), n, mode, block),
        warps=warps_of(block),
    )


@triton.jit
def _change(codes, direction, factor, decay, old, negated, columns, mask, MODE: tl.constexpr):
    """Codes, and their change in units of a code, as fp32. negated: -factor in these units, if it is one
    number for the row."""
    code = tl.load(codes + columns, mask=mask, other=0).to(tl.float32)
    change = tl.load(direction + columns, mask=mask, other=0.0)
    if MODE == _PER_COLUMN:
        change *= tl.div_rn(tl.load(factor + columns, mask=mask, other=0.0), old * -1.0)
    else:
        change *= negated
    if decay is not None:
        change = tl.fma(code * -1.0, tl.load(decay), change)  # as addcmul, see lowres/kernels/update.py
    return code, change


@triton.jit(do_not_specialize=["k0", "k1"])
def _int8_update(codes, scales, direction, factor, decay, k0, k1, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    codes += row.to(tl.int64) * n
    direction += row.to(tl.int64) * n
    old = tl.load(scales + row)
    negated = old
    if MODE != _PER_COLUMN:
        negated = tl.div_rn(tl.load(factor + (row if MODE == _PER_ROW else 0)), old * -1.0)
    # what is not of the row counts as 0, whatever the factor is
    largest = tl.zeros([BLOCK], tl.int32)
    moved = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n
        code, change = _change(codes, direction, factor, decay, old, negated, columns, mask, MODE)
        largest = tl.maximum(largest, tl.where(mask, magnitude(code + change), 0))
        moved = tl.maximum(moved, tl.where(mask, magnitude(change), 0))
    top = tl.max(largest, 0).to(tl.float32, bitcast=True)
    fits = ((top >= _HALF) | (tl.max(moved, 0) == 0) | (top == 0.0)) & (top <= _MAX_CODE)
    grow = tl.where(fits, 1.0, tl.div_rn(top, _RESCALED))
    first = row.to(tl.uint32) * n
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n
        code, change = _change(codes, direction, factor, decay, old, negated, columns, mask, MODE)
        # exact: the part that is a code already. rest: what must be rounded, the change or the new value
        exact, rest = code, change
        if not fits:
            exact, rest = code * 0.0, tl.div_rn(code + change, grow)
        rounded = round_to_integer(rest, random_bits(first + columns.to(tl.uint32), k0, k1))
        tl.store(codes + columns, code_of(exact + rounded), mask=mask)
    tl.store(scales + row, old * grow)


def bf16_update(
    value: Tensor, direction: Tensor, factor: Tensor, mode: int, decay: Tensor | None, key: rng.Key
) -> None:
    assert value.is_contiguous()
    rows, n = value.shape if value.dim() == 2 else (1, value.numel())
    block = block_of(n, 4096)
    launch(
        *(_bf16_update, (rows, blocks(n, block)), value, direction.contiguous(), factor.contiguous(), decay),
        *(signed(key[0]), signed(key[1]), n, mode, block),
        warps=warps_of(block),
    )


@triton.jit(do_not_specialize=["k0", "k1"])
def _bf16_update(value, direction, factor, decay, k0, k1, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    places = row.to(tl.int64) * n + columns
    x = tl.load(value + places, mask=mask, other=0.0).to(tl.float32)
    if decay is not None:
        x *= 1.0 - tl.load(decay)
    if MODE == _PER_COLUMN:
        own = tl.load(factor + columns, mask=mask, other=0.0)
    else:
        own = tl.load(factor + (row if MODE == _PER_ROW else 0))
    x = tl.fma(tl.load(direction + places, mask=mask, other=0.0) * -1.0, own, x)
    tl.store(value + places, round_to_bf16(x, random_bits(places.to(tl.uint32), k0, k1)), mask=mask)
