"""Units: the parts of a model that a step processes one by one, and the slabs of memory that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lowres import rng
from lowres.storage.dense import Dense
from lowres.storage.formats import FORMATS, Storage
from lowres.storage.specs import Fields, UnitSpec
from lowres.target import chunk_elements, chunks, row_chunks

ALIGNMENT = 256  # bytes; every tensor of a slab starts at a multiple of this


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
    """The weights of the embedding, of one block, or of the final norm and head, with their optimizer state.

    A step processes a unit as a whole: once in the forward pass and once in the backward pass. Weights and
    state are one slab each, and the two slabs may live in different rooms (GPU or host). In a checkpoint a
    unit is one file.

    state: by weight name and key. updates: int64 scalar, the number of accepted updates. Both are set by
    `give_state`.
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
            found = FORMATS[kinds[tensor.name]]
            own = {suffix: tensors[tensor.name + suffix] for suffix in found.parts}
            self.weights[tensor.name] = found.over(own)

    def give_state(self, fields: Mapping[str, Fields], slab: Tensor) -> None:
        """Attach optimizer state, by weight name and key, in a slab that is all zero at the start."""
        self._state_fields, self.state_slab = fields, slab
        tensors = fields_in(slab, state_fields(fields))
        self.updates = tensors.pop(UPDATES)
        self.state = {name: {key: tensors[f"{name}.{key}"] for key in own} for name, own in fields.items()}

    def over(self, weights: Tensor, state: Tensor | None) -> Unit:
        """The same unit in other memory, such as a copy on the GPU; without state if `state` is None."""
        unit = Unit(self.spec, self.kinds, weights)
        if state is not None:
            unit.give_state(self._state_fields, state)
        return unit

    def has_master(self, name: str) -> bool:
        """Whether the optimizer state has a more precise copy of a weight."""
        return MASTER in self.state.get(name, {})

    def fill(self, name: str, values: Iterator[tuple[int, Tensor]]) -> None:
        """Set a weight as `Storage.fill` does. With a master copy, the weight is the rounded master copy."""
        weight = self.weights[name]
        if self.has_master(name):
            master = self.state[name][MASTER]
            Dense(master).fill(values)
            values = ((r.start, master[r].float()) for r in row_chunks(weight.shape, master.device))
        weight.fill(values)

    def apply(self, name: str, direction: Tensor, factor: Tensor, decay: Tensor | None, key: rng.Key) -> None:
        """Change a weight as `Storage.apply` does, through its master copy if it has one."""
        weight = self.weights[name]
        if not self.has_master(name):
            weight.apply(direction, factor, decay, key)
            return
        master = self.state[name][MASTER]
        Dense(master).apply(direction, factor, decay, key)
        chunks = row_chunks(weight.shape, master.device)
        weight.fill((rows.start, master[rows].float()) for rows in chunks)

    def square(self, name: str) -> Tensor:
        """Squared norm of a weight, fp64 scalar on the device. It needs the memory of a chunk."""
        stored, device = self.weights[name].tensors(), self.weights_slab.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for rows in row_chunks(self.weights[name].shape, device):
            part = FORMATS[self.kinds[name]].over({key: tensor[rows] for key, tensor in stored.items()})
            flat = part.dense(torch.float32).reshape(-1)
            total += torch.dot(flat, flat)
        return total

    def weight_tensors(self) -> dict[str, Tensor]:
        """The stored tensors of the weights: all that a trained model needs."""
        return {
            name + suffix: tensor
            for name, storage in self.weights.items()
            for suffix, tensor in storage.tensors().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and update count: everything that the next step depends on."""
        state = {f"{name}.{key}": t for name, keys in self.state.items() for key, t in keys.items()}
        count = {} if self.updates is None else {f"{self.spec.name}.{UPDATES}": self.updates}
        return self.weight_tensors() | state | count


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of the floating-point tensors are finite. Needs next to no memory, and waits once
    for every device that they are on."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            for part in _comparable(tensor.reshape(-1)):
                # both are NaN if any number is
                found.setdefault(tensor.device, []).extend(x.double() for x in part.aminmax())
    return all(bool(torch.stack(extremes).isfinite().all()) for extremes in found.values())


def _comparable(flat: Tensor) -> Iterator[Tensor]:
    """The tensor, or, as PyTorch cannot compare fp8, its chunks in fp32."""
    if flat.itemsize > 1:
        yield flat
        return
    for part in chunks(flat.numel(), chunk_elements(flat.device)):
        yield flat[part].float()


# state keys that do not depend on the rule: the count of updates, a more precise copy of the weight, and the
# sum of the changes that were merged into it
UPDATES, MASTER, MERGED = "updates", "master", "merged"
# used instead of a weight's name, for the state that all adapters of a unit share
ADAPTERS = "adapters"


def weight_fields(spec: UnitSpec, kinds: Mapping[str, str]) -> Fields:
    """All tensors in the weights slab of a unit, by the names that a checkpoint uses."""
    return {
        tensor.name + suffix: field
        for tensor in spec.tensors
        for suffix, field in FORMATS[kinds[tensor.name]].fields(tensor.shape).items()
    }


def state_fields(fields: Mapping[str, Fields]) -> Fields:
    """All tensors in the state slab of a unit."""
    flat = {f"{name}.{key}": field for name, own in fields.items() for key, field in own.items()}
    return flat | {UPDATES: (torch.int64, ())}
