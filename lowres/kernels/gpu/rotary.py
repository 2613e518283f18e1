"""Rotary position embedding, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import block_of, blocks, launch, warps_of

_NUMBERS = 4096  # pairs that a program rotates at one time


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """sign: of the angles, 1 or -1."""
    assert x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    b, t, heads, width = x.shape
    block = block_of(width // 2)
    height = block_of(heads, max(1, _NUMBERS // block))
    grid = b * t, blocks(heads, height)
    more = t, heads, width // 2, sign < 0, height, block
    launch(_rotate, grid, x, cos, sin, *more, warps=warps_of(height * block))


@triton.jit
def _rotate(x, cos, sin, length, heads, half, BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    place = token % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    inside = pair < half
    mask = (head < heads)[:, None] & inside[None, :]
    c = tl.load(cos + place * half * 2 + pair, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + place * half * 2 + pair, mask=inside, other=0.0)[None, :]
    if BACK:
        s = s * -1.0
    first = x + (token.to(tl.int64) * heads + head[:, None]) * half * 2 + pair[None, :]
    one = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (one * c - two * s).to(x.dtype.element_ty), mask=mask)
    tl.store(first + half, (two * c + one * s).to(x.dtype.element_ty), mask=mask)
