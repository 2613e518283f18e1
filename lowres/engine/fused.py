"""The operations of a block with fused kernels: norm, SwiGLU and rotary embedding in one pass each, the input
of several matrices prepared once, and products of INT8 codes.

Between two products there is one node of the graph: what prepares the input (nothing, a norm or SwiGLU)
together with the matrices that read it. It keeps the input before preparation, and the INT8 codes that were
multiplied; the prepared input in 16 or 32 bits does not exist with INT8 products.

An INT8 product multiplies the codes that are stored:

    y  = (a codes . W codes^T) * a scale of the token * W scale of the output
    dx = (g codes . W codes)   * g scale of the token          g = dy * W scales, quantised per token
    dW = (h codes^T . a codes) * h scale of the output         h = dy * a scales, quantised per output

So the weight gradient is that of the product that was computed: it reads the same codes. Only the gradients
of outputs are quantised, twice, because in each product the scales along the sum are folded into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lowres.config import ModelConfig
from lowres.engine.common import EngineSettings
from lowres.engine.pieces import Additions
from lowres.engine.working import Gradient, Room, working_copy
from lowres.kernels.norm import rms_norm, rms_norm_backward, rms_norm_quantised
from lowres.kernels.product import along_sum, multiply
from lowres.kernels.quantise import Quantised, quantise_columns, quantise_rows
from lowres.kernels.rotary import rotate
from lowres.kernels.swiglu import swiglu, swiglu_backward, swiglu_quantised
from lowres.model import Dropout, Operations, Places, lora, split_heads
from lowres.storage import Int8, Storage, TensorSpec


class Operand:
    """The prepared input of some matrices, [tokens, in]: in the format of the activations (`dense`), as
    codes, or both. leading: its shape before the last dimension."""

    def __init__(
        self,
        dense: Tensor | None,
        quantised: Quantised | None,
        leading: tuple[int, ...],
    ) -> None:
        self.dense, self.quantised, self.leading = dense, quantised, leading
        self._along_tokens: Tensor | None = None

    @property
    def codes_along_tokens(self) -> Tensor:
        """The codes as [in, tokens], once for all matrices."""
        if self._along_tokens is None:
            assert self.quantised is not None
            self._along_tokens = along_sum(self.quantised.codes)
        return self._along_tokens


class Matrix(Protocol):
    """A matrix during the visit of its layer. dense, codes: in which forms it needs its input."""

    dense: bool
    codes: bool
    rows: int

    def product(self, x: Operand, out: Tensor) -> Tensor:
        """Into out [tokens, rows], which is returned."""

    def backward(self, dy: Tensor, x: Operand, dx: Tensor | None) -> Tensor:
        """Add to the gradient of the weight; return the gradient of the input, added to `dx` if given."""


class DenseMatrix:
    """Values [out, in] in the format of the activations."""

    dense, codes = True, False

    def __init__(self, value: Tensor, grad: Gradient | None) -> None:
        """grad: None in the forward pass and for a frozen matrix."""
        self.value, self.grad, self.rows = value, grad, len(value)

    def product(self, x: Operand, out: Tensor) -> Tensor:
        assert x.dense is not None
        return torch.mm(x.dense, self.value.T, out=out)

    def backward(self, dy: Tensor, x: Operand, dx: Tensor | None) -> Tensor:
        assert x.dense is not None
        if self.grad is not None:
            self.grad.add(dy, x.dense)
        return dy @ self.value if dx is None else dx.addmm_(dy, self.value)


class Int8Matrix:
    """Codes [out, in] with a scale per output.

    transposed: the codes as [in, out], needed in the backward pass. grad: if its buffer is smaller than the
    codes, these have padding. wide: compute the weight's gradient in the format of the activations instead of
    INT8.
    """

    dense, codes = False, True

    def __init__(self, weight: Quantised, transposed: Tensor, grad: Gradient | None, wide: bool) -> None:
        self.weight, self.transposed, self.grad, self.wide = weight, transposed, grad, wide
        self.rows = len(weight.codes)

    def product(self, x: Operand, out: Tensor) -> Tensor:
        assert x.quantised is not None
        return multiply(x.quantised, *self.weight, out)

    def backward(self, dy: Tensor, x: Operand, dx: Tensor | None) -> Tensor:
        if self.grad is not None:
            self._add_gradient(self.grad, dy, x)
        g = quantise_rows(dy, self.weight.scales)
        if dx is not None:
            return multiply(g, self.transposed, None, dx, add=True)
        dx = torch.empty(len(dy), len(self.transposed), dtype=dy.dtype, device=dy.device)
        return multiply(g, self.transposed, None, dx)

    def _add_gradient(self, grad: Gradient, dy: Tensor, x: Operand) -> None:
        assert x.quantised is not None
        if self.wide:
            grad.add(dy, x.quantised.dense(dy.dtype))
            return
        buffer, additions = grad.buffer, grad.additions
        if not additions.lacks(buffer):
            return
        rows, columns = buffer.shape
        h = quantise_columns(dy, x.quantised.scales)
        h = Quantised(h.codes[:rows], h.scales[:rows])
        multiply(h, x.codes_along_tokens[:columns], None, buffer, add=True)
        additions.done(buffer)


class Adapted:
    """A frozen matrix and its adapter; see `lowres.model.lora`. The adapter reads the input in the format of
    the activations."""

    dense = True

    def __init__(
        self,
        frozen: DenseMatrix | Int8Matrix,
        a: DenseMatrix,
        b: DenseMatrix,
        scaling: float,
        dropout: Dropout,
        spec: TensorSpec,
    ) -> None:
        """spec: of the frozen matrix."""
        self.frozen, self.a, self.b, self.dropout, self.spec = frozen, a, b, dropout, spec
        self.adapter = lora.Adapter(a.value, b.value, scaling)
        self.rows, self.codes = frozen.rows, frozen.codes

    def product(self, x: Operand, out: Tensor) -> Tensor:
        assert x.dense is not None
        return lora.add_product(self.frozen.product(x, out), x.dense, self._mask(x), self.adapter)

    def backward(self, dy: Tensor, x: Operand, dx: Tensor | None) -> Tensor:
        assert x.dense is not None and self.a.grad is not None and self.b.grad is not None
        dx = self.frozen.backward(dy, x, dx)
        add_a, add_b = self.a.grad.add, self.b.grad.add
        return lora.add_gradients(dx, dy, x.dense, self._mask(x), self.adapter, add_a, add_b)

    def _mask(self, x: Operand) -> Tensor | None:
        assert x.dense is not None
        mask = lora.padded_mask(self.dropout, self.spec, x.dense.view(*x.leading, -1))
        return mask if mask is None else mask.flatten(0, -2)


# What turns the inputs of a node, each [tokens, ...], into what its matrices multiply. kept: whether
# `backward` reads the inputs (they are also kept if a matrix needs `dense`). `backward` returns the gradients
# of the inputs for that of the result, and may overwrite all its arguments.


class _AsItIs:
    kept = False

    def dense(self, x: Tensor) -> Tensor:
        return x

    def quantised(self, x: Tensor) -> Quantised:
        return quantise_rows(x)

    def backward(self, d: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (d,)


class _Normed:
    """weight: fp32, with the buffer of its gradient as `.grad`."""

    kept = True

    def __init__(self, weight: Tensor, eps: float, additions: Additions) -> None:
        self.weight, self.eps, self.additions = weight, eps, additions

    def dense(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def quantised(self, x: Tensor) -> Quantised:
        return rms_norm_quantised(x, self.weight, self.eps)

    def backward(self, d: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (norm_backward(d, x, self.weight, self.eps, self.additions),)


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, additions: Additions) -> Tensor:
    """`rms_norm_backward` of a weight that has the buffer of its gradient as `.grad`."""
    buffer = weight.grad
    if buffer is None or not additions.lacks(buffer):
        return rms_norm_backward(dy, x, weight, eps, None)
    dx = rms_norm_backward(dy, x, weight, eps, buffer)
    additions.done(buffer)
    return dx


class _Gated:
    kept = True

    def dense(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up)

    def quantised(self, gate: Tensor, up: Tensor) -> Quantised:
        return swiglu_quantised(gate, up)

    def backward(self, d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        swiglu_backward(d, gate, up)
        return gate, up


Prepare = _AsItIs | _Normed | _Gated


def _operand(prepare: Prepare, matrices: Sequence[Matrix], inputs: Sequence[Tensor]) -> Operand:
    flat = [x.flatten(0, -2) for x in inputs]
    return Operand(
        prepare.dense(*flat) if any(m.dense for m in matrices) else None,
        prepare.quantised(*flat) if any(m.codes for m in matrices) else None,
        tuple(inputs[0].shape[:-1]),
    )


def _products(matrices: Sequence[Matrix], operand: Operand, like: Tensor) -> tuple[Tensor, ...]:
    """The products [..., rows], each in memory of its own, so that it may be changed in place."""
    found = tuple(like.new_empty(*operand.leading, matrix.rows) for matrix in matrices)
    for matrix, y in zip(matrices, found, strict=True):
        matrix.product(operand, y.flatten(0, -2))
    return found


class _Node(torch.autograd.Function):
    """Prepare the inputs, and multiply them by each of some matrices. Weight gradients are added to buffers
    and do not pass through autograd. What was prepared in the format of the activations is prepared again in
    the backward pass; codes are kept."""

    @staticmethod
    def forward(
        ctx: Any, prepare: Prepare, matrices: Sequence[Matrix], valued: bool, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.prepare, ctx.matrices, ctx.operand = prepare, matrices, None
        if prepare.kept or any(m.dense for m in matrices):
            ctx.save_for_backward(*inputs)
        if not valued:
            leading = inputs[0].shape[:-1]
            return tuple(inputs[0].new_empty(1).expand(*leading, m.rows) for m in matrices)
        operand = _operand(prepare, matrices, inputs)
        found = _products(matrices, operand, inputs[0])
        if operand.quantised is not None:
            operand.dense = None
            ctx.operand = operand
        return found

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        prepare, inputs, operand = ctx.prepare, ctx.saved_tensors, ctx.operand
        flat = [x.flatten(0, -2) for x in inputs]
        if operand is None:
            operand = _operand(prepare, ctx.matrices, inputs)
        elif any(m.dense for m in ctx.matrices):
            operand.dense = prepare.dense(*flat)
        dx = None
        for matrix, dy in zip(ctx.matrices, dys, strict=True):
            dx = matrix.backward(dy.flatten(0, -2).contiguous(), operand, dx)
        ctx.operand = operand = None
        grads = prepare.backward(dx, *flat)
        leading = dys[0].shape[:-1]
        return None, None, None, *(grad.view(*leading, -1) for grad in grads)


class _Rotate(torch.autograd.Function):
    """Rotary embedding of x [B, T, H * E] in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.tables = cos, sin
        rotate(x.unflatten(-1, (-1, cos.shape[-1])), cos, sin)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        dx = dx.clone(memory_format=torch.contiguous_format)  # autograd may give the same tensor to others
        cos, sin = ctx.tables
        rotate(dx.unflatten(-1, (-1, cos.shape[-1])), cos, sin, inverse=True)
        return dx, None, None


