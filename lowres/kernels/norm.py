"""RMSNorm (arXiv 1910.07467), alone or with quantisation, and its gradient. Arithmetic is fp32.

x [m, n] in fp32 or bf16, weight fp32 [n].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of
from lowres.kernels.quantise import Quantised, quantise_rows

ROWS = 64  # rows whose gradients of the weight are summed first, so that the sum is the same for any thread


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of x."""
    form = form_of(x)
    if form == PLAIN:
        return _plain(x, weight, eps).to(x.dtype)
    out = torch.empty_like(x)
    _run(form, x, weight, eps, out, None)
    return out


def rms_norm_quantised(x: Tensor, weight: Tensor, eps: float) -> Quantised:
    """`rms_norm` with INT8 codes and a scale for every row instead."""
    form = form_of(x)
    if form == PLAIN:
        return quantise_rows(_plain(x, weight, eps))
    found = Quantised(
        torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    )
    _run(form, x, weight, eps, None, found)
    return found


def _run(
    form: str, x: Tensor, weight: Tensor, eps: float, out: Tensor | None, found: Quantised | None
) -> None:
    codes, scales = found or (None, None)
    if form == NATIVE:
        native.call(f"norm_{native.suffix(x.dtype)}", x, weight, float(eps), out, codes, scales, *x.shape)
    elif form == TRITON:
        from lowres.kernels.gpu import norm

        norm.rms_norm(x, weight, eps, out, codes, scales)


def _plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * wide.square().mean(1, keepdim=True).add_(eps).rsqrt_() * weight


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, d_weight: Tensor | None) -> Tensor:
    """The gradient of x, for dy [m, n] in the dtype of x; that of the weight is added to d_weight [n]."""
    form = form_of(x)
    if form == PLAIN:
        wide, grad = x.float(), dy.float()
        inverse = wide.square().mean(1, keepdim=True).add_(eps).rsqrt_()
        normed = wide * inverse
        added = (grad * normed).sum(0)
        d_normed = grad * weight
        along = (d_normed * normed).mean(1, keepdim=True)
        dx = ((d_normed - normed * along) * inverse).to(x.dtype)
        if d_weight is not None:  # last, so that a lack of memory leaves it as it was
            d_weight.add_(added)
        return dx
    dx, blocks = torch.empty_like(x), -(-len(x) // ROWS)
    partial = torch.empty(blocks, x.shape[1], dtype=torch.float32, device=x.device)
    if d_weight is None:
        d_weight = torch.empty_like(weight)
    if form == NATIVE:
        name = f"norm_backward_{native.suffix(x.dtype)}"
        native.call(name, dy, x, weight, float(eps), dx, d_weight, partial, *x.shape)
    elif form == TRITON:
        from lowres.kernels.gpu import norm

        norm.rms_norm_backward(dy, x, weight, eps, dx, d_weight, partial)
    return dx
