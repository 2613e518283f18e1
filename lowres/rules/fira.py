"""Fira (Chen et al., arXiv 2410.01623): GaLore, plus the rest of the gradient scaled as in APOLLO.

    R = project(G),  N = Adam(R),  f = ||N|| / ||R|| per channel
    W <- W - lr * (scale * back(N) + (G - scale * back(R)) * f / limiter)

The rest is computed as in the authors' code: G minus the *scaled* back-projection. The paper has
G - back(R). Only the rest passes the norm-growth limiter. Written from the paper.

Two identities save a second matrix of the gradient's size. f is a factor per channel, so it commutes
with `back`: the direction is G * f/L + back(scale * (N - R * f/L)). And because the vectors of P are
orthonormal, a channel of the rest has the squared norm ||g||^2 - scale (2 - scale) ||r||^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.catalogue import GROWTH
from lowres.rules import lowrank
from lowres.rules.base import Betas, Clock, State
from lowres.rules.limiter import NORM_FIELDS, limit
from lowres.rules.lowrank import LowRankRule, SvdProjection, rank_for
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec


class FiraRule(LowRankRule):
    """State of a matrix [m, n]: rank * (2 * max(m, n) + min(m, n)) + 1 numbers and a count."""

    def __init__(
        self,
        betas: Betas,
        eps: float,
        projection: SvdProjection,
        scale: float,
        limiter: float = GROWTH,
    ) -> None:
        """limiter: the largest growth of the rest's norm, as a factor; 0 for no limiter."""
        self.betas, self.eps, self.projection = betas, eps, projection
        self.scale, self.limiter = scale, limiter

    def state_fields(self, spec: TensorSpec) -> Fields:
        fields = lowrank.moment_fields(self.projection.rank, spec.shape)
        if self.limiter:
            fields |= NORM_FIELDS
        return fields | self.projection.state_fields(spec.shape)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        for part in lowrank.batches(specs, self.projection.rank):
            self._directions(specs[part], grads[part], states[part], clock)
        return [lowrank.rate(lr, clock, self.betas)] * len(grads)

    def _directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], clock: Clock
    ) -> None:
        matrices = [
            self.projection.matrix(spec, grad, state, clock)
            for spec, grad, state in zip(specs, grads, states, strict=True)
        ]
        projected = [lowrank.project(g, p) for g, p in zip(grads, matrices, strict=True)]
        adam = lowrank.adam(projected, states, clock, self.betas, self.eps)
        axes = [lowrank.channel_axis(spec.shape) for spec in specs]
        inside = lowrank.channel_norms(projected, axes)
        factors = list(
            torch._foreach_div(lowrank.channel_norms(adam, axes), torch._foreach_add(inside, 1e-8))
        )
        if self.limiter:
            whole = lowrank.channel_norms(grads, axes)
            rest = [
                (g.square() - self.scale * (2 - self.scale) * r.square()).clamp_(min=0).sqrt_() * f
                for g, r, f in zip(whole, inside, factors, strict=True)
            ]
            excess = limit(lowrank.norms(rest), states, clock.accepted, self.limiter)
            torch._foreach_div_(factors, list(excess.unbind()))
        for grad, p, r, n, f in zip(grads, matrices, projected, adam, factors, strict=True):
            low = n.addcmul_(r, f, value=-1)
            grad.mul_(f)
            if lowrank.is_tall(grad.shape):
                grad.addmm_(low, p, alpha=self.scale)
            else:
                grad.addmm_(p, low, alpha=self.scale)


@makes("fira")
def _make(settings: Settings) -> FiraRule:
    projection = SvdProjection(rank_for(settings), settings.keys["refresh_every"])
    return FiraRule(settings.betas, settings.eps, projection, settings.keys["scale"], settings.limiter)
