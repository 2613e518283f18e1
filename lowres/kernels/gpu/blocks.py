"""Linear INT8 codes in blocks that share a scale. A program has several whole blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres import rng
from lowres.kernels.blocks import BLOCK, LARGEST, SMALLEST
from lowres.kernels.gpu.common import (
    blocks,
    code_of,
    launch,
    magnitude,
    random_bits,
    round_to_integer,
    signed,
)

_BLOCK = tl.constexpr(BLOCK)
_LARGEST, _SMALLEST = tl.constexpr(float(LARGEST)), tl.constexpr(SMALLEST)
_TOGETHER = 8  # blocks of a program


def expand(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    assert codes.is_contiguous() and absmax.is_contiguous() and out.is_contiguous()
    n = codes.numel()
    launch(_expand, (blocks(n, _TOGETHER * BLOCK),), codes, absmax, out, n, _TOGETHER, warps=4)


@triton.jit
def _expand(codes, absmax, out, n, TOGETHER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    places = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = places < n
    largest = tl.load(absmax + block, mask=block * _BLOCK < n, other=0.0)
    scale = tl.div_rn(largest, _LARGEST)
    code = tl.load(codes + places, mask=mask, other=0).to(tl.float32)
    tl.store(out + places, code * scale[:, None], mask=mask)


def store(values: Tensor, codes: Tensor, absmax: Tensor, accepted: Tensor, key: rng.Key, start: int) -> None:
    assert values.is_contiguous() and codes.is_contiguous() and absmax.is_contiguous()
    n, words = values.numel(), (signed(key[0]), signed(key[1]), signed(start))
    grid = (blocks(n, _TOGETHER * BLOCK),)
    launch(_store, grid, values, codes, absmax, accepted, *words, n, _TOGETHER, warps=4)


@triton.jit(do_not_specialize=["k0", "k1", "start"])
def _store(values, codes, absmax, accepted, k0, k1, start, n, TOGETHER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    places = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = places < n
    x = tl.load(values + places, mask=mask, other=0.0)
    largest = tl.max(magnitude(x), 1).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(_LARGEST, tl.where(largest < _SMALLEST, _SMALLEST, largest))
    index = places.to(tl.uint32) + start.to(tl.uint32, bitcast=True)
    rounded = round_to_integer(x * inverse[:, None], random_bits(index, k0, k1))
    if tl.load(accepted) != 0:
        tl.store(codes + places, code_of(rounded), mask=mask)
        tl.store(absmax + block, largest, mask=block * _BLOCK < n)
