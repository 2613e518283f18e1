"""Matrices during the visit of their layer: products that add their weight gradients to an fp32 buffer.

A block (`lowres.model.block`) uses these in place of its weights.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowres.data.batches import IGNORED
from lowres.engine.common import EngineSettings
from lowres.engine.layout import aligned_elements
from lowres.engine.pieces import Additions
from lowres.model import PLAIN, Dropout, lora
from lowres.storage import Storage, TensorSpec
from lowres.target import kind_of

# elements of a weight gradient that exist at one time before they are added to a buffer of another precision
PRODUCT_CHUNK = 1 << 24


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 2-D matrices; the result is fp32 if the inputs are bf16."""
    if a.dtype != torch.bfloat16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if kind_of(a.device) == "cuda" else (a @ b).float()


@cache
def adds_wide() -> bool:
    """Whether this PyTorch can add a bf16 product to an fp32 matrix in place. It can only do so on CUDA. The
    first versions with this overload require a bf16 matrix, so it is tried if there is a GPU. This waits for
    the device, so engines call it when they are built."""
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    if not torch.cuda.is_available():  # a plan for a GPU assumes it
        return True
    with _disable_current_modes():  # the cached answer is also used after a trace
        try:
            a = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
            total = torch.full((16, 16), 0.25, device="cuda")
            torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
            return bool((total == 16.25).all())
        except RuntimeError:
            return False


class Gradient:
    """The gradient of a matrix [out, in], to which every piece of a batch is added. buffer: fp32 or better.
    additions: see there; by default, nothing is repeated."""

    def __init__(self, buffer: Tensor, additions: Additions | None = None) -> None:
        self.buffer, self.additions = buffer, additions or Additions()

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add dy^T x for dy [tokens, out] and x [tokens, in], in the precision of the buffer. If dy and x
        have more columns, those are padding."""
        grad, additions = self.buffer, self.additions
        dy, x = dy[:, : grad.shape[0]], x[:, : grad.shape[1]]
        wide = dy.dtype == torch.bfloat16 and kind_of(grad.device) == "cuda" and adds_wide()
        in_place = wide or dy.dtype == grad.dtype  # no memory for the product
        rows = len(grad) if in_place else max(1, PRODUCT_CHUNK // grad.shape[1])
        for part, columns in zip(grad.split(rows), dy.split(rows, dim=1), strict=True):
            if not additions.lacks(part):
                continue
            if wide:
                torch.addmm(part, columns.T, x, out_dtype=part.dtype, out=part)
            elif in_place:
                part.addmm_(columns.T, x)
            else:
                part.add_(columns.T @ x if kind_of(x.device) == "cpu" else matmul_wide(columns.T, x))
            additions.done(part)


class Room:
    """Memory for the working copies of a visit, taken from the start to the end."""

    def __init__(self, slab: Tensor) -> None:
        self._slab, self._taken = slab, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        start, self._taken = self._taken, self._taken + aligned_elements(numel) * dtype.itemsize
        return self._slab[start : start + numel * dtype.itemsize].view(dtype).view(shape)


def working_copy(storage: Storage, spec: TensorSpec, dtype: torch.dtype, room: Room, pad: int) -> Tensor:
    """A matrix in this dtype: the stored tensor if that has it, else a copy in `room`, padded with zeros (see
    `EngineSettings`)."""
    if storage.tensors()[""].dtype == dtype:
        return storage.dense(dtype)
    (rows, columns), copy = spec.shape, room.take(spec.padded(pad), dtype)
    storage.dense(dtype, copy[:rows, :columns])
    copy[rows:].zero_()
    copy[:, columns:].zero_()
    return copy


class WorkingMatrix:
    """A matrix during the visit of its layer: its values in compute precision and its gradient."""

    def __init__(self, value: Tensor, grad: Gradient | None) -> None:
        """grad: None in the forward pass and for a frozen matrix."""
        self.value, self.grad = value, grad

    def __call__(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x, self) if torch.is_grad_enabled() else self.product(x)

    def last(self, x: Tensor) -> Tensor:
        """The product as a node to differentiate; its value is not needed and not computed."""
        return _Last.apply(x, self)

    @property
    def rows(self) -> int:
        return len(self.value)

    def product(self, x: Tensor) -> Tensor:
        return x @ self.value.T

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """Add dy^T x to the gradient; return dy W."""
        if self.grad is not None:
            self.grad.add(dy.flatten(0, -2), x.flatten(0, -2))
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
        spec: TensorSpec,
    ) -> None:
        """spec: of the frozen matrix; its name names the dropout masks, its width is theirs."""
        super().__init__(frozen.value, None)
        self.a, self.b, self.dropout, self.spec = a, b, dropout, spec
        self.adapter = lora.Adapter(a.value, b.value, scaling)

    def product(self, x: Tensor) -> Tensor:
        return lora.add_product(super().product(x), x, self._mask(x), self.adapter)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """Add to the gradients of A and B; return the gradient of x."""
        assert self.a.grad is not None and self.b.grad is not None
        dx = dy @ self.value
        return lora.add_gradients(dx, dy, x, self._mask(x), self.adapter, self.a.grad.add, self.b.grad.add)

    def _mask(self, x: Tensor) -> Tensor | None:
        return lora.padded_mask(self.dropout, self.spec, x)


class PlainWeights:
    """Makes the matrices of a visit, for a block that computes with PyTorch's operations."""

    operations = PLAIN

    def __init__(self, settings: EngineSettings, dropout: Dropout) -> None:
        self._settings, self._dropout = settings, dropout

    def matrix(
        self, storage: Storage, spec: TensorSpec, grad: Gradient | None, room: Room, backward: bool
    ) -> WorkingMatrix:
        """grad: its gradient, if it has one. backward: whether the visit differentiates."""
        value = working_copy(storage, spec, self._settings.compute, room, self._settings.pad)
        return WorkingMatrix(value, grad)

    def adapted(
        self, frozen: WorkingMatrix, a: WorkingMatrix, b: WorkingMatrix, spec: TensorSpec
    ) -> AdaptedMatrix:
        """spec: of the frozen matrix."""
        return AdaptedMatrix(frozen, a, b, self._settings.scaling, self._dropout, spec)


class _Multiply(torch.autograd.Function):
    """x W^T; its weight gradient is added to an fp32 buffer and does not pass through autograd."""

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
    """`_Multiply` for the last product of a recomputation. Its value is not needed, so it is not computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: WorkingMatrix) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix = matrix
        return x.new_empty(1).expand(*x.shape[:-1], matrix.rows)

    backward = _Multiply.backward


def cross_entropy(logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
    """The loss of each target, fp64 [tokens], from logits [tokens, V], which are overwritten; 0 for IGNORED.

    With a weight, the logits become the gradient of weight times the sum of the losses. All of it is done in
    place, so that the logits of a chunk are in memory only once.
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
    return losses.double().masked_fill(~counts, 0.0)
