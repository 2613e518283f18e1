"""Products of INT8 matrices, with int32 sums: exact until the scales are applied.

    y = a b^T * a's scales * b's scales        a [m, k], b [n, k]

Both operands are rows along the sum, which is the layout in which tensor cores are fast. `along_sum` prepares
an operand for it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRACED, TRITON, form_of
from lowres.kernels.quantise import Quantised
from lowres.target import CPU, CUDA, chunks, kind_of

LONGEST_SUM = 2**17  # products of codes that int32 can sum: 127 * 127 * 2^17 is below 2^31
FP32_SUM = 2**24 // (127 * 127)  # the same for fp32


def multiply(a: Quantised, b: Tensor, b_scales: Tensor | None, out: Tensor, add: bool = False) -> Tensor:
    """out [m, n] = the product, or that added to out. b: codes [n, k], in any layout. b_scales: fp32 [n, 1],
    or None if they are folded into a. out: fp32 or bf16."""
    if a.codes.shape[1] > LONGEST_SUM:  # the gradient of a weight from more tokens
        for i, part in enumerate(chunks(a.codes.shape[1], LONGEST_SUM)):
            multiply(Quantised(a.codes[:, part], a.scales), b[:, part], b_scales, out, add or i > 0)
        return out
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
    """int32 [m, n] = a [m, k] b^T for codes b [n, k], exact."""
    # PyTorch's kernel returns garbage for a sum of one number in one layout, and for one row in another
    if min(len(a), len(b), a.shape[1]) > 1 and (kind_of(a.device) == CUDA or is_exact()):
        return torch._int_mm(a, b.t())
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for part in chunks(a.shape[1], FP32_SUM):
        total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


@cache
def is_exact() -> bool:
    """Whether PyTorch's INT8 product is right on this CPU. Without VNNI or AMX (on x86) it adds pairs of
    products in 16 bits, which silently saturates for codes above 64."""
    with _disable_current_modes():  # also correct if a plan asks first
        steps = torch.arange(64 * 96, dtype=torch.int64).view(64, 96)
        a, b = ((steps * step % 255 - 127).to(torch.int8) for step in (7, 13))
        a[:8], b[:8] = 127, -127
        b[8:16] = 127
        wanted = a.long() @ b.long().t()
        layouts = (b.t(), b.t().contiguous())
        return all(torch.equal(torch._int_mm(a, other).long(), wanted) for other in layouts)


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
