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
from lowres.kernels.rounding import dequantise, int8_fill
from lowres.kernels.update import int8_update
from lowres.marks import DEQUANTISE, mark
from lowres.storage.formats import Format, register


class Int8:
    """A matrix stored as int8 codes [out, in] and fp32 scales [out, 1]."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.shape = tuple(codes.shape)
        self.codes, self.scales = codes, scales

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        with mark(DEQUANTISE, "weights"):
            return dequantise(self.codes, self.scales, out)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.codes[index] * self.scales[index]).to(dtype)

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        for first, rows in values:
            part = slice(first, first + len(rows))
            int8_fill(rows, self.codes[part], self.scales[part])

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        int8_update(self.codes, self.scales, direction, factor, decay, key)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scales": self.scales}


register(
    Format(
        name="int8",
        parts={"": "int8 codes", ".scales": "scales"},
        fields=lambda shape: {"": (torch.int8, shape), ".scales": (torch.float32, (shape[0], 1))},
        over=lambda tensors: Int8(tensors[""], tensors[".scales"]),
    )
)
