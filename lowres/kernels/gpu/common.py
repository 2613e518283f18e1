"""What several kernels share: launching, random bits, rounding, INT8 codes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowres import marks
from lowres.marks import mark

# what a profile counts a kernel as, by its file
KINDS = {
    "update": marks.UPDATE,
    "blocks": marks.UPDATE,
    "rounding": marks.DEQUANTISE,
    "quantise": marks.QUANTISE,
    "product": marks.GEMM,
    "norm": marks.NORM,
    "swiglu": marks.SWIGLU,
    "rotary": marks.ROPE,
    "loss": marks.LOSS,
    "groups": marks.QUANTISE,
}
# adding and subtracting it rounds a number below 2^22 to the nearest integer, ties to even
_SHIFT = tl.constexpr(12582912.0)
_TO_UNIT = tl.constexpr(2.0**-24)
_TOP_CODE = tl.constexpr(127.0)
_SMALLEST = tl.constexpr(1e-35)  # lowres.kernels.quantise.SMALLEST
_INFINITY = tl.constexpr(0x7F800000)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any, warps: int, **more: Any) -> None:
    """Start a kernel on the device of its first argument, which need not be the current one."""
    file = kernel.fn.__module__.rpartition(".")[2]  # of the function, also if it is interpreted
    with torch.cuda.device_of(first), mark(KINDS[file], kernel.fn.__name__):
        kernel[grid](first, *others, num_warps=warps, enable_fp_fusion=False, **more)


def block_of(n: int, most: int = 1 << 20) -> int:
    """The power of two that holds n numbers, or `most`."""
    return min(triton.next_power_of_2(n), most)


def warps_of(numbers: int) -> int:
    """Warps for a program that works on this many numbers at one time: 16 a thread, more for the widest."""
    return max(1, min(16, numbers // 512))


def blocks(n: int, block: int) -> int:
    """Blocks that together cover n numbers."""
    return -(-n // block)


def signed(word: int) -> int:
    """The int32 with the bits of `word` modulo 2^32. A kernel gets words as int32, always: Triton would
    compile again for a number that needs 64 bits."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@triton.jit
def magnitude(x):
    """Magnitudes as integers: the order is that of the numbers, and NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def random_bits(index, k0, k1):
    """`lowres.rng.random_bits`. index: uint32. k0, k1: the words of the key, int32."""
    x = index + k0.to(tl.uint32, bitcast=True)
    x ^= x >> 17
    x *= 0xED5AD4BB
    x += k1.to(tl.uint32, bitcast=True)
    x ^= x >> 11
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    x ^= x >> 14
    return x


@triton.jit
def round_to_integer(x, bits):
    """`lowres.rng.round_to_integer`."""
    size = tl.abs(x)
    whole = tl.floor(size)
    uniform = ((bits >> 8).to(tl.float32) + 0.5) * _TO_UNIT
    whole += tl.where(uniform < size - whole, 1.0, 0.0)
    return tl.where(x < 0, whole * -1.0, whole)


@triton.jit
def round_to_bf16(x, bits):
    """`lowres.rng.round_to_bf16`."""
    raw = x.to(tl.uint32, bitcast=True)
    rounded = ((raw + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    # inf and nan stay as they are: the addition could change their exponent
    return tl.where(magnitude(x) < _INFINITY, rounded, x).to(tl.bfloat16)


@triton.jit
def nearest(x):
    """The nearest integer, ties to even, of a number below 2^22."""
    return (x + _SHIFT) - _SHIFT


@triton.jit
def code_of(x):
    """A whole number as an INT8 code; NaN is 0."""
    clamped = tl.minimum(tl.maximum(x, -_TOP_CODE), _TOP_CODE)
    return tl.where(magnitude(x) > _INFINITY, 0.0, clamped).to(tl.int8)


@triton.jit
def scale_of(largest):
    """Scale and inverse for the codes of a row (or of several) from the bits of its largest magnitude. A row
    that is not finite gets a scale of NaN and codes of zero, a row too small to divide by gets zeros."""
    top = largest.to(tl.float32, bitcast=True)
    finite = largest < _INFINITY
    usable = finite & (top >= _SMALLEST)
    scale = tl.where(usable, tl.div_rn(top, _TOP_CODE), 0.0)
    inverse = tl.where(usable, tl.div_rn(_TOP_CODE, top), 0.0)
    return tl.where(finite, scale, float("nan")), inverse


@triton.jit
def quantise_row(wide, mask, codes, scales, row, columns):
    """Writes the codes and the scale of a row of fp32 numbers. codes: points at the row."""
    scale, inverse = scale_of(tl.max(tl.where(mask, magnitude(wide), 0), 0))
    tl.store(scales + row, scale)
    # clamped first: what is too large for `nearest` is inf, whose inverse is 0
    tl.store(codes + columns, code_of(nearest(wide * inverse)), mask=mask)
