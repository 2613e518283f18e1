"""The step of the autograd engine with DeepSpeed: AdamW with state, gradients and weights divided among the
ranks (ZeRO, arXiv 1910.02054), optionally offloaded to host memory.

All ranks get the same batch, and each processes its share of the sequences, so N ranks compute the same step
as one. Between steps, weights and state are DeepSpeed's flat partitions. Only `units` reads and writes them:
it assembles one unit at a time in host memory, or divides it again. So callers see the same tensors as with
the other engines, for any number of ranks.

Not used from DeepSpeed: its checkpoints (pickles, with a layout that depends on the number of ranks), its
schedules and its counting of micro-batches.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lowres import ranks
from lowres.config import Config
from lowres.data.batches import IGNORED
from lowres.engine.cache import Reader, Rereading
from lowres.engine.common import (
    MARKED,
    Documents,
    Limits,
    StepReport,
    apart,
    documents_of,
    split,
    weighed_batch,
)
from lowres.errors import UserError
from lowres.model import Llama, Starts, storage_kinds, unit_specs
from lowres.objective import Pairs, make_objective
from lowres.optim import Optimizer
from lowres.rooms import Rooms
from lowres.storage import (
    DENSE_DTYPES,
    Unit,
    UnitSpec,
    compute_dtype,
    field_bytes,
    state_fields,
    weight_fields,
)

# elements that are communicated at a time; DeepSpeed's default of 500 M takes 2 GB of a small card
BUCKET = 100_000_000
# the operators that DeepSpeed compiles here, and the age in seconds after which their lock files are stale:
# while we hold our own lock, another process holds such a lock only for a moment
OPERATORS = ("cpu_adam", "deepspeed_shm_comm")
LEFT_OVER = 60.0
# keys of a DeepSpeed JSON that the run's config sets, and the key to use instead
DECIDED = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "optimizer": "the section [optim]",
    "scheduler": "the section [schedule]",
    "gradient_clipping": "optim.grad_clip",
    "fp16": "memory.compute",
    "bf16": "memory.weights and memory.compute",
    "amp": "memory.compute",
    "torch_autocast": "memory.compute",
    "data_types": "memory.weights",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.overlap_comm": "deepspeed.overlap",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_param",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_optimizer.pin_memory": "deepspeed.pin_memory",
    "zero_optimization.offload_param.device": "deepspeed.offload_param",
    "zero_optimization.offload_param.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_param.pin_memory": "deepspeed.pin_memory",
}


def require(config: Config, device: torch.device) -> None:
    """Raise UserError if DeepSpeed or a compiler that it needs is missing, if deepspeed.config_file cannot be
    used, or if the batch cannot be divided among the ranks."""
    if config.batch_sequences % ranks.size():
        near = max(1, round(config.batch_sequences / ranks.size())) * ranks.size() * config.data.seq_len
        raise UserError(
            f"train.batch_tokens: {config.batch_sequences} sequences cannot be divided among {ranks.size()} "
            f"ranks; {near} tokens can"
        )
    own_keys(config)
    deepspeed(device)
    compile_operators(config.deepspeed.offload_optimizer != "none")


def own_keys(config: Config) -> dict[str, Any]:
    """The content of deepspeed.config_file. Raises UserError for a key that the run's config sets."""
    path = config.deepspeed.config_file
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config_file: {path} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config_file: {path} does not contain a JSON object")
    for key, instead in DECIDED.items():
        found: Any = values
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            raise UserError(f"deepspeed.config_file: {path} sets {key}; remove it and use {instead}")
    return values


def deepspeed(device: torch.device) -> ModuleType:
    """The DeepSpeed module, set up for the device and with less output."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # by default it uses a GPU if there is one
    try:
        import deepspeed as found
    except ImportError:
        raise UserError(
            "memory.engine: deepspeed is not installed; pip install deepspeed ninja, or use layerwise"
        ) from None
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)  # stdout is for a run's results
    logger.addFilter(_is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return found


def _is_news(record: logging.LogRecord) -> bool:
    return "OVERFLOW" not in record.getMessage()  # the metrics count skipped steps


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    """Suppress DeepSpeed's messages about compiled operators."""
    return contextlib.redirect_stdout(io.StringIO())


