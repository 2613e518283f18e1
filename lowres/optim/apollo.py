"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270).

The gradient is multiplied by a factor that Adam would have found for a random low-rank projection of
it: one factor per channel (APOLLO), or with rank 1 one for the whole matrix (APOLLO-Mini). State is
two projected moments and a norm; the direction is the gradient itself, so no memory of its size is
needed. Written from the paper.

Beyond the paper: each weight has a projection of its own, named by the weight, where the reference
seeds all alike. The norm-growth limiter remembers accepted norms only, ignores a gradient of zero,
and lets its memory fall by at most half a step; one tiny gradient would else hold the updates down
for a thousand steps, as growth is limited to 1 % a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowres import rng
from lowres.optim.base import Clock, State
from lowres.storage import Fields, TensorSpec

GROWTH = 1.01  # the limiter's gamma
# a projection of more numbers is drawn again in every step instead of being kept
KEPT_PROJECTION = 1 << 14
SLOWEST_FALL = 0.5


class Apollo:
    """State of a matrix [m, n]: 2 * rank * max(m, n) + 1 numbers."""

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        rank: int,
        scale: float,
        refresh_every: int,
        per_channel: bool,
        scale_front: bool = False,
        seed: int = 0,
    ) -> None:
        self.betas, self.eps, self.rank, self.scale = betas, eps, rank, scale
        self.refresh_every, self.per_channel, self.scale_front = refresh_every, per_channel, scale_front
        self.seed = seed
        self._drawn: dict[str, tuple[int, Tensor]] = {}  # name -> (draw, projection)

    def state_fields(self, spec: TensorSpec) -> Fields:
        m, n = spec.shape
        projected = torch.float32, (m, self.rank) if m >= n else (self.rank, n)
        return {"exp_avg": projected, "exp_avg_sq": projected, "norm": (torch.float32, ())}

    def projection(self, name: str, shape: tuple[int, ...], step: int, device: torch.device) -> Tensor:
        """fp32 [rank, n] for m >= n, else [m, rank], entries N(0, 1 / rank). A function of its name and
        the step alone, so it is kept only to save drawing it again."""
        draw = step // self.refresh_every
        if name in self._drawn and self._drawn[name][0] == draw:
            return self._drawn[name][1]
        m, n = shape
        key = rng.make_key(self.seed, "projection", name, draw)
        values = rng.normal(key, 0, self.rank * min(m, n), device).div_(math.sqrt(self.rank))
        projection = values.view((self.rank, n) if m >= n else (m, self.rank))
        if projection.numel() <= KEPT_PROJECTION:
            self._drawn[name] = (draw, projection)
        return projection

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that the projection of a weight takes between steps."""
        numel = self.rank * min(shape)
        return 4 * numel if numel <= KEPT_PROJECTION else 0

    def workspace_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes beside the state while the directions of a weight are found: the projection, the projected
        gradient and two more of its size."""
        return 4 * self.rank * (min(shape) + 3 * max(shape))

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        weight1, weight2 = clock.moment_weights(self.betas)
        correction1, correction2 = clock.bias_corrections(self.betas)
        rate = lr * correction2.sqrt() / correction1 * clock.accepted
        return [
            rate * self._factor(spec.name, grad, state, clock, weight1, weight2)
            for spec, grad, state in zip(specs, grads, states, strict=True)
        ]

    def _factor(
        self, name: str, grad: Tensor, state: State, clock: Clock, weight1: Tensor, weight2: Tensor
    ) -> Tensor:
        """Scaling, sqrt(scale) and limiter (section 4 and algorithm 1), without the learning rate."""
        tall = grad.shape[0] >= grad.shape[1]
        p = self.projection(name, tuple(grad.shape), clock.step, grad.device).to(grad.dtype)
        projected = grad @ p.T if tall else p.T @ grad
        state["exp_avg"].lerp_(projected, weight1)
        state["exp_avg_sq"].lerp_(projected.square(), weight2)
        adam = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(self.eps)
        if self.per_channel:
            across = 1 if tall else 0
            factor = adam.norm(dim=across, keepdim=True) / (projected.norm(dim=across, keepdim=True) + 1e-8)
            norm = (grad.norm(dim=across, keepdim=True) * factor).norm()
        else:
            factor = adam.norm() / (projected.norm() + 1e-8)
            norm = grad.norm() * factor
        root = math.sqrt(self.scale)
        last = state["norm"]
        seen = norm * root if self.scale_front else norm
        excess = torch.where(last > 0, (seen / (last + 1e-8)).clamp(min=GROWTH) / GROWTH, 1.0)
        kept = torch.maximum(seen / excess, last * SLOWEST_FALL)
        state["norm"].copy_(torch.where(clock.accepted & (seen > 0), kept, last))
        return factor * (root / excess)
