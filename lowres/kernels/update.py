"""The second phase of an update, W <- (1 - decay) W - factor * direction, in one pass over a weight.

Every form gives the same bits. `addcmul` with a broadcast operand rounds once, as a fused multiply-add; so do
the other forms, there and nowhere else. factor: fp32, a scalar or one number per row [m, 1] or column [1, n].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres import rng
from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of
from lowres.target import row_chunks

MAX_CODE = 127
# code of a row's largest value when the row gets a new scale: leaves room to grow before the next new scale
RESCALED_CODE = 120
SCALAR, PER_ROW, PER_COLUMN = 0, 1, 2


def mode_of(factor: Tensor) -> int:
    """How a factor is spread over a matrix."""
    if factor.numel() == 1:
        return SCALAR
    return PER_ROW if factor.shape[0] > 1 else PER_COLUMN


def int8_update(
    codes: Tensor, scales: Tensor, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key
) -> None:
    """Update INT8 codes [m, n] and scales [m, 1] in place; see `lowres.storage.int8`.

    direction: fp32 [m, n]. decay: fp32 scalar or None. key: names the bits for rounding.
    """
    form = form_of(codes)
    if form == NATIVE:
        m, n = codes.shape
        mode, (k0, k1) = mode_of(factor), key
        native.call(
            *("int8_update", codes, scales, direction.contiguous(), factor.contiguous(), mode, decay),
            *(k0, k1, m, n),
        )
    elif form == TRITON:
        from lowres.kernels.gpu import update

        update.int8_update(codes, scales, direction, factor, mode_of(factor), decay, key)
    elif form == PLAIN:
        for rows in row_chunks(codes.shape, codes.device):
            _plain_int8(codes, scales, direction, factor, decay, key, rows)


def _plain_int8(
    codes: Tensor,
    scales: Tensor,
    direction: Tensor,
    factor: Tensor,
    decay: Tensor | None,
    key: rng.Key,
    rows: slice,
) -> None:
    old, scale = codes[rows].float(), scales[rows]
    change = direction[rows] * (factor_of(factor, rows) / -scale)
    if decay is not None:
        change.addcmul_(old, decay, value=-1)
    new = old + change
    top = new.abs().amax(1, keepdim=True)
    unchanged = change.abs().amax(1, keepdim=True) == 0
    fits = ((top >= MAX_CODE // 2 + 1) | unchanged | (top == 0)) & (top <= MAX_CODE)
    # not `top / 120`, which CUDA multiplies by a reciprocal
    grow = torch.where(fits, 1.0, top / torch.full_like(top, RESCALED_CODE))
    # old: the part that is exact already. rest: what must be rounded, the change or the new value
    old.mul_(fits)
    rest = torch.where(fits, change, new.div_(grow))
    rounded = rng.round_to_integer(rest, key, rows.start * codes.shape[1])
    # fp32 may have rounded 127.000004 to 127; rounded up to 128 it would wrap around
    codes[rows] = old.add_(rounded).clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
    scales[rows] = scale * grow


def factor_of(factor: Tensor, rows: slice) -> Tensor:
    """The part of an update's factor that belongs to these rows."""
    return factor[rows] if factor.dim() and factor.shape[0] > 1 else factor


def bf16_update(value: Tensor, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
    """Update a bf16 tensor [m, n] or [n] in place; the arithmetic is fp32, rounded once, stochastically."""
    form = form_of(value)
    if form == NATIVE:
        m, n = value.shape if value.dim() == 2 else (1, value.numel())
        mode, (k0, k1) = mode_of(factor), key
        native.call(
            *("bf16_update", value, direction.contiguous(), factor.contiguous(), mode, decay),
            *(k0, k1, m, n),
        )
    elif form == TRITON:
        from lowres.kernels.gpu import update

        update.bf16_update(value, direction, factor, mode_of(factor), decay, key)
    elif form == PLAIN:
        length = value[0].numel()
        for rows in row_chunks(value.shape, value.device):
            new = value[rows].float()
            if decay is not None:
                new.mul_(1 - decay)
            new.addcmul_(direction[rows], factor_of(factor, rows), value=-1)
            value[rows] = rng.round_to_bf16(new, key, rows.start * length)
