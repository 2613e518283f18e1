"""Low-rank adapters (Hu et al., LoRA, arXiv 2106.09685): their tensors, initial values and arithmetic.

    y = x W^T + scaling * dropout(x) A^T B^T       W [m, n] frozen, A [rank, n], B [m, rank]

`plain_product` is the definition, and autograd differentiates it. `add_product` and `add_gradients` compute
the same in less memory, for the layer-major engine; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lowres import rng
from lowres.config import ReloraConfig
from lowres.storage import ADAPTER, LORA_A, LORA_B, TensorSpec


def adapted(spec: TensorSpec, adapters: ReloraConfig) -> Iterator[TensorSpec]:
    """The tensors that replace a tensor of a block when there are adapters: a target matrix is frozen, and
    its A and B follow."""
    if spec.role not in adapters.targets:
        yield spec
        return
    (rows, columns), rank = spec.shape, min(adapters.rank, *spec.shape)
    path = spec.name.removesuffix(".weight")  # adapters have the names of PEFT
    yield replace(spec, frozen=True)
    inner = [dimension if dimension == spec.inner else None for dimension in (1, 0)]
    a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    yield TensorSpec(a, (rank, columns), spec.role + LORA_A, ADAPTER, inner=inner[0])
    yield TensorSpec(b, (rows, rank), spec.role + LORA_B, ADAPTER, inner=inner[1])


def fresh_adapter(spec: TensorSpec, seed: int, step: int, device: torch.device) -> Tensor:
    """Initial fp32 values of an adapter's A or B that starts after `step` steps. A is uniform in
    +- 1 / sqrt(n) for n columns (Kaiming with a = sqrt(5), as in LoRA). B is zero, so the model computes the
    same as before."""
    if spec.role.endswith(LORA_B):
        return torch.zeros(spec.shape, device=device)
    key = rng.make_key(seed, "adapter", spec.name, step)
    uniform = rng.uniform(key, 0, spec.numel, device).mul_(2).sub_(1)
    return uniform.div_(math.sqrt(spec.shape[1])).view(spec.shape)


class Dropout:
    """Dropout on the inputs of adapters. A mask is named by weight, step and sequence. So the recomputation
    of a layer uses the same mask as its forward pass, for any micro-batch size.

    The caller of the model sets `step` (None is evaluation, without dropout), and `first`, the index in the
    batch of the first sequence of the current micro-batch.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.seed = rate, seed
        self.step: int | None = None
        self.first = 0

    def mask(self, name: str, x: Tensor) -> Tensor | None:
        """What to multiply x [B, T, in] by, 0 or 1 / (1 - rate); None if nothing is dropped."""
        if not self.rate or self.step is None:
            return None
        key = rng.make_key(self.seed, "dropout", name, self.step)
        kept = rng.uniform(key, self.first * x[0].numel(), x.numel(), x.device) >= self.rate
        return kept.view_as(x).to(x.dtype).div_(1 - self.rate)


@dataclass(frozen=True)
class Adapter:
    """A [rank, n] and B [m, rank] in use, in the number format of the computation."""

    a: Tensor
    b: Tensor
    scaling: float


Add = Callable[[Tensor, Tensor], None]  # adds dy^T x to a gradient, for dy [tokens, out] and x [tokens, in]


def padded_mask(dropout: Dropout, spec: TensorSpec, x: Tensor) -> Tensor | None:
    """The dropout mask of x [B, T, in], the input of this matrix. Random numbers are named by element, so
    columns that are padding get none."""
    width = spec.shape[1]
    mask = dropout.mask(spec.name, x[..., :width])
    return mask if mask is None else F.pad(mask, (0, x.shape[-1] - width))


def plain_product(x: Tensor, mask: Tensor | None, frozen: Tensor, w: Adapter) -> Tensor:
    """y [..., m] for x [..., n]. mask: the dropout mask, or None."""
    dropped = x if mask is None else x * mask
    return F.linear(x, frozen) + w.scaling * F.linear(F.linear(dropped, w.a), w.b)


def add_product(y: Tensor, x: Tensor, mask: Tensor | None, w: Adapter) -> Tensor:
    """`plain_product` without a graph, in place, for y = x W^T."""
    inner = (x if mask is None else x * mask) @ w.a.T
    y.flatten(0, -2).addmm_(inner.flatten(0, -2), w.b.T, alpha=w.scaling)
    return y


def add_gradients(
    dx: Tensor, dy: Tensor, x: Tensor, mask: Tensor | None, w: Adapter, add_a: Add, add_b: Add
) -> Tensor:
    """Adds the adapter's part to dx = dy W, the gradient of x; the gradients of A and B go to `add_a` and
    `add_b`."""
    dropped = x if mask is None else x * mask
    # the scaling is applied to the smallest tensors
    add_b(dy.flatten(0, -2), (dropped @ w.a.T).mul_(w.scaling).flatten(0, -2))
    inner = (dy @ w.b).mul_(w.scaling)
    add_a(inner.flatten(0, -2), dropped.flatten(0, -2))
    if mask is not None:
        return dx.addcmul_(inner @ w.a, mask)
    dx.flatten(0, -2).addmm_(inner.flatten(0, -2), w.a)
    return dx
