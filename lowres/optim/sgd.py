"""Stochastic gradient descent with heavy-ball momentum (Polyak, 1964), as in `torch.optim.SGD`.

    m <- beta1 m + g,  W <- W - lr m

With beta1 = 0 it is plain SGD without any state. Weight decay is decoupled, as in every rule here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.optim.base import Clock, State
from lowres.optim.moments import Moment, flat_chunks, moment_fields
from lowres.storage import Fields, TensorSpec


class SgdRule:
    """4, 2 or about 1 byte of state a parameter; none without momentum."""

    overwrites = True

    def __init__(self, momentum: float, moments: str = "fp32") -> None:
        self.momentum, self.moments = momentum, moments

    def state_fields(self, spec: TensorSpec) -> Fields:
        return moment_fields("momentum", spec.shape, self.moments) if self.momentum else {}

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        if self.momentum:
            keep = torch.where(clock.accepted, self.momentum, 1.0)
            for spec, grad, state in zip(specs, grads, states, strict=True):
                moment, flat = Moment(spec, "momentum", state, clock, signed=True), grad.view(-1)
                for part in flat_chunks(spec.numel, grad.device):
                    m = moment.read(part).mul_(keep).add_(flat[part])
                    moment.write(m, part)
                    flat[part] = m  # a copy, as the direction must not be the state itself
        return [lr * clock.accepted.float()] * len(grads)
