"""Rotary position embedding (arXiv 2104.09864) in the rotate-half form, in place. Arithmetic is fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Rotate x [B, T, H, E], contiguous, in place. cos, sin: fp32 [T, E], or [B, 1, T, E]; their halves are
    equal. inverse: rotate back, which is also what turns the gradient of the result into that of x."""
    if cos.dim() > 2:  # a row for every token, as in one long sequence
        x, cos, sin = x.flatten(0, 1).unsqueeze(0), cos.flatten(0, 2), sin.flatten(0, 2)
    form, sign = form_of(x), -1.0 if inverse else 1.0
    b, t, heads, width = x.shape
    if form == NATIVE:
        native.call(f"rotate_{native.suffix(x.dtype)}", x, cos, sin, sign, b * t, t, heads, width)
    elif form == TRITON:
        from lowres.kernels.gpu import rotary

        rotary.rotate(x, cos, sin, sign)
    elif form == PLAIN:
        first, second = x.float().chunk(2, dim=-1)
        c, s = (table[:t, : width // 2].unsqueeze(1) for table in (cos, sin * sign))
        x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=-1))
