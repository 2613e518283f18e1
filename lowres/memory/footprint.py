"""The arithmetic of the plan: bytes of every component of a run, once the choice is made.

Weights, optimizer state and what the layerwise and autograd engines add. What DeepSpeed allocates is in
`lowres.engine.zero_memory`.
"""

from __future__ import annotations

import torch

from lowres.checkpoint import PIECE_BYTES
from lowres.config import Config, ModelConfig, ReloraConfig
from lowres.engine.boundaries import boundary_bytes, make_encoding
from lowres.engine.layerwise import ALIGNMENT, PRODUCT_CHUNK
from lowres.engine.residence import Visit, slot_bytes
from lowres.engine.zero_memory import components as deepspeed_components
from lowres.memory.plan import DISK, Choice
from lowres.model import storage_kinds, unit_specs
from lowres.optim import Optimizer, make_optimizer
from lowres.relora import MERGE_ROWS
from lowres.rooms import GPU, HOST, Component, Homes
from lowres.storage import (
    ADAPTER,
    MASTER,
    MATRIX,
    TensorSpec,
    UnitSpec,
    chunk_elements,
    compute_dtype,
    field_bytes,
    state_fields,
    weight_fields,
)

# what cuBLAS takes for itself, at most: PyTorch gives it 32 MiB on Hopper and 8 MiB elsewhere
CUBLAS_WORKSPACE = 32 << 20


