"""Memory that lives between operations, found by running the code of a step on tensors without memory.

The engine and the optimizer are the real ones. `torch._subclasses.fake_tensor` gives every tensor a shape,
and `lowres.meter` counts. Widths, vocabulary, micro-batch and length are real too. The model is cut to one
band, because a step works on one at a time, and the batch to two micro-batches, because what the first one
leaves is alive during the second. Slabs are subtracted: `lowres.engine.layout` describes them.

Traces use CPU tensors, also for CUDA (`lowres.target`). A trace cannot see what a kernel allocates inside
itself; `inside_kernel` adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowres.config import Config, ModelConfig, ReloraConfig
from lowres.device import wants_kernels
from lowres.engine import Choice, EngineSettings, LayerwiseEngine
from lowres.engine.common import Documents, Updater, one_example_each
from lowres.errors import UserError
from lowres.kernels import forms
from lowres.meter import LiveTensors
from lowres.model import Dropout, Llama, empty_units
from lowres.model.documents import Positions
from lowres.optim import make_optimizer
from lowres.relora import Relora
from lowres.rooms import GPU, HOST, Rooms
from lowres.rules.moments import bitsandbytes_functional
from lowres.storage import Unit
from lowres.target import CUDA, kind_of, planned_for

_CPU = torch.device("cpu")
_aten = torch.ops.aten


class Traced(LiveTensors):
    """Counts tensors without memory. Reading a number from the device returns 1 or True, so everything that
    happens only sometimes (an update, a new projection) happens."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func is _aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if more := inside_kernel(func, args):
            self.note(GPU, more)
        return result


def inside_kernel(func: Callable[..., Any], args: Any) -> int:
    """Bytes that the kernel of an operation allocates for itself while it runs.

    Backward of flash attention on CUDA (PyTorch's aten/.../flash_attn/flash_api.cpp, `mha_bwd`): an fp32
    accumulator of dq and one number per row, with the length rounded up to 128 and the head width to 32; and
    dk and dv of every head if keys are grouped. In fp32 the memory-efficient kernel needs one number per row
    (`_efficient_attention_backward`). Singular values (BatchLinearAlgebra.cpp, `linalg_svd`): a copy of the
    matrix, which the solver overwrites.
    """
    if func is _aten._linalg_svd.default:
        return int(args[0].nbytes)
    if func is not _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    q, k = args[1], args[2]
    if kind_of(q.device) != CUDA:
        return 0
    b, heads, length, width = q.shape
    rows = b * heads * _rounded(length, 128)
    if q.dtype == torch.float32:
        return 4 * rows
    grouped = 2 * q.numel() * q.itemsize if k.shape[1] != heads else 0
    return int(4 * rows * (_rounded(width, 32) + 1) + grouped)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@contextmanager
def without_memory(
    kind: str, rooms: Rooms | None = None, brief: bool = False, compiled: bool = False
) -> Iterator[Traced]:
    """Tensors made in the block have no memory and are counted; code behaves as on this kind of device, and
    as with compiled kernels or without them."""
    live, without = Traced(rooms), FakeTensorMode(allow_non_fake_inputs=True)
    with planned_for(kind, brief), forms.using(kind, compiled), without, live:
        yield live


class _Still:
    """An optimizer that does nothing, for traces of activations."""

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None: ...


class _OnlyUpdating(LayerwiseEngine):
    """An engine that computes neither activations nor gradients, for traces of updates: most of the time of a
    trace would go into them."""

    def _through(self, x: Tensor, layers: list[dict[str, Any]], positions: Positions) -> Tensor:
        return x

    def _add_loss(self, *arguments: Any) -> None: ...

    def _backward(self, *arguments: Any) -> None: ...

    def _backward_embedding(self, *arguments: Any) -> None: ...


class _Watched:
    """An optimizer, and the bytes that remain after its updates of each unit."""

    def __init__(self, updater: Updater, live: LiveTensors) -> None:
        self._updater, self._live = updater, live
        self.kept: dict[str, int] = {}

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        before = self._live.current[GPU]
        self._updater.update(unit, grads, step, schedule, accepted)
        name = unit.spec.name
        self.kept[name] = self.kept.get(name, 0) + self._live.current[GPU] - before


@dataclass(frozen=True)
class Updates:
    """workspace: peak bytes in addition to gradients and state while a unit is updated. kept: bytes that stay
    from step to step: for one block, and for all other units together."""

    workspace: int
    kept: tuple[int, int]


# above this band, every further layer adds as many bytes as the last traced one
_TRACED_BAND = 3


