"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in `torch.optim.AdamW`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.optim.base import Clock, State
from lowres.optim.moments import Moment, flat_chunks, moment_fields
from lowres.storage import Fields, TensorSpec


class AdamWRule:
    """Both moments element by element: 8, 4 or about 2 bytes of state a parameter."""

    overwrites = True

    def __init__(self, betas: tuple[float, float], eps: float, moments: str = "fp32") -> None:
        self.betas, self.eps, self.moments = betas, eps, moments

    def state_fields(self, spec: TensorSpec) -> Fields:
        first = moment_fields("exp_avg", spec.shape, self.moments)
        return first | moment_fields("exp_avg_sq", spec.shape, self.moments)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        weight1, weight2 = clock.moment_weights(self.betas)
        correction1, correction2 = clock.bias_corrections(self.betas)
        for spec, grad, state in zip(specs, grads, states, strict=True):
            first = Moment(spec, "exp_avg", state, clock, signed=True)
            second = Moment(spec, "exp_avg_sq", state, clock, signed=False)
            flat = grad.view(-1)
            for part in flat_chunks(spec.numel, grad.device):
                g, m, v = flat[part], first.read(part), second.read(part)
                m.lerp_(g, weight1)
                v.lerp_(g.square_(), weight2)
                first.write(m, part)
                second.write(v, part)
                # the gradient's memory becomes the denominator, then the direction
                torch.div(v, correction2, out=g).sqrt_().add_(self.eps)
                torch.div(m, g, out=g)
        return [lr / correction1 * clock.accepted] * len(grads)
