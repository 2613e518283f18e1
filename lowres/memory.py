"""The plan: how many bytes each component of a run takes on GPU, host and disk, before any exists.

Sizes of tensors at rest follow from their specifications and are exact. What lives only for a while
(activations inside a layer, the loss chunk) is counted for the moment when it is largest, and belongs
to a phase; the peak is everything that stays plus the largest phase. `LiveTensors` measures the same
quantity on the CPU.

On a machine without a GPU the same tensors live in host memory; the plan still says what the GPU
would need, so that a run can be planned anywhere.
"""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowres.config import Config
from lowres.errors import DoesNotFit
from lowres.model import storage_kind, unit_specs
from lowres.optim import Optimizer
from lowres.storage import CHUNK_CPU, CHUNK_CUDA, MATRIX_ROLES, TensorSpec, compute_dtype

GIB = 1 << 30
# tokens in a micro-batch beyond which a matrix product is no faster
USEFUL_TOKENS = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Component:
    """Bytes of one thing in one room (gpu, host or disk). phase: when it is alive; "" is always."""

    name: str
    room: str
    bytes: int
    phase: str = ""


@dataclass(frozen=True)
class Plan:
    """All components of a run and the numbers that were derived for it."""

    components: tuple[Component, ...]
    parameters: int
    batch_tokens: int
    micro_batch: int
    budgets: dict[str, int | None]  # bytes by room; None is no limit

    def peak(self, room: str) -> int:
        """Bytes in a room when it is fullest."""
        own = [c for c in self.components if c.room == room]
        phases = {c.phase for c in own if c.phase}
        return sum(c.bytes for c in own if not c.phase) + max(
            (sum(c.bytes for c in own if c.phase == phase) for phase in phases), default=0
        )

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what to change; a line each."""
        found = []
        for room, key in (("gpu", "memory.budget_gib"), ("host", "memory.host_budget_gib")):
            budget = self.budgets[room]
            if budget is not None and self.peak(room) > budget:
                largest = max((c for c in self.components if c.room == room), key=lambda c: c.bytes)
                found.append(
                    f"{key}: the run needs {self.peak(room) / GIB:.2f} GiB of {room} memory, the budget is "
                    f"{budget / GIB:.2f} GiB; the largest part is the {largest.name} "
                    f"({largest.bytes / GIB:.2f} GiB); lower train.micro_batch or train.batch_tokens"
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """The plan for `lowres plan --json`."""
        return {
            "gpu_peak_bytes": self.peak("gpu"),
            "host_peak_bytes": self.peak("host"),
            "disk_bytes_per_checkpoint": self.peak("disk"),
            "components": [vars(c) for c in self.components],
            "fits": not self.problems,
            "parameters": self.parameters,
            "tokens_per_step": self.batch_tokens,
            "micro_batch": self.micro_batch,
        }

    def table(self) -> str:
        """The plan for people."""
        lines = [f"{'component':<38}{'room':<6}{'GiB':>10}   alive"]
        for c in self.components:
            lines.append(f"{c.name:<38}{c.room:<6}{c.bytes / GIB:>10.3f}   {c.phase or 'always'}")
        for room in ("gpu", "host", "disk"):
            budget = self.budgets.get(room)
            limit = "" if budget is None else f"   budget {budget / GIB:.2f}"
            name = "disk per checkpoint" if room == "disk" else f"{room} peak"
            lines.append(f"{name:<44}{self.peak(room) / GIB:>10.3f}{limit}")
        lines.append(
            f"{self.parameters / 1e6:.1f} M parameters, {self.batch_tokens:,} tokens a step, "
            f"micro-batches of {self.micro_batch} sequences"
        )
        return "\n".join(lines)


def make_plan(config: Config, device: torch.device, on_this_machine: bool = False) -> Plan:
    """The plan of a run. train.micro_batch = "auto" becomes the largest useful one within the budget.

    on_this_machine: a budget that the config leaves open is what the machine has.
    """
    budgets = {
        "gpu": _budget(config.memory.budget_gib, _device_bytes(device) if on_this_machine else None),
        "host": _budget(config.memory.host_budget_gib, _host_bytes() if on_this_machine else None),
    }
    asked = config.train.micro_batch
    if asked != "auto":
        return _plan_for(config, device, min(asked, config.batch_sequences), budgets)
    micro_batch = max(1, min(config.batch_sequences, USEFUL_TOKENS[device.type] // config.data.seq_len))
    while micro_batch > 1 and _plan_for(config, device, micro_batch, budgets).problems:
        micro_batch -= 1
    return _plan_for(config, device, micro_batch, budgets)


def _budget(asked_gib: float | None, found: int | None) -> int | None:
    return found if asked_gib is None else int(asked_gib * GIB)


def _device_bytes(device: torch.device) -> int | None:
    """Memory of the room that the plan calls gpu: free on a CUDA device, all of the host's on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _host_bytes()


