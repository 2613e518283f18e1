"""INT8 codes with a bf16 scale for every GROUP neighbours: the INT8 stash. Every form gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of

GROUP = 32  # neighbours along the width that share a scale
_ROWS = 1 << 15  # groups that the plain form encodes at one time


def encode(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """x (fp32 or bf16), rounded to nearest. codes: int8 [groups, GROUP]. scales: bf16 [groups, 1]."""
    form = form_of(x)
    if form == NATIVE and x.dtype in native.DTYPES:
        native.call(f"group_encode_{native.suffix(x.dtype)}", x.contiguous(), codes, scales, len(codes))
    elif form == TRITON:
        from lowres.kernels.gpu import groups

        groups.encode(x, codes, scales)
    elif form in (PLAIN, NATIVE):
        for part, kept, scale in zip(
            *(t.split(_ROWS) for t in (x.reshape(-1, GROUP), codes, scales)), strict=True
        ):
            wide = part.float()
            # bf16 may round the scale down, so a value can come to 127.4, which is still 127
            top = wide.abs().amax(1, keepdim=True)
            scale.copy_(top.div_(torch.full_like(top, 127)))  # see update.py
            kept.copy_((wide / scale.float().clamp_(min=1e-30)).round_().clamp_(-127, 127))


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """out = the numbers, fp32 or bf16, contiguous. They are bf16 numbers in both cases, as the scales are."""
    form = form_of(out)
    if form == NATIVE and out.dtype in native.DTYPES:
        native.call(f"group_decode_{native.suffix(out.dtype)}", codes, scales, out, len(codes))
    elif form == TRITON:
        from lowres.kernels.gpu import groups

        groups.decode(codes, scales, out)
    elif form in (PLAIN, NATIVE):
        torch.mul(codes, scales, out=out.view(-1, GROUP))
