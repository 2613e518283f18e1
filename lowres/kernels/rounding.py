"""Numbers in a lower precision: weights rounded to INT8 codes or expanded from them, and stochastic rounding
to bf16. Every form gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres import rng
from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of
from lowres.kernels.update import RESCALED_CODE
from lowres.target import row_chunks


def dequantise(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """out [m, n] = codes [m, n] * scales [m, 1]. out: fp32 or bf16, perhaps part of a wider matrix."""
    form = form_of(codes)
    if form == NATIVE and out.dtype in native.DTYPES:
        m, n = codes.shape
        name = f"dequantise_{native.suffix(out.dtype)}"
        native.call(name, codes, scales, native.Strided(out), m, n, out.stride(0))
    elif form == TRITON:
        from lowres.kernels.gpu import rounding

        rounding.dequantise(codes, scales, out)
    elif form in (PLAIN, NATIVE):
        for rows in row_chunks(codes.shape, codes.device):
            out[rows] = codes[rows] * scales[rows]
    return out


def int8_fill(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Set codes [m, n] and scales [m, 1] to the nearest to values [m, n], fp32 or bf16."""
    form = form_of(codes)
    if form == NATIVE and values.dtype in native.DTYPES:
        name = f"int8_fill_{native.suffix(values.dtype)}"
        native.call(name, values.contiguous(), codes, scales, *values.shape)
    elif form == TRITON:
        from lowres.kernels.gpu import rounding

        rounding.int8_fill(values, codes, scales)
    elif form in (PLAIN, NATIVE):
        for rows in row_chunks(codes.shape, codes.device):
            wide = values[rows].float() if values.dtype == torch.bfloat16 else values[rows]
            top = wide.abs().amax(1, keepdim=True)
            own = top.div_(torch.full_like(top, RESCALED_CODE)).clamp_(min=1e-8)
            scales[rows] = own
            codes[rows] = (wide / own).round_().to(torch.int8)


def round_to_bf16(x: Tensor, out: Tensor, key: rng.Key, start: int) -> None:
    """out = fp32 x, rounded stochastically as by `lowres.rng.round_to_bf16`."""
    form = form_of(x)
    if form == NATIVE:
        native.call("bf16_round", x, out, *key, start, x.numel())
    elif form == TRITON:
        from lowres.kernels.gpu import rounding

        rounding.round_to_bf16(x, out, key, start)
    elif form == PLAIN:
        out.copy_(rng.round_to_bf16(x, key, start))
