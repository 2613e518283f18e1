"""The layer-major step: all micro-batches of a step pass one layer before the next.

    forward:   for each layer: keep its inputs (the stash), run every micro-batch, no graph
    head:      loss and its gradient, a chunk of tokens at a time
    backward:  for each layer from the last: recompute and differentiate every micro-batch,
               gradients adding up in one fp32 buffer; update the layer; reuse the buffer

So gradients take the memory of one unit, a weight is dequantised once per direction and step, and
accumulation is exact at any batch size. Each unit is touched once a direction, so it may live in host
memory (`residence`), and so may the stash and the carry, which pass by a micro-batch at a time
(`boundaries`). The layer order is that of L2L (arXiv 2002.05645); its union with INT8 weights and a
fused per-layer update is this project's own.

A band is as many neighbouring layers as are recomputed and differentiated together. The stash keeps
the input of each band only; a band has the gradient buffers and activations of all its layers.

There is no global gradient norm before the first update. A loss that is not finite therefore skips
the step before anything changed; a gradient that is not finite poisons all below it, so it ends the
step's updates there. Both are decided on the device: nothing here waits for it before the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lowres.config import ModelConfig
from lowres.data.batches import IGNORED
from lowres.engine.boundaries import Boundaries, Boundary, make_encoding
from lowres.engine.common import StepReport, Updater, split, sum_of_squares
from lowres.engine.residence import Residence, Visit
from lowres.model import EMBEDDING_NAME, Dropout, Units, block, block_body, lora, rms_norm, rope_tables
from lowres.rooms import GPU, Homes, Mover, Rooms
from lowres.storage import LORA_A, LORA_B, Unit

ALIGNMENT = 64  # elements between tensors in the flat buffers, so that every view is aligned
# elements of a weight gradient in another precision that exist before they are added to the buffer
PRODUCT_CHUNK = 1 << 24
P = ParamSpec("P")
R = TypeVar("R")


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 2-D matrices with the result in fp32 where the inputs are bf16."""
    if a.dtype != torch.bfloat16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def accumulate(grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """grad [out, in] += dy^T x for dy [tokens, out] and x [tokens, in], in the precision of grad."""
    if dy.dtype == grad.dtype:
        grad.addmm_(dy.T, x)
        return
    rows = max(1, PRODUCT_CHUNK // grad.shape[1])
    for part, columns in zip(grad.split(rows), dy.split(rows, dim=1), strict=True):
        part.add_(matmul_wide(columns.T, x))


class WorkingMatrix:
    """A matrix while its layer is visited: its values in compute precision and its gradient buffer."""

    def __init__(self, value: Tensor, grad: Tensor | None) -> None:
        """grad: None if there is none, in the forward pass or of a frozen matrix."""
        self.value, self.grad = value, grad

    def __call__(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x, self) if torch.is_grad_enabled() else self.product(x)

    @property
    def rows(self) -> int:
        return len(self.value)

    def product(self, x: Tensor) -> Tensor:
        return x @ self.value.T

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """Add dy^T x to the gradient; return dy W."""
        if self.grad is not None:
            accumulate(self.grad, dy.flatten(0, -2), x.flatten(0, -2))
        return dy @ self.value


class AdaptedMatrix(WorkingMatrix):
    """A frozen matrix and its adapter; see `lowres.model.lora`."""

    def __init__(
        self,
        frozen: WorkingMatrix,
        a: WorkingMatrix,
        b: WorkingMatrix,
        scaling: float,
        dropout: Dropout,
        name: str,
    ) -> None:
        """dropout, name: what names the masks."""
        super().__init__(frozen.value, None)
        self.a, self.b, self.dropout, self.name = a, b, dropout, name
        self.matrices = lora.Matrices(frozen.value, a.value, b.value, scaling)

    def product(self, x: Tensor) -> Tensor:
        return lora.product(x, self.dropout.mask(self.name, x), self.matrices)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """Add to the gradients of A and B; return that of x."""
        assert self.a.grad is not None and self.b.grad is not None
        add_a, add_b = partial(accumulate, self.a.grad), partial(accumulate, self.b.grad)
        return lora.gradients(dy, x, self.dropout.mask(self.name, x), self.matrices, add_a, add_b)


class _Multiply(torch.autograd.Function):
    """x W^T whose weight gradient goes straight into an fp32 buffer instead of through autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: WorkingMatrix) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix = matrix
        return matrix.product(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.matrix.backward(dy, x), None


class _Last(torch.autograd.Function):
    """`_Multiply` for the last product of a recomputation, whose value nobody needs: it is not computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: WorkingMatrix) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix = matrix
        return x.new_empty(1).expand(*x.shape[:-1], matrix.rows)

    backward = _Multiply.backward


def _settled(
    method: Callable[Concatenate[LayerwiseEngine, P], R],
) -> Callable[Concatenate[LayerwiseEngine, P], R]:
    """Leaves no copy under way when it is interrupted or fails: the memory may be given back, or read by the
    CPU, next."""

    @wraps(method)
    def settled(self: LayerwiseEngine, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            self._units_mover.finish()
            self._boundaries_mover.finish()
            raise

    return settled


class LayerwiseEngine:
    """Engine interface: see `lowres.engine.Engine`."""

    def __init__(
        self,
        config: ModelConfig,
        units: Units,
        optimizer: Updater | None,
        micro_batch: int,
        compute: torch.dtype,
        rooms: Rooms,
        loss_chunk: int = 1024,
        band: int = 1,
        homes: Homes = Homes(),  # noqa: B008 - frozen
        stash_dtype: str = "auto",
        exact_forward: bool = False,
        grad_clip: float = 0.0,
        scaling: float = 1.0,
        dropout: Dropout | None = None,
    ) -> None:
        """band: layers that are recomputed and differentiated together. homes: where units, stash and
        carry live; the units were made accordingly. exact_forward: if the stash is lossy, the forward
        pass goes on from the exact values instead of the stored ones. grad_clip: largest global gradient
        norm; if not 0, a first backward pass finds the norm and a second one updates. scaling: of what
        adapters add, if the units have some. dropout: on what goes into them."""
        self.config, self.optimizer = config, optimizer
        self.micro_batch, self.loss_chunk = micro_batch, loss_chunk
        self.compute, self.device, self.rooms = compute, rooms.device, rooms
        self.homes, self.exact_forward, self.grad_clip = homes, exact_forward, grad_clip
        self.encoding = make_encoding(stash_dtype, compute)
        self.scaling, self.dropout = scaling, dropout or Dropout(0.0, 0)
        self._units = units
        blocks = [name for name in units if name not in ("embed", "head")]
        self.bands = [tuple(blocks[i : i + band]) for i in range(0, len(blocks), band)]
        # two, so that a layer on its way does not hold up the pieces of a boundary
        self._units_mover, self._boundaries_mover = Mover(self.device), Mover(self.device)
        self._residence = Residence(
            units, homes, self._forward_visits() + self._backward_visits(), rooms, self._units_mover
        )
        self._copies = self._copy_buffer()
        # the tied embedding collects its gradient from the head's use until the embedding's own
        self._grads = self._gradient_buffers() if optimizer is not None else {}
        self._boundaries: Boundaries | None = None

    def _forward_visits(self) -> list[Visit]:
        return [Visit(("embed",)), *(Visit(band) for band in self.bands)]

    def _backward_visits(self) -> list[Visit]:
        blocks = [Visit(band, update=True) for band in reversed(self.bands)]
        return [Visit(("head",), update=True), *blocks, Visit(("embed",), update=True)]

    def _groups(self) -> list[tuple[str, ...]]:
        """Units that are visited together."""
        return [*self.bands, ("head",), ("embed",)]

    def _copy_buffer(self) -> Tensor:
        """Room for the matrices of the largest visit in compute precision, where they are kept otherwise."""
        tied = self.config.tie_embeddings
        sizes = []
        for group in self._groups():
            used = ("embed",) if tied and group == ("head",) else () if group == ("embed",) else group
            sizes.append(sum(_copied(self._units[name], self.compute) for name in used))
        slab = self.rooms.slab("layers in compute precision", GPU, max(sizes) * self.compute.itemsize)
        return slab.view(self.compute)

    def _gradient_buffers(self) -> dict[str, dict[str, Tensor]]:
        """fp32 gradients of every unit as views of one buffer for the largest visit. A tied embedding has
        one of its own, as its gradient is alive while the layers use the other."""
        dtype = torch.promote_types(self.compute, torch.float32)
        sizes = {n: sum(_aligned(s.numel) for s in u.spec.trained) for n, u in self._units.items()}
        own = ("embed",) if self.config.tie_embeddings else ()

        def buffer(size: int) -> Tensor:
            return self.rooms.slab("gradient buffer", GPU, size * dtype.itemsize).view(dtype)

        shared = buffer(max(sum(sizes[n] for n in group) for group in self._groups() if group != own))
        found = {}
        for group in self._groups():
            flat = buffer(sizes["embed"]) if group == own else shared
            start = 0
            for name in group:
                views = {}
                for spec in self._units[name].spec.trained:
                    views[spec.name] = flat[start : start + spec.numel].view(spec.shape)
                    start += _aligned(spec.numel)
                found[name] = views
        return found

    def reserve(self, sequences: int, length: int, training: bool) -> Boundaries:
        """Stash and carry for batches of this size, cut for one of them."""
        bands = len(self.bands) if training else 0
        if self._boundaries is None or not self._boundaries.holds(sequences, length, bands):
            self._boundaries = None  # before its successor is allocated
            self._boundaries = Boundaries(
                self.rooms,
                self._boundaries_mover,
                self.homes,
                self.encoding,
                bands,
                self.config.dim,
                self.compute,
                sequences,
                self.micro_batch,
                length,
                keep_output=bool(self.grad_clip),
            )
        self._boundaries.cut(sequences, length)
        return self._boundaries

    # a visit

    def _working(self, units: list[Unit], grads: bool = False) -> list[dict[str, Any]]:
        """The weights of each unit by role, ready for use; with `grads`, also their zeroed buffers."""
        found, free = [], self._copies
        for unit in units:
            working: dict[str, Any] = {}
            for spec in unit.spec.tensors:
                storage = unit.weights[spec.name]
                grad = self._grads[unit.spec.name][spec.name].zero_() if grads and not spec.frozen else None
                if len(spec.shape) == 2:
                    value = storage.dense(self.compute, free)
                    if value.data_ptr() == free.data_ptr():
                        free = free[_aligned(spec.numel) :]
                    working[spec.role] = WorkingMatrix(value, grad)
                    continue
                norm = storage.dense(torch.promote_types(self.compute, torch.float32)).detach()
                if grad is not None:
                    norm.requires_grad_().grad = grad  # autograd adds to an existing .grad in place
                working[spec.role] = norm
            for spec in unit.spec.tensors:
                if spec.frozen:
                    a, b = (working.pop(spec.role + part) for part in (LORA_A, LORA_B))
                    working[spec.role] = AdaptedMatrix(
                        working[spec.role], a, b, self.scaling, self.dropout, spec.name
                    )
            found.append(working)
        return found

    # forward

    def _forward(self, inputs: list[Tensor], kept: Boundaries, training: bool) -> None:
        """Run all layers and keep the output of the last. In training, the stash is filled."""
        self.rooms.phase = "forward"
        rope = rope_tables(self.config, inputs[0].shape[1], self.device)
        stash = kept.stash if training else []
        # the next boundary is the next band's entry in the stash, so that it is written once
        through_stash = training and not self.exact_forward
        places = [*stash, kept.output] if through_stash else [kept.carry] * len(self.bands) + [kept.output]
        with self._residence.visit() as (embed,):
            table = embed.weights[EMBEDDING_NAME]
            for i, tokens in enumerate(inputs):
                places[0].put(i, table.rows(tokens.to(self.device, non_blocking=True), self.compute))
        for band, (here, there) in enumerate(itertools.pairwise(places)):
            with self._residence.visit() as units:
                layers = self._working(units)
                for i in range(len(inputs)):
                    x, self.dropout.first = here.get(i), i * self.micro_batch
                    if training and not through_stash:
                        stash[band].put(i, x)
                    for w in layers:
                        x = block(x, w, rope, self.config)
                    there.put(i, x)

    # head

    def _head_matrix(self, working: dict[str, Any], grad: Tensor | None) -> WorkingMatrix:
        if "head" in working:
            return working["head"]
        table = self._units["embed"].weights[EMBEDDING_NAME]  # tied, so it lives on the GPU
        return WorkingMatrix(table.dense(self.compute, self._copies), grad)

    def _loss(self, output: Boundary, targets: list[Tensor]) -> Tensor:
        """Sum of the loss, fp64 scalar."""
        self.rooms.phase = "loss"
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._residence.visit() as units:
            (w,) = self._working(units)
            head = self._head_matrix(w, None)
            for i, wanted in enumerate(targets):
                for h, t in self._chunks(output.get(i), wanted):
                    normed = rms_norm(h, w["norm"], self.config.norm_eps)
                    total += cross_entropy(matmul_wide(normed, head.value.T), t, None)
        return total

    def _loss_and_backward(
        self, w: dict[str, Any], kept: Boundaries, targets: list[Tensor], count: int
    ) -> Tensor:
        """Mean loss; its gradient goes into the carry, and those of norm and head into their buffers."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tied = self._grads["embed"][EMBEDDING_NAME].zero_() if self.config.tie_embeddings else None
        head = self._head_matrix(w, tied)
        for i, wanted in enumerate(targets):
            x = kept.output.get(i)
            dx = x if kept.output is kept.carry else torch.empty_like(x)
            for (h, t), dh in zip(
                self._chunks(x, wanted), dx.flatten(0, 1).split(self.loss_chunk), strict=True
            ):
                leaf = h.detach().requires_grad_()
                with torch.enable_grad():
                    normed = rms_norm(leaf, w["norm"], self.config.norm_eps)
                logits = matmul_wide(normed.detach(), head.value.T)
                total += cross_entropy(logits, t, 1 / count)
                d_logits = logits.to(self.compute)
                del logits  # in bf16 both are large
                d_normed = head.backward(d_logits, normed.detach())
                del d_logits
                torch.autograd.backward(normed, d_normed)
                assert leaf.grad is not None
                dh.copy_(leaf.grad)
            kept.carry.put(i, dx)
        return total / count

    def _chunks(self, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        flat = targets.to(self.device, non_blocking=True).flatten()
        return zip(x.flatten(0, 1).split(self.loss_chunk), flat.split(self.loss_chunk), strict=True)

    # backward

    def _backward(
        self,
        layers: list[dict[str, Any]],
        stash: Boundary,
        carry: Boundary,
        count: int,
        rope: tuple[Tensor, Tensor],
    ) -> None:
        """Gradients of a band into its buffers; the carry from the gradient of its output to its input's."""
        for i in range(count):
            x, self.dropout.first = stash.get(i).detach().requires_grad_(), i * self.micro_batch
            outputs, dy = self._recompute(x, layers, rope), carry.get(i)
            torch.autograd.backward(outputs, (dy, dy))
            assert x.grad is not None
            carry.put(i, x.grad)
            del x, outputs, dy  # before the next micro-batch makes its own

    def _recompute(
        self, x: Tensor, layers: list[dict[str, Any]], rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The two terms of a band's output, with their graph; the second is not computed."""
        with torch.enable_grad():
            for w in layers[:-1]:
                x = block(x, w, rope, self.config)
            residual, product = block_body(x, layers[-1], rope, self.config)
            return residual, _Last.apply(product, layers[-1]["down"])

    def _backward_embedding(self, inputs: list[Tensor], carry: Boundary) -> None:
        grad = self._grads["embed"][EMBEDDING_NAME]
        if not self.config.tie_embeddings:
            grad.zero_()
        for i, tokens in enumerate(inputs):
            index = tokens.to(self.device, non_blocking=True).flatten()
            grad.index_add_(0, index, carry.get(i).flatten(0, 1).to(grad.dtype))

    # the interface

    @_settled
    @torch.no_grad()
    def step(self, batch: Tensor, step: int, schedule: float, rehearsal: bool = False) -> StepReport:
        assert self.optimizer is not None, "this engine was made without an optimizer"
        inputs, targets, count = split(batch, self.micro_batch, self.rooms)
        kept = self.reserve(*_shape(batch), training=True)
        backward = self._backward_visits()
        norm_only = [Visit(visit.units) for visit in backward] if self.grad_clip else []
        self._residence.begin(self._forward_visits() + norm_only + backward)
        self.dropout.step = step
        self._forward(inputs, kept, training=True)

        # filled there: a copy from here would wait
        accepted = torch.full((), not rehearsal, dtype=torch.bool, device=self.device)
        shrink = None
        if self.grad_clip:
            norm, loss = self._norm(inputs, targets, count, kept)
            accepted = accepted & norm.isfinite() & loss.isfinite()
            shrink = (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        updated = torch.zeros((), dtype=torch.int64, device=self.device)
        for unit, grads, loss in self._gradients(inputs, targets, count, kept):
            self.rooms.phase = "update"
            square = sum_of_squares(grads)
            squares += square
            accepted = accepted & square.isfinite() & loss.isfinite()
            if shrink is not None:
                for grad in grads.values():
                    grad.mul_(shrink)
            self.optimizer.update(unit, grads, step, schedule, accepted)
            updated += accepted
        self.rooms.phase = ""
        # the only wait for the device
        numbers = torch.stack([loss, squares.sqrt(), updated.double()]).tolist()
        self._units_mover.finish()
        self._boundaries_mover.finish()
        self.dropout.step = None
        return StepReport(numbers[0], numbers[1], len(self._units) - int(numbers[2]))

    def _norm(
        self, inputs: list[Tensor], targets: list[Tensor], count: int, kept: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """Norm of the gradient of all weights, at the price of a backward pass; and the loss."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, grads, mean_loss in self._gradients(inputs, targets, count, kept):
            squares += sum_of_squares(grads)
            loss = mean_loss
        return squares.sqrt(), loss

    def _gradients(
        self, inputs: list[Tensor], targets: list[Tensor], count: int, kept: Boundaries
    ) -> Iterator[tuple[Unit, dict[str, Tensor], Tensor]]:
        """Every unit from the head down with its gradients, which last until the next, and the mean loss."""
        rope = rope_tables(self.config, inputs[0].shape[1], self.device)
        stash = list(kept.stash)
        for visit in self._backward_visits():
            with self._residence.visit() as units:
                self.rooms.phase = "loss" if visit.units == ("head",) else "backward"
                if visit.units == ("head",):
                    (w,) = self._working(units, grads=True)
                    loss = self._loss_and_backward(w, kept, targets, count)
                elif visit.units == ("embed",):
                    self._backward_embedding(inputs, kept.carry)
                else:
                    layers = self._working(units, grads=True)
                    self._backward(layers, stash.pop(), kept.carry, len(inputs), rope)
                for unit in reversed(units):
                    yield unit, self._grads[unit.spec.name], loss

    @_settled
    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> tuple[float, int]:
        inputs, targets, count = split(batch, self.micro_batch, self.rooms)
        kept = self.reserve(*_shape(batch), training=False)
        self._residence.begin([*self._forward_visits(), Visit(("head",))])
        self._forward(inputs, kept, training=False)
        total = float(self._loss(kept.output, targets))
        self.rooms.phase = ""
        return total, count

    @_settled
    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        self._residence.begin([*self._forward_visits(), Visit(("head",))])
        rope = rope_tables(self.config, tokens.shape[1], self.device)
        with self._residence.visit() as (embed,):
            x = embed.weights[EMBEDDING_NAME].rows(tokens.to(self.device), self.compute)
        for _ in self.bands:
            with self._residence.visit() as units:
                for w in self._working(units):
                    x = block(x, w, rope, self.config)
        with self._residence.visit() as units:
            (w,) = self._working(units)
            normed = rms_norm(x[:, -1], w["norm"], self.config.norm_eps)
            return matmul_wide(normed, self._head_matrix(w, None).value.T)

    def units(self, write: bool = False) -> Iterator[Unit]:
        yield from self._units.values()


def _shape(batch: Tensor) -> tuple[int, int]:
    """Sequences and length of the inputs of a batch."""
    return batch.shape[0], batch.shape[1] - 1


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _copied(unit: Unit, compute: torch.dtype) -> int:
    """Elements of a unit's matrices that exist in compute precision beside what is stored."""
    stored = unit.weight_tensors()
    matrices = [spec for spec in unit.spec.tensors if len(spec.shape) == 2]
    return sum(_aligned(spec.numel) for spec in matrices if stored[spec.name].dtype != compute)


def cross_entropy(logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
    """Sum of the cross-entropy, fp64 scalar, of logits [tokens, V], which are used up.

    With a weight they become the gradient of weight times that sum; all in place, so that a chunk
    has its logits in memory once.
    """
    counts = targets != IGNORED
    index = targets.clamp_min(0).unsqueeze(1)
    top = logits.amax(1, keepdim=True)
    logits.sub_(top)
    picked = logits.gather(1, index)
    logits.exp_()
    total = logits.sum(1, keepdim=True)
    losses = (total.log() - picked).squeeze(1)
    if weight is not None:
        logits.div_(total)
        logits.scatter_add_(1, index, torch.full_like(picked, -1.0))
        logits.mul_(weight).masked_fill_(~counts.unsqueeze(1), 0.0)
    return losses.double().masked_fill(~counts, 0.0).sum()
