"""How a weight is kept between its visits: fp32, bf16, or INT8 codes with one scale per row.

Training reads a weight with `dense` (or `rows`, for an embedding) and writes it with `apply`, the
second phase of every optimizer:

    W <- (1 - decay) * W - factor * direction

The arithmetic is fp32 whatever the storage is; low precision costs exactly one stochastic rounding
a write (bf16 arithmetic would lose 70 % of an update of 3e-5 before it is rounded). All work goes by
chunks of rows, so a write needs little memory beyond the weight, and the random bits are named by
element (`lowres.rng`), so the chunk size changes no result.

INT8 keeps symmetric codes in [-127, 127] and one fp32 scale per output row: 1 + 4 / row length
bytes a parameter. The scale is sticky. While every new value of a row fits the old scale, only the
*change* is rounded, in units of a code, so an update of zero changes nothing and a small one brings
little noise. A row is given a new scale, and rounded whole, when it outgrows the codes or uses less
than half of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowres import rng

MAX_CODE = 127
# where the largest value of a row is put when it gets a scale: room to grow before the next time
RESCALED_CODE = 120
# elements whose fp32 temporaries exist at one time: the L2 cache of a CPU core, or enough to fill a GPU
CHUNK_CPU, CHUNK_CUDA = 1 << 17, 1 << 22

# what a tensor does in the model
MATRIX_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
EMBEDDING_ROLES = ("embedding", "head")
NORM_ROLES = ("attn_norm", "mlp_norm", "norm")
DENSE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that `memory.compute` means on this device."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return DENSE_DTYPES[name]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model; `role` is one of the roles above."""

    name: str
    shape: tuple[int, ...]
    role: str

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class UnitSpec:
    """What a step visits as a whole: the embedding, one block, or final norm and head."""

    name: str
    tensors: tuple[TensorSpec, ...]


class Storage(Protocol):
    """One weight at rest. `shape` is that of the weight, whatever tensors it is kept in."""

    shape: tuple[int, ...]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`; the stored tensor itself where that is already so. Do not write to it."""

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight in `dtype`: shape index.shape + shape[1:]."""

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        """Set the weight from (first row, fp32 rows) pieces, rounding to nearest."""

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        """W <- (1 - decay) W - factor * direction, rounded stochastically with the bits of `key`.

        direction: fp32, the shape of the weight. factor: fp32, scalar or one per row [m, 1] or per
        column [1, n]. decay: fp32 scalar, or None for no weight decay.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores, by suffix to the weight's name."""


class Unit:
    """What a step visits as a whole: the weights of the embedding, of one block, or of final norm and
    head, with their optimizer state. Everything in it is touched once a direction and step, so it has
    one home, travels together, and is one file of a checkpoint.

    state: by weight name and key, filled by the optimizer. updates: int64 scalar, accepted updates.
    """

    def __init__(self, spec: UnitSpec, weights: dict[str, Storage], device: torch.device) -> None:
        assert weights.keys() == {tensor.name for tensor in spec.tensors}
        self.spec, self.weights = spec, weights
        self.state: dict[str, dict[str, Tensor]] = {}
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    def weight_tensors(self) -> dict[str, Tensor]:
        """The stored tensors of the weights: what a trained model consists of."""
        return {
            name + suffix: tensor
            for name, storage in self.weights.items()
            for suffix, tensor in storage.tensors().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and count: what the next step depends on."""
        state = {f"{name}.{key}": t for name, keys in self.state.items() for key, t in keys.items()}
        return self.weight_tensors() | state | {f"{self.spec.name}.updates": self.updates}


def row_chunks(shape: tuple[int, ...], device: torch.device) -> list[slice]:
    """Slices of rows that together cover a tensor, none much larger than the chunk size."""
    length = 1 if len(shape) == 1 else shape[1]
    step = max(1, (CHUNK_CUDA if device.type == "cuda" else CHUNK_CPU) // length)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def _part(factor: Tensor, rows: slice) -> Tensor:
    return factor[rows] if factor.dim() and factor.shape[0] > 1 else factor


class Dense:
    """A weight kept in a floating-point format. fp32 (and fp64, in tests) is written exactly."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = tuple(shape)
        self.value = torch.zeros(shape, dtype=dtype, device=device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.value[index].to(dtype)

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        for first, rows in values:
            self.value[first : first + len(rows)] = rows

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        if self.value.dtype != torch.bfloat16:
            if decay is not None:
                self.value.mul_(1 - decay)
            self.value.addcmul_(direction, factor.to(self.value.dtype), value=-1)
            return
        length = self.value[0].numel()
        for rows in row_chunks(self.shape, self.value.device):
            value = self.value[rows].float()
            if decay is not None:
                value.mul_(1 - decay)
            value.addcmul_(direction[rows], _part(factor, rows), value=-1)
            self.value[rows] = rng.round_to_bf16(value, key, rows.start * length)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.value}


class Int8:
    """A matrix kept as int8 codes [out, in] and fp32 scales [out, 1]: W = codes * scales."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape = tuple(shape)
        self.codes = torch.zeros(shape, dtype=torch.int8, device=device)
        self.scales = torch.full((shape[0], 1), 1e-8, dtype=torch.float32, device=device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in row_chunks(self.shape, self.codes.device):
            out[rows] = self.codes[rows] * self.scales[rows]
        return out

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.codes[index] * self.scales[index]).to(dtype)

    def fill(self, values: Iterator[tuple[int, Tensor]]) -> None:
        for first, rows in values:
            scales = rows.abs().amax(1, keepdim=True).div_(RESCALED_CODE).clamp_(min=1e-8)
            self.scales[first : first + len(rows)] = scales
            self.codes[first : first + len(rows)] = (rows / scales).round_().to(torch.int8)

    def apply(self, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        for rows in row_chunks(self.shape, self.codes.device):
            codes, scales = self.codes[rows].float(), self.scales[rows]
            change = direction[rows] * (_part(factor, rows) / -scales)
            if decay is not None:
                change.addcmul_(codes, decay, value=-1)
            new = codes + change
            top = new.abs().amax(1, keepdim=True)
            unchanged = change.abs().amax(1, keepdim=True) == 0
            fits = ((top >= MAX_CODE // 2 + 1) | unchanged | (top == 0)) & (top <= MAX_CODE)
            grow = torch.where(fits, 1.0, top / RESCALED_CODE)
            # what is exact already, and what has to be rounded: the change, or the whole new value
            codes.mul_(fits)
            rest = torch.where(fits, change, new.div_(grow))
            rounded = rng.round_to_integer(rest, key, rows.start * self.shape[1])
            # fp32 may have put 127.000004 at 127, and rounded up it would wrap around
            self.codes[rows] = codes.add_(rounded).clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
            self.scales[rows] = scales * grow

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scales": self.scales}


def make_storage(kind: str, shape: tuple[int, ...], device: torch.device) -> Storage:
    """An empty storage of a kind named in the config: int8, bf16 or fp32."""
    if kind == "int8":
        return Int8(shape, device)
    return Dense(shape, DENSE_DTYPES[kind], device)
