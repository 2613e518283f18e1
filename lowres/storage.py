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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowres import rng
from lowres.device import chunks, kind_of

MAX_CODE = 127
# where the largest value of a row is put when it gets a scale: room to grow before the next time
RESCALED_CODE = 120
# elements whose fp32 temporaries exist at one time: the L2 cache of a CPU core, or enough to fill a GPU
CHUNK_CPU, CHUNK_CUDA = 1 << 17, 1 << 22

# what a tensor does in the model
MATRIX_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
EMBEDDING_ROLES = ("embedding", "head")
NORM_ROLES = ("attn_norm", "mlp_norm", "norm")
# the adapter of a matrix [m, n]: A [rank, n] and B [m, rank], see `lowres.relora`
LORA_A, LORA_B = ".lora_a", ".lora_b"
ADAPTER_ROLES = tuple(role + part for role in MATRIX_ROLES for part in (LORA_A, LORA_B))
DENSE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that `memory.compute` means on this device."""
    if name == "auto":
        name = "bf16" if kind_of(device) == "cuda" else "fp32"
    return DENSE_DTYPES[name]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model; `role` is one of the roles above. frozen: has no gradient and no state."""

    name: str
    shape: tuple[int, ...]
    role: str
    frozen: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class UnitSpec:
    """What a step visits as a whole: the embedding, one block, or final norm and head."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def trained(self) -> list[TensorSpec]:
        """The tensors that have gradients."""
        return [spec for spec in self.tensors if not spec.frozen]

    @property
    def adapters(self) -> dict[str, TensorSpec]:
        """The adapters of its matrices, by role."""
        return {spec.role: spec for spec in self.tensors if spec.role in ADAPTER_ROLES}


class Storage(Protocol):
    """One weight at rest. `shape` is that of the weight, whatever tensors it is kept in."""

    shape: tuple[int, ...]

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`; the stored tensor itself where that is already so. Do not write to it.

        out: where to put it otherwise, flat, at least as many elements.
        """

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


def row_chunks(shape: tuple[int, ...], device: torch.device) -> list[slice]:
    """Slices of rows that together cover a tensor, none much larger than the chunk size."""
    length = 1 if len(shape) == 1 else shape[1]
    step = max(1, (CHUNK_CUDA if kind_of(device) == "cuda" else CHUNK_CPU) // length)
    return chunks(shape[0], step)


def _part(factor: Tensor, rows: slice) -> Tensor:
    return factor[rows] if factor.dim() and factor.shape[0] > 1 else factor


class Dense:
    """A weight kept in a floating-point format. fp32 (and fp64, in tests) is written exactly."""

    def __init__(self, value: Tensor) -> None:
        self.shape = tuple(value.shape)
        self.value = value

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None or self.value.dtype == dtype:
            return self.value.to(dtype)
        return out[: self.value.numel()].view(self.shape).copy_(self.value)

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

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.shape = tuple(codes.shape)
        self.codes, self.scales = codes, scales

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.codes.numel(), dtype=dtype, device=self.codes.device)
        out = out[: self.codes.numel()].view(self.shape)
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


Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name


def storage_fields(kind: str, shape: tuple[int, ...]) -> Fields:
    """The tensors that a weight of a kind (int8, bf16 or fp32) is kept in, by suffix to its name."""
    if kind == "int8":
        return {"": (torch.int8, shape), ".scales": (torch.float32, (shape[0], 1))}
    return {"": (DENSE_DTYPES[kind], shape)}


def make_storage(kind: str, tensors: Mapping[str, Tensor]) -> Storage:
    """A storage of a kind over the tensors of `storage_fields`."""
    if kind == "int8":
        return Int8(tensors[""], tensors[".scales"])
    return Dense(tensors[""])


ALIGNMENT = 256  # bytes between the tensors of a slab


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def field_bytes(fields: Fields) -> dict[str, int]:
    """Bytes that each field takes in a slab."""
    return {n: aligned(d.itemsize * torch.Size(shape).numel()) for n, (d, shape) in fields.items()}


