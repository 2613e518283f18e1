"""GaLore (Zhao et al., arXiv 2403.03507): Adam in the space of the gradient's first singular vectors.

    R = project(G),  N = Adam(R),  W <- W - lr * scale * back(N)

Moments are neither reset nor rotated when the projection changes, as in the authors' code. Written
from the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.rules import lowrank
from lowres.rules.base import Betas, Clock, State
from lowres.rules.lowrank import LowRankRule, SvdProjection, rank_for
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec


class GaLoreRule(LowRankRule):
    """State of a matrix [m, n]: rank * (2 * max(m, n) + min(m, n)) numbers and a count."""

    def __init__(self, betas: Betas, eps: float, projection: SvdProjection, scale: float) -> None:
        self.betas, self.eps, self.projection, self.scale = betas, eps, projection, scale

    def state_fields(self, spec: TensorSpec) -> Fields:
        moments = lowrank.moment_fields(self.projection.rank, spec.shape)
        return moments | self.projection.state_fields(spec.shape)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        for part in lowrank.batches(specs, self.projection.rank):
            matrices = [
                self.projection.matrix(spec, grad, state, clock)
                for spec, grad, state in zip(specs[part], grads[part], states[part], strict=True)
            ]
            projected = [lowrank.project(g, p) for g, p in zip(grads[part], matrices, strict=True)]
            adam = lowrank.adam(projected, states[part], clock, self.betas, self.eps)
            for grad, p, n in zip(grads[part], matrices, adam, strict=True):
                # the gradient is no longer needed: the direction takes its memory
                torch.mm(*((n, p) if lowrank.is_tall(grad.shape) else (p, n)), out=grad)
        return [lowrank.rate(lr, clock, self.betas) * self.scale] * len(grads)


@makes("galore")
def _make(settings: Settings) -> GaLoreRule:
    projection = SvdProjection(rank_for(settings), settings.keys["refresh_every"])
    return GaLoreRule(settings.betas, settings.eps, projection, settings.keys["scale"])
