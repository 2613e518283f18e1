"""SinkGD (Scetbon et al., arXiv 2502.06742): rows and columns of the gradient normalised in turns, no state.

    X = G [m, n];  5 times:  rows of X to the norm sqrt(n), then its columns to sqrt(m)
    W <- W - lr X

So the update has an RMS of 1, and so has each of its columns; its rows nearly. Written from the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.rules.base import Clock, Rule, State
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec

LEAST_NORM = 1e-18  # the squares of smaller numbers are zero in fp32, which would make their rows the largest


class SinkGdRule(Rule):
    """No state."""

    def __init__(self, steps: int = 5) -> None:
        self.steps = steps

    def state_fields(self, spec: TensorSpec) -> Fields:
        return {}

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        rate, factors = lr * clock.accepted.float(), []
        for grad in grads:
            columns = torch.ones((), device=grad.device)
            for _ in range(self.steps):
                grad.mul_(columns)
                grad.mul_(_to_rms_of_one(grad, 1))
                columns = _to_rms_of_one(grad, 0)
            factors.append(rate * columns)  # the last time the storage multiplies
        return factors


def _to_rms_of_one(matrix: Tensor, axis: int) -> Tensor:
    """By what to multiply the rows (axis 1) or columns (axis 0), so that each has an RMS of 1; those with
    hardly any norm stay small."""
    norms = torch.linalg.vector_norm(matrix, dim=axis, keepdim=True)
    return matrix.shape[axis] ** 0.5 / norms.clamp_(min=LEAST_NORM)


@makes("sinkgd")
def _make(settings: Settings) -> SinkGdRule:
    return SinkGdRule(settings.keys["sinkhorn_steps"])
