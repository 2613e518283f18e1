"""RACS (Gong et al., arXiv 2502.07752): the gradient scaled by running numbers of its rows and columns.

    q, s = the rank-1 matrix q s^T that is closest to G^2   (element by element; 5 steps of a fixed point)
    Q <- beta2 Q + (1 - beta2) q,  S <- beta2 S + (1 - beta2) s
    W <- W - lr G / sqrt(Q S^T), its growth limited (`limiter`)

State of a matrix [m, n]: m + n numbers, and the norm for the limiter. One difference from the paper: the
averages begin with the first values instead of zero, where the first update would be ten times too large.
Written from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowres.catalogue import GROWTH
from lowres.rules import lowrank
from lowres.rules.base import Betas, Clock, Rule, State
from lowres.rules.limiter import NORM_FIELDS, limited
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec
from lowres.target import row_chunks

ROWS, COLUMNS = "rows", "columns"  # state
FIXED_POINT_STEPS = 5
TINY = 1e-30
SMALLEST = torch.finfo(torch.float32).tiny  # mean square that fp32 has with all digits


class RacsRule(Rule):
    """m + n numbers of state for a matrix [m, n], and one for the limiter."""

    moments: ClassVar = {ROWS: False, COLUMNS: False}

    def __init__(self, betas: Betas, eps: float, limiter: float = GROWTH) -> None:
        """eps: the least size to divide by, as a fraction of the gradient's RMS. limiter: the largest growth
        of the update's norm, as a factor; 0 for no limiter."""
        self.betas, self.eps, self.limiter = betas, eps, limiter

    def state_fields(self, spec: TensorSpec) -> Fields:
        rows, columns = (torch.float32, (spec.shape[0], 1)), (torch.float32, (1, spec.shape[1]))
        return {ROWS: rows, COLUMNS: columns} | (NORM_FIELDS if self.limiter else {})

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        _, weight = clock.moment_weights(self.betas)
        accepted, factors = clock.accepted.float(), []
        for grad, state in zip(grads, states, strict=True):
            found, mean_square = rank_one(grad)
            # a first value is taken whole; a gradient whose squares are about zero has no scales
            first = clock.accepted & (state[ROWS].amax() == 0)
            share = torch.where(mean_square >= SMALLEST, torch.where(first, 1.0, weight), 0.0)
            for key, new in zip((ROWS, COLUMNS), found, strict=True):
                state[key].lerp_(new, share)
            rows, columns = (state[key].sqrt() for key in (ROWS, COLUMNS))
            least = self.eps * mean_square.sqrt()
            grad.div_(columns.clamp_(min=least.clamp(min=TINY)))
            # before there are any scales, nothing moves
            factors.append(accepted * (rows.amax() > 0) / rows.clamp(min=self.eps))
        if self.limiter:
            factors = limited(grads, factors, states, clock.accepted, self.limiter)
        return [factor * lr for factor in factors]


def rank_one(grad: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(q [m, 1], s [1, n]), with q s^T close to grad^2, and the mean of grad^2. q has about the size of 1."""
    m, n = grad.shape
    mean_square = lowrank.norms([grad])[0].square() / (m * n)
    unit = mean_square.clamp(min=TINY)
    inverse = 1 / unit
    q, s = grad.new_ones(m, 1), grad.new_zeros(1, n)
    parts = row_chunks(grad.shape, grad.device)
    for _ in range(FIXED_POINT_STEPS):
        s.zero_()
        for rows in parts:
            s.addmm_(q[rows].T, grad[rows].square().mul_(inverse))
        s.div_(q.square().sum().clamp(min=TINY))
        for rows in parts:
            q[rows] = grad[rows].square().mul_(inverse) @ s.T
        q.div_(s.square().sum().clamp(min=TINY))
    return (q, s * unit), mean_square


@makes("racs")
def _make(settings: Settings) -> RacsRule:
    return RacsRule(settings.betas, settings.eps, settings.limiter)
