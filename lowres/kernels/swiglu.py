"""SwiGLU (arXiv 2002.05202): silu(gate) * up, alone or with quantisation, and its gradient.

gate and up [m, n] in fp32 or bf16; arithmetic is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of
from lowres.kernels.quantise import Quantised, quantise_rows


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The product in the dtype of gate."""
    form = form_of(gate)
    if form == PLAIN:
        return _plain(gate, up).to(gate.dtype)
    out = torch.empty_like(gate)
    _run(form, gate, up, out, None)
    return out


def swiglu_quantised(gate: Tensor, up: Tensor) -> Quantised:
    """The product as INT8 codes with a scale for every row."""
    form = form_of(gate)
    if form == PLAIN:
        return quantise_rows(_plain(gate, up))
    found = Quantised(
        torch.empty_like(gate, dtype=torch.int8),
        torch.empty(len(gate), 1, dtype=torch.float32, device=gate.device),
    )
    _run(form, gate, up, None, found)
    return found


def _run(form: str, gate: Tensor, up: Tensor, out: Tensor | None, found: Quantised | None) -> None:
    codes, scales = found or (None, None)
    if form == NATIVE:
        native.call(f"swiglu_{native.suffix(gate.dtype)}", gate, up, out, codes, scales, *gate.shape)
    elif form == TRITON:
        from lowres.kernels.gpu import swiglu

        swiglu.swiglu(gate, up, out, codes, scales)


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return wide * torch.sigmoid(wide) * up.float()


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """Replaces gate and up by their gradients, for the gradient dy [m, n] of the product."""
    form = form_of(gate)
    if form == PLAIN:
        g, u, d = gate.float(), up.float(), dy.float()
        s = torch.sigmoid(g)
        d_gate, d_up = d * u * s * (1 + g * (1 - s)), d * g * s
        gate.copy_(d_gate)
        up.copy_(d_up)
    elif form == NATIVE:
        native.call(f"swiglu_backward_{native.suffix(gate.dtype)}", dy, gate, up, gate.numel())
    elif form == TRITON:
        from lowres.kernels.gpu import swiglu

        swiglu.swiglu_backward(dy, gate, up)