class Footprint:
    """Everything that does not depend on the choice, computed once; then the components of a choice."""

    def __init__(
        self, config: Config, device: torch.device, adapters: ReloraConfig | None, ranks: int
    ) -> None:
        self.config, self.device, self.adapters, self.ranks = config, device, adapters, ranks
        model, kept = config.model, config.memory
        self.units = {unit.name: unit for unit in unit_specs(model, adapters)}
        self.kinds = storage_kinds(self.units.values(), kept.weights, kept.embeddings_kept_in)
        self.compute = compute_dtype(kept.compute, device)
        self.encoding = make_encoding(kept.stash_dtype, self.compute)
        optimizer = make_optimizer(config)
        self.weights = {name: self._weights(unit) for name, unit in self.units.items()}
        self.state = {name: _state(unit, optimizer) for name, unit in self.units.items()}
        self.sizes = {
            name: (sum(self.weights[name].values()), sum(self.state[name].values())) for name in self.units
        }
        self.blocks = [name for name in self.units if name not in ("embed", "head")]
        self.numel = {name: sum(_aligned(s.numel) for s in unit.trained) for name, unit in self.units.items()}
        specs = [s for unit in self.units.values() for s in unit.tensors]
        self.parameters = sum(s.numel for s in specs)
        self.projections = optimizer.projection_bytes(specs)
        self.directions = max(optimizer.workspace_bytes(unit) for unit in self.units.values())

    def _weights(self, unit: UnitSpec) -> dict[str, int]:
        """Bytes of a unit's weights by component."""
        found: dict[str, int] = {}
        sizes = field_bytes(weight_fields(unit, {s.name: self.kinds[s.name] for s in unit.tensors}))
        for spec in unit.tensors:
            kind = self.kinds[spec.name]
            if kind == "int8":
                name = "block matrices: int8 codes"
                scales = "block matrices: scales"
                found[scales] = found.get(scales, 0) + sizes[spec.name + ".scales"]
            elif spec.kind == MATRIX:
                name = f"block matrices: {kind}"
            elif spec.kind == ADAPTER:
                name = f"adapters: {kind}"
            else:
                name = f"embedding and head: {kind}" if len(spec.shape) == 2 else "norms: fp32"
            found[name] = found.get(name, 0) + sizes[spec.name]
        return found

    def components(self, choice: Choice) -> tuple[Component, ...]:
        """All that is alive at some moment of the run, and what a checkpoint takes on the disk."""
        if self.config.memory.engine == "deepspeed":
            found = self._deepspeed(choice)
        elif self.config.memory.engine == "layerwise":
            found = self._at_rest(choice.homes) + self._layerwise(choice)
        else:
            found = self._at_rest(choice.homes) + self._autograd(choice)
        if self.projections:
            found.append(Component("projections", GPU, self.projections))
        if self.device.type == "cuda":
            found.append(Component("cuBLAS workspace", GPU, CUBLAS_WORKSPACE))
            found.append(Component("checkpoint snapshot", HOST, PIECE_BYTES, "saving"))
        found.append(Component("checkpoint", DISK, sum(sum(pair) for pair in self.sizes.values())))
        return tuple(c for c in found if c.bytes)

    def _at_rest(self, homes: Homes) -> list[Component]:
        found: dict[tuple[str, str], int] = {}
        for parts, on_host in ((self.weights, homes.weights), (self.state, homes.state)):
            for unit, components in parts.items():
                for name, size in components.items():
                    key = (name, HOST if unit in on_host else GPU)
                    found[key] = found.get(key, 0) + size
        return [Component(name, room, size) for (name, room), size in sorted(found.items())]

    def _layerwise(self, choice: Choice) -> list[Component]:
        """What the layer-major engine adds to weights and state."""
        config, model = self.config, self.config.model
        seq, width, tied = config.data.seq_len, self.compute.itemsize, self.config.model.tie_embeddings
        same = {4: "fp32", 2: "bf16"}[width]
        wide = 4 if width == 2 else 0  # fp32 beside bf16
        homes, micro_batch, band = choice.homes, choice.micro_batch, choice.band
        tokens = micro_batch * seq
        bands = [tuple(self.blocks[i : i + band]) for i in range(0, len(self.blocks), band)]

        def copied(group: tuple[str, ...]) -> int:
            specs = [s for name in group for s in self.units[name].tensors if len(s.shape) == 2]
            return sum(_aligned(s.numel) * width for s in specs if self.kinds[s.name] != same)

        own = self.numel["embed"] if tied else 0  # a tied embedding has a gradient buffer of its own
        groups = [bands[0], ("head",), *([] if tied else [("embed",)])]
        gradients = own + max(sum(self.numel[name] for name in group) for group in groups)
        visits = [Visit(group, update=True) for group in (*bands, ("head",), ("embed",))]
        stash = boundary_bytes(self.encoding, model.dim, config.batch_sequences, micro_batch, seq)
        exact = make_encoding("auto", self.compute)
        carry = boundary_bytes(exact, model.dim, config.batch_sequences, micro_batch, seq)
        carries = 2 if config.optim.grad_clip else 1  # the second keeps the output for a second pass
        piece = self.encoding.nbytes(tokens, model.dim)
        doors = (4 * piece if homes.stash else 0) + (
            4 * carries * tokens * model.dim * width if homes.carry else 0
        )
        decoded = 0 if self.encoding.is_free(self.compute) else tokens * model.dim * width
        chunk = min(config.memory.loss_chunk, tokens)

        def product(numel: int) -> int:
            """A bf16 weight gradient before it is added: in fp32, and on a CPU in bf16 before that."""
            each = wide if self.device.type == "cuda" else wide + 2
            return min(numel, PRODUCT_CHUNK) * each if wide else 0

        block = max(s.numel for s in self.units[self.blocks[0]].trained)
        # logits in fp32, then their gradient in compute precision beside them or beside the head's
        logits = chunk * model.vocab
        loss = max(logits * (4 + (width if wide else 0)), logits * width + product(model.vocab * model.dim))
        loss += chunk * model.dim * 14
        kept = _kept(model, tokens, width)
        inside = self._adapter_activations(tokens, width) + product(block)
        backward = max(_activations(model, tokens, width), kept + inside) + (band - 1) * kept
        return [
            Component("transfer of layers", GPU, 2 * slot_bytes(visits, self.sizes, homes)),
            Component("transfer of boundaries", GPU, doors),
            Component("gradient buffer", GPU, 4 * gradients),
            Component(
                "layers in compute precision",
                GPU,
                max(copied(bands[0]), copied(("embed",) if tied else ("head",))),
            ),
            Component("stash", GPU, stash * (len(bands) - homes.stash)),
            Component("stash", HOST, stash * homes.stash),
            Component("carry", HOST if homes.carry else GPU, carries * carry),
            Component("rotary tables", GPU, 2 * 4 * seq * model.head_dim),
            Component("activations inside a layer", GPU, backward + decoded, "backward"),
            Component("loss chunk", GPU, loss, "loss"),
            Component("update workspace", GPU, self._update_workspace(), "update"),
        ]

    def _update_workspace(self) -> int:
        """Most bytes while directions are found, while a chunk of a weight is written, or while adapters are
        merged and begin anew."""
        found = [self.directions]
        specs = [s for unit in self.units.values() for s in unit.tensors]
        chunk = chunk_elements(self.device)
        for spec in specs:
            written, rows = self._written(spec), MERGE_ROWS * spec.shape[-1]
            if not spec.frozen:
                moments = 4 if self.config.memory.moments != "fp32" else 0
                found.append(4 * max(written, moments) * min(chunk, spec.numel))
                if spec.kind == ADAPTER and self.config.relora.cycle_steps:
                    # random numbers; or both moments, their magnitude or a random mask, and what is kept
                    found.append(4 * (2 if self.config.relora.reset == "zero" else 6) * spec.numel)
            elif self.config.relora.cycle_steps:
                rows = min(rows, spec.numel)
                # beside the intended change, and the applied one or the values before
                found.append(4 * (2 * rows + max(rows, written * min(chunk, rows))))
                if self.config.relora.log_rank:  # singular value decomposition
                    found.append(3 * 4 * spec.numel)
        return max(found)

    def _written(self, spec: TensorSpec) -> int:
        """fp32 numbers for each element while a tensor is written: for int8 codes, change, new value, random
        bits and what their making leaves behind; less for what is rounded in one go."""
        if self.config.memory.master == "host" and spec.kind == MATRIX:
            return 4
        return {"int8": 8, "bf16": 4, "fp32": 0}[self.kinds[spec.name]]

    def _adapter_activations(self, tokens: int, width: int) -> int:
        """Most bytes beside what is kept in the backward of an adapted matrix: the input's gradient and rank
        numbers a token twice; with dropout also the mask, the input under it and its gradient, or before them
        the mask's random numbers."""
        if self.adapters is None:
            return 0
        model = self.config.model
        widest = model.ffn_dim if "down" in self.adapters.targets else model.dim
        each = max(4 * width, 8) if self.adapters.dropout else width
        return tokens * (2 * self.adapters.rank * width + widest * each)

    def _autograd(self, choice: Choice) -> list[Component]:
        """What the autograd engine adds: the whole model and two gradients of what is trained."""
        model, seq = self.config.model, self.config.data.seq_len
        width = self.compute.itemsize
        tokens = choice.micro_batch * seq
        boundary, inside = tokens * model.dim * width, _activations(model, tokens, width)
        inside += self._adapter_graph(tokens, width)
        trained = sum(s.numel for unit in self.units.values() for s in unit.trained)
        gradients, block = trained * width, self.numel[self.blocks[0]] * width
        embedding = model.vocab * model.dim * width
        head = boundary * (model.n_layers + 1) + embedding  # until the last block is differentiated
        # the embedding's gradient comes last; if it is tied, beside that of its use as the head
        twice = embedding if model.tie_embeddings else 0
        first_block = boundary * 2 + inside + gradients - block - embedding + twice
        backward = max(head + inside, first_block, boundary + gradients + twice)
        chunk = min(self.config.memory.loss_chunk, tokens)
        return [
            Component("model in compute precision", GPU, self.parameters * width),
            Component("accumulated gradients", GPU, 4 * trained),
            Component("activations and gradients of a micro-batch", GPU, backward, "backward"),
            Component("loss chunk", GPU, head + 3 * chunk * model.vocab * 4, "loss"),
        ]

    def _adapter_graph(self, tokens: int, width: int) -> int:
        """What adapters add to the most that autograd holds of a block: what is between A and B; with dropout
        masks and inputs under them, of the down projection the mask's random numbers before all others."""
        if self.adapters is None:
            return 0
        model, targets = self.config.model, self.adapters.targets
        each = len(targets) * self.adapters.rank * width
        if self.adapters.dropout:
            each += 2 * sum(role != "down" for role in targets) * model.dim * width
            each += max(0, 8 - 2 * width) * model.ffn_dim if "down" in targets else 0
        return tokens * each

    def _deepspeed(self, choice: Choice) -> list[Component]:
        """All of the deepspeed engine: that of autograd with gradients that leave as they come."""
        model = self.config.model
        width = 2 if self.config.memory.weights == "bf16" else self.compute.itemsize
        tokens = choice.micro_batch * self.config.data.seq_len
        boundaries = tokens * model.dim * width * (model.n_layers + 1)
        # of each chunk a gradient of the head, added to that of those before
        head = 2 * model.vocab * model.dim * width
        chunk = min(self.config.memory.loss_chunk, tokens)
        return [
            *deepspeed_components(self.config, self.device, self.ranks, choice.micro_batch),
            Component("activations", GPU, boundaries + _activations(model, tokens, width), "backward"),
            Component("loss chunk", GPU, boundaries + head + 3 * chunk * model.vocab * 4, "loss"),
        ]


def _state(unit: UnitSpec, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of a unit's optimizer state by component."""
    found = {"optimizer state": 0}
    for name, size in field_bytes(state_fields(optimizer.unit_fields(unit))).items():
        component = "master copy" if name.endswith(f".{MASTER}") else "optimizer state"
        found[component] = found.get(component, 0) + size
    return found


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _activations(model: ModelConfig, tokens: int, width: int) -> int:
    """Most bytes alive while the last block of a band is differentiated, for `tokens` in a micro-batch.

    At the peak, in the backward of SwiGLU: gate, up, silu(gate) and their product with two gradients of
    that width; k and v; of the width of the model the first normalised input, rotated q, attention's
    output and its transposed copy, and the middle residual.
    """
    kv = model.kv_heads * model.head_dim
    return tokens * width * (5 * model.dim + 2 * kv + 6 * model.ffn_dim)


def _kept(model: ModelConfig, tokens: int, width: int) -> int:
    """Bytes that every other block of a band keeps meanwhile."""
    kv = model.kv_heads * model.head_dim
    return tokens * width * (6 * model.dim + 2 * kv + 4 * model.ffn_dim)
