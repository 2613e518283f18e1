"""The plan: how many bytes each component of a run takes on GPU, host and disk, before any exists.

Slabs follow from the specifications and are exact. What lives only for a while (activations inside a
layer, the loss chunk) is counted for the moment when it is largest, and belongs to a phase of the step;
the peak is everything that stays plus the largest phase. `lowres.meter` measures the same quantities.

The plan also decides what the config leaves open: the micro-batch, the band, and what lives in host
memory. On a machine without a GPU the same tensors live in the same memory; the plan still says what
the GPU would need, so that a run can be planned anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowres import ranks
from lowres.checkpoint import PIECE_BYTES
from lowres.config import Config, ModelConfig, ReloraConfig
from lowres.engine.boundaries import boundary_bytes, make_encoding
from lowres.engine.layerwise import ALIGNMENT, PRODUCT_CHUNK
from lowres.engine.residence import Visit, slot_bytes
from lowres.engine.zero_memory import components as deepspeed_components
from lowres.errors import DoesNotFit
from lowres.model import storage_kinds, unit_specs
from lowres.optim import Optimizer, make_optimizer
from lowres.relora import MERGE_ROWS
from lowres.rooms import GPU, HOST, Component, Homes
from lowres.storage import (
    ADAPTER_ROLES,
    CHUNK_CPU,
    CHUNK_CUDA,
    MASTER,
    MATRIX_ROLES,
    TensorSpec,
    UnitSpec,
    compute_dtype,
    field_bytes,
    state_fields,
    weight_fields,
)

GIB = 1 << 30
DISK = "disk"
ADAPTERS = "adapters"  # the part of a run that has them
# tokens in a micro-batch beyond which a matrix product is no faster
USEFUL_TOKENS = {"cuda": 8192, "cpu": 2048}
BANDS = (1, 2, 4, 8)
# what cuBLAS takes for itself, at most: PyTorch gives it 32 MiB on Hopper and 8 MiB elsewhere
CUBLAS_WORKSPACE = 32 << 20


@dataclass(frozen=True)
class Choice:
    """What the config may leave to the plan."""

    micro_batch: int
    band: int
    homes: Homes


@dataclass(frozen=True)
class Crew:
    """The ranks of a run, and how many of them share the host memory of a machine."""

    ranks: int = 1
    here: int = 1


@dataclass(frozen=True)
class Plan:
    """All components of a run, or of one of its ranks, and what was chosen for it."""

    components: tuple[Component, ...]
    choice: Choice
    parameters: int
    batch_tokens: int
    budgets: dict[str, int | None]  # bytes by room; None is no limit
    crew: Crew = Crew()
    alternatives: tuple[tuple[str, Plan], ...] = ()  # settings that may fit where this does not

    @property
    def micro_batch(self) -> int:
        return self.choice.micro_batch

    def peak(self, room: str) -> int:
        """Bytes in a room when it is fullest."""
        own = [c for c in self.components if c.room == room]
        phases = {c.phase for c in own if c.phase}
        return sum(c.bytes for c in own if not c.phase) + max(
            (sum(c.bytes for c in own if c.phase == phase) for phase in phases), default=0
        )

    def size(self, name: str, room: str | None = None) -> int:
        """Bytes of a component, in one room or in all."""
        return sum(c.bytes for c in self.components if c.name == name and room in (None, c.room))

    @property
    def excess(self) -> int:
        """Bytes beyond the budgets."""
        limits = ((room, budget) for room, budget in self.budgets.items() if budget is not None)
        return sum(max(0, self.peak(room) - budget) for room, budget in limits)

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what to change; a line each."""
        found = []
        for room, key in ((GPU, "memory.budget_gib"), (HOST, "memory.host_budget_gib")):
            budget, peak = self.budgets[room], self.peak(room)
            if budget is not None and peak > budget:
                largest = max((c for c in self.components if c.room == room), key=lambda c: c.bytes)
                fitting = [name for name, other in self.alternatives if not other.problems]
                found.append(
                    f"{key}: {self._whose} needs {peak / GIB:.2f} GiB of {room} memory, there are "
                    f"{budget / GIB:.2f} GiB; the largest part is the {largest.name} "
                    f"({largest.bytes / GIB:.2f} GiB); "
                    f"{_would_fit(fitting) or _REMEDIES.get(largest.name, _SMALLER)}"
                )
        return found

    @property
    def _whose(self) -> str:
        return "the run" if self.crew.ranks == 1 else f"each of {self.crew.ranks} ranks"

    def lacks(self, device: torch.device) -> dict[str, tuple[int, int]]:
        """Bytes needed and bytes free of what this machine has not got, right now, by room; those of the
        host for all ranks here."""
        needs = {GPU: self.peak(GPU), HOST: self.peak(HOST) * self.crew.here}
        if device.type == "cpu":  # one memory for both
            needs = {HOST: needs[GPU] * self.crew.here + needs[HOST]}
        frees = {room: _device_bytes(device) if room == GPU else host_bytes() for room in needs}
        return {room: (need, free) for room, need in needs.items() if (free := frees[room]) and need > free}

    def as_dict(self) -> dict[str, Any]:
        """The plan for `lowres plan --json`."""
        return {
            "gpu_peak_bytes": self.peak(GPU),
            "host_peak_bytes": self.peak(HOST),
            "disk_bytes_per_checkpoint": self.peak(DISK),
            "components": [vars(c) for c in self.components],
            "fits": not self.problems,
            "parameters": self.parameters,
            "tokens_per_step": self.batch_tokens,
            "micro_batch": self.choice.micro_batch,
            "band": self.choice.band,
            "ranks": self.crew.ranks,
            "on_host": self._on_host(),
        }

    def _on_host(self) -> dict[str, Any]:
        homes = self.choice.homes
        return {
            "weights": sorted(homes.weights),
            "state": sorted(homes.state),
            "stash": homes.stash,
            "carry": homes.carry,
        }

    def table(self) -> str:
        """The plan for people."""
        lines = [f"{'component':<38}{'room':<6}{'GiB':>10}   alive"]
        for c in self.components:
            lines.append(f"{c.name:<38}{c.room:<6}{c.bytes / GIB:>10.3f}   {c.phase or 'always'}")
        for room in (GPU, HOST, DISK):
            budget = self.budgets.get(room)
            limit = "" if budget is None else f"   budget {budget / GIB:.2f}"
            name = "disk per checkpoint" if room == DISK else f"{room} peak"
            lines.append(f"{name:<44}{self.peak(room) / GIB:>10.3f}{limit}")
        lines.append(
            f"{self.parameters / 1e6:.1f} M parameters, {self.batch_tokens:,} tokens a step, micro-batches "
            f"of {self.choice.micro_batch} sequences, bands of {self.choice.band} layers"
        )
        if self.crew.ranks > 1:
            lines.append(f"all this for each of {self.crew.ranks} ranks, {self.crew.here} on a machine")
        if self._hosted() or not any(c.room == HOST for c in self.components):
            lines.append(f"in host memory between uses: {self._hosted() or 'nothing'}")
        return "\n".join(lines)

    def _hosted(self) -> str:
        homes = self.choice.homes
        parts = {
            "weights of {} units": len(homes.weights),
            "optimizer state of {} units": len(homes.state),
            "the inputs of {} bands (stash)": homes.stash,
            "the carry": int(homes.carry),
        }
        return ", ".join(text.format(count) for text, count in parts.items() if count)


