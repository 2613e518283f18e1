"""The description of a tensor of the model, before any memory exists: name, shape, role and kind.

A *role* says what the tensor does in the model ("q", "mlp_norm", "head"); `lowres.model` defines the roles.
A *kind* is what all other code needs: it decides the number format, the optimizer group, and whether weight
decay and adapters apply. Only rules that know the model (Adam-mini) look at roles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowres.catalogue import ADAPTER, BIAS, EMBEDDING, MATRIX, NORM

# the adapter of a matrix [m, n] is A [rank, n] and B [m, rank]; their roles are the role of the matrix plus
# these endings
LORA_A, LORA_B = ".lora_a", ".lora_b"

__all__ = [
    "ADAPTER",
    "BIAS",
    "EMBEDDING",
    "LORA_A",
    "LORA_B",
    "MATRIX",
    "NORM",
    "Fields",
    "TensorSpec",
    "UnitSpec",
]

Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape of a tensor


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model. frozen: it has no gradient and no optimizer state. inner: its dimension that
    lies between two matrices of a block, so that zeros there change nothing."""

    name: str
    shape: tuple[int, ...]
    role: str
    kind: str = MATRIX
    frozen: bool = False
    inner: int | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def padded(self, multiple: int) -> tuple[int, ...]:
        """The shape with the inner dimension rounded up to a multiple."""
        sizes = list(self.shape)
        if self.inner is not None:
            sizes[self.inner] += -sizes[self.inner] % multiple
        return tuple(sizes)


@dataclass(frozen=True)
class UnitSpec:
    """Tensors that a step processes together: the embedding, one block, or the final norm with the head."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def trained(self) -> list[TensorSpec]:
        """The tensors that have gradients."""
        return [spec for spec in self.tensors if not spec.frozen]

    @property
    def adapters(self) -> dict[str, TensorSpec]:
        """The adapters of the unit's matrices, by role."""
        return {spec.role: spec for spec in self.tensors if spec.kind == ADAPTER}
