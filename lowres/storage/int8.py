"""INT8 codes with one fp32 scale per output row: W = codes * scales.

Symmetric codes in [-127, 127]: 1 + 4 / row length bytes per parameter. The scale is sticky: while every new
value of a row fits the old scale, only the *change* is rounded, in units of a code. So an update of zero
changes nothing, and a small update adds little noise. A row gets a new scale, and is rounded as a whole,
when its values exceed the codes or use less than half of their range.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowres import rng
from lowres.marks import DEQUANTISE, mark
from lowres.storage.formats import Format, factor_of, register, row_chunks

MAX_CODE = 127
# code of a row's largest value when the row gets a new scale: leaves room to grow before the next new scale
RESCALED_CODE = 120


class Int8:
    """A matrix stored as int8 codes [out, in] and fp32 scales [out, 1]."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.shape = tuple(codes.shape)
        self.codes, self.scales = codes, scales

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        with mark(DEQUANTISE, "weights"):
            for rows in row_chunks(self.shape, self.codes.device):
                out[rows] = self.codes[rows] * self.scales[rows]
        return out

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.codes[index] * self.scales[index]).to(dtype)

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        for first, rows in values:
            scales = rows.abs().amax(1, keepdim=True).div_(RESCALED_CODE).clamp_(min=1e-8)
            self.scales[first : first + len(rows)] = scales
            self.codes[first : first + len(rows)] = (rows / scales).round_().to(torch.int8)

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        for rows in row_chunks(self.shape, self.codes.device):
            codes, scales = self.codes[rows].float(), self.scales[rows]
            change = direction[rows] * (factor_of(factor, rows) / -scales)
            if decay is not None:
                change.addcmul_(codes, decay, value=-1)
            new = codes + change
            top = new.abs().amax(1, keepdim=True)
            unchanged = change.abs().amax(1, keepdim=True) == 0
            fits = ((top >= MAX_CODE // 2 + 1) | unchanged | (top == 0)) & (top <= MAX_CODE)
            grow = torch.where(fits, 1.0, top / RESCALED_CODE)
            # codes: the part that is exact already. rest: what must be rounded, the change or the new value
            codes.mul_(fits)
            rest = torch.where(fits, change, new.div_(grow))
            rounded = rng.round_to_integer(rest, key, rows.start * self.shape[1])
            # fp32 may have rounded 127.000004 to 127; rounded up to 128 it would wrap around
            self.codes[rows] = codes.add_(rounded).clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
            self.scales[rows] = scales * grow

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scales": self.scales}


register(
    Format(
        name="int8",
        about="codes with one scale per row, 1.001 to 1.008 bytes per parameter; only the change is rounded, "
        "stochastically",
        parts={"": "int8 codes", ".scales": "scales"},
        fields=lambda shape: {"": (torch.int8, shape), ".scales": (torch.float32, (shape[0], 1))},
        over=lambda tensors: Int8(tensors[""], tensors[".scales"]),
    )
)
