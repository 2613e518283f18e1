"""The layer-major step: all micro-batches of a step pass one layer before the next.

    forward:   for each layer: keep its inputs (the stash), run every micro-batch, no graph
    head:      loss and its gradient, a chunk of tokens at a time
    backward:  for each layer from the last: recompute and differentiate every micro-batch,
               gradients adding up in one fp32 buffer; update the layer; reuse the buffer

So gradients take the memory of one unit, a weight is dequantised once per direction and step, and
accumulation is exact at any batch size. The layer order is that of L2L (arXiv 2002.05645); its union
with INT8 weights and a fused per-layer update is this project's own.

There is no global gradient norm before the first update. A loss that is not finite therefore skips
the step before anything changed; a gradient that is not finite poisons all below it, so it ends the
step's updates there. Both are decided on the device: nothing here waits for it before the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowres.config import ModelConfig
from lowres.data.batches import IGNORED
from lowres.engine.common import StepReport, Updater, split, sum_of_squares
from lowres.model import EMBEDDING, Units, block, block_body, rms_norm, rope_tables

ALIGNMENT = 64  # elements between tensors in the gradient buffer, so that every view is aligned


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 2-D matrices with the result in fp32 where the inputs are bf16."""
    if a.dtype != torch.bfloat16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def accumulate(grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """grad [out, in] += dy^T x for dy [tokens, out] and x [tokens, in], in the precision of grad."""
    if dy.dtype == grad.dtype:
        grad.addmm_(dy.T, x)
    else:
        grad.add_(matmul_wide(dy.T, x))


class WorkingMatrix:
    """A matrix while its layer is visited: its values in compute precision and its gradient buffer."""

    def __init__(self, value: Tensor, grad: Tensor | None) -> None:
        self.value, self.grad = value, grad

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _Multiply.apply(x, self)
        return x @ self.value.T

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """Add dy^T x to the gradient; return dy W."""
        assert self.grad is not None
        accumulate(self.grad, dy.flatten(0, -2), x.flatten(0, -2))
        return dy @ self.value


class _Multiply(torch.autograd.Function):
    """x W^T whose weight gradient goes straight into an fp32 buffer instead of through autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: WorkingMatrix) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix = matrix
        return x @ matrix.value.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.matrix.backward(dy, x), None


class LayerwiseEngine:
    """Engine interface: see `lowres.engine.Engine`."""

    def __init__(
        self,
        config: ModelConfig,
        units: Units,
        optimizer: Updater | None,
        micro_batch: int,
        compute: torch.dtype,
        device: torch.device,
        loss_chunk: int = 1024,
    ) -> None:
        self.config, self.units, self.optimizer = config, units, optimizer
        self.micro_batch, self.loss_chunk = micro_batch, loss_chunk
        self.compute, self.device = compute, device
        self.layers = [name for name in units if name not in ("embed", "head")]
        # the tied embedding collects its gradient from the head's use until the embedding's own
        self._grads = self._gradient_buffers() if optimizer is not None else {}

    def _gradient_buffers(self) -> dict[str, dict[str, Tensor]]:
        """fp32 gradients of every unit as views of one buffer of the largest unit's size. A tied
        embedding has one of its own, as its gradient is alive while the layers use the other."""
        dtype = torch.promote_types(self.compute, torch.float32)
        sizes = {name: sum(_aligned(s.numel) for s in u.spec.tensors) for name, u in self.units.items()}
        own = ["embed"] if self.config.tie_embeddings else []
        shared = torch.empty(
            max(s for n, s in sizes.items() if n not in own), dtype=dtype, device=self.device
        )
        buffers = {}
        for name, unit in self.units.items():
            flat = torch.empty(sizes[name], dtype=dtype, device=self.device) if name in own else shared
            views, start = {}, 0
            for spec in unit.spec.tensors:
                views[spec.name] = flat[start : start + spec.numel].view(spec.shape)
                start += _aligned(spec.numel)
            buffers[name] = views
        return buffers

    # a visit

    @contextmanager
    def _visit(self, unit: str, grads: bool = False) -> Iterator[dict[str, Any]]:
        """The weights of a unit by role, ready for use; with `grads`, also their zeroed buffers."""
        working: dict[str, Any] = {}
        for spec in self.units[unit].spec.tensors:
            storage = self.units[unit].weights[spec.name]
            grad = self._grads[unit][spec.name].zero_() if grads else None
            if len(spec.shape) == 2:
                working[spec.role] = WorkingMatrix(storage.dense(self.compute), grad)
                continue
            norm = storage.dense(torch.promote_types(self.compute, torch.float32)).detach()
            if grad is not None:
                norm.requires_grad_().grad = grad  # autograd adds to an existing .grad in place
            working[spec.role] = norm
        yield working

    # forward

    def _embed(self, inputs: list[Tensor]) -> list[Tensor]:
        table = self.units["embed"].weights[EMBEDDING]
        return [table.rows(tokens, self.compute) for tokens in inputs]

    def _forward(self, inputs: list[Tensor], stash: list[list[Tensor]] | None) -> list[Tensor]:
        """Output of the last block for every micro-batch; each layer's inputs go to the stash, if any."""
        rope = rope_tables(self.config, inputs[0].shape[1], self.device)
        x = self._embed(inputs)
        for layer in self.layers:
            if stash is not None:
                stash.append(list(x))
            with self._visit(layer) as w:
                for i in range(len(x)):
                    x[i] = block(x[i], w, rope, self.config)
        return x

    # head

    def _head_matrix(self, working: dict[str, Any], grad: Tensor | None) -> WorkingMatrix:
        if "head" in working:
            return working["head"]
        table = self.units["embed"].weights[EMBEDDING]
        return WorkingMatrix(table.dense(self.compute), grad)

    def _loss(self, x: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Sum of the loss, fp64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._visit("head") as w:
            head = self._head_matrix(w, None)
            for xi, ti in zip(x, targets, strict=True):
                for h, t in self._chunks(xi, ti):
                    normed = rms_norm(h, w["norm"], self.config.norm_eps)
                    total += _cross_entropy(matmul_wide(normed, head.value.T), t, None)
        return total

    def _loss_and_backward(self, x: list[Tensor], targets: list[Tensor], count: int) -> Tensor:
        """Mean loss; x becomes its gradient, and the gradients of norm and head are left in their buffers."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tied = self._grads["embed"][EMBEDDING].zero_() if self.config.tie_embeddings else None
        with self._visit("head", grads=True) as w:
            head = self._head_matrix(w, tied)
            for i, (xi, ti) in enumerate(zip(x, targets, strict=True)):
                dx = torch.empty_like(xi)
                for (h, t), dh in zip(
                    self._chunks(xi, ti), dx.flatten(0, 1).split(self.loss_chunk), strict=True
                ):
                    leaf = h.detach().requires_grad_()
                    with torch.enable_grad():
                        normed = rms_norm(leaf, w["norm"], self.config.norm_eps)
                    logits = matmul_wide(normed.detach(), head.value.T)
                    total += _cross_entropy(logits, t, 1 / count)
                    d_normed = head.backward(logits.to(self.compute), normed.detach())
                    del logits  # before the next chunk makes its own
                    torch.autograd.backward(normed, d_normed)
                    assert leaf.grad is not None
                    dh.copy_(leaf.grad)
                x[i] = dx
        return total / count

    def _chunks(self, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(
            x.flatten(0, 1).split(self.loss_chunk), targets.flatten().split(self.loss_chunk), strict=True
        )

    # backward

    def _backward(
        self, layer: str, stash: list[Tensor], dx: list[Tensor], rope: tuple[Tensor, Tensor]
    ) -> None:
        """Gradients of a layer into its buffers; dx [micro-batch] from its output's to its input's."""
        with self._visit(layer, grads=True) as w:
            for i in range(len(dx)):
                x = stash[i].detach().requires_grad_()
                with torch.enable_grad():
                    residual, product = block_body(x, w, rope, self.config)
                d_product = w["down"].backward(dx[i], product.detach())
                torch.autograd.backward((residual, product), (dx[i], d_product))
                assert x.grad is not None
                dx[i] = x.grad

    def _backward_embedding(self, inputs: list[Tensor], dx: list[Tensor]) -> None:
        grad = self._grads["embed"][EMBEDDING]
        if not self.config.tie_embeddings:
            grad.zero_()
        for tokens, d in zip(inputs, dx, strict=True):
            grad.index_add_(0, tokens.flatten(), d.flatten(0, 1).to(grad.dtype))

    # the interface

    @torch.no_grad()
    def step(self, batch: Tensor, step: int, schedule: float) -> StepReport:
        assert self.optimizer is not None, "this engine was made without an optimizer"
        inputs, targets, count = split(batch, self.micro_batch, self.device)
        stash: list[list[Tensor]] = []
        x = self._forward(inputs, stash)
        loss = self._loss_and_backward(x, targets, count)  # x is its gradient from here on

        accepted = loss.isfinite()
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        updated = torch.zeros((), dtype=torch.int64, device=self.device)
        rope = rope_tables(self.config, inputs[0].shape[1], self.device)
        for unit in reversed(self.units):
            if unit == "embed":
                self._backward_embedding(inputs, x)
            elif unit != "head":
                self._backward(unit, stash.pop(), x, rope)
            grads = self._grads[unit]
            square = sum_of_squares(grads)
            squares += square
            accepted = accepted & square.isfinite()
            self.optimizer.update(self.units[unit], grads, step, schedule, accepted)
            updated += accepted
        # the only wait for the device
        numbers = torch.stack([loss, squares.sqrt(), updated.double()]).tolist()
        return StepReport(numbers[0], numbers[1], len(self.units) - int(numbers[2]))

    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> tuple[float, int]:
        inputs, targets, count = split(batch, self.micro_batch, self.device)
        return float(self._loss(self._forward(inputs, None), targets)), count

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        (x,) = self._forward([tokens.to(self.device)], None)
        with self._visit("head") as w:
            normed = rms_norm(x[:, -1], w["norm"], self.config.norm_eps)
            return matmul_wide(normed, self._head_matrix(w, None).value.T)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _cross_entropy(logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
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
