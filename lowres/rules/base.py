"""The interface of an update rule.

An update has two phases. In the first a rule looks at the gradients of one unit of the model (a
layer, say), brings its state up to date and turns each gradient *in place* into a direction, with a
factor for it. In the second the storage of each weight applies `W <- (1 - decay) W - factor *
direction` in its own number format (`lowres.storage`). So a rule knows nothing of INT8, a storage
nothing of Adam, and the second phase can become one fused kernel for all of them.

Nothing here waits for the device: step-dependent numbers that depend on data (how many updates were
accepted, whether this one is) are scalars on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowres.storage import Fields, TensorSpec

State = dict[str, Tensor]
Betas = tuple[float, float]

# names of state: element-wise moments, and the norm of the last update that a limiter compares with
EXP_AVG, EXP_AVG_SQ, MOMENTUM, NORM = "exp_avg", "exp_avg_sq", "momentum", "norm"


@dataclass(frozen=True)
class Clock:
    """When an update happens, and whether it does.

    step: completed steps of the run before this one; names random numbers and projections.
    updates: int64 scalar on the device, accepted updates of this unit including this one.
    accepted: bool scalar on the device. If false the gradients have been set to zero, and the rule
        must leave its state as it is and return factors of zero.
    seed: that of the run; names random numbers.
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
        """1 - beta^updates for both moments, fp32 scalars; fp64 inside, as 1 - 0.999 would lose digits."""
        updates = self.updates.double().clamp(min=1)
        one, two = (1 - beta**updates for beta in betas)
        return one.float(), two.float()


class Rule(ABC):
    """One update rule, shared by all tensors of a group."""

    overwrites: ClassVar[bool] = True
    """Whether the directions are put where the gradients were; if not, they are the gradients."""
    moments: ClassVar[Mapping[str, bool]] = {}
    """Its moments of the gradient by key of state, the first one first, and whether each can be negative."""

    betas: Betas
    eps: float

    @abstractmethod
    def state_fields(self, spec: TensorSpec) -> Fields:
        """The state tensors of a weight. They start as zero bytes."""

    @abstractmethod
    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        """Phase one for some tensors of a unit.

        grads are fp32 and become the directions. Returns a factor for each, with the learning rate in it
        as a factor and nowhere else: fp32, scalar or one per row [m, 1] or column [1, n].
        """

    def kept_bytes(self, spec: TensorSpec) -> int:
        """Bytes that the rule keeps between steps for a weight, beside its state."""
        return 0

    def workspace_bytes(self, specs: Sequence[TensorSpec]) -> int:
        """Most bytes beside gradients and state while the directions of these tensors are found; 0 for a
        rule that works in small chunks."""
        return 0

    def describe(self, spec: TensorSpec) -> dict[str, str]:
        """What `lowres plan --optimizer` says of the state of a weight instead of its shape, by key; and of
        what is no state, under the key ""."""
        return {}
