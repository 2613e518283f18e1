"""Products of INT8 matrices, with int32 sums: exact until the scales are applied.

    y = a b^T * a's scales * b's scales        a [m, k], b [n, k]

Both operands are rows along the sum, which is the layout in which tensor cores are fast. `along_sum` prepares
an operand for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRACED, TRITON, form_of
from lowres.kernels.quantise import Quantised
from lowres.target import CPU, CUDA, kind_of

# above this, a sum of products of codes could exceed int32
LONGEST_SUM = (2**31 - 1) // (127 * 127)


def multiply(a: Quantised, b: Tensor, b_scales: Tensor | None, out: Tensor, add: bool = False) -> Tensor:
    """out [m, n] = the product, or that added to out. b: codes [n, k], in any layout. b_scales: fp32 [n, 1],
    or None if they are folded into a. out: fp32 or bf16."""
    assert a.codes.shape[1] <= LONGEST_SUM, "an INT8 product of more numbers than int32 can sum"
    form = form_of(out)
    if form == TRITON:
        from lowres.kernels.gpu import product

        return product.multiply(a, b, b_scales, out, add)
    if form == TRACED and kind_of(out.device) == CUDA:
        return out
    acc = int32_product(a.codes, b)
    if form == NATIVE:
        name, (m, n) = f"epilogue_{native.suffix(out.dtype)}", out.shape
        native.call(name, acc, a.scales, b_scales, native.Strided(out), int(add), m, n, out.stride(0))
        return out
    if form == TRACED:
        return out
    wide = acc.float() * a.scales
    if b_scales is not None:
        wide = wide * b_scales.view(1, -1)
    return out.add_(wide) if add else out.copy_(wide)


def int32_product(a: Tensor, b: Tensor) -> Tensor:
    """int32 [m, n] = a [m, k] b^T for codes b [n, k]."""
    k = a.shape[1]
    # PyTorch's kernel returns garbage for a sum of one number in one layout, and for one row in another
    if k == 1 or len(a) == 1 or not a.shape[0] or len(b) == 1:
        return (a.double() @ b.double().t()).to(torch.int32)
    return torch._int_mm(a, b.t())


def along_sum(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """The transposed codes: contiguous on CUDA, in `out` if that is given; a view on a CPU, where PyTorch's
    product takes any layout."""
    if kind_of(codes.device) == CPU:
        return codes.t()
    if out is None:
        out = torch.empty(codes.shape[::-1], dtype=torch.int8, device=codes.device)
    if form_of(codes) == TRITON:
        from lowres.kernels.gpu import product

        product.transposed(codes, out)
    elif form_of(codes) == PLAIN:
        out.copy_(codes.t())
    return out