class FusedOperations(Operations):
    """The operations of a block on `Matrix` weights. additions: see `Gradient`."""

    def __init__(self, additions: Additions | None = None) -> None:
        self._additions = additions or Additions()

    def products(
        self, x: Tensor, w: Any, normed_by: str, roles: tuple[str, ...], config: ModelConfig
    ) -> list[Tensor]:
        prepare = _Normed(w[normed_by], config.norm_eps, self._additions)
        return self._node(prepare, [w[role] for role in roles], [x])

    def product(self, x: Tensor, weight: Any) -> Tensor:
        return self._node(_AsItIs(), [weight], [x])[0]

    def gated(self, gate: Tensor, up: Tensor, weight: Any, valued: bool) -> Tensor:
        return self._node(_Gated(), [weight], [gate, up], valued)[0]

    def rotate(self, x: Tensor, positions: Places) -> Tensor:
        rotated = _Rotate.apply(x, positions.cos, positions.sin)
        return split_heads(rotated, positions.cos.shape[-1])

    @staticmethod
    def _node(
        prepare: Prepare, matrices: list[Matrix], inputs: list[Tensor], valued: bool = True
    ) -> list[Tensor]:
        if torch.is_grad_enabled():
            return list(_Node.apply(prepare, matrices, valued, *inputs))
        operand = _operand(prepare, matrices, inputs)
        return list(_products(matrices, operand, inputs[0]))


