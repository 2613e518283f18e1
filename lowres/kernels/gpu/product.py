"""Products of INT8 matrices on tensor cores, and the transposition of an operand.

Both operands are contiguous along the sum, the only layout in which INT8 tensor cores get whole words from
shared memory. Rows whose distance is a multiple of 16 bytes are copied asynchronously; others work, slowly.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import blocks, launch
from lowres.kernels.quantise import Quantised

_GROUP = 8  # blocks of rows that share the columns in the L2 cache
_TILE = 64


class Config(NamedTuple):
    """A program makes m x n numbers of the product. Of the sum it reads twice k in a turn, and up to
    `stages` - 1 turns ahead, in shared memory."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


# From the largest tile, which has the least traffic per operation, to the smallest, for small products.
# For cards with 164 KB of shared memory or more per multiprocessor (A100, H100, B200), and with 100 KB (RTX
# 30, 40 and 50), of which the largest tile takes 96 KB.
_CONFIGS = {
    True: (Config(128, 256, 64, 4, 8), Config(128, 128, 64, 4, 8), Config(64, 64, 64, 4, 4)),
    False: (Config(128, 256, 64, 3, 8), Config(128, 128, 64, 3, 8), Config(64, 64, 64, 3, 4)),
}
# for rows that are not made of whole words of 16 bytes: loads of bytes need registers
_BY_BYTE = Config(64, 64, 32, 2, 8)
_LARGE_SHARED = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3)}


@cache
def card(device: torch.device) -> tuple[bool, int]:
    """Whether a device has much shared memory, and its multiprocessors."""
    if device.type != "cuda":
        return False, 1
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) in _LARGE_SHARED, found.multi_processor_count


def config_for(m: int, n: int, device: torch.device) -> Config:
    """The largest tiles that give every multiprocessor one."""
    large, processors = card(device)
    fitting = (c for c in _CONFIGS[large] if blocks(m, c.m) * blocks(n, c.n) >= processors)
    return next(fitting, _CONFIGS[large][-1])


def multiply(a: Quantised, b: Tensor, b_scales: Tensor | None, out: Tensor, add: bool) -> Tensor:
    codes, (m, n), k = _rows(a.codes), out.shape, a.codes.shape[1]
    b = _rows(b)
    assert a.scales.is_contiguous() and (b_scales is None or b_scales.is_contiguous())
    assert out.stride(1) == 1 and b.shape == (n, k) and len(codes) == m
    whole = not any(t % 16 for t in (k, codes.stride(0), b.stride(0), codes.data_ptr(), b.data_ptr()))
    config = config_for(m, n, out.device) if whole else _BY_BYTE
    launch(
        *(_multiply, (blocks(m, config.m) * blocks(n, config.n),), codes, b, a.scales, b_scales, out),
        *(m, n, k, codes.stride(0), b.stride(0), out.stride(0), add, k % (2 * config.k) == 0),
        *(config.m, config.n, config.k, _GROUP),
        warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _rows(codes: Tensor) -> Tensor:
    return codes if codes.stride(1) == 1 else codes.contiguous()


@triton.jit
def _multiply(
    a, b, a_scales, b_scales, out, m, n, k, a_stride, b_stride, out_stride,
    ADD: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # programs that run at the same time share rows of a and b, so that these come from the L2 cache
    program = tl.program_id(0)
    across = GROUP * tl.cdiv(n, BLOCK_N)
    above = program // across * GROUP
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - above, GROUP)
    top = (above + program % across % height) * BLOCK_M
    left = program % across // height * BLOCK_N
    # rows beyond the last are the last one again, whose results are not stored: a load without a mask is
    # faster; 64 bits only in the scalars, as pointers need many registers
    i = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - top)
    j = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - left)
    along = tl.arange(0, BLOCK_K)
    a += top.to(tl.int64) * a_stride + (i[:, None] * a_stride + along[None, :])
    b += left.to(tl.int64) * b_stride + (j[None, :] * b_stride + along[:, None])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    # Two products in one turn: Triton 3.9 fetches the operands of a single one ahead into registers on
    # sm_8x, a byte of INT8 in a register of its own, and spills.
    for start in range(0, k, 2 * BLOCK_K):
        for half in tl.static_range(2):
            if EVEN_K:
                total = tl.dot(tl.load(a), tl.load(b), total, out_dtype=tl.int32)
            else:
                inside = along < k - start - half * BLOCK_K
                one = tl.load(a, mask=inside[None, :], other=0)
                two = tl.load(b, mask=inside[:, None], other=0)
                total = tl.dot(one, two, total, out_dtype=tl.int32)
            a += BLOCK_K
            b += BLOCK_K
    out += top.to(tl.int64) * out_stride + left
    # In two halves: the numbers to which they are added fit into registers beside one of them.
    one, two = tl.split(tl.reshape(total, [BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1))
    j = tl.arange(0, BLOCK_N // 2)
    _store(one, a_scales + top, b_scales, out, m - top, n, left, j, out_stride, ADD)
    _store(two, a_scales + top, b_scales, out, m - top, n, left, j + BLOCK_N // 2, out_stride, ADD)


@triton.jit
def _store(total, a_scales, b_scales, out, m, n, left, j, out_stride, ADD: tl.constexpr):
    """Scale and store columns j of a tile whose first row is that of a_scales and out, and whose first
    column is `left`."""
    i = tl.arange(0, total.shape[0])
    mask = (i < m)[:, None] & (left + j < n)[None, :]
    wide = total.to(tl.float32) * tl.load(a_scales + i, mask=i < m, other=0.0)[:, None]
    if b_scales is not None:
        wide *= tl.load(b_scales + left + j, mask=left + j < n, other=0.0)[None, :]
    places = i[:, None] * out_stride + j[None, :]
    if ADD:
        wide += tl.load(out + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, wide.to(out.dtype.element_ty), mask=mask)


def transposed(codes: Tensor, out: Tensor) -> None:
    """out [n, m], contiguous, = the transposed codes [m, n]."""
    codes = _rows(codes)
    m, n = codes.shape
    assert out.shape == (n, m) and out.is_contiguous()
    grid = blocks(m, _TILE), blocks(n, _TILE)
    launch(_transpose, grid, codes, out, m, n, codes.stride(0), _TILE, warps=4)


@triton.jit
def _transpose(codes, out, m, n, stride, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (i < m)[:, None] & (j < n)[None, :]
    found = tl.load(codes + i.to(tl.int64)[:, None] * stride + j[None, :], mask=mask, other=0)
    tl.store(out + j.to(tl.int64)[:, None] * m + i[None, :], tl.trans(found), mask=tl.trans(mask))
