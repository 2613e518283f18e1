"""Weights in a floating-point format. In fp32 (and fp64, in tests) an update is exact; in bf16 it is rounded
once, stochastically."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowres import rng
from lowres.kernels.update import bf16_update
from lowres.storage.formats import DENSE_DTYPES, Format, register


class Dense:
    """One tensor of the weight's shape."""

    def __init__(self, value: Tensor) -> None:
        self.shape = tuple(value.shape)
        self.value = value

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None or self.value.dtype == dtype:
            return self.value.to(dtype)
        return out.copy_(self.value)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.value[index].to(dtype)

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        for first, rows in values:
            self.value[first : first + len(rows)] = rows

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        if self.value.dtype != torch.bfloat16:
            if decay is not None:
                self.value.mul_(1 - decay)
            self.value.addcmul_(direction, factor.to(self.value.dtype), value=-1)
            return
        bf16_update(self.value, direction, factor, decay, key)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.value}


for name, dtype in DENSE_DTYPES.items():
    register(
        Format(
            name=name,
            parts={"": name},
            fields=lambda shape, dtype=dtype: {"": (dtype, shape)},  # type: ignore[misc]
            over=lambda tensors: Dense(tensors[""]),
            dtype=dtype,
        )
    )
