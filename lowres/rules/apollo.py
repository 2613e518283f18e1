"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270).

The gradient is multiplied by the factor by which Adam would scale a low-rank projection of it: one factor
per channel (APOLLO), or one for the whole matrix with rank 1 (APOLLO-Mini). The state is two projected
moments and a norm. The direction is the gradient itself, so no memory of its size is needed. Written from
the paper.

Two differences from the paper: each weight has its own projection, seeded with the weight's name (the
reference uses one seed for all), and the norm-growth limiter is safe against zero, tiny and refused
gradients (`limiter`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowres.catalogue import GROWTH
from lowres.rules import lowrank
from lowres.rules.base import Betas, Clock, State
from lowres.rules.limiter import NORM_FIELDS, limit
from lowres.rules.lowrank import LowRankRule, Projection, rank_for
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec


class ApolloRule(LowRankRule):
    """State of a matrix [m, n]: 2 * rank * max(m, n) + 1 numbers; with an SVD, the projection too."""

    overwrites = False

    def __init__(
        self,
        betas: Betas,
        eps: float,
        projection: Projection,
        scale: float,
        per_channel: bool,
        scale_front: bool = False,
        limiter: float = GROWTH,
    ) -> None:
        """scale: the update is multiplied by its square root, before the limiter if scale_front.
        limiter: the largest growth of an update's norm, as a factor; 0 for no limiter."""
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


def _make(settings: Settings, per_channel: bool) -> ApolloRule:
    keys, every = settings.keys, settings.keys["refresh_every"]
    rank = rank_for(settings)
    projection = (
        lowrank.SvdProjection(rank, every)
        if keys["projection"] == "svd"
        else lowrank.RandomProjection(rank, every, settings.seed)
    )
    return ApolloRule(
        settings.betas,
        settings.eps,
        projection,
        keys["scale"],
        per_channel,
        bool(keys["scale_front"]),
        settings.limiter,
    )


@makes("apollo")
def _apollo(settings: Settings) -> ApolloRule:
    return _make(settings, per_channel=True)


@makes("apollo-mini")
def _apollo_mini(settings: Settings) -> ApolloRule:
    return _make(settings, per_channel=False)