_SMALLER = "lower train.micro_batch or take a smaller model.preset"
_REMEDIES = {
    "stash": "lower train.batch_tokens, raise memory.band or set memory.stash_dtype=int8",
    "carry": "lower train.batch_tokens",
    "gradient buffer": "lower memory.band",
    "activations inside a layer": "lower train.micro_batch or memory.band",
    "loss chunk": "lower memory.loss_chunk",
    "optimizer state": "set memory.moments=int8, or optim.name=apollo-mini, which needs next to none",
    "master copy": "set memory.master_dtype=bf16 or memory.master=none",
    "accumulated gradients": "set memory.engine=layerwise",
    "model in compute precision": "set memory.engine=layerwise",
}
# for the deepspeed engine: what may fit where a config does not, from the least change to the largest
_STAGE_3 = {"deepspeed.stage": 3, "deepspeed.offload_optimizer": "cpu", "deepspeed.offload_param": "cpu"}
_BF16 = {"memory.weights": "bf16", "memory.moments": "bf16"}
_LAYERWISE = {"memory.engine": "layerwise"}
_INT8 = {"memory.weights": "int8", "memory.moments": "int8"}
_INSTEAD = (
    {"train.micro_batch": "auto"},
    _BF16,
    _STAGE_3,
    _BF16 | _STAGE_3,
    _LAYERWISE,
    _LAYERWISE | _INT8,
)


