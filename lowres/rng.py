"""Named randomness: every random number is a pure function of its purpose.

A `Key` is derived from (seed, purpose, name, step), and the bits of an element from (key, element index).
Nothing depends on call order, chunk size or device. So a resumed run gives the same results, recomputation
gives the same values, and a fused kernel can draw the same bits. Only integer arithmetic modulo 2^32 is
used, which is exact everywhere.

The generator is the 32-bit finaliser `triple32` of C. Wellons ("Prospecting for Hash Functions", 2018),
applied to the index of the element, with one word of the key added before and one word inside it. (The
faster `lowbias32`, with two multiplications, fails a chi-squared test on sequential counters by 8 standard
deviations at 4 M draws.) It is not cryptographic; the tests check the uniformity and independence that
rounding and initialisation need.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

Key = tuple[int, int]

_TO_UNIT = 2.0**-24


def make_key(seed: int, purpose: str, name: str = "", step: int = 0) -> Key:
    """Two 32-bit words from all that names a random quantity."""
    digest = hashlib.blake2b(f"{seed}|{purpose}|{name}|{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _signed(word: int) -> int:
    """The int32 with the bits of `word` modulo 2^32 (torch has no uint32 arithmetic)."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def random_bits(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [count]: 32 random bits for each of the elements start .. start + count - 1."""
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += _signed(start + key[0])
    # `>>` copies the sign bit of an int32, so shifted words are masked
    x ^= (x >> 17).bitwise_and_(0x7FFF)
    x *= _signed(0xED5AD4BB)
    x += _signed(key[1])
    x ^= (x >> 11).bitwise_and_(0x1FFFFF)
    x *= _signed(0xAC4C1B51)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x31848BAB)
    x ^= (x >> 14).bitwise_and_(0x3FFFF)
    return x


def uniform(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [count], uniform on the midpoints of 2^24 equal parts of (0, 1)."""
    bits = random_bits(key, start, count, device)
    return bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(_TO_UNIT)


def normal(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [count], standard normal (Box and Muller, 1958); magnitude at most 5.9."""
    radius = uniform(key, start, count, device).log_().mul_(-2).sqrt_()
    angle = uniform((key[1], key[0] ^ 0x9E3779B9), start, count, device).mul_(2 * math.pi)
    return radius.mul_(angle.cos_())


def permutation(key: Key, count: int) -> Tensor:
    """int64 [count]: a random order of 0 .. count - 1, the same with every version of torch."""
    return torch.argsort(random_bits(key, 0, count), stable=True)


def round_to_integer(x: Tensor, key: Key, start: int) -> Tensor:
    """Round float32 `x` to integers stochastically and without bias; returns float32.

    The magnitude is rounded, so 0 stays 0 and a tiny value keeps its precision: the probability of rounding
    up is exact to 2^-25 for either sign. Element i of `x` uses the bits of start + i.
    """
    size = x.abs()
    whole = size.floor()
    up = uniform(key, start, x.numel(), x.device).view_as(x) < size.sub_(whole)
    return whole.add_(up).copysign_(x)


def round_to_bf16(x: Tensor, key: Key, start: int) -> Tensor:
    """Round float32 `x` to bfloat16 stochastically and without bias.

    bfloat16 is the upper half of float32: add 16 random bits to the lower half, then cut it off. A value that
    bfloat16 can hold never changes. Element i of `x` uses the bits of start + i.
    """
    noise = random_bits(key, start, x.numel(), x.device).view_as(x).bitwise_and_(0xFFFF)
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # inf and nan must stay as they are: the addition could change their exponent
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
