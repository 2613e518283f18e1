"""Numbers in a lower precision, and back."""

from __future__ import annotations

import torch
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
    nearest,
    random_bits,
    signed,
    warps_of,
)
from lowres.kernels.gpu.common import round_to_bf16 as rounded_to_bf16
from lowres.kernels.update import RESCALED_CODE

_RESCALED = tl.constexpr(float(RESCALED_CODE))
_FLAT = 2048  # numbers of a program that has no rows


def dequantise(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    assert codes.is_contiguous() and scales.is_contiguous() and out.stride(1) == 1
    rows, n = codes.shape
    block = block_of(n, 4096)
    grid = rows, blocks(n, block)
    launch(_dequantise, grid, codes, scales, out, n, out.stride(0), block, warps=warps_of(block))


@triton.jit
def _dequantise(codes, scales, out, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    code = tl.load(codes + row.to(tl.int64) * n + columns, mask=mask, other=0).to(tl.float32)
    wide = code * tl.load(scales + row)
    tl.store(out + row.to(tl.int64) * stride + columns, wide.to(out.dtype.element_ty), mask=mask)


def int8_fill(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    assert codes.is_contiguous() and scales.is_contiguous()
    if values.dtype != torch.bfloat16:
        values = values.float()
    rows, n = codes.shape
    block = block_of(n)
    launch(_int8_fill, (rows,), values.contiguous(), codes, scales, n, block, warps=warps_of(block))


@triton.jit
def _int8_fill(values, codes, scales, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    wide = tl.load(values + row.to(tl.int64) * n + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(magnitude(wide), 0).to(tl.float32, bitcast=True), _RESCALED)
    scale = tl.where(scale < 1e-8, 1e-8, scale)
    tl.store(scales + row, scale)
    tl.store(codes + row.to(tl.int64) * n + columns, code_of(nearest(tl.div_rn(wide, scale))), mask=mask)


def round_to_bf16(x: Tensor, out: Tensor, key: rng.Key, start: int) -> None:
    assert x.is_contiguous() and out.is_contiguous()
    words = signed(key[0]), signed(key[1]), signed(start)
    grid = (blocks(x.numel(), _FLAT),)
    launch(_round_to_bf16, grid, x, out, *words, x.numel(), _FLAT, warps=warps_of(_FLAT))


@triton.jit(do_not_specialize=["k0", "k1", "start"])
def _round_to_bf16(x, out, k0, k1, start, numel, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < numel
    index = places.to(tl.uint32) + start.to(tl.uint32, bitcast=True)
    wide = tl.load(x + places, mask=mask, other=0.0)
    tl.store(out + places, rounded_to_bf16(wide, random_bits(index, k0, k1)), mask=mask)
