"""How a weight can be stored between uses: the interface of a storage, and the registry of formats.

Training reads a weight with `dense` (or `rows`, for an embedding) and writes it with `apply`, the second
phase of every update:

    W <- (1 - decay) * W - factor * direction

The arithmetic is fp32 in every format; low precision costs exactly one stochastic rounding per write (bf16
arithmetic would lose 70 % of an update of 3e-5 before it is rounded). All work is done in chunks of rows, so
a write needs little memory beyond the weight. Random bits are named by element (`lowres.rng`), so the chunk
size does not change any result.

A format is one file in this package that ends with `register(Format(...))`. The catalogue
(`lowres.catalogue.formats`) has what config and help say about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowres import rng
from lowres.catalogue import WEIGHT_FORMATS
from lowres.storage.specs import Fields
from lowres.target import kind_of

DENSE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Storage(Protocol):
    """One stored weight. `shape` is the shape of the weight, not of the tensors that store it."""

    shape: tuple[int, ...]

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`, or the stored tensor itself if it has that dtype. Do not write to it.

        out: where the result goes if a conversion is needed: the shape of the weight, perhaps part of
        something larger.
        """

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight in `dtype`: shape index.shape + shape[1:]."""

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        """Set the weight from (first row, fp32 rows) pieces, rounding to nearest."""

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        """W <- (1 - decay) W - factor * direction, rounded stochastically with the bits of `key`.

        direction: fp32, the shape of the weight. factor: fp32, scalar or one per row [m, 1] or per
        column [1, n]. decay: fp32 scalar, or None for no weight decay.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint, by suffix to the weight's name."""


@dataclass(frozen=True)
class Format:
    """A number format for weights.

    name: its name in `memory.weights` and in the catalogue. parts: the tensors that store
    a weight: suffix to its name -> what the plan calls it. fields: the dtypes and shapes of these tensors,
    for the shape of a weight. over: makes a storage from such tensors. dtype: in which matrix products can
    use the weight as stored, or None.
    """

    name: str
    parts: Mapping[str, str]
    fields: Callable[[tuple[int, ...]], Fields]
    over: Callable[[Mapping[str, Tensor]], Storage]
    dtype: torch.dtype | None = None


FORMATS: dict[str, Format] = {}


def register(found: Format) -> None:
    """Make a format known under its name."""
    assert found.name in WEIGHT_FORMATS and found.name not in FORMATS, found.name
    FORMATS[found.name] = found


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that `memory.compute` means on this device."""
    if name == "auto":
        name = "bf16" if kind_of(device) == "cuda" else "fp32"
    return DENSE_DTYPES[name]
