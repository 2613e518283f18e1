"""What the engines share: their settings, the report of a step, and how a batch is split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lowres.config import Config, ReloraConfig
from lowres.data.batches import BEGINS, IGNORED, inputs_and_targets
from lowres.kernels import forms
from lowres.model import Lengths, Starts, lengths_of
from lowres.objective import Examples, Objective, Pairs, make_objective
from lowres.rooms import HOST, Homes, Rooms
from lowres.storage import FORMATS, Unit, compute_dtype
from lowres.target import CUDA, kind_of

PAD = 16  # 32 bytes in bf16, and 16 in INT8


class Updater(Protocol):
    """What an engine needs from an optimizer; see `lowres.optim.Optimizer.update`."""

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None: ...


@dataclass(frozen=True)
class Choice:
    """What the plan decides if the config says "auto". band: layers that are recomputed and differentiated
    together. homes: where units, stash and carry live. texts: that are sampled together."""

    micro_batch: int
    band: int = 1
    homes: Homes = field(default_factory=Homes)
    texts: int = 1


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine, in addition to model, weights and optimizer.

    micro_batch, band, homes, texts: see `Choice`; the units must have been made with the same homes. compute:
    number format of the activations. loss_chunk: tokens whose logits exist at one time. stash_dtype: see
    `boundaries.make_encoding`. exact_forward: if the stash is lossy, the forward pass continues from the
    exact values instead of the stored ones. grad_clip: largest global gradient norm; if not 0, the
    layer-major engine finds the norm in one backward pass and updates in a second one. adapters: settings of
    the adapters, if the units have some. seed: the run's seed; names the dropout masks. pad: the inner
    dimension of working copies is a multiple of this many elements (`TensorSpec.inner`), because tensor
    cores want rows of a multiple of 16 bytes. int8: multiply the codes of INT8 weights; wide_gradients:
    except in the products for their gradients. transposes: INT8 products need both operands contiguous along
    the sum, so the backward pass transposes codes. fused: see `lowres.engine.fused`. starts: where documents
    start that do not see each other; None if all tokens before are context. objective: what a step
    minimises; None for the mean over its targets.
    """

    micro_batch: int
    compute: torch.dtype
    loss_chunk: int = 1024
    band: int = 1
    homes: Homes = field(default_factory=Homes)
    stash_dtype: str = "auto"
    exact_forward: bool = False
    grad_clip: float = 0.0
    adapters: ReloraConfig | None = None
    seed: int = 0
    pad: int = 1
    int8: bool = False
    wide_gradients: bool = False
    transposes: bool = False
    fused: bool = False
    starts: Starts | None = None
    objective: Objective | None = None
    texts: int = 1

    @classmethod
    def of(
        cls,
        config: Config,
        choice: Choice,
        device: torch.device,
        adapted: bool,
        starts: Starts | None = None,
    ) -> EngineSettings:
        """The settings of a run, with adapters or without."""
        kept = config.memory
        compute, on_gpu = compute_dtype(kept.activations_in, device), kind_of(device) == "cuda"
        # weights stored in the compute format are used without a copy
        copied = compute == torch.bfloat16 and FORMATS[kept.weights].dtype != compute
        int8 = kept.compute == "int8"
        return cls(
            choice.micro_batch,
            compute,
            kept.loss_chunk,
            choice.band,
            choice.homes,
            kept.stash_dtype,
            kept.exact_forward,
            config.optim.grad_clip,
            config.relora if adapted else None,
            config.run.seed,
            PAD if copied and on_gpu else 1,
            int8,
            int8 and kept.compute_wgrad == "dense",
            int8 and on_gpu,
            int8 or kept.kernels == "fused" or (kept.kernels == "auto" and on_gpu and forms.possible(CUDA)),
            starts,
            make_objective(config.objective),
            choice.texts,
        )

    @property
    def scaling(self) -> float:
        """Factor on the output of adapters."""
        return self.adapters.scaling if self.adapters else 1.0

    @property
    def dropout(self) -> float:
        """Dropout probability on the input of adapters."""
        return self.adapters.dropout if self.adapters else 0.0


