"""The bytes of every component of a run for a given choice.

Weights and state follow from the specifications, slabs from the engine's layout, and what lives between
operations from traces. What DeepSpeed allocates is in `lowres.engine.zero_memory`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch

from lowres.checkpoint import PIECE_BYTES
from lowres.config import Config, ReloraConfig
from lowres.engine import Choice, EngineSettings
from lowres.engine.layout import Hosted, Layout, UnitBytes
from lowres.engine.zero_memory import components as deepspeed_components
from lowres.memory.plan import DISK
from lowres.memory.trace import tracer
from lowres.model import storage_kinds, unit_specs
from lowres.optim import Optimizer, make_optimizer
from lowres.rooms import GPU, HOST, Component, Homes, Slab
from lowres.storage import (
    ADAPTER,
    BIAS,
    EMBEDDING,
    FORMATS,
    MASTER,
    MATRIX,
    NORM,
    UnitSpec,
    compute_dtype,
    field_bytes,
    state_fields,
    weight_fields,
)

# the largest workspace of cuBLAS: PyTorch gives it 32 MiB on Hopper and 8 MiB elsewhere
CUBLAS_WORKSPACE = 32 << 20
GRADIENT_NORM = 8  # bytes; of a unit
# names of weights in the plan, by kind
_GROUPS = {
    MATRIX: "block matrices",
    EMBEDDING: "embedding and head",
    ADAPTER: "adapters",
    NORM: "norms",
    BIAS: "biases",
}


class Footprint:
    """Computes once what does not depend on the choice; then gives the components of any choice."""

    def __init__(
        self, config: Config, device: torch.device, adapters: ReloraConfig | None, ranks: int
    ) -> None:
        self.config, self.device, self.adapters, self.ranks = config, device, adapters, ranks
        model, kept = config.model, config.memory
        self.units = {unit.name: unit for unit in unit_specs(model, adapters)}
        self.kinds = storage_kinds(self.units.values(), kept.weights, kept.embeddings_kept_in)
        self.compute = compute_dtype(kept.activations_in, device)
        self.trace = tracer(config, device.type, adapters)
        optimizer = make_optimizer(config)
        self.weights = {name: self._weights(unit) for name, unit in self.units.items()}
        self.state = {name: _state(unit, optimizer) for name, unit in self.units.items()}
        self.blocks = [name for name in self.units if name not in ("embed", "head")]
        specs = [s for unit in self.units.values() for s in unit.tensors]
        self.parameters = sum(s.numel for s in specs)
        self.at_rest = sum(
            sum(own.values()) for found in (self.weights, self.state) for own in found.values()
        )
        settings = self._settings(Choice(1))
        self.bytes = {
            name: UnitBytes.of(unit, self.kinds, sum(self.state[name].values()), settings)
            for name, unit in self.units.items()
        }
        self.layout = cache(self._layout)

    def _layout(self, micro_batch: int, band: int) -> Layout:
        return Layout(self.config.model, self.bytes, self._settings(Choice(micro_batch, band)))

    def _settings(self, choice: Choice) -> EngineSettings:
        return EngineSettings.of(self.config, choice, self.device, self.adapters is not None)

    def _weights(self, unit: UnitSpec) -> dict[str, int]:
        """Bytes of a unit's weights by component, which is their kind and format."""
        found: dict[str, int] = {}
        sizes = field_bytes(weight_fields(unit, {s.name: self.kinds[s.name] for s in unit.tensors}))
        for spec in unit.tensors:
            for suffix, part in FORMATS[self.kinds[spec.name]].parts.items():
                name = f"{_GROUPS[spec.kind]}: {part}"
                found[name] = found.get(name, 0) + sizes[spec.name + suffix]
        return found

    def components(self, choice: Choice) -> tuple[Component, ...]:
        """Everything that is alive at some time of the run, and the size of a checkpoint on disk."""
        if self.config.memory.engine == "deepspeed":
            found = self._deepspeed(choice)
        elif self.config.memory.engine == "layerwise":
            found = self._at_rest(choice.homes) + self._layerwise(choice)
            if texts := self.config.texts:
                found += self._sampling(replace(choice, texts=texts), self.config.data.seq_len)
        else:
            found = self._at_rest(choice.homes) + self._autograd(choice)
        if self.device.type == "cuda":
            found.append(Component("cuBLAS workspace", GPU, CUBLAS_WORKSPACE))
            found.append(Component("checkpoint snapshot", HOST, PIECE_BYTES, "saving"))
        if self.config.train.save_beside == "yes":
            found.append(Component("weights being saved", HOST, self.at_rest))
        found.append(Component("checkpoint", DISK, self.at_rest))
        return tuple(c for c in found if c.bytes)

    def in_use(self, choice: Choice, length: int, evaluates: bool) -> tuple[Component, ...]:
        """Everything that is alive while the layer-major engine uses a trained model: to sample choice.texts
        texts of so many tokens, and maybe to evaluate, on as many sequences as in a step."""
        layout = self.layout(choice.micro_batch, choice.band)
        homes, sequences, seq_len = choice.homes, self.config.most_windows, self.config.data.seq_len
        slabs = [layout.slots(layout.hosted(homes)), layout.copies()]
        found = self._at_rest(homes, used=True) + self._sampling(choice, length)
        if evaluates:
            kept = layout.boundaries(sequences, seq_len, 0, 0, homes.carry)
            slabs += [layout.rotary(seq_len), *kept.all()]
            phases = self.trace.phases(choice.micro_batch, choice.band, sequences > choice.micro_batch)
            found += [
                Component("activations inside a layer", GPU, phases["forward"], "forward"),
                Component("loss chunk", GPU, phases["loss"], "loss"),
            ]
        if self.device.type == "cuda":
            found.append(Component("cuBLAS workspace", GPU, CUBLAS_WORKSPACE))
        return tuple(c for c in found + _listed(slabs) if c.bytes)

    def _sampling(self, choice: Choice, length: int) -> list[Component]:
        """What it takes to sample choice.texts texts of so many tokens together."""
        layout = self.layout(choice.micro_batch, choice.band)
        made = layout.cache(choice.texts, length).total, layout.rotary(length).total
        reading = self.trace.reading(choice.texts, length, choice.band)
        return [
            Component("keys and values", GPU, sum(made), "sampling"),
            Component("reading tokens", GPU, reading, "sampling"),
        ]

    @property
    def bytes_of_a_token(self) -> int:
        """Keys and values of a token in all layers."""
        return self.layout(1, 1).cache(1, 1).total

    def movable(self, layout: Layout, hosted: Hosted, stash_on_host: int, carry_on_host: bool) -> int:
        """Bytes on the GPU of everything that may live there or on the host, and of the slots to move it.
        All of it is always alive, so the peaks of two choices that differ only in homes differ by this."""
        slabs = layout.movable(
            hosted, self.config.most_windows, self.config.data.seq_len, stash_on_host, carry_on_host
        )
        return self.at_rest - hosted.total + sum(slab.total for slab in slabs if slab.room == GPU)

    def _at_rest(self, homes: Homes, used: bool = False) -> list[Component]:
        """Weights, and state unless they are only used."""
        found: dict[tuple[str, str], int] = {}
        for parts, on_host in ((self.weights, homes.weights), (self.state, homes.state))[: 1 if used else 2]:
            for unit, components in parts.items():
                for name, size in components.items():
                    key = (name, HOST if unit in on_host else GPU)
                    found[key] = found.get(key, 0) + size
        return [Component(name, room, size) for (name, room), size in sorted(found.items())]

    def _layerwise(self, choice: Choice) -> list[Component]:
        """What the layer-major engine adds to weights and state."""
        homes, sequences, length = choice.homes, self.config.most_windows, self.config.data.seq_len
        layout = self.layout(choice.micro_batch, choice.band)
        hosted = layout.hosted(homes)
        movable = layout.movable(hosted, sequences, length, homes.stash, homes.carry)
        phases = self.trace.phases(choice.micro_batch, choice.band, sequences > choice.micro_batch)
        inside = max(phases["forward"], phases["backward"])
        return [
            *_listed((*movable, *layout.fixed(length))),
            Component("activations inside a layer", GPU, inside, "backward"),
            Component("loss chunk", GPU, phases["loss"], "loss"),
            *self._updates(),
        ]

    def _updates(self) -> list[Component]:
        """Memory during updates, and memory that they keep."""
        found = self.trace.updates()
        block, rest = found.kept
        # those of all units are kept to the end of a step; the trace has one block
        norms = GRADIENT_NORM * (len(self.blocks) - 1)
        return [
            Component("update workspace", GPU, found.workspace + norms, "update"),
            Component("projections", GPU, block * len(self.blocks) + rest),
        ]

    def _autograd(self, choice: Choice) -> list[Component]:
        """What the autograd engine adds: the whole model, and two gradients of every trained tensor."""
        model, width = self.config.model, self.compute.itemsize
        boundary = choice.micro_batch * self.config.data.seq_len * model.dim * width
        inside = self.trace.block(choice.micro_batch, self.compute, keeps_gradients=True)
        trained = sum(s.numel for unit in self.units.values() for s in unit.trained)
        block = sum(s.numel for s in self.units[self.blocks[0]].trained) * width
        gradients, embedding = trained * width, model.vocab * model.dim * width
        kept = boundary * (model.n_layers + 1)  # until the last block is differentiated
        # the embedding's gradient comes last; if it is tied, the gradient of its use as the head has existed
        # since the loss, and autograd adds the two into a third
        tied = embedding if model.tie_embeddings else 0
        first_block = boundary * 2 + inside + gradients - block - embedding + tied
        backward = max(kept + embedding + inside, first_block, boundary + gradients + 2 * tied)
        loss = kept + self.trace.loss(choice.micro_batch, self.compute, keeps_gradients=True)
        return [
            Component("model in compute precision", GPU, self.parameters * width),
            Component("accumulated gradients", GPU, 4 * trained),
            Component("activations and gradients of a micro-batch", GPU, backward, "backward"),
            Component("loss chunk", GPU, loss, "loss"),
            *self._updates(),
        ]

    def _deepspeed(self, choice: Choice) -> list[Component]:
        """All components of the deepspeed engine. It is like autograd, but frees each gradient at once."""
        model = self.config.model
        dtype = torch.bfloat16 if self.config.memory.weights == "bf16" else self.compute
        tokens = choice.micro_batch * self.config.data.seq_len
        boundaries = tokens * model.dim * dtype.itemsize * (model.n_layers + 1)
        inside, loss = (
            trace(choice.micro_batch, dtype, keeps_gradients=False)
            for trace in (self.trace.block, self.trace.loss)
        )
        return [
            *deepspeed_components(self.config, self.device, self.ranks, choice.micro_batch),
            Component("activations", GPU, boundaries + inside, "backward"),
            Component("loss chunk", GPU, boundaries + loss, "loss"),
        ]


def _listed(slabs: Iterable[Slab]) -> list[Component]:
    """Slabs as components."""
    found: dict[tuple[str, str], int] = {}
    for slab in slabs:
        key = slab.component, slab.room
        found[key] = found.get(key, 0) + slab.total
    return [Component(name, room, size) for (name, room), size in found.items()]


def _state(unit: UnitSpec, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of a unit's optimizer state by component."""
    found = {"optimizer state": 0}
    for name, size in field_bytes(state_fields(optimizer.unit_fields(unit))).items():
        component = "master copy" if name.endswith(f".{MASTER}") else "optimizer state"
        found[component] = found.get(component, 0) + size
    return found