def _would_fit(names: list[str]) -> str:
    """The least change that keeps DeepSpeed, and the least that does not."""
    kinds = [[n for n in names if n.startswith("memory.engine") is other] for other in (False, True)]
    least = [kind[0] for kind in kinds if kind]
    return "what fits: " + ", or ".join(least) if least else ""


def make_plans(
    config: Config, device: torch.device, on_this_machine: bool = False, crew: Crew | None = None
) -> dict[str, Plan]:
    """The plan of each part of a run by name: the whole run, or with ReLoRA warm start and adapters."""
    relora, parts = config.relora, ["run"]
    if relora.enabled and relora.start_step < config.train.total_steps:
        parts = ["warm start", ADAPTERS] if relora.start_step else [ADAPTERS]
    return {part: make_plan(config, device, on_this_machine, part == ADAPTERS, crew) for part in parts}


def make_plan(
    config: Config,
    device: torch.device,
    on_this_machine: bool = False,
    adapted: bool = False,
    crew: Crew | None = None,
) -> Plan:
    """The plan of a run: the first that fits of bands from small to large, with the largest useful
    micro-batch, and as little as possible on the host.

    on_this_machine: a budget that the config leaves open is what the machine has, or the least that any
    rank has. adapted: with the adapters of ReLoRA. crew: default the ranks that were started.
    """
    crew = crew or Crew(ranks.size(), ranks.size_here())
    found: dict[str, int | None] = {GPU: None, HOST: None}
    if on_this_machine:
        least = ranks.least(_device_bytes(device) or 0, host_bytes() or 0)
        found = {room: int(size) or None for room, size in zip(found, least, strict=True)}
    asked = {GPU: config.memory.budget_gib, HOST: config.memory.host_budget_gib}
    budgets = {room: found[room] if gib is None else int(gib * GIB) for room, gib in asked.items()}
    if (host := budgets[HOST]) is not None:
        budgets[HOST] = host // crew.here
    plan = _first_that_fits(config, device, budgets, adapted, crew)
    if config.memory.engine != "deepspeed":
        return plan
    others = []
    for keys in _INSTEAD:
        other = _changed(config, keys)
        if other not in (None, config) and (crew.ranks == 1 or other.memory.engine == "deepspeed"):
            others.append((_named(config, keys), _first_that_fits(other, device, budgets, adapted, crew)))
    return replace(plan, alternatives=tuple(others))


def _named(config: Config, keys: dict[str, Any]) -> str:
    """The settings that differ from those of a config: `a=1 with b=2, c=3`."""
    before = config.model_dump()
    first, *rest = [
        f"{key}={value}" for key, value in keys.items() if before[(k := key.split("."))[0]][k[1]] != value
    ]
    return f"{first} with {', '.join(rest)}" if rest else first


def _changed(config: Config, keys: dict[str, Any]) -> Config | None:
    """The config with other values, or None if they do not go with the rest of it."""
    values = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValueError:
        return None


def _first_that_fits(
    config: Config, device: torch.device, budgets: dict[str, int | None], adapted: bool, crew: Crew
) -> Plan:
    planner = _Planner(config, device, budgets, config.relora if adapted else None, crew)
    plans = []
    for band in planner.bands():
        plans.append(planner.with_largest_micro_batch(band))
        if not plans[-1].problems:
            return plans[-1]
    return min(plans, key=lambda plan: plan.excess)


def require_fit(plan: Plan) -> None:
    """Raise DoesNotFit with one line if the plan exceeds a budget."""
    if plan.problems:
        raise DoesNotFit(plan.problems[0])


def require_machine(plan: Plan, device: torch.device) -> None:
    """Raise DoesNotFit with one line if this machine has not got, right now, what the plan takes."""
    for room, (need, free) in plan.lacks(device).items():
        fitting = [name for name, p in plan.alternatives if not (p.problems or p.lacks(device))]
        raise DoesNotFit(
            f"the run needs {need / GIB:.2f} GiB of {room} memory, this machine has {free / GIB:.2f} GiB "
            f"free; {_would_fit(fitting) or '`lowres plan` shows what takes it'}"
        )


