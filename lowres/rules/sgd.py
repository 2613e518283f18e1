"""Stochastic gradient descent with heavy-ball momentum (Polyak, 1964), as in `torch.optim.SGD`.

    m <- beta1 m + g,  W <- W - lr m

With beta1 = 0 it is plain SGD without state. Weight decay is decoupled, as in every rule here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowres.rules.base import MOMENTUM, Clock, Rule, State
from lowres.rules.moments import Moment, flat_chunks, moment_fields
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec


class SgdRule(Rule):
    """4, 2 or about 1 byte of state per parameter; none without momentum."""

    moments: ClassVar = {MOMENTUM: True}

    def __init__(self, momentum: float, moments: str = "fp32") -> None:
        self.momentum, self.kept_in = momentum, moments

    def state_fields(self, spec: TensorSpec) -> Fields:
        return moment_fields(MOMENTUM, spec.shape, self.kept_in) if self.momentum else {}

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        if self.momentum:
            keep = torch.where(clock.accepted, self.momentum, 1.0)
            for spec, grad, state in zip(specs, grads, states, strict=True):
                moment, flat = Moment(spec, MOMENTUM, state, clock, signed=True), grad.view(-1)
                for part in flat_chunks(spec.numel, grad.device):
                    m = moment.read(part).mul_(keep).add_(flat[part])
                    moment.write(m, part)
                    flat[part] = m  # a copy, because the direction must not be the state itself
        return [lr * clock.accepted.float()] * len(grads)


@makes("sgd")
def _make(settings: Settings) -> SgdRule:
    return SgdRule(settings.betas[0], settings.moments)