def _host_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def require_fit(plan: Plan) -> None:
    """Raise DoesNotFit with one line if the plan exceeds a budget."""
    if plan.problems:
        raise DoesNotFit(plan.problems[0])


def _plan_for(config: Config, device: torch.device, micro_batch: int, budgets: dict[str, int | None]) -> Plan:
    model_units = unit_specs(config.model)
    specs = [spec for unit in model_units for spec in unit.tensors]
    kinds = {s.name: storage_kind(s, config.memory.weights, config.memory.embeddings_kept_in) for s in specs}
    optimizer = Optimizer(config.optim, config.model, config.run.seed)
    state = {spec.name: _state_bytes(optimizer, spec) for spec in specs}
    found = [
        *_weights_at_rest(specs, kinds),
        Component("optimizer state", "gpu", sum(state.values()) + 8 * len(model_units)),
    ]
    working = _layerwise if config.memory.engine == "layerwise" else _autograd
    found += working(config, device, kinds, micro_batch)
    by_unit = [sum(_stored(s, kinds[s.name]) + state[s.name] for s in unit.tensors) for unit in model_units]
    found.append(Component("checkpoint", "disk", sum(by_unit)))
    if device.type == "cuda":
        found.append(Component("checkpoint snapshot", "host", max(by_unit)))
    parameters = sum(spec.numel for spec in specs)
    return Plan(tuple(found), parameters, config.train.batch_tokens, micro_batch, budgets)


def _state_bytes(optimizer: Optimizer, spec: TensorSpec) -> int:
    fields = optimizer.state_fields(spec).values()
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in fields)


def _stored(spec: TensorSpec, kind: str) -> int:
    if kind == "int8":
        return spec.numel + 4 * spec.shape[0]
    return spec.numel * (2 if kind == "bf16" else 4)


def _weights_at_rest(specs: list[TensorSpec], kinds: dict[str, str]) -> list[Component]:
    found: dict[str, int] = {}
    for spec in specs:
        kind, size = kinds[spec.name], _stored(spec, kinds[spec.name])
        if kind == "int8":
            found["block matrices: int8 codes"] = found.get("block matrices: int8 codes", 0) + spec.numel
            name, size = "block matrices: scales", 4 * spec.shape[0]
        elif spec.role in MATRIX_ROLES:
            name = f"block matrices: {kind}"
        else:
            name = f"embedding and head: {kind}" if len(spec.shape) == 2 else "norms: fp32"
        found[name] = found.get(name, 0) + size
    return [Component(name, "gpu", size) for name, size in found.items()]


def _activations(config: Config, tokens: int, width: int) -> int:
    """Most bytes alive inside one block while it is differentiated, for `tokens` in one micro-batch.

    Kept for the backward: both normalised inputs, the norms' own copies of their fp32 inputs, rotated
    q and k, v, attention's output and its transposed copy, the middle residual; gate, up, silu(gate)
    and their product. At the peak, in the SwiGLU backward, two more of the width ffn_dim.
    """
    model = config.model
    kv = model.kv_heads * model.head_dim
    wide = 4 if width == 2 else width
    kept = width * (6 * model.dim + 2 * kv + 4 * model.ffn_dim) + wide * 2 * model.dim
    return tokens * (kept + width * 2 * model.ffn_dim)


