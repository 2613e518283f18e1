"""What both engines share: the report of a step, and how a batch is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.rooms import HOST, Rooms
from lowres.storage import Unit


class Updater(Protocol):
    """What an engine needs of an optimizer; see `lowres.optim.Optimizer.update`."""

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """What happened in a step. loss: mean over the targets, nats. grad_norm: global, before limiting.

    skipped: units (embedding, blocks, head) that were not updated because the loss, or a gradient at
    or above them, was not finite. 0 in a normal step.
    """

    loss: float
    grad_norm: float
    skipped: int


def split(batch: Tensor, micro_batch: int, rooms: Rooms) -> tuple[list[Tensor], list[Tensor], int]:
    """Inputs and targets [b, T] of each micro-batch of batch [S, T + 1], still in host memory, and how
    many targets count (at least 1, to divide by)."""
    with rooms.allocate_in(HOST):
        inputs, targets = inputs_and_targets(batch)
        count = max(1, int((targets != IGNORED).sum()))
        if rooms.device.type == "cuda":  # so that a copy to the device waits for nothing
            inputs, targets = inputs.contiguous().pin_memory(), targets.contiguous().pin_memory()
    return list(inputs.split(micro_batch)), list(targets.split(micro_batch)), count


def sum_of_squares(grads: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of all gradients together, fp64 scalar on the device."""
    # on a CPU `norm` takes twice the time of a dot product, and errs by 0.3 % for 45 M elements
    flat = (grad.view(-1) for grad in grads.values())
    return torch.stack([torch.dot(grad, grad).double() for grad in flat]).sum()
