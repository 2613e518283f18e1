"""The layer-major step: all micro-batches of a step pass one layer before the next.

    forward:   for each layer: keep its inputs (the stash), run every micro-batch, no graph
    head:      loss and its gradient, a chunk of tokens at a time
    backward:  for each layer from the last: recompute and differentiate every micro-batch,
               accumulate the gradients in one fp32 buffer; update the layer; reuse the buffer

So gradients take the memory of one unit, a weight is dequantised once per direction and step, and
accumulation is exact at any batch size. Each unit is used once per direction, so it may live in host
memory (`residence`). So may the stash and the carry, which pass through the GPU one micro-batch at a
time (`boundaries`). If the GPU is full after all, micro-batches get smaller (`pieces`). The layer order
comes from L2L (arXiv 2002.05645); the combination with INT8 weights and a fused update per layer is this
project's own.

A band is a group of neighbouring layers that are recomputed and differentiated together. The stash
keeps only the input of each band; a band needs gradient buffers and activations for all its layers.

There is no global gradient norm before the first update. If the loss is not finite or above its limit,
the step is skipped before anything has changed. If a gradient is not finite, the layers below it would
get such gradients too, so the updates of the step end there; also where the norm so far exceeds its
limit. Both are decided on the device: nothing here waits for the device before the end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lowres.config import ModelConfig
from lowres.engine.boundaries import Boundaries, Boundary
from lowres.engine.cache import CachedReader, KVCache, NewTokens, Reader
from lowres.engine.common import (
    Documents,
    EngineSettings,
    Grouping,
    Limits,
    Marking,
    StepReport,
    Updater,
    apart,
    documents_of,
    split,
    sum_of_squares,
    weigh,
)
from lowres.engine.fused import FusedWeights, norm_backward
from lowres.engine.layout import Layout, UnitBytes, aligned_elements, gradient_dtype
from lowres.engine.pieces import Additions, Size
from lowres.engine.residence import Residence, Visit
from lowres.engine.working import (
    Gradient,
    PlainWeights,
    Room,
    WorkingMatrix,
    adds_wide,
    cross_entropy,
    matmul_wide,
    working_copy,
)
from lowres.kernels import loss as loss_kernels
from lowres.kernels import norm as norm_kernels
from lowres.kernels.loss import Weight
from lowres.model import (
    EMBEDDING_NAME,
    Dropout,
    Positions,
    Units,
    block,
    block_terms,
    rms_norm,
    rope_tables,
)
from lowres.objective import Pairs
from lowres.rooms import HOST, Mover, Rooms
from lowres.storage import LORA_A, LORA_B, Unit
from lowres.target import chunks, kind_of

# new tokens of a KV cache that pass a layer together
READ_TOKENS = 2048

P = ParamSpec("P")
R = TypeVar("R")
Score = Callable[[slice, Tensor, Tensor], None]  # see `LayerwiseEngine._score`


def _settled(
    method: Callable[Concatenate[LayerwiseEngine, P], R],
) -> Callable[Concatenate[LayerwiseEngine, P], R]:
    """Finish all copies if the method is interrupted or fails, because the memory may be freed, or read by
    the CPU, next."""

    @wraps(method)
    def settled(self: LayerwiseEngine, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            self._units_mover.finish()
            self._boundaries_mover.finish()
            raise

    return settled


class LayerwiseEngine(Marking):
    """Engine interface: see `lowres.engine.Engine`. shrinks: whether it goes on in smaller pieces if the GPU
    is full, except in a rehearsal."""

    shrinks = True

    def __init__(
        self,
        config: ModelConfig,
        units: Units,
        optimizer: Updater | None,
        rooms: Rooms,
        settings: EngineSettings,
    ) -> None:
        self.config, self.optimizer, self.settings = config, optimizer, settings
        self.compute, self.device, self.rooms = settings.compute, rooms.device, rooms
        self.dropout = Dropout(settings.dropout, settings.seed)
        self._sequences, self._tokens = Size(settings.micro_batch), Size(settings.loss_chunk)
        self._read_tokens = Size(READ_TOKENS)
        self._additions = Additions()
        if self.device.type == "cuda":
            adds_wide()  # now, because it waits for the device
        self._units = units
        self.layout = Layout(config, {n: _bytes_of(u, settings) for n, u in units.items()}, settings)
        self.bands = self.layout.bands
        # two, so that the copy of a layer does not delay the pieces of a boundary
        self._units_mover, self._boundaries_mover = Mover(self.device), Mover(self.device)
        slots = rooms.make(self.layout.slots(self.layout.hosted(settings.homes)))
        self._residence = Residence(units, settings.homes, slots, self._units_mover)
        (self._copies,) = rooms.make(self.layout.copies())
        self._plain_weights = PlainWeights(settings, self.dropout)
        self._weights = (
            FusedWeights(settings, self.dropout, self._additions) if settings.fused else self._plain_weights
        )
        self._grads = self._gradient_buffers() if optimizer is not None else {}
        self._boundaries: Boundaries | None = None
        self._whole: Positions  # in sequences of the reserved length
        # of the batch at work
        self._documents: Documents = None
        self._grouping: Grouping | None = None
        self._readings: list[Tensor] = []

    def _forward_visits(self) -> list[Visit]:
        return [Visit(("embed",)), *(Visit(band) for band in self.bands)]

    def _backward_visits(self) -> list[Visit]:
        blocks = [Visit(band, update=True) for band in reversed(self.bands)]
        return [Visit(("head",), update=True), *blocks, Visit(("embed",), update=True)]

    def _gradient_buffers(self) -> dict[str, dict[str, Tensor]]:
        """fp32 gradients of every unit as views of one buffer; a tied embedding has its own buffer."""
        dtype = gradient_dtype(self.compute)
        shared, own = (self.rooms.make(slab)[0].view(dtype) for slab in self.layout.gradients())
        found = {}
        for group in self.layout.groups:
            flat, start = own if group == self.layout.own_gradient else shared, 0
            for name in group:
                views = {}
                for spec in self._units[name].spec.trained:
                    views[spec.name] = flat[start : start + spec.numel].view(spec.shape)
                    start += aligned_elements(spec.numel)
                found[name] = views
        return found

    def reserve(self, sequences: int, length: int, training: bool) -> Boundaries:
        """Stash, carry and rotary tables for batches of this size."""
        bands, homes = len(self.bands) if training else 0, self.settings.homes
        if self._boundaries is None or not self._boundaries.holds(sequences, length, bands):
            self._boundaries = None  # free the memory before the new ones are allocated
            self._whole = self._rotary_tables(length)
            self._boundaries = Boundaries(
                self.rooms,
                self._boundaries_mover,
                self.layout.boundaries(sequences, length, bands, homes.stash, homes.carry),
                encoding=self.layout.encoding,
                dim=self.config.dim,
                compute=self.compute,
                sequences=sequences,
                length=length,
            )
        return self._boundaries

    def _rotary_tables(self, length: int) -> Positions:
        (slab,) = self.rooms.make(self.layout.rotary(length))
        cos, sin = slab.view(torch.float32).view(2, length, -1).unbind()
        for kept, table in zip((cos, sin), rope_tables(self.config, length, self.device), strict=True):
            kept.copy_(table)
        return Positions(cos, sin)

    def _positions(self, part: slice) -> Positions:
        """Of the tokens of a micro-batch."""
        return self._whole.within(None if self._documents is None else self._documents[part])

    # a visit

    def _working(self, units: list[Unit], grads: bool = False) -> list[dict[str, Any]]:
        """The weights of each unit by role, ready for use; with `grads`, also their zeroed buffers."""
        found, room = [], Room(self._copies)
        self._additions.begin()
        for unit in units:
            working: dict[str, Any] = {}
            made = self._weights if unit.spec.name.startswith("layers") else self._plain_weights
            for spec in unit.spec.tensors:
                storage = unit.weights[spec.name]
                buffer = self._grads[unit.spec.name][spec.name].zero_() if grads and not spec.frozen else None
                if len(spec.shape) == 2:
                    grad = None if buffer is None else Gradient(buffer, self._additions)
                    working[spec.role] = made.matrix(storage, spec, grad, room, grads)
                    continue
                norm = storage.dense(torch.promote_types(self.compute, torch.float32)).detach()
                if buffer is not None:
                    self._additions.collect(norm, buffer)
                working[spec.role] = norm
            for spec in unit.spec.tensors:
                if spec.frozen:
                    a, b = (working.pop(spec.role + part) for part in (LORA_A, LORA_B))
                    working[spec.role] = made.adapted(working[spec.role], a, b, spec)
            found.append(working)
        return found

    # forward

    @_settled
    def _forward(self, inputs: Tensor, kept: Boundaries, visits: list[Visit], training: bool) -> None:
        """Run all layers and keep the output of the last. In training, the stash is filled. visits: of the
        whole step or evaluation."""
        self.rooms.phase = "forward"
        kept.begin(len(inputs))
        self._residence.begin(visits)
        parts = self._micro_batches(inputs)
        stash = kept.stash if training else []
        # the next boundary is the next band's entry in the stash, so it is written only once
        through_stash = training and not self.settings.exact_forward
        places = [*stash, kept.output] if through_stash else [kept.carry] * len(self.bands) + [kept.output]
        with self._residence.visit() as (embed,):
            table = embed.weights[EMBEDDING_NAME]
            for part in parts:
                places[0].put(part, table.rows(inputs[part], self.compute))
        for band, (here, there) in enumerate(itertools.pairwise(places)):
            with self._residence.visit() as units:
                layers = self._working(units)
                for part in parts:
                    x, self.dropout.first = here.get(part), part.start
                    if training and not through_stash:
                        stash[band].put(part, x)
                    there.put(part, self._through(x, layers, self._positions(part)))

    def _through(self, x: Tensor, layers: list[dict[str, Any]], positions: Positions) -> Tensor:
        for w in layers:
            x = block(x, w, positions, self.config, self._weights.operations)
        return x

    def _micro_batches(self, batch: Tensor) -> list[slice]:
        """The sequences of each micro-batch."""
        return chunks(len(batch), self.micro_batch)

    # head

    def _head_matrix(self, working: dict[str, Any], grad: Tensor | None) -> WorkingMatrix:
        if "head" in working:
            return working["head"]
        embed = self._units["embed"]  # tied, so it lives on the GPU
        (spec,) = embed.spec.tensors
        table = working_copy(embed.weights[EMBEDDING_NAME], spec, self.compute, Room(self._copies), 1)
        return WorkingMatrix(table, None if grad is None else Gradient(grad, self._additions))

    @_settled
    def _score(self, inputs: Tensor, targets: Tensor, kept: Boundaries, score: Score) -> None:
        """A forward pass without a stash. score: called for each chunk of tokens with its place in the
        flattened batch, its logits [tokens, V], which it may overwrite, and its targets [tokens]."""
        visits = [*self._forward_visits(), Visit(("head",))]
        self._forward(inputs, kept, visits, training=False)
        self.rooms.phase = "loss"
        with self._residence.visit() as units:
            (w,) = self._working(units)
            self._score_output(w["norm"], self._head_matrix(w, None), targets, kept, score)

    def _score_output(
        self, norm: Tensor, head: WorkingMatrix, targets: Tensor, kept: Boundaries, score: Score
    ) -> None:
        """`_score` after the forward pass."""
        for part in self._micro_batches(targets):
            x, wanted = kept.output.get(part).flatten(0, 1), targets[part].flatten()
            first = part.start * targets.shape[1]

            def of_chunk(some: slice, x: Tensor = x, wanted: Tensor = wanted, first: int = first) -> None:
                place = slice(first + some.start, first + some.stop)
                score(place, self._logits_of(x[some], norm, head)[0], wanted[some])

            self._tokens.each(len(x), of_chunk)

    def _loss(self, inputs: Tensor, targets: Tensor, kept: Boundaries) -> Tensor:
        """Sum of the loss, fp64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def add(place: slice, logits: Tensor, wanted: Tensor) -> None:
            total.add_(self._cross_entropy(logits, wanted, None).sum())

        self._score(inputs, targets, kept, add)
        return total

    def _each_target(self, inputs: Tensor, targets: Tensor, kept: Boundaries) -> tuple[Tensor, Tensor]:
        """What `log_probabilities` returns, on the device and flattened."""
        found = torch.zeros(targets.numel(), dtype=torch.float32, device=self.device)
        likeliest = torch.zeros(targets.numel(), dtype=torch.bool, device=self.device)

        def put(place: slice, logits: Tensor, wanted: Tensor) -> None:
            likeliest[place] = logits.argmax(1) == wanted
            found[place] = -self._cross_entropy(logits, wanted, None)

        self._score(inputs, targets, kept, put)
        return found, likeliest

    def _loss_and_backward(self, w: dict[str, Any], kept: Boundaries, targets: Tensor, count: int) -> Tensor:
        """The loss of the step. Its gradient goes into the carry, the gradients of norm and head into their
        buffers."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tied = self._grads["embed"][EMBEDDING_NAME].zero_() if self.config.tie_embeddings else None
        head = self._head_matrix(w, tied)
        loss, weights = self._weights_of_targets(w["norm"], head, targets, kept)
        for part in self._micro_batches(targets):
            x, dx = kept.output.get(part), kept.carry.blank(part)
            weight = 1 / count if weights is None else weights[part].flatten()
            flat = x.flatten(0, 1), dx.flatten(0, 1), targets[part].flatten()
            first = part.start * targets.shape[1]
            self._tokens.each(len(flat[0]), partial(self._add_loss, w, head, total, weight, first, *flat))
            kept.carry.put(part, dx)
        if loss is not None:
            return loss
        return total / count if weights is None else total

    def _weights_of_targets(
        self, norm: Tensor, head: WorkingMatrix, targets: Tensor, kept: Boundaries
    ) -> tuple[Tensor | None, Tensor | None]:
        """The weights that the objective gives to the targets [S, T], and the loss, if it needs all
        log-probabilities first; these cost one more pass of the head."""
        objective = self.settings.objective
        if objective is None:
            return None, None
        assert self._grouping is not None, "the batch of an objective has no examples"
        each = None
        if not objective.linear:
            each = torch.zeros(targets.numel(), dtype=torch.float64, device=self.device)

            def put(place: slice, logits: Tensor, wanted: Tensor) -> None:
                each[place] = -self._cross_entropy(logits, wanted, None)

            self._score_output(norm, head, targets, kept, put)
        dtype = torch.promote_types(self.compute, torch.float32)
        loss, weights, self._readings = weigh(objective, self._grouping, each, dtype)
        return loss, weights

    def _add_loss(
        self,
        w: dict[str, Any],
        head: WorkingMatrix,
        total: Tensor,
        weight: float | Tensor,
        first: int,
        x: Tensor,
        dx: Tensor,
        targets: Tensor,
        some: slice,
    ) -> None:
        """Loss and gradients of some tokens of a micro-batch x [tokens, D], whose gradient dx may be the same
        memory. first: the micro-batch's first token in the batch. weight: of the losses; of each, [tokens],
        `total` gets the weighted sum."""
        self._additions.end = first + some.stop
        h = x[some]
        logits, normed = self._logits_of(h, w["norm"], head)
        of_each = isinstance(weight, Tensor)
        own = weight[some] if isinstance(weight, Tensor) else weight
        losses = self._cross_entropy(logits, targets[some], own)
        loss = (losses * own if of_each else losses).sum()
        d_logits = logits.to(self.compute)
        del logits  # in bf16 both are large
        d_normed = head.backward(d_logits, normed)
        del d_logits, normed
        dh = self._norm_backward(d_normed, h, w["norm"])
        # this needs no memory, so it cannot fail halfway
        dx[some] = dh
        total += loss

    def _logits_of(self, h: Tensor, norm: Tensor, head: WorkingMatrix) -> tuple[Tensor, Tensor]:
        """Of a chunk of tokens h [tokens, D]: the logits [tokens, V], and the normalised h."""
        if not self.settings.fused:
            normed = rms_norm(h, norm, self.config.norm_eps)
            return matmul_wide(normed, head.value.T), normed
        normed = norm_kernels.rms_norm(h, norm, self.config.norm_eps)
        # a CPU has no product of bf16 numbers with an fp32 result
        on_cpu = kind_of(self.device) == "cpu"
        return normed @ head.value.T if on_cpu else matmul_wide(normed, head.value.T), normed

    def _cross_entropy(self, logits: Tensor, targets: Tensor, weight: Weight) -> Tensor:
        """The loss of each target, fp64 [tokens]. The logits may be overwritten; with a weight, they become
        the gradient of weight times the sum of the losses."""
        return (loss_kernels.cross_entropy if self.settings.fused else cross_entropy)(logits, targets, weight)

    def _norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x [tokens, D] under the final norm; that of the weight is added to its buffer."""
        if self.settings.fused:
            return norm_backward(dy, x, weight, self.config.norm_eps, self._additions)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            normed = rms_norm(leaf, weight, self.config.norm_eps)
        torch.autograd.backward(normed, dy)
        assert leaf.grad is not None
        return leaf.grad

    # backward

    def _backward(self, layers: list[dict[str, Any]], stash: Boundary, carry: Boundary, part: slice) -> None:
        """Add the gradients of a band for a micro-batch to its buffers; turn the carry from the gradient of
        the band's output into the gradient of its input."""
        self._additions.end = part.stop
        x, self.dropout.first = stash.get(part).detach().requires_grad_(), part.start
        outputs, dy = self._recompute(x, layers, self._positions(part)), carry.get(part)
        torch.autograd.backward(outputs, (dy, dy))
        assert x.grad is not None
        carry.put(part, x.grad)

    def _recompute(
        self, x: Tensor, layers: list[dict[str, Any]], positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """The two terms of a band's output, with their graph; the value of the second is not computed."""
        with torch.enable_grad():
            x = self._through(x, layers[:-1], positions)
            operations = self._weights.operations
            return block_terms(x, layers[-1], positions, self.config, operations, recomputed=True)

    def _backward_embedding(self, inputs: Tensor, carry: Boundary, part: slice) -> None:
        grad = self._grads["embed"][EMBEDDING_NAME]
        grad.index_add_(0, inputs[part].flatten(), carry.get(part).flatten(0, 1).to(grad.dtype))

    # the interface

    @property
    def micro_batch(self) -> int:
        """Sequences in a micro-batch: as planned, or fewer after the GPU was full."""
        return self._sequences.number

    @_settled
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
        inputs, targets, count, documents = self._on_device(batch)
        objective, allowed = self.settings.objective, Limits.of(norm_limit, loss_limit)
        with self.rooms.allocate_in(HOST):
            grouping = Grouping.of(batch, pairs) if objective else None
        results = self.enqueue(
            *(inputs, targets, count, step, schedule, rehearsal, allowed, documents),
            grouping and grouping.to(self.device),
        )
        numbers = torch.stack(results).tolist()  # the only wait for the device
        loss, norm, updated, *rest = numbers
        norms, readings = rest[: len(self._units)], rest[len(self._units) :]
        return StepReport(
            *(loss, norm, len(self._units) - int(updated), dict(zip(self._units, norms, strict=True))),
            dict(zip(objective.names, readings, strict=True)) if objective else {},
        )

    def _on_device(self, batch: Tensor) -> tuple[Tensor, Tensor, int, Documents]:
        """Inputs and targets, the number of targets that count, and the documents: 16 bytes a token, copied
        once."""
        whole = split(batch, len(batch), self.rooms)
        (inputs,), (targets,), count, (documents,) = apart(batch, whole, self.rooms, self.settings.starts)
        inputs, targets = (tokens.to(self.device, non_blocking=True) for tokens in (inputs, targets))
        return inputs, targets, count, documents

    @torch.no_grad()
    def enqueue(
        self,
        inputs: Tensor,
        targets: Tensor,
        count: int,
        step: int,
        schedule: float,
        rehearsal: bool,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        documents: Documents = None,
        grouping: Grouping | None = None,
    ) -> list[Tensor]:
        """Enqueue all work of a step and wait for none of it. inputs, targets [sequences, T], on the device;
        count, documents: see `split`. grouping: on the device, if there is an objective.

        Returns fp64 scalars on the device: loss, norm of the gradient, number of units that were updated, the
        norm of the gradient of every unit, and the readings of the objective. Once the host has read them,
        all copies are done and host slabs are complete.
        """
        assert self.optimizer is not None, "this engine was made without an optimizer"
        self._documents, self._grouping, self._readings = documents, grouping, []
        kept = self.reserve(len(inputs), inputs.shape[1], training=True)
        backward, clip = self._backward_visits(), self.settings.grad_clip
        norm_only = [Visit(visit.units) for visit in backward] if clip else []
        visits = self._forward_visits() + norm_only + backward
        self._sequences.fixed = self._tokens.fixed = rehearsal or not self.shrinks
        self.dropout.step = step
        self._sequences.again(len(inputs), partial(self._forward, inputs, kept, visits, training=True))

        # filled on the device: a copy from the host would wait
        accepted = torch.full((), not rehearsal, dtype=torch.bool, device=self.device)
        shrink = None
        if clip:
            norm, found = self._norm(inputs, targets, count, kept, limits)
            accepted = accepted & found
            shrink = (clip / (norm + 1e-6)).clamp(max=1.0)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        squares: dict[str, Tensor] = {}
        updated = torch.zeros((), dtype=torch.int64, device=self.device)
        for unit, grads, loss in self._gradients(inputs, targets, count, kept):
            self.rooms.phase = "update"
            name = unit.spec.name
            square = squares[name] = sum_of_squares(grads)
            total += square
            accepted = accepted & limits.allow_norm(total) & limits.allow_loss(loss)
            if shrink is not None:
                for grad in grads.values():
                    grad.mul_(shrink)
            self.optimizer.update(unit, grads, step, schedule, accepted)
            updated += accepted
        self.rooms.phase = ""
        self.dropout.step = None
        self._join()
        norms = (squares[name].sqrt() for name in self._units)
        return [loss, total.sqrt(), updated.double(), *norms, *self._readings]

    def _join(self) -> None:
        """Let what is enqueued next wait for all copies. So host slabs are complete as soon as its result is
        there."""
        for mover in (self._units_mover, self._boundaries_mover):
            mover.join()

    def _norm(
        self, inputs: Tensor, targets: Tensor, count: int, kept: Boundaries, limits: Limits
    ) -> tuple[Tensor, Tensor]:
        """Norm of the gradient of all weights, which costs one backward pass; and whether the limits allow
        this norm and the loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, grads, mean_loss in self._gradients(inputs, targets, count, kept):
            total += sum_of_squares(grads)
            loss = mean_loss
        return total.sqrt(), limits.allow_norm(total) & limits.allow_loss(loss)

    def _gradients(
        self, inputs: Tensor, targets: Tensor, count: int, kept: Boundaries
    ) -> Iterator[tuple[Unit, dict[str, Tensor], Tensor]]:
        """Every unit from the head down, its gradients (valid until the next unit), and the mean loss."""
        stash = list(kept.stash)
        for visit in self._backward_visits():
            with self._residence.visit() as units:
                self.rooms.phase = "loss" if visit.units == ("head",) else "backward"
                if visit.units == ("head",):
                    (w,) = self._working(units, grads=True)
                    loss = self._loss_and_backward(w, kept, targets, count)
                elif visit.units == ("embed",):
                    if not self.config.tie_embeddings:
                        self._grads["embed"][EMBEDDING_NAME].zero_()
                    work = partial(self._backward_embedding, inputs, kept.carry)
                    self._sequences.each(len(inputs), work)
                else:
                    layers = self._working(units, grads=True)
                    work = partial(self._backward, layers, stash.pop(), kept.carry)
                    self._sequences.each(len(inputs), work)
                for unit in reversed(units):
                    yield unit, self._grads[unit.spec.name], loss

    @_settled
    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> tuple[float, int]:
        loss, count = self._scored(batch, self._loss)
        total = float(loss)
        self.rooms.phase = ""
        return total, count

    @_settled
    @torch.no_grad()
    def log_probabilities(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        (found, likeliest), _ = self._scored(batch, self._each_target)
        shape = len(batch), batch.shape[1] - 1
        with self.rooms.allocate_in(HOST):
            on_host = found.view(shape).cpu(), likeliest.view(shape).cpu()
        self.rooms.phase = ""
        return on_host

    def _scored(self, batch: Tensor, work: Callable[[Tensor, Tensor, Boundaries], R]) -> tuple[R, int]:
        """What work makes of inputs and targets, enqueued, and the number of targets that count."""
        inputs, targets, count, self._documents = self._on_device(batch)
        kept = self.reserve(len(inputs), inputs.shape[1], training=False)
        found = self._sequences.again(len(inputs), partial(work, inputs, targets, kept))
        self._join()
        return found, count

    @_settled
    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        self._residence.begin([*self._forward_visits(), Visit(("head",))])
        whole = Positions(*rope_tables(self.config, tokens.shape[1], self.device))
        positions = whole.within(documents_of(tokens, self.settings.starts))
        with self._residence.visit() as (embed,):
            x = embed.weights[EMBEDDING_NAME].rows(tokens.to(self.device), self.compute)
        for _ in self.bands:
            with self._residence.visit() as units:
                x = self._through(x, self._working(units), positions)
        return self._logits_after(x[:, -1])

    def _logits_after(self, x: Tensor) -> Tensor:
        """fp32 [S, V] of the token after x [S, D], the output of the last band; the visit of the head."""
        with self._residence.visit() as units:
            (w,) = self._working(units)
            normed = rms_norm(x, w["norm"], self.config.norm_eps)
            return matmul_wide(normed, self._head_matrix(w, None).value.T)

    def reader(self, sequences: int, length: int) -> Reader:
        (slab,) = self.rooms.make(self.layout.cache(sequences, length))
        tables = self._rotary_tables(length)
        cache = KVCache(slab, self.config, self.compute, (sequences, length), (tables.cos, tables.sin))
        return CachedReader(cache, self._extend, self.settings.starts)

    @_settled
    @torch.no_grad()
    def _extend(self, cache: KVCache, new: NewTokens) -> Tensor:
        """Read new tokens of a cache; returns the logits [S, V] after the last one of each sequence."""
        self.rooms.phase = "sampling"
        self._residence.begin([*self._forward_visits(), Visit(("head",))])
        with self._residence.visit() as (embed,):
            x = embed.weights[EMBEDDING_NAME].rows(new.ids, self.compute)
        first = 0
        for band in self.bands:
            with self._residence.visit() as units:
                work = partial(self._extend_band, x, self._working(units), first, cache)
                self._read_tokens.each(len(x), work)
            first += len(band)
        found = self._logits_after(x[new.last])
        self.rooms.phase = ""
        return found

    def _extend_band(
        self, x: Tensor, layers: list[dict[str, Any]], first: int, cache: KVCache, piece: slice
    ) -> None:
        """Take some of the new tokens x [N, D] through a band, in place. first: its first layer."""
        h = x[piece].unsqueeze(0)
        for i, w in enumerate(layers, first):
            h = block(h, w, cache.positions(i, piece), self.config, self._weights.operations)
        x[piece] = h[0]  # needs no memory, so until here nothing has changed

    @property
    def fetched(self) -> int:
        """Bytes of weights that a forward pass copies to the GPU."""
        return sum(self.layout.units[name].weights for name in self.settings.homes.weights)

    @_settled
    def seconds_to_fetch(self) -> float:
        """Measures the copies of a forward pass, without its computation."""
        visits = [*self._forward_visits(), Visit(("head",))]
        began = time.perf_counter()
        self._residence.begin(visits)
        for _ in visits:
            with self._residence.visit():
                pass
        self._units_mover.finish()
        return time.perf_counter() - began

    def units(self, write: bool = False) -> Iterator[Unit]:
        yield from self._units.values()


def _bytes_of(unit: Unit, settings: EngineSettings) -> UnitBytes:
    state = 0 if unit.state_slab is None else unit.state_slab.numel()
    return UnitBytes.of(unit.spec, unit.kinds, state, settings)