def fields_in(slab: Tensor, fields: Fields) -> dict[str, Tensor]:
    """The tensors of `fields` as views of a uint8 slab, one after another."""
    found, start = {}, 0
    sizes = field_bytes(fields)
    for name, (dtype, shape) in fields.items():
        end = start + dtype.itemsize * torch.Size(shape).numel()
        found[name] = slab[start:end].view(dtype).view(shape)
        start += sizes[name]
    return found


class Unit:
    """What a step visits as a whole: the weights of the embedding, of one block, or of final norm and
    head, with their optimizer state. Each of the two is one slab, in a home of its own; everything in a
    unit is touched once a direction and step, and it is one file of a checkpoint.

    state: by weight name and key. updates: int64 scalar, accepted updates. Both come with `give_state`.
    """

    def __init__(self, spec: UnitSpec, kinds: Mapping[str, str], slab: Tensor) -> None:
        self.spec, self.kinds, self.weights_slab = spec, kinds, slab
        self.state_slab: Tensor | None = None
        self.state: dict[str, dict[str, Tensor]] = {}
        self.updates: Tensor | None = None
        self._state_fields: Mapping[str, Fields] = {}
        tensors = fields_in(slab, weight_fields(spec, kinds))
        self.weights: dict[str, Storage] = {}
        for tensor in spec.tensors:
            own = {
                suffix: tensors[tensor.name + suffix]
                for suffix in storage_fields(kinds[tensor.name], tensor.shape)
            }
            self.weights[tensor.name] = make_storage(kinds[tensor.name], own)

    def give_state(self, fields: Mapping[str, Fields], slab: Tensor) -> None:
        """Optimizer state, by weight name and key, in a slab that is all zero at the start."""
        self._state_fields, self.state_slab = fields, slab
        tensors = fields_in(slab, state_fields(fields))
        self.updates = tensors.pop(UPDATES)
        self.state = {name: {key: tensors[f"{name}.{key}"] for key in own} for name, own in fields.items()}

    def over(self, weights: Tensor, state: Tensor | None) -> Unit:
        """The same unit in other memory, such as a copy on the GPU; without state if that is None."""
        unit = Unit(self.spec, self.kinds, weights)
        if state is not None:
            unit.give_state(self._state_fields, state)
        return unit

    def has_master(self, name: str) -> bool:
        """Whether a weight has a more precise copy, among the optimizer's state."""
        return MASTER in self.state.get(name, {})

    def fill(self, name: str, values: Iterator[tuple[int, Tensor]]) -> None:
        """Set a weight as `Storage.fill` does; it is the rounded master copy, if it has one."""
        weight = self.weights[name]
        if self.has_master(name):
            master = self.state[name][MASTER]
            Dense(master).fill(values)
            values = ((r.start, master[r].float()) for r in row_chunks(weight.shape, master.device))
        weight.fill(values)

    def apply(self, name: str, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        """Change a weight as `Storage.apply` does; through its master copy, if it has one."""
        weight = self.weights[name]
        if not self.has_master(name):
            weight.apply(direction, factor, decay, key)
            return
        master = self.state[name][MASTER]
        Dense(master).apply(direction, factor, decay, key)
        chunks = row_chunks(weight.shape, master.device)
        weight.fill((rows.start, master[rows].float()) for rows in chunks)

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
        count = {} if self.updates is None else {f"{self.spec.name}.{UPDATES}": self.updates}
        return self.weight_tensors() | state | count


# keys of optimizer state that every rule shares: the count, a higher-precision copy of the weight, and the
# sum of what was merged into it
UPDATES, MASTER, MERGED = "updates", "master", "merged"
# what state that all adapters of a unit share is filed under, instead of a weight's name
ADAPTERS = "adapters"


def weight_fields(spec: UnitSpec, kinds: Mapping[str, str]) -> Fields:
    """All tensors in the weights slab of a unit, by the names that a checkpoint uses."""
    return {
        tensor.name + suffix: field
        for tensor in spec.tensors
        for suffix, field in storage_fields(kinds[tensor.name], tensor.shape).items()
    }


def state_fields(fields: Mapping[str, Fields]) -> Fields:
    """All tensors in the state slab of a unit."""
    flat = {f"{name}.{key}": field for name, own in fields.items() for key, field in own.items()}
    return flat | {UPDATES: (torch.int64, ())}
