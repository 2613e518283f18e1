"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270).

The gradient is multiplied by a factor that Adam would have found for a low-rank projection of it: one
factor per channel (APOLLO), or with rank 1 one for the whole matrix (APOLLO-Mini). State is two
projected moments and a norm; the direction is the gradient itself, so no memory of its size is needed.
Written from the paper.

Beyond the paper: each weight has a projection of its own, named by the weight, where the reference
seeds all alike, and the norm-growth limiter is safe from zero, tiny and refused gradients (`limiter`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowres.optim import lowrank
from lowres.optim.base import Clock, State
from lowres.optim.limiter import GROWTH, NORM_FIELDS, limit
from lowres.optim.lowrank import Projection
from lowres.storage import Fields, TensorSpec


class ApolloRule:
    """State of a matrix [m, n]: 2 * rank * max(m, n) + 1 numbers; with an SVD also the projection."""

    overwrites = False

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        projection: Projection,
        scale: float,
        per_channel: bool,
        scale_front: bool = False,
        limiter: float = GROWTH,
    ) -> None:
        """scale: the update is multiplied by its square root, before the limiter if scale_front.
        limiter: most that the norm of an update may grow by, or 0 for no limiter."""
        self.betas, self.eps, self.projection, self.scale = betas, eps, projection, scale
        self.per_channel, self.scale_front, self.limiter = per_channel, scale_front, limiter

    def state_fields(self, spec: TensorSpec) -> Fields:
        fields = lowrank.moment_fields(self.projection.rank, spec.shape)
        if self.limiter:
            fields |= NORM_FIELDS
        return fields | self.projection.state_fields(spec.shape)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        rate = lowrank.rate(lr, clock, self.betas)
        factors: list[Tensor] = []
        for part in lowrank.batches(specs, self.projection.rank):
            factors += self._factors(specs[part], grads[part], states[part], rate, clock)
        return factors

    def _factors(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], rate: Tensor, clock: Clock
    ) -> list[Tensor]:
        """Scaling, sqrt(scale) and limiter (section 4 and algorithm 1) for a batch of k tensors."""
        projected = [
            lowrank.project(grad, self.projection.matrix(spec, grad, state, clock))
            for spec, grad, state in zip(specs, grads, states, strict=True)
        ]
        adam = lowrank.adam(projected, states, clock, self.betas, self.eps)
        if self.per_channel:
            axes = [lowrank.channel_axis(spec.shape) for spec in specs]
            below = lowrank.channel_norms(projected, axes)
            torch._foreach_add_(below, 1e-8)
            factors = list(torch._foreach_div(lowrank.channel_norms(adam, axes), below))
            scaled = torch._foreach_mul(lowrank.channel_norms(grads, axes), factors)
            norms = lowrank.norms(list(scaled))
        else:
            ratio = lowrank.norms(adam) / (lowrank.norms(projected) + 1e-8)
            norms = lowrank.norms(grads) * ratio
        root = math.sqrt(self.scale)
        common = rate * root
        if self.limiter:
            size = norms * root if self.scale_front else norms
            common = common / limit(size, states, clock.accepted, self.limiter)
        if not self.per_channel:
            return list((ratio * common).unbind())
        torch._foreach_mul_(factors, list(common.expand(len(factors)).unbind()))
        return factors
