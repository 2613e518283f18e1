"""Activations and gradients as INT8 codes, for INT8 products.

Symmetric in [-127, 127], never -128: an uneven range would bias gradients (arXiv 2510.25602). Rounded to
nearest. A row (or column) that holds inf or NaN gets a scale of NaN, so its products are NaN and the step is
skipped, as it would be in floating point.

A scale that varies along the sum of a product cannot be applied after it, so it is folded into the other
operand before that is quantised: the scales of a weight into the gradient of its output, and the scales of
the tokens into the gradient for the weight's gradient.

All forms give the same codes and scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of

TOP_CODE = 127
SMALLEST = 1e-35  # of a row that has codes; a smaller one counts as zero, because its inverse would overflow


class Quantised(NamedTuple):
    """codes int8 [m, n] and fp32 scales [m, 1]: row i stands for codes[i] * scales[i]."""

    codes: Tensor
    scales: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[m, n] in a floating-point format."""
        from lowres.kernels.rounding import dequantise

        return dequantise(self.codes, self.scales, torch.empty_like(self.codes, dtype=dtype))


def quantise_rows(x: Tensor, fold: Tensor | None = None) -> Quantised:
    """x [m, n] (fp32 or bf16), with column j multiplied by fold[j] first, with a scale for every row."""
    codes, scales = torch.empty_like(x, dtype=torch.int8), _scales(len(x), x)
    form = form_of(x)
    if form == NATIVE:
        native.call(f"quantise_rows_{native.suffix(x.dtype)}", x, fold, codes, scales, *x.shape)
    elif form == TRITON:
        from lowres.kernels.gpu import quantise

        quantise.quantise_rows(x, fold, codes, scales)
    elif form == PLAIN:
        wide = x.float() if fold is None else x.float() * fold.view(1, -1)
        _plain(wide, codes, scales)
    return Quantised(codes, scales)


def quantise_columns(x: Tensor, fold: Tensor) -> Quantised:
    """The columns of x [m, n], with row i multiplied by fold[i] first, as rows: codes [n, m], scales [n, 1].
    On CUDA the codes are contiguous, as tensor cores want them; on a CPU they are a transposed view."""
    scales, form = _scales(x.shape[1], x), form_of(x)
    if form == TRITON:
        from lowres.kernels.gpu import quantise

        codes = torch.empty(x.shape[::-1], dtype=torch.int8, device=x.device)
        quantise.quantise_columns(x, fold, codes, scales)
        return Quantised(codes, scales)
    codes = torch.empty_like(x, dtype=torch.int8).t()
    if form == NATIVE:
        name = f"quantise_columns_{native.suffix(x.dtype)}"
        native.call(name, x, fold, codes.t(), scales, *x.shape)
    elif form == PLAIN:
        _plain(x.t().float() * fold.view(1, -1), codes, scales)
    return Quantised(codes, scales)


def _scales(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, 1, dtype=torch.float32, device=like.device)


def _plain(wide: Tensor, codes: Tensor, scales: Tensor) -> None:
    top = wide.abs().amax(1, keepdim=True)
    usable = top.isfinite() & (top >= SMALLEST)
    # not `127 / top`, which is 127 times a rounded reciprocal; nor `top / 127`, which CUDA computes like that
    most = torch.full_like(top, TOP_CODE)
    scales.copy_(torch.where(top.isfinite(), torch.where(usable, top / most, 0.0), torch.nan))
    inverse = torch.where(usable, most / top, 0.0)
    found = (wide * inverse).round_().clamp_(-TOP_CODE, TOP_CODE)
    codes.copy_(found.nan_to_num_(0.0))