def tracer(config: Config, kind: str, adapters: ReloraConfig | None) -> Tracer:
    """The traces of a run on a kind of device. They are cached by everything they depend on, because a run is
    planned more than once. Learning rates are only numbers, so the points of a sweep share theirs."""
    rates = {"lr", "embed_lr", "norm_lr", "lr_over_batch", "batch_policy"}
    homes = {f"{what}_on" for what in ("weights", "state", "stash", "carry")}
    budgets = {"budget_gib", "host_budget_gib", "rehearse"}
    parts = [
        config.model.model_dump_json(exclude={"n_layers", "preset"}),
        config.memory.model_dump_json(exclude=homes | budgets | {"band"}),
        config.optim.model_dump_json(exclude=rates),
        config.relora.model_dump_json(),
    ]
    compiled = forms.compiled(kind) or wants_kernels(config, kind)
    parts.append(str(bool(config.log.update_every)))
    key = (*parts, config.data.seq_len, config.packed, config.objective, kind, adapters is not None, compiled)
    if key not in tracers:
        tracers[key] = Tracer(config, kind, adapters, compiled)
    return tracers[key]


tracers: dict[tuple[object, ...], Tracer] = {}


class Tracer:
    """Traces of a run on a kind of device; each is made at its first use."""

    def __init__(
        self, config: Config, kind: str, adapters: ReloraConfig | None, compiled: bool = False
    ) -> None:
        self._config, self._kind, self._adapters, self._compiled = config, kind, adapters, compiled
        self._traced = cache(self._trace)
        self.updates = cache(self._updates)
        self.block = cache(self._block)
        self.loss = cache(self._loss)
        self.reading = cache(self._reading)

    def phases(self, micro_batch: int, band: int, several: bool) -> dict[str, int]:
        """Peak bytes beyond the slabs by phase of a layer-major step, except the update. several: whether a
        step has more than one micro-batch."""
        found = self._traced(micro_batch, min(band, _TRACED_BAND), several)
        if band <= _TRACED_BAND:
            return found
        before = self._traced(micro_batch, _TRACED_BAND - 1, several)
        return {p: size + (band - _TRACED_BAND) * (size - before[p]) for p, size in found.items()}

    def _trace(self, micro_batch: int, band: int, several: bool) -> dict[str, int]:
        rooms = Rooms(_CPU)
        with self._without_memory(rooms) as live:
            engine = self._engine(rooms, Choice(micro_batch, band), _Still())
            shape = micro_batch, self._config.data.seq_len
            self._take_step(engine, live, shape, 2 if several else 1, 0)
            return _beyond_slabs(live, rooms)

    def _reading(self, texts: int, length: int, band: int) -> int:
        """Peak bytes beyond the slabs while texts are sampled: when a whole context is new, and when it is
        new after half of another."""
        rooms = Rooms(_CPU)
        with self._without_memory(rooms) as live:
            engine = self._engine(rooms, Choice(1, band), None)
            reader = engine.reader(texts, length)
            for ids in ([0] * length, [0] * (length // 2) + [1] * (length - length // 2)):
                reader.logits(dict.fromkeys(range(texts), ids))
            return _beyond_slabs(live, rooms)["sampling"]

    def _updates(self) -> Updates:
        """Traces the first step, a step that replaces projections, and a step that merges."""
        rooms, config = Rooms(_CPU), _installed(self._config)
        relora = config.relora
        steps = [0, config.optim.refresh_every or 1]
        if self._adapters is not None and relora.cycle_steps:
            steps.append(relora.start_step + relora.cycle_steps - 1)
        with self._without_memory(rooms) as live:
            optimizer = make_optimizer(self._cut(config, 1))
            optimizer.measured_every = min(1, optimizer.measured_every)  # every step, if any
            watched = _Watched(Relora(relora, optimizer), live)
            engine = self._engine(rooms, Choice(1), watched, _OnlyUpdating)
            optimizer.attach(engine.units(), rooms)
            for step in steps:
                self._take_step(engine, live, (1, 1), 1, step)
            most = _beyond_slabs(live, rooms)["update"]
        block = sum(size for name, size in watched.kept.items() if name not in ("embed", "head"))
        rest = sum(watched.kept.values()) - block
        return Updates(most - block - rest, (block, rest))

    def _without_memory(self, rooms: Rooms) -> AbstractContextManager[Traced]:
        return without_memory(self._kind, rooms, brief=True, compiled=self._compiled)

    def _engine(
        self,
        rooms: Rooms,
        choice: Choice,
        updater: Updater | None,
        kind: type[LayerwiseEngine] = LayerwiseEngine,
    ) -> LayerwiseEngine:
        config, kept = self._cut(self._config, choice.band), self._config.memory
        units = empty_units(
            config.model, kept.weights, kept.embeddings_kept_in, rooms, adapters=self._adapters
        )
        settings = EngineSettings.of(config, choice, torch.device(self._kind), self._adapters is not None)
        return kind(config.model, units, updater, rooms, settings)

    def _take_step(
        self, engine: LayerwiseEngine, live: Traced, shape: tuple[int, int], count: int, step: int
    ) -> None:
        with engine.rooms.allocate_in(HOST):
            batch = torch.zeros(count * shape[0], shape[1], dtype=torch.int64)
        engine.reserve(len(batch), shape[1], training=True)
        documents = self._documents(*batch.shape)
        grouping = None
        if engine.settings.objective is not None:
            with engine.rooms.allocate_in(HOST):
                grouping = one_example_each(batch)
        engine.enqueue(batch, batch, 1, step, 1.0, rehearsal=False, documents=documents, grouping=grouping)

    def _documents(self, sequences: int, length: int) -> Documents:
        """One in each sequence: where they end does not matter to the memory."""
        return [(length,)] * sequences if self._config.packed else None

    @staticmethod
    def _cut(config: Config, layers: int) -> Config:
        return config.model_copy(update={"model": config.model.model_copy(update={"n_layers": layers})})

    # the whole model and PyTorch's autograd

    def _block(self, micro_batch: int, dtype: torch.dtype, keeps_gradients: bool) -> int:
        """Peak bytes while a block of `Llama` is recomputed and differentiated, beyond its input and the
        gradient of its output. Includes the gradients of its weights if they are kept."""
        model = self._config.model.model_copy(update={"n_layers": 1, "vocab_size": 2})
        return self._differentiated(model, self._adapters, micro_batch, dtype, keeps_gradients, 2)

    def _loss(self, micro_batch: int, dtype: torch.dtype, keeps_gradients: bool) -> int:
        """Peak bytes from the last block's output, which is not counted, to its gradient. Includes the
        gradient of the head if it is kept."""
        model = self._config.model.model_copy(update={"n_layers": 0, "tie_embeddings": False})
        return self._differentiated(model, None, micro_batch, dtype, keeps_gradients, 1)

    def _differentiated(
        self,
        model: ModelConfig,
        adapters: ReloraConfig | None,
        micro_batch: int,
        dtype: torch.dtype,
        keeps_gradients: bool,
        boundaries: int,
    ) -> int:
        """Peak of a micro-batch through a small `Llama`, minus its parameters and this many boundaries."""
        config = self._config
        dropout = Dropout(adapters.dropout if adapters else 0.0, 0)
        dropout.step = 0
        with without_memory(self._kind) as live:
            llama = Llama(model, adapters, dropout)
            embedding = llama.get_submodule("model.embed_tokens")
            for parameter in llama.parameters():
                if parameter.dim() == 2:
                    parameter.data = parameter.data.to(dtype)
                if parameter.requires_grad and not keeps_gradients:
                    parameter.register_post_accumulate_grad_hook(_drop)
            # its gradient is made after everything else is freed
            embedding.requires_grad_(False)
            embedding.register_forward_hook(lambda *found: found[-1].requires_grad_())
            tokens = torch.zeros(micro_batch, config.data.seq_len, dtype=torch.int64)
            live.reset()
            before = live.current[GPU]
            documents = self._documents(*tokens.shape)
            llama(tokens, tokens, config.memory.loss_chunk, documents).backward()
            boundary = tokens.numel() * model.dim * dtype.itemsize
            return max(0, live.peak[GPU] - before - boundaries * boundary)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _beyond_slabs(live: LiveTensors, rooms: Rooms) -> dict[str, int]:
    slabs = sum(size for (_, room), size in rooms.held().items() if room == GPU)
    return {phase: most - slabs for phase, most in live.phases.items()}


def _installed(config: Config) -> Config:
    """The config; or, if it needs bitsandbytes and that is missing, one whose moments need at least as much
    workspace. Such a run cannot start here, but it can be planned."""
    optim, kept = config.optim, config.memory
    if optim.name == "adamw8bit" or kept.moments == "int8":
        try:
            bitsandbytes_functional()
        except UserError:
            name = "adamw" if optim.name == "adamw8bit" else optim.name
            return config.model_copy(
                update={
                    "optim": optim.model_copy(update={"name": name}),
                    "memory": kept.model_copy(update={"moments": "bf16"}),
                }
            )
    return config
