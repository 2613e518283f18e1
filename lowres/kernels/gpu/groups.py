"""The INT8 stash."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import blocks, code_of, launch, magnitude, nearest
from lowres.kernels.groups import GROUP

_GROUPS = 64  # of a program


def encode(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    assert codes.is_contiguous() and scales.is_contiguous()
    count = len(codes)
    launch(_encode, (blocks(count, _GROUPS),), x.contiguous(), codes, scales, count, _GROUPS, GROUP, warps=4)


@triton.jit
def _places(count, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The groups of this program, which of them exist, and their numbers."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    return group, group < count, group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _encode(x, codes, scales, count, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    group, exists, places = _places(count, GROUPS, GROUP)
    wide = tl.load(x + places, mask=exists[:, None], other=0.0).to(tl.float32)
    top = tl.max(magnitude(wide), 1).to(tl.float32, bitcast=True)
    stored = tl.div_rn(top, 127.0).to(tl.bfloat16)
    tl.store(scales + group, stored, mask=exists)
    # bf16 may round the scale down, so a value can come to 127.4, which is still 127
    scale = stored.to(tl.float32)
    scale = tl.where(scale < 1e-30, 1e-30, scale)
    found = code_of(nearest(tl.div_rn(wide, scale[:, None])))
    tl.store(codes + places, found, mask=exists[:, None])


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    assert codes.is_contiguous() and scales.is_contiguous() and out.is_contiguous()
    count = len(codes)
    launch(_decode, (blocks(count, _GROUPS),), codes, scales, out, count, _GROUPS, GROUP, warps=4)


@triton.jit
def _decode(codes, scales, out, count, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    group, exists, places = _places(count, GROUPS, GROUP)
    code = tl.load(codes + places, mask=exists[:, None], other=0).to(tl.float32)
    scale = tl.load(scales + group, mask=exists, other=0.0).to(tl.float32)
    found = (code * scale[:, None]).to(tl.bfloat16)
    tl.store(out + places, found.to(out.dtype.element_ty), mask=exists[:, None])