def _device_bytes(device: torch.device) -> int | None:
    """Memory of the room that the plan calls gpu: free on a CUDA device, that of the host on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_bytes()


def host_bytes() -> int | None:
    """Host memory that can be had without swapping, also in a container; None where the system does not
    say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        return min([available, *_container_bytes()])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _container_bytes() -> list[int]:
    """What is left of the limit of this process's control group, if it has one; cached files give way."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [limit - used + int(parts["inactive_file"]) + int(parts["active_file"])]
    except (OSError, ValueError, KeyError):  # no such files, or "max"
        return []


class _Planner:
    """Everything that does not depend on the choice, computed once."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        budgets: dict[str, int | None],
        adapters: ReloraConfig | None,
        crew: Crew,
    ) -> None:
        self.config, self.device, self.budgets, self.adapters = config, device, budgets, adapters
        self.crew = crew
        self.sequences = -(-config.batch_sequences // crew.ranks)  # of a rank, in a step
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
            elif spec.role in MATRIX_ROLES:
                name = f"block matrices: {kind}"
            elif spec.role in ADAPTER_ROLES:
                name = f"adapters: {kind}"
            else:
                name = f"embedding and head: {kind}" if len(spec.shape) == 2 else "norms: fp32"
            found[name] = found.get(name, 0) + sizes[spec.name]
        return found

    # the choice

    def bands(self) -> tuple[int, ...]:
        asked, layers = self.config.memory.band, self.config.model.n_layers
        if self.config.memory.engine != "layerwise":
            return (1,)
        return tuple(b for b in BANDS if b <= layers) if asked == "auto" else (min(asked, layers),)

    def with_largest_micro_batch(self, band: int) -> Plan:
        config = self.config
        asked = config.train.micro_batch
        if asked != "auto":
            return self.place(min(asked, self.sequences), band)
        most = max(1, min(self.sequences, USEFUL_TOKENS[self.device.type] // config.data.seq_len))
        best = self.place(1, band)
        low, high = 1, most
        while low < high and not best.problems:  # the largest that fits, by halving
            middle = (low + high + 1) // 2
            plan = self.place(middle, band)
            if plan.problems:
                high = middle - 1
            else:
                low, best = middle, plan
        return best

    def place(self, micro_batch: int, band: int) -> Plan:
        """The plan that has least on the host; if nothing fits, the one with all there that may be."""
        everything = list(self.homes(band))
        last = self.plan(Choice(micro_batch, band, everything[-1]))
        budget = self.budgets[GPU]
        if len(everything) == 1 or (budget is not None and last.peak(GPU) > budget):
            return last
        for homes in everything[:-1]:
            plan = self.plan(Choice(micro_batch, band, homes))
            if budget is None or plan.peak(GPU) <= budget:
                return plan
        return last

    def homes(self, band: int) -> Iterator[Homes]:
        """From what must be on the host to all that may be: first what is moved least often in a step."""
        kept = self.config.memory
        if kept.engine != "layerwise":
            yield Homes()
            return
        bands = -(-self.config.model.n_layers // band)
        # a tied embedding is used at both ends of the model, so it stays
        movable = [*self.blocks, "head", *([] if self.config.model.tie_embeddings else ["embed"])]
        limits = {
            "stash": (kept.stash_on, bands),
            "state": ("host" if kept.master == "host" else kept.state_on, len(movable)),
            "weights": (kept.weights_on, len(movable)),
            "carry": (kept.carry_on, 1),
        }
        counts = {key: most if home == "host" else 0 for key, (home, most) in limits.items()}

        def chosen() -> Homes:
            return Homes(
                weights=frozenset(movable[: counts["weights"]]),
                state=frozenset(movable[: counts["state"]]),
                stash=counts["stash"],
                carry=bool(counts["carry"]),
            )

        yield chosen()
        for key, (home, most) in limits.items():
            while home == "auto" and counts[key] < most:
                counts[key] += 1
                yield chosen()

    # the components

    def plan(self, choice: Choice) -> Plan:
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
        components = tuple(c for c in found if c.bytes)
        batch = self.config.train.batch_tokens
        return Plan(components, choice, self.parameters, batch, self.budgets, self.crew)

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
        chunk = CHUNK_CUDA if self.device.type == "cuda" else CHUNK_CPU
        for spec in specs:
            written, rows = self._written(spec), MERGE_ROWS * spec.shape[-1]
            if not spec.frozen:
                moments = 4 if self.config.memory.moments != "fp32" else 0
                found.append(4 * max(written, moments) * min(chunk, spec.numel))
                if spec.role in ADAPTER_ROLES and self.config.relora.cycle_steps:
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
        if self.config.memory.master == "host" and spec.role in MATRIX_ROLES:
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
            *deepspeed_components(self.config, self.device, self.crew.ranks, choice.micro_batch),
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
