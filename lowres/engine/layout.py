"""What the layer-major engine allocates before its first step, described before it exists.

The engine makes its slabs from these descriptions and the plan lists the same ones, so sizes are computed in
one place. Tensors that live only between operations are in no slab; the plan traces them
(`lowres.memory.trace`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from lowres.config import ModelConfig
from lowres.engine.boundaries import BoundarySlabs, Plain, boundary_bytes, make_encoding
from lowres.engine.common import EngineSettings
from lowres.rooms import GPU, HOST, Homes, Slab
from lowres.storage import TensorSpec, UnitSpec, field_bytes, weight_fields

ALIGNMENT = 64  # elements between tensors in the flat buffers, so that every view is aligned


def aligned_elements(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class UnitBytes:
    """Bytes of a unit. weights, state: at rest. copied: its working copies during a visit. gradients: of the
    trained tensors."""

    weights: int
    state: int
    copied: int
    gradients: int

    @classmethod
    def of(cls, spec: UnitSpec, kinds: Mapping[str, str], state: int, settings: EngineSettings) -> UnitBytes:
        weights = weight_fields(spec, {s.name: kinds[s.name] for s in spec.tensors})
        matrices = [s for s in spec.tensors if len(s.shape) == 2]
        return cls(
            sum(field_bytes(weights).values()),
            state,
            sum(_copied(s, weights[s.name][0], settings) for s in matrices),
            sum(aligned_elements(s.numel) for s in spec.trained) * gradient_dtype(settings.compute).itemsize,
        )


def _copied(spec: TensorSpec, stored: torch.dtype, settings: EngineSettings) -> int:
    """Bytes of the working copies of a matrix: in the format of the activations if it is stored in another
    one. INT8 products use the codes as they are, unless they need padding, and the transposed codes."""
    padded = spec.padded(settings.pad)
    numel = aligned_elements(math.prod(padded))
    if settings.int8 and stored == torch.int8:
        return numel * (settings.transposes + (padded != spec.shape))
    return 0 if stored == settings.compute else numel * settings.compute.itemsize


def gradient_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.promote_types(compute, torch.float32)


class Hosted:
    """Units whose home is the host, added one at a time. slot: bytes that the largest visit fetches.
    total: bytes that are no longer on the GPU."""

    def __init__(self, groups: Iterable[tuple[str, ...]], units: Mapping[str, UnitBytes]) -> None:
        """groups: the units of each visit."""
        self._units = units
        self._group = {name: i for i, group in enumerate(groups) for name in group}
        self._fetched = [0] * len(self._group)
        self.slot = self.total = 0

    def move(self, name: str, part: str) -> None:
        """part: weights or state."""
        size, group = getattr(self._units[name], part), self._group[name]
        self._fetched[group] += size
        self.slot = max(self.slot, self._fetched[group])
        self.total += size


class Layout:
    """The slabs of an engine. units: by name, in the order of the forward pass."""

    def __init__(self, model: ModelConfig, units: Mapping[str, UnitBytes], settings: EngineSettings) -> None:
        self.model, self.units, self.settings = model, units, settings
        self.encoding = make_encoding(settings.stash_dtype, settings.compute)
        blocks, band = [name for name in units if name not in ("embed", "head")], settings.band
        self.bands = [tuple(blocks[i : i + band]) for i in range(0, len(blocks), band)]
        self.groups = [*self.bands, ("head",), ("embed",)]  # units that are visited together
        # the gradient of a tied embedding is accumulated from the head to the embedding; in between, the
        # layers use the shared buffer
        self.own_gradient = ("embed",) if model.tie_embeddings else ()

    def copies(self) -> Slab:
        """Memory for those matrices of the largest visit that are not stored in compute precision."""
        tied = self.model.tie_embeddings
        # the embedding only looks up rows; a tied one is a matrix when it is used as the head
        used = [*self.bands, ("embed",) if tied else ("head",)]
        size = max(sum(self.units[name].copied for name in group) for group in used)
        name = "transposed codes of a layer" if self.settings.transposes else "layers in compute precision"
        return Slab(name, GPU, size)

    def gradients(self) -> tuple[Slab, Slab]:
        """The buffer that visits share, and the buffer of a tied embedding."""
        shared = [group for group in self.groups if group != self.own_gradient]
        sizes = (
            max(sum(self.units[name].gradients for name in group) for group in shared),
            sum(self.units[name].gradients for name in self.own_gradient),
        )
        return Slab("gradient buffer", GPU, sizes[0]), Slab("gradient buffer", GPU, sizes[1])

    def hosted(self, homes: Homes = Homes()) -> Hosted:  # noqa: B008 - frozen
        found = Hosted(self.groups, self.units)
        for part, names in (("weights", homes.weights), ("state", homes.state)):
            for name in names:
                found.move(name, part)
        return found

    def slots(self, hosted: Hosted) -> Slab:
        """Two slots, each of the size of the largest visit."""
        return Slab("transfer of layers", GPU, hosted.slot, 2 if hosted.slot else 0)

    def boundaries(
        self, sequences: int, length: int, bands: int, stash_on_host: int, carry_on_host: bool
    ) -> BoundarySlabs:
        """bands: number of boundaries in the stash; 0 for evaluation. With clipping, the output of the last
        band has its own memory, because two backward passes begin with it."""
        settings, dim = self.settings, self.model.dim
        exact, carries = Plain(settings.compute), 2 if settings.grad_clip else 1
        whole, piece = (count * length * dim for count in (sequences, min(settings.micro_batch, sequences)))
        stash, carry = (boundary_bytes(encoding, whole) for encoding in (self.encoding, exact))
        on_host = min(stash_on_host, bands)
        door = "transfer of boundaries"
        return BoundarySlabs(
            (Slab("stash", HOST, stash, on_host), Slab("stash", GPU, stash, bands - on_host)),
            Slab(door, GPU, boundary_bytes(self.encoding, piece), 4 if on_host else 0),
            Slab("carry", HOST if carry_on_host else GPU, carry, carries),
            Slab(door, GPU, boundary_bytes(exact, piece), 4 * carries if carry_on_host else 0),
        )

    def rotary(self, length: int) -> Slab:
        """cos and sin."""
        return Slab("rotary tables", GPU, 2 * 4 * length * self.model.head_width)

    def cache(self, sequences: int, length: int) -> Slab:
        """Keys and values of so many tokens of each sequence, in all layers."""
        model = self.model
        numbers = 2 * model.n_layers * model.kv_heads * model.head_width
        return Slab("keys and values", GPU, sequences * length * numbers * self.settings.compute.itemsize)

    def fixed(self, length: int) -> tuple[Slab, ...]:
        """Slabs that do not depend on homes."""
        return self.copies(), *self.gradients(), self.rotary(length)

    def movable(
        self, hosted: Hosted, sequences: int, length: int, stash_on_host: int, carry_on_host: bool
    ) -> tuple[Slab, ...]:
        """Slabs that depend on homes, for training on batches of this size."""
        kept = self.boundaries(sequences, length, len(self.bands), stash_on_host, carry_on_host)
        return self.slots(hosted), *kept.all()

    def traffic(self, homes: Homes, sequences: int, length: int) -> tuple[int, int]:
        """Bytes that a step moves from the host to the GPU, and back.

        Weights on the host are fetched in both passes, except the head's, which are fetched once. State is
        fetched once. Both are written back. A boundary of the stash is written once and read in the forward
        and in the backward pass. The carry is read and written once per band in the backward pass, and around
        the loss; with exact_forward the forward pass reads and writes it instead of the stash. With clipping
        there are two backward passes.
        """
        fetched, stored, backward = 0, 0, 2 if self.settings.grad_clip else 1
        for name in homes.weights:
            fetched += (backward + (name != "head")) * self.units[name].weights
            stored += self.units[name].weights
        for name in homes.state:
            fetched += self.units[name].state
            stored += self.units[name].state
        bands, exact = len(self.bands), self.settings.exact_forward
        kept = self.boundaries(sequences, length, bands, homes.stash, homes.carry)
        stash, carry = kept.stash[0].total, kept.carry.bytes if homes.carry else 0
        fetched += (backward + (not exact)) * stash + (backward * (bands + 2) + exact * bands) * carry
        stored += stash + (1 + backward * (bands + 1) + exact * bands) * carry
        return fetched, stored
