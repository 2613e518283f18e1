"""What a tensor of the model is, before it exists: name, shape, role and kind.

A *role* says what the tensor does in the model ("q", "mlp_norm", "head"); the roles are those of
`lowres.model`. A *kind* says what it is to everything else: which number format keeps it, which optimizer
group updates it, whether weight decay and adapters apply. Only rules that know the model (Adam-mini) look
at roles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# the kinds: matrices of the blocks, embedding and head, and what is small and always fp32
MATRIX, EMBEDDING, NORM, BIAS, ADAPTER = "matrix", "embedding", "norm", "bias", "adapter"
# the adapter of a matrix [m, n] is A [rank, n] and B [m, rank]; their roles are the matrix's with these
# endings
LORA_A, LORA_B = ".lora_a", ".lora_b"

Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model. frozen: it has no gradient and no optimizer state."""

    name: str
    shape: tuple[int, ...]
    role: str
    kind: str = MATRIX
    frozen: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class UnitSpec:
    """What a step visits as a whole: the embedding, one block, or final norm and head."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def trained(self) -> list[TensorSpec]:
        """The tensors that have gradients."""
        return [spec for spec in self.tensors if not spec.frozen]

    @property
    def adapters(self) -> dict[str, TensorSpec]:
        """The adapters of its matrices, by role."""
        return {spec.role: spec for spec in self.tensors if spec.kind == ADAPTER}
