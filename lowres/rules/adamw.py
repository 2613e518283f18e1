"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in `torch.optim.AdamW`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowres.rules.base import EXP_AVG, EXP_AVG_SQ, Betas, Clock, Rule, State
from lowres.rules.moments import Moment, flat_chunks, moment_fields
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec


class AdamWRule(Rule):
    """Both moments per element: 8, 4 or about 2 bytes of state per parameter."""

    moments: ClassVar = {EXP_AVG: True, EXP_AVG_SQ: False}

    def __init__(self, betas: Betas, eps: float, moments: str = "fp32") -> None:
        self.betas, self.eps, self.kept_in = betas, eps, moments

    def state_fields(self, spec: TensorSpec) -> Fields:
        first = moment_fields(EXP_AVG, spec.shape, self.kept_in)
        return first | moment_fields(EXP_AVG_SQ, spec.shape, self.kept_in)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        weight1, weight2 = clock.moment_weights(self.betas)
        correction1, correction2 = clock.bias_corrections(self.betas)
        for spec, grad, state in zip(specs, grads, states, strict=True):
            first = Moment(spec, EXP_AVG, state, clock, signed=True)
            second = Moment(spec, EXP_AVG_SQ, state, clock, signed=False)
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


@makes("adamw")
def _adamw(settings: Settings) -> AdamWRule:
    return AdamWRule(settings.betas, settings.eps, settings.moments)


@makes("adamw8bit")
def _adamw8bit(settings: Settings) -> AdamWRule:
    return AdamWRule(settings.betas, settings.eps, "int8")