def _layerwise(
    config: Config, device: torch.device, kinds: dict[str, str], micro_batch: int
) -> list[Component]:
    """What the layer-major engine adds to weights and state."""
    model, seq = config.model, config.data.seq_len
    width = compute_dtype(config.memory.compute, device).itemsize
    same = "fp32" if width == 4 else "bf16"
    model_units = {unit.name: unit.tensors for unit in unit_specs(model)}
    numel = {name: sum(s.numel for s in tensors) for name, tensors in model_units.items()}
    tied = model.tie_embeddings
    shared = max(size for name, size in numel.items() if not (tied and name == "embed"))

    def copies(unit: str) -> int:
        return sum(s.numel * width for s in model_units[unit] if len(s.shape) == 2 and kinds[s.name] != same)

    boundary = config.train.batch_tokens * model.dim * width
    chunk = min(config.memory.loss_chunk, micro_batch * seq)
    row_chunk = CHUNK_CUDA if device.type == "cuda" else CHUNK_CPU
    largest = max(s.numel for tensors in model_units.values() for s in tensors)
    # a bf16 product exists in fp32 before it is added to the gradient; on a CPU in bf16 before that too
    product = 0 if width == 4 else (4 if device.type == "cuda" else 6)
    found = [
        Component("gradient buffer", "gpu", 4 * (shared + (numel["embed"] if tied else 0))),
        Component("stash", "gpu", boundary * model.n_layers),
        Component("carry", "gpu", boundary),
        Component("a layer in compute precision", "gpu", copies("layers.0"), "backward"),
        Component(
            "activations inside a layer", "gpu", _activations(config, micro_batch * seq, width), "backward"
        ),
        Component(
            "weight gradient before it is added",
            "gpu",
            product * max(s.numel for s in model_units["layers.0"]),
            "backward",
        ),
        Component("head's gradient before it is added", "gpu", product * model.vocab * model.dim, "loss"),
        Component("head in compute precision", "gpu", copies("embed" if tied else "head"), "loss"),
        Component("loss chunk", "gpu", chunk * model.vocab * (4 + (0 if width == 4 else width)), "loss"),
        Component("update workspace", "gpu", 6 * 4 * min(row_chunk, largest), "update"),
    ]
    return [c for c in found if c.bytes]


def _autograd(
    config: Config, device: torch.device, kinds: dict[str, str], micro_batch: int
) -> list[Component]:
    """What the autograd engine adds: the whole model and two gradients of it."""
    model, seq = config.model, config.data.seq_len
    width = compute_dtype(config.memory.compute, device).itemsize
    parameters = sum(s.numel for unit in unit_specs(model) for s in unit.tensors)
    tokens = micro_batch * seq
    chunk = min(config.memory.loss_chunk, tokens)
    return [
        Component("model in compute precision", "gpu", parameters * width),
        Component("accumulated gradients", "gpu", 4 * parameters),
        Component("gradients of a micro-batch", "gpu", parameters * width),
        Component("boundary activations", "gpu", tokens * model.dim * width * (model.n_layers + 1)),
        Component("activations inside a layer", "gpu", _activations(config, tokens, width), "backward"),
        Component("loss chunk", "gpu", 3 * chunk * model.vocab * 4, "loss"),
    ]


def peak_gib(device: torch.device) -> float:
    """Most memory this process has had: PyTorch's allocator on CUDA, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensor storage made inside it that is still alive; `peak` is the most.

    Slow (it sees every operation): for tests and measurements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current, self.peak = 0, 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._alive:
            return
        size, key = storage.nbytes(), id(storage)

        def forget(_: Any) -> None:
            self._alive.pop(key, None)
            self.current -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.current += size
        self.peak = max(self.peak, self.current)