def compile_operators(offloaded: bool) -> None:
    """Compile now what DeepSpeed would compile at first use: reductions through shared memory on a CPU, and
    AdamW for an offloaded optimizer. Raises UserError if this fails."""
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder

    # pip installs ninja here, and an environment that is not activated does not search this folder
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        with _silence(), _alone():
            build_shm_op()
            if offloaded:
                CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # from the compiler or ninja, or because something is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"memory.engine: DeepSpeed could not compile its operators ({reason}); install a C++ compiler "
            "(g++) and ninja, or use layerwise"
        ) from None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let only one process of this machine compile at a time, and remove PyTorch's stale lock files first: a
    compilation that is killed leaves its lock file, and all later ones would wait for it forever."""
    import fcntl

    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lowres.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for theirs in (lock for name in OPERATORS for lock in root.rglob(f"{name}/lock")):
            with contextlib.suppress(FileNotFoundError):  # its holder has released it
                while time.time() - theirs.stat().st_mtime < LEFT_OVER:
                    time.sleep(0.1)
                theirs.unlink()
        yield


def settings(config: Config, micro_batch: int, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; `own_keys` override values that only this function chooses."""
    asked, kept, cuda = config.deepspeed, config.memory, device.type == "cuda"
    lean = kept.weights == "bf16"
    share = -(-config.most_windows // ranks.size())
    pinned = cuda if asked.pin_memory == "auto" else asked.pin_memory
    place = {"pin_memory": pinned} | ({"nvme_path": asked.nvme_path} if asked.nvme_path else {})
    bf16: dict[str, Any] = {"enabled": lean or compute_dtype(kept.activations_in, device) == torch.bfloat16}
    if lean:
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    numel = sum(spec.numel for unit in unit_specs(config.model) for spec in unit.tensors)
    bucket = min(BUCKET, numel + numel % 2)
    zero: dict[str, Any] = {
        "stage": asked.stage,
        "overlap_comm": asked.overlap and cuda,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket // 2,
        "stage3_max_live_parameters": 5 * BUCKET,
        "stage3_max_reuse_distance": 5 * BUCKET,
    }
    if asked.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": asked.offload_optimizer} | place
    if asked.offload_param != "none":
        zero["offload_param"] = {"device": asked.offload_param} | place
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": -(-share // micro_batch),
        "gradient_clipping": config.optim.grad_clip,
        "bf16": bf16,
        "data_types": {"grad_accum_dtype": "bf16" if lean else "fp32"},
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    return _merged(ours, own_keys(config))


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    both = ours.keys() & theirs.keys()
    nested = {k for k in both if isinstance(ours[k], dict) and isinstance(theirs[k], dict)}
    return ours | theirs | {key: _merged(ours[key], theirs[key]) for key in nested}


@dataclass(frozen=True)
class Fragment:
    """The part of a flattened weight that this rank stores: its start, and views of the master weight (key
    "") and of the moments (by their keys)."""

    start: int
    views: dict[str, Tensor]


class ZeroEngine:
    """Engine interface: see `lowres.engine.Engine`."""

    def __init__(
        self,
        config: Config,
        optimizer: Optimizer,
        micro_batch: int,
        rooms: Rooms,
        starts: Starts | None = None,
    ) -> None:
        """optimizer: gives the learning rates and weight decays; DeepSpeed does the updates. starts: see
        `EngineSettings`."""
        assert (starts is not None) == config.packed
        self.objective = make_objective(config.objective)
        self.config, self.rooms, self.device, self.starts = config, rooms, rooms.device, starts
        self.micro_batch = min(micro_batch, -(-config.most_windows // ranks.size()))
        self.loss_chunk = config.memory.loss_chunk
        self.specs = unit_specs(config.model)
        self._rule = optimizer
        module = deepspeed(self.device)
        ranks.join(self.device)
        keys = settings(config, self.micro_batch, self.device)
        dtype = torch.bfloat16 if keys["bf16"]["enabled"] else torch.float32
        if config.deepspeed.stage == 3:  # each weight is divided when it is created
            with _silence(), module.zero.Init(config_dict_or_path=keys):
                model = Llama(config.model)
        else:
            with torch.device("meta"):  # never in fp32 on the device
                model = Llama(config.model).to(dtype)
            model.to_empty(device=self.device)
        self._groups = [g for g in optimizer.groups if any(g.has(s) for u in self.specs for s in u.tensors)]
        with _silence():
            self._engine, *_ = module.initialize(model=model, optimizer=self._adamw(model), config=keys)
        self._zero = self._engine.optimizer
        self._parameters: dict[str, Any] = dict(self._engine.module.named_parameters())
        self._start_state()

    def _adamw(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with one param group for each of the optimizer's groups (learning rate and weight decay)."""
        optim, groups = self.config.optim, []
        for group in self._groups:
            names = [s.name for u in self.specs for s in u.tensors if group.has(s)]
            own = [model.get_parameter(name) for name in names]
            groups.append({"params": own, "lr": group.lr, "weight_decay": group.weight_decay})
        assert optim.eps is not None
        more: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps}
        if self.config.deepspeed.offload_optimizer == "none":
            return torch.optim.AdamW(groups, **more, fused=self.device.type == "cuda")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        wide = self.config.memory.moments == "fp32"
        return DeepSpeedCPUAdam(groups, **more, fp32_optimizer_states=wide)

    def reserve(self, sequences: int, length: int, training: bool) -> None:
        """Does nothing: DeepSpeed allocates its buffers at the start, and activations when needed."""

    # the step

    def _micro_batches(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor], int, list[Documents]]:
        return apart(batch, split(batch, self.micro_batch, self.rooms), self.rooms, self.starts)

    def step(
        self,
        batch: Tensor,
        step: int,
        schedule: float,
        rehearsal: bool = False,
        norm_limit: float | None = None,
        loss_limit: float | None = None,
        pairs: Pairs | None = None,
    ) -> StepReport:
        _, _, count, _ = self._micro_batches(batch)
        weighed = weighed_batch(self, batch, pairs, self.objective, torch.float32)
        weights: Sequence[Tensor | None] = [None] * len(batch)
        if weighed is not None:
            count, weights = 1, ranks.share(weighed.weights, 0).split(self.micro_batch)
        inputs, targets, _, documents = self._micro_batches(ranks.share(batch, IGNORED))
        for group, kept in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = kept.lr * schedule
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self._engine.train()
        for i, (tokens, wanted, lengths) in enumerate(zip(inputs, targets, documents, strict=True)):
            last, own = i == len(inputs) - 1, weights[i]
            self._engine.set_gradient_accumulation_boundary(last)
            loss = self._engine(
                *(tokens.to(self.device), wanted.to(self.device), self.loss_chunk, lengths),
                weights=None if own is None else own.to(self.device),
            )
            total += loss.detach()
            # DeepSpeed takes the mean over the ranks
            weight = ranks.size() / count
            if last:
                (mean,) = ranks.total(float(total) / count)
                if weighed is not None and weighed.loss is not None:
                    mean = float(weighed.loss)
                allowed = Limits.of(None, loss_limit).allow_loss(torch.tensor(mean, dtype=torch.float64))
                refused = rehearsal or not allowed
                # DeepSpeed skips a step, on all ranks, if gradients are not finite
                weight = float("nan") if refused else weight
            self._engine.backward(loss * weight, scale_wrt_gas=False)
        self._engine.step()
        skipped = len(self.specs) if self._zero.overflow else 0
        readings = weighed.readings if weighed is not None else {}
        return StepReport(mean, float(self._engine.get_global_grad_norm()), skipped, readings=readings)

    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> tuple[float, int]:
        _, _, count, _ = self._micro_batches(batch)
        inputs, targets, _, documents = self._micro_batches(ranks.share(batch, IGNORED))
        self._engine.eval()
        losses = [
            self._engine(i.to(self.device), t.to(self.device), self.loss_chunk, lengths)
            for i, t, lengths in zip(inputs, targets, documents, strict=True)
        ]
        return ranks.total(float(torch.stack(losses).double().sum()))[0], count

    @torch.no_grad()
    def log_probabilities(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        own = ranks.share(batch, IGNORED)
        inputs, targets, _, documents = self._micro_batches(own)
        self._engine.eval()
        found = [
            self._engine(i.to(self.device), t.to(self.device), self.loss_chunk, lengths, each=True).cpu()
            for i, t, lengths in zip(inputs, targets, documents, strict=True)
        ]
        whole = torch.zeros(2, len(own) * ranks.size(), batch.shape[1] - 1)
        whole[:, ranks.rank() :: ranks.size()] = torch.cat(found, 1)
        each, likeliest = ranks.add(whole)[:, : len(batch)]
        return each, likeliest.bool()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        self._engine.eval()
        documents = documents_of(tokens, self.starts)
        return self._engine(tokens.to(self.device), documents=documents)[:, -1].float()

    def reader(self, sequences: int, length: int) -> Reader:
        """It remembers nothing."""
        return Rereading(self.logits)

    @contextlib.contextmanager
    def marked(self) -> Iterator[None]:
        before, self.starts = self.starts, MARKED
        try:
            yield
        finally:
            self.starts = before

    # weights and state between steps

    def units(self, write: bool = False) -> Iterator[Unit]:
        for spec in self.specs:
            unit = self._empty(spec)
            if not write:
                self._read(unit)
                for slab in (unit.weights_slab, unit.state_slab):
                    assert slab is not None
                    ranks.add(slab)  # each byte is nonzero on one rank only: exact for any number format
            yield unit
            if write:
                self._write(unit)
        if write:
            self._publish()

    def _empty(self, spec: UnitSpec) -> Unit:
        """A unit in host memory, all zero."""
        kept = self.config.memory
        kinds = storage_kinds([spec], kept.weights, kept.embeddings_kept_in)
        fields = self._rule.unit_fields(spec)
        sizes = (sum(field_bytes(f).values()) for f in (weight_fields(spec, kinds), state_fields(fields)))
        weights, state = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
        unit = Unit(spec, kinds, weights)
        unit.give_state(fields, state)
        return unit

    def _read(self, unit: Unit) -> None:
        """Copy this rank's parts of the weights and moments into the unit."""
        for spec in unit.spec.tensors:
            for whole, fragment in self._pairs(unit, spec.name):
                whole.copy_(fragment)
        assert unit.updates is not None
        if ranks.is_first():
            unit.updates.fill_(self._updates())

    def _write(self, unit: Unit) -> None:
        """Copy this rank's parts of the weights and moments from the unit."""
        for spec in unit.spec.tensors:
            for whole, fragment in self._pairs(unit, spec.name):
                fragment.copy_(whole)
        assert unit.updates is not None
        self._set_updates(int(unit.updates))

    def _pairs(self, unit: Unit, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of a weight and of each of its moments: (view in the unit, view in DeepSpeed)."""
        fragment = self._fragment(name)
        if fragment is not None:
            wholes = {"": unit.weight_tensors()[name]} | unit.state[name]
            for key, view in fragment.views.items():
                yield wholes[key].view(-1).narrow(0, fragment.start, view.numel()), view

    # DeepSpeed's partitions

    def _flats(self) -> list[Tensor]:
        """The flat master weights of this rank."""
        if self.config.deepspeed.stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _state(self, flat: Tensor) -> dict[str, Any]:
        """The state of DeepSpeed's AdamW for flat master weights."""
        return self._zero.optimizer.state[flat]

    def _start_state(self) -> None:
        """Create the moments before the first step, so they can be loaded, and lack of memory shows now."""
        offloaded = self.config.deepspeed.offload_optimizer != "none"
        dtype = DENSE_DTYPES[self.config.memory.moments]
        for flat in self._flats():
            moments = {key: torch.zeros_like(flat, dtype=dtype).detach() for key in ("exp_avg", "exp_avg_sq")}
            self._state(flat).update(
                {"step": 0 if offloaded else torch.zeros((), device=flat.device)} | moments
            )

    def _updates(self) -> int:
        return int(self._state(self._flats()[0])["step"])

    def _set_updates(self, count: int) -> None:
        for flat in self._flats():
            state = self._state(flat)
            if isinstance(state["step"], Tensor):
                state["step"].fill_(count)
            else:
                state["step"] = count

    def _fragment(self, name: str) -> Fragment | None:
        """This rank's part of a weight; None if it has none."""
        parameter = self._parameters[name]
        if self.config.deepspeed.stage == 3:
            group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat, start = self._zero.fp32_partitioned_groups_flat[group], ranks.rank() * length
            length = min(length, parameter.ds_numel - start)  # the last parts are padded
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
        if length <= 0:
            return None
        kept = {"": flat.detach()} | {k: v for k, v in self._state(flat).items() if k != "step"}
        return Fragment(start, {key: tensor.narrow(0, offset, length) for key, tensor in kept.items()})

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the new master weights to the weights that the model computes with."""
        if self.config.deepspeed.stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
