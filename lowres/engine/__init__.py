"""Engines: one optimizer step, three ways, behind one interface.

`layerwise` takes all micro-batches of a step through one layer before the next. `autograd` runs the
whole model for each micro-batch with PyTorch's own differentiation, and is the reference. `zero` does the
same under DeepSpeed, on one or many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from lowres.config import Config
from lowres.engine.autograd import AutogradEngine
from lowres.engine.cache import Reader
from lowres.engine.common import Choice, EngineSettings, StepReport, Updater
from lowres.engine.layerwise import LayerwiseEngine
from lowres.model import Starts, Units, is_adapted
from lowres.objective import Pairs
from lowres.rooms import Rooms
from lowres.storage import Unit

__all__ = [
    "AutogradEngine",
    "Choice",
    "Engine",
    "EngineSettings",
    "LayerwiseEngine",
    "Reader",
    "StepReport",
    "make_engine",
]


class Engine(Protocol):
    """The interface of all engines."""

    @property
    def micro_batch(self) -> int:
        """Sequences that are processed together."""

    def reserve(self, sequences: int, length: int, training: bool) -> object:
        """Allocate now what a batch of this size needs, instead of at its first step."""

    def step(
        self,
        batch: Tensor,
        step: int,
        schedule: float,
        rehearsal: bool = False,
        norm_limit: float | None = None,
        loss_limit: float | None = None,
        pairs: Pairs | None = None,
    ) -> StepReport:
        """One optimizer step on batch int64 [sequences, seq_len + 1], words of `data.batches`.

        step: completed steps before this one. schedule: factor on the peak learning rates. rehearsal: do
        everything, but refuse the update, so that weights and state do not change. pairs: of the batch, if
        the objective is about pairs.

        loss_limit: the largest accepted loss. Above it, as with a loss that is not finite, the whole step is
        refused. norm_limit: the largest accepted norm of the gradient. The layer-major engine adds the norm
        up from the head down, and refuses the updates of the unit at which it exceeds the limit, or is not
        finite, and of those below. With clipping it knows the norm before the first update, like the autograd
        engine always does, and then refuses the whole step. DeepSpeed updates before it tells the norm, so
        the zero engine ignores norm_limit; it reports no norms of units.
        """

    def evaluate(self, batch: Tensor) -> tuple[float, int]:
        """Sum of the loss (nats) over the targets of batch, and their number."""

    def log_probabilities(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """For every target of batch int64 [S, T + 1], on the host: its log-probability (nats), fp32 [S, T],
        and whether no token is likelier, bool [S, T] (of equally likely ones, the first). 0 and False where
        the target does not count."""

    def logits(self, tokens: Tensor) -> Tensor:
        """fp32 [B, V]: logits of the token after tokens int64 [B, T]."""

    def reader(self, sequences: int, length: int) -> Reader:
        """What answers as `logits` does for that many sequences that grow, up to `length` tokens; in the
        layer-major engine without reading again what it has read, see `lowres.engine.cache`. It allocates its
        memory now."""

    def marked(self) -> AbstractContextManager[None]:
        """Until it is left, documents begin where the words of a batch are marked (`data.batches.BEGINS`),
        and not where the run says."""

    def units(self, write: bool = False) -> Iterator[Unit]:
        """Every unit, in the order of the forward pass. A unit is complete and valid until the next one is
        requested. write: the caller gives all of its tensors a value, and the engine keeps it."""


def make_engine(
    config: Config,
    units: Units,
    optimizer: Updater | None,
    rooms: Rooms,
    choice: Choice,
    starts: Starts | None = None,
) -> Engine:
    """The engine of a run, with adapters if the units have some. Without an optimizer it can only evaluate;
    the layerwise engine then also serves a deepspeed run. choice: see the plan. starts: see
    `EngineSettings`; given if data.document_mask or an objective asks for it."""
    assert (starts is not None) == config.packed
    settings = EngineSettings.of(config, choice, rooms.device, is_adapted(units), starts)
    engine = AutogradEngine if config.memory.engine == "autograd" else LayerwiseEngine
    return engine(config.model, units, optimizer, rooms, settings)