class FusedWeights:
    """Makes the matrices of a visit; see `lowres.engine.working.PlainWeights`."""

    def __init__(self, settings: EngineSettings, dropout: Dropout, additions: Additions) -> None:
        self._settings, self._dropout, self.operations = settings, dropout, FusedOperations(additions)

    def matrix(
        self, storage: Storage, spec: TensorSpec, grad: Gradient | None, room: Room, backward: bool
    ) -> DenseMatrix | Int8Matrix:
        settings = self._settings
        if not (settings.int8 and isinstance(storage, Int8)):
            return DenseMatrix(working_copy(storage, spec, settings.compute, room, settings.pad), grad)
        weight = Quantised(storage.codes, storage.scales)
        padded = spec.padded(settings.pad)
        if padded != spec.shape:
            weight = _padded(weight, padded, room)
        transposed = weight.codes.t()
        if settings.transposes and backward:
            transposed = along_sum(weight.codes, room.take(padded[::-1], torch.int8))
        return Int8Matrix(weight, transposed, grad, settings.wide_gradients)

    def adapted(
        self, frozen: DenseMatrix | Int8Matrix, a: DenseMatrix, b: DenseMatrix, spec: TensorSpec
    ) -> Adapted:
        return Adapted(frozen, a, b, self._settings.scaling, self._dropout, spec)


def _padded(weight: Quantised, shape: tuple[int, ...], room: Room) -> Quantised:
    """A copy with rows and columns of zeros; padded rows have a scale of zero."""
    (rows, columns), codes = weight.codes.shape, room.take(shape, torch.int8)
    codes[:rows, :columns] = weight.codes
    codes[rows:].zero_()
    codes[:, columns:].zero_()
    return Quantised(codes, F.pad(weight.scales, (0, 0, 0, shape[0] - rows)))