@dataclass(frozen=True)
class StepReport:
    """What happened in a step. loss: of the objective; otherwise the mean over the targets, nats. grad_norm:
    global, before limiting. readings: of the objective.

    skipped: units (embedding, blocks, head) that were not updated because the loss, or the gradient of this
    unit or of a later one in the forward pass, was not finite or above its limit. 0 in a normal step. norms:
    of the gradient of each unit, before limiting; empty if the engine does not know them.
    """

    loss: float
    grad_norm: float
    skipped: int
    norms: Mapping[str, float] = field(default_factory=dict)
    readings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What a step may be at most, or it is refused; see `lowres.engine.Engine.step`. norm: of the gradient. A
    step that is not finite is always refused. The answers are bool scalars on the device."""

    norm: float = math.inf
    loss: float = math.inf

    @classmethod
    def of(cls, norm: float | None, loss: float | None) -> Limits:
        return cls(math.inf if norm is None else norm, math.inf if loss is None else loss)

    def allow_loss(self, loss: Tensor) -> Tensor:
        return loss.isfinite() & (loss <= self.loss)

    def allow_norm(self, square: Tensor) -> Tensor:
        """square: squared norm of the gradient."""
        return square.isfinite() & (square <= self.norm * self.norm)


Documents = list[Lengths] | None  # those of every sequence; None: each sequence is one
Parts = tuple[list[Tensor], list[Tensor], int]
# documents that the words of a window mark
MARKED = Starts(lambda words: (words > 0) & (words & BEGINS != 0))


class Marking:
    """An engine whose settings say where documents begin."""

    settings: EngineSettings

    @contextmanager
    def marked(self) -> Iterator[None]:
        """See `Engine.marked`."""
        before, self.settings = self.settings, replace(self.settings, starts=MARKED)
        try:
            yield
        finally:
            self.settings = before


def split(batch: Tensor, micro_batch: int, rooms: Rooms) -> Parts:
    """Inputs and targets [s, T] of each micro-batch of batch [S, T + 1], in host memory, and the number of
    targets that count (at least 1, because it is a divisor)."""
    with rooms.allocate_in(HOST):
        inputs, targets = inputs_and_targets(batch)
        count = max(1, int((targets != IGNORED).sum()))
        inputs, targets = _locked(inputs, rooms), _locked(targets, rooms)
        return list(inputs.split(micro_batch)), list(targets.split(micro_batch)), count


def apart(
    batch: Tensor, parts: Parts, rooms: Rooms, starts: Starts | None
) -> tuple[list[Tensor], list[Tensor], int, list[Documents]]:
    """What `split` makes of a batch, and the documents of each micro-batch. A document's first token is no
    target, as nothing in the document predicts it, unless it is what ends the one before."""
    inputs, targets, count = parts
    if starts is None:
        return inputs, targets, count, [None] * len(inputs)
    sizes = [len(part) for part in inputs]
    with rooms.allocate_in(HOST):
        begins = starts.where(batch)
        if not starts.predicted:
            firsts = begins[:, 1:].split(sizes)
            targets = [
                _locked(t.masked_fill(b, IGNORED), rooms) for t, b in zip(targets, firsts, strict=True)
            ]
            count = max(1, sum(int((part != IGNORED).sum()) for part in targets))
        return inputs, targets, count, [lengths_of(part) for part in begins[:, :-1].split(sizes)]


def _locked(tokens: Tensor, rooms: Rooms) -> Tensor:
    """Page-locked for CUDA, so that the host does not wait for the copy to the device."""
    return tokens.contiguous().pin_memory() if rooms.device.type == "cuda" else tokens


@dataclass(frozen=True)
class Grouping:
    """Which example each target of a batch belongs to. owner: int64 [S, T]. counts: int64 [E], of targets.
    pairs: see `objective`."""

    owner: Tensor
    counts: Tensor
    pairs: Pairs | None

    @classmethod
    def of(cls, batch: Tensor, pairs: Pairs | None) -> Grouping:
        """batch: int64 [S, T + 1], words. Every sequence begins with an example."""
        begins = MARKED.where(batch[:, :-1])
        owner = begins.flatten().long().cumsum(0).sub_(1).view_as(begins)
        counted = inputs_and_targets(batch)[1] != IGNORED
        return cls(owner, torch.bincount(owner[counted], minlength=int(begins.sum())), pairs)

    def to(self, device: torch.device) -> Grouping:
        reference = self.pairs and self.pairs.reference
        reference = None if reference is None else reference.to(device)
        pairs = self.pairs and Pairs(self.pairs.order.to(device), reference)
        return Grouping(self.owner.to(device), self.counts.to(device), pairs)


def one_example_each(batch: Tensor) -> Grouping:
    """The grouping of a batch [S, T] whose sequences are one example each; every two of them are a pair."""
    owner = torch.arange(len(batch)).unsqueeze(1).expand(batch.shape)
    pairs = Pairs(torch.arange(len(batch) // 2 * 2), torch.zeros(len(batch)))
    return Grouping(owner, torch.ones(len(batch), dtype=torch.int64), pairs)


def weigh(
    objective: Objective, grouping: Grouping, each: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """The loss of a step, fp64 scalar; the weight of each target, [S, T] in dtype, with which the gradient of
    the weighted sum of all losses is that of the step; and the readings of the objective.

    each: the log-probability of every target [S, T], 0 where it does not count; None if the objective is
    linear, and then there is no loss either.
    """
    owner, counts = grouping.owner, grouping.counts
    sums = torch.zeros(len(counts), dtype=torch.float64, device=owner.device)
    if each is not None:
        sums.index_add_(0, owner.flatten(), each.flatten().double())
    order, reference = grouping.pairs or (None, None)
    with torch.enable_grad():
        loss, readings = objective(Examples(sums.requires_grad_(), counts, reference, order))
        (slope,) = torch.autograd.grad(loss, sums)
    return (None if each is None else loss.detach()), -slope.to(dtype)[owner], list(readings)


@dataclass(frozen=True)
class Weighed:
    """What an objective makes of a batch before any gradient, see `weigh`. weights: on the host."""

    loss: Tensor | None
    weights: Tensor
    readings: Mapping[str, float]


class Scorer(Protocol):
    def log_probabilities(self, batch: Tensor) -> tuple[Tensor, Tensor]: ...


def weighed_batch(
    engine: Scorer, batch: Tensor, pairs: Pairs | None, objective: Objective | None, compute: torch.dtype
) -> Weighed | None:
    """For engines that differentiate a whole micro-batch at once: an objective that is not linear costs them
    one more forward pass. None without an objective."""
    if objective is None:
        return None
    each = None if objective.linear else engine.log_probabilities(batch)[0]
    dtype = torch.promote_types(compute, torch.float32)
    loss, weights, readings = weigh(objective, Grouping.of(batch, pairs), each, dtype)
    return Weighed(loss, weights, dict(zip(objective.names, map(float, readings), strict=True)))


def documents_of(tokens: Tensor, starts: Starts | None) -> Documents:
    """The documents in tokens [S, T]."""
    return None if starts is None else lengths_of(starts.where(tokens))


def square(grad: Tensor) -> Tensor:
    """Squared norm of a gradient, fp64 scalar on the device."""
    flat = grad.view(-1)
    # on a CPU `norm` takes twice the time of a dot product, and is 0.3 % off for 45 M elements
    return torch.dot(flat, flat).double()


def sum_of_squares(grads: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of all gradients together, fp64 scalar on the device."""
    return torch.stack([square(grad) for grad in grads.values()]).sum()
