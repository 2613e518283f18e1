"""Adam-mini (Zhang et al., arXiv 2406.16793): AdamW with one second moment per block of a weight.

    v <- beta2 v + (1 - beta2) mean over the block of g^2
    m <- beta1 m + (1 - beta1) g
    W <- W - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

The blocks are those of the paper and follow from a tensor's role in the model: one per head for query and
key, one per row for every other matrix, one for a whole norm. For an adapter, B has the blocks of the matrix
that it adds to, and A has one per row. A block is always whole rows, so the denominator is a factor per row
and no matrix is divided. Written from the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from lowres.rules.base import EXP_AVG, EXP_AVG_SQ, Betas, Clock, Rule, State
from lowres.rules.moments import average_, moment_fields
from lowres.rules.registry import Settings, makes
from lowres.storage import BIAS, LORA_A, LORA_B, NORM, Fields, TensorSpec

HEAD_ROLES = ("q", "k")
# matrix: one whose role is not known
ROW_ROLES = ("v", "o", "gate", "up", "down", "embedding", "head", "matrix")


def partition(spec: TensorSpec, head_dim: int) -> tuple[int, int]:
    """(number of blocks, rows in each) of a weight; a 1-D weight of m elements has m rows."""
    if spec.kind == NORM:
        rows = spec.shape[0]
    elif spec.kind == BIAS:  # element by element, as in the authors' code
        rows = 1
    elif spec.role.removesuffix(LORA_B) in HEAD_ROLES:
        rows = head_dim
    elif spec.role.removesuffix(LORA_B) in ROW_ROLES or spec.role.endswith(LORA_A):
        rows = 1
    else:
        raise ValueError(f"{spec.name}: adam-mini has no blocks for the role {spec.role!r}")
    assert spec.shape[0] % rows == 0, f"{spec.name}: {spec.shape[0]} rows are not a multiple of {rows}"
    return spec.shape[0] // rows, rows


def describe_partition(specs: Iterable[TensorSpec], head_dim: int) -> str:
    """The blocks of a model's weights, one line per role."""
    tensors: dict[tuple[str, int, int], int] = {}
    for spec in specs:
        key = (spec.role, *partition(spec, head_dim))
        tensors[key] = tensors.get(key, 0) + 1
    return "\n".join(
        f"{role:<10} {blocks:>6} blocks of {rows} rows in each of {count} tensors"
        for (role, blocks, rows), count in tensors.items()
    )


class AdamMiniRule(Rule):
    """First moment per element, one fp32 second moment per block: 4, 2 or about 1 byte per parameter."""

    moments: ClassVar = {EXP_AVG: True, EXP_AVG_SQ: False}

    def __init__(self, betas: Betas, eps: float, head_dim: int, moments: str = "fp32") -> None:
        self.betas, self.eps, self.head_dim, self.kept_in = betas, eps, head_dim, moments

    def state_fields(self, spec: TensorSpec) -> Fields:
        blocks, _ = partition(spec, self.head_dim)
        first = moment_fields(EXP_AVG, spec.shape, self.kept_in)
        return first | {EXP_AVG_SQ: (torch.float32, (blocks,))}

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        _, weight2 = clock.moment_weights(self.betas)
        correction1, correction2 = clock.bias_corrections(self.betas)
        rate = lr / correction1 * clock.accepted
        factors = []
        for spec, grad, state in zip(specs, grads, states, strict=True):
            blocks, rows = partition(spec, self.head_dim)
            v = state[EXP_AVG_SQ].lerp_(_mean_square(grad, blocks), weight2)
            average_(grad, spec, EXP_AVG, state, clock, self.betas)
            denominator = (v / correction2).sqrt_().add_(self.eps)
            factor = rate / denominator
            one_each = factor.unsqueeze(1).expand(blocks, rows).reshape(-1, 1)
            if grad.dim() == 2:
                factors.append(one_each)
            elif blocks == 1:
                factors.append(factor[0])
            else:  # 1-D with a denominator per element, but its factor must be a scalar
                grad.div_(denominator)
                factors.append(rate)
        return factors

    def describe(self, spec: TensorSpec) -> dict[str, str]:
        blocks, rows = partition(spec, self.head_dim)
        return {EXP_AVG_SQ: f"{EXP_AVG_SQ} for {_count(blocks, 'block')} of {_count(rows, 'row')}"}


def _mean_square(grad: Tensor, blocks: int) -> Tensor:
    """Mean of the squares in each block of rows: [blocks]. Sums each row first: this needs no second matrix
    and keeps the fp32 sums short."""
    rows = grad.view(grad.shape[0], -1)
    squares = torch.linalg.vector_norm(rows, dim=1).square_()
    return squares.view(blocks, -1).mean(1).div_(rows.shape[1])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number > 1)


@makes("adam-mini")
def _make(settings: Settings) -> AdamMiniRule:
    assert settings.head_dim is not None, "Adam-mini has a block for each attention head"
    return AdamMiniRule(settings.betas, settings.eps, settings.head_dim, settings.moments)
