"""The interface of an update rule.

An update has two phases. In the first, a rule reads the gradients of one unit of the model (a layer, for
example), updates its state, and turns each gradient *in place* into a direction with a factor. In the
second, the storage of each weight applies `W <- (1 - decay) W - factor * direction` in its own number
format (`lowres.storage`). So a rule knows nothing about INT8, a storage knows nothing about Adam, and the
second phase can become one fused kernel for all rules.

Nothing here waits for the device: numbers of a step that depend on data (how many updates were accepted,
whether this one is) are scalars on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowres.catalogue import Betas
from lowres.storage import Fields, TensorSpec

State = dict[str, Tensor]

# names of state tensors: element-wise moments, and the norm of the last update, which a limiter reads
EXP_AVG, EXP_AVG_SQ, MOMENTUM, UPDATE_NORM = "exp_avg", "exp_avg_sq", "momentum", "norm"


@dataclass(frozen=True)
class Clock:
    """When an update happens, and whether it does.

    step: completed steps of the run before this one; names random numbers and projections.
    updates: int64 scalar on the device, accepted updates of this unit including this one.
    accepted: bool scalar on the device. If false, the gradients have been set to zero, and the rule
        must leave its state as it is and return factors of zero.
    seed: the run's seed; names random numbers.
    rehearsal: whether only memory matters: what takes long is then done once for each shape.
    """

    step: int
    updates: Tensor
    accepted: Tensor
    seed: int
    rehearsal: bool = False

    def moment_weights(self, betas: Betas) -> tuple[Tensor, Tensor]:
        """Weight of the newest value in both moving averages, fp32 scalars; zero if not accepted."""
        return (1 - betas[0]) * self.accepted.float(), (1 - betas[1]) * self.accepted.float()

    def bias_corrections(self, betas: Betas) -> tuple[Tensor, Tensor]:
        """1 - beta^updates for both moments, fp32 scalars; computed in fp64, as 1 - 0.999 loses digits."""
        updates = self.updates.double().clamp(min=1)
        one, two = (1 - beta**updates for beta in betas)
        return one.float(), two.float()


class Rule(ABC):
    """One update rule, shared by all tensors of a group."""

    overwrites: ClassVar[bool] = True
    """Whether the directions overwrite the gradients; if not, the gradients are the directions."""
    moments: ClassVar[Mapping[str, bool]] = {}
    """Its moments of the gradient: state key (first moment first) -> whether it can be negative."""

    # read at every update, as schedulers may change them
    betas: Betas
    eps: float

    @abstractmethod
    def state_fields(self, spec: TensorSpec) -> Fields:
        """The state tensors of a weight. They start as zero bytes."""

    @abstractmethod
    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        """The first phase for some tensors of a unit.

        grads are fp32 and become the directions. Returns one factor for each: fp32, a scalar or one number
        per row [m, 1] or column [1, n]. The learning rate is a multiplier in this factor and nowhere else.
        """

    def product_flops(self, spec: TensorSpec) -> int:
        """Floating-point operations of the matrix products of an update that are more than a constant times
        the elements of the weight, so that a time per element does not contain them."""
        return 0

    def describe(self, spec: TensorSpec) -> dict[str, str]:
        """What `lowres plan --optimizer` prints for a weight's state instead of its shape, by state key;
        under the key "", what it prints about things that are not state."""
        return {}
