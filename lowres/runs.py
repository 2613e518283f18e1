"""A run: its folder, the parts that compute, and how to use its weights.

config.toml      the resolved config
tokenizer.model  a copy, so that the folder can be moved and still be used for sampling and evaluation
metrics.jsonl    see lowres.metrics
checkpoints/     see lowres.checkpoint
summary.json     final values, written last: it exists only if the run is finished
loss.png         if matplotlib is installed

With ReLoRA a run has two parts. Engine and optimizer are built again between them: the adapters start from
the checkpoint at the end of the warm start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lowres import checkpoint, memory, ranks
from lowres.config import Config, ReloraConfig
from lowres.config_file import load_config
from lowres.data import TokenData, Tokenizer
from lowres.device import lacks_bf16, pick_device, prepare_cuda, use_kernels
from lowres.engine import Engine, make_engine
from lowres.engine.zero import ZeroEngine
from lowres.errors import UserError
from lowres.meter import Meter
from lowres.model import Units, empty_units, storage_kinds, unit_specs
from lowres.optim import Optimizer, make_optimizer
from lowres.relora import MERGE_ROWS, Relora, adapters_of, start_adapters, tensors_before
from lowres.rooms import Rooms
from lowres.storage import TensorSpec, Unit, UnitSpec, field_bytes, weight_fields

CONFIG, METRICS, CHECKPOINTS, SUMMARY = "config.toml", "metrics.jsonl", "checkpoints", "summary.json"
TOKENIZER = "tokenizer.model"


def make_units(config: Config, plan: memory.Plan, rooms: Rooms, adapted: bool) -> Units:
    """Storage for the weights of a run, in the homes that the plan chose."""
    kept = config.memory
    adapters = config.relora if adapted else None
    return empty_units(
        config.model, kept.weights, kept.embeddings_kept_in, rooms, plan.choice.homes.weights, adapters
    )


def engine_of(
    config: Config, units: Units, optimizer: Optimizer | Relora | None, plan: memory.Plan, rooms: Rooms
) -> Engine:
    """The engine of a run, with the choice of the plan."""
    return make_engine(config, units, optimizer, rooms, plan.choice)


def training_engine(config: Config, plan: memory.Plan, rooms: Rooms, adapted: bool) -> tuple[Engine, Relora]:
    """The training engine of a run, with weights and state all zero, and the Relora that does its updates."""
    optimizer = make_optimizer(config)
    relora = Relora(config.relora, optimizer)
    if config.memory.engine == "deepspeed":
        return ZeroEngine(config, optimizer, plan.micro_batch, rooms), relora
    units = make_units(config, plan, rooms, adapted)
    optimizer.attach(units.values(), rooms, plan.choice.homes.state)
    return engine_of(config, units, relora, plan, rooms), relora


@dataclass
class Parts:
    """Everything that computes: without adapters in the warm start of ReLoRA, then with them."""

    plan: memory.Plan
    rooms: Rooms
    engine: Engine
    relora: Relora
    meter: Meter
    adapted: bool


@dataclass(kw_only=True)
class Run:
    """A run in progress."""

    folder: Path
    config: Config
    data: TokenData
    validation: Tensor  # windows of eval_tokens, see TokenData.validation
    token_bytes: Tensor
    offset: int  # sequences seen minus steps so far times the present batch; 0 if the batch never changed
    started_with: dict[str, Any]  # the batch and the rates of its first step
    plans: dict[bool, memory.Plan]  # by whether there are adapters
    parts: Parts = field(init=False)

    def sequences_at(self, step: int) -> int:
        """Sequences seen in the first `step` steps, for any step since the batch last changed."""
        return self.offset + step * self.config.batch_sequences

    def tokens_at(self, step: int) -> int:
        return self.sequences_at(step) * self.config.data.seq_len

    def build(self, device: torch.device, adapted: bool) -> None:
        """Make the parts and replace earlier ones; weights and state are all zero."""
        self.__dict__.pop("parts", None)  # first, because both may not fit
        config, plan, rooms = self.config, self.plans[adapted], Rooms(device)
        engine, relora = training_engine(config, plan, rooms, adapted)
        engine.reserve(config.batch_sequences, config.data.seq_len, training=True)
        self.parts = Parts(plan, rooms, engine, relora, Meter(rooms), adapted)

    def save(self, step: int) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        stored = ((unit.spec.name, unit.tensors()) for unit in self.parts.engine.units())
        data, start = self.data.fingerprint, self.started_with
        state = {"tokens": self.tokens_at(step), "data": data, "start": start}
        write_checkpoint(self.folder / CHECKPOINTS, step, stored, state, self.config.train.keep_checkpoints)

    def load(self, folder: Path) -> None:
        """Read a checkpoint into place."""
        for unit in self.parts.engine.units(write=True):
            checkpoint.load_unit(folder, unit.spec.name, unit.tensors())

    def start_adapters(self, step: int) -> None:
        """Continue with adapters from the end of the warm start; always goes through a checkpoint."""
        saved = checkpoint.step_folder(self.folder / CHECKPOINTS, step)
        if not saved.exists():
            self.save(step)
        self.build(self.parts.rooms.device, adapted=True)
        for unit in self.parts.engine.units(write=True):
            checkpoint.load_unit(saved, unit.spec.name, tensors_before(unit), all_used=False)
            start_adapters(unit, self.config.run.seed, step)


def write_beside(path: Path, text: str) -> None:
    """Write a file completely, or leave the old one unchanged."""
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_checkpoint(
    folder: Path, step: int, stored: Iterable[tuple[str, dict[str, Tensor]]], state: dict[str, Any], keep: int
) -> None:
    """`checkpoint.save` on the first rank; the others only send it their parts of the units."""
    if ranks.is_first():
        checkpoint.save(folder, step, stored, state, keep)
    else:
        for _ in stored:
            pass


def open_run(folder: str | Path, device: str | None = None) -> tuple[Config, Engine, Tokenizer]:
    """A trained model for sampling and evaluation: the weights of the newest valid checkpoint, no optimizer.
    The weights of a deepspeed run are ordinary ones too, and the layerwise engine uses them."""
    prepare_cuda()
    folder = Path(folder)
    config, found = _newest(folder, [f"run.device={device}"] if device else [])
    config = _for_use(config)
    for note in use_kernels(config, pick_device(config)):
        tqdm.write(f"note: {note}", file=sys.stderr)
    rooms, adapted = Rooms(pick_device(config)), _is_adapted(config, found)
    plan = memory.make_plan(config, rooms.device, on_this_machine=True, adapted=adapted)
    units = make_units(config, plan, rooms, adapted)
    for name, unit in units.items():
        checkpoint.load_unit(found, name, unit.weight_tensors(), all_used=False)
    return config, engine_of(config, units, None, plan, rooms), Tokenizer(folder / TOKENIZER)


def _for_use(config: Config) -> Config:
    """The config of a trained run, changed for the device on which it is used."""
    changes = {"engine": "layerwise"} if config.memory.engine == "deepspeed" else {}
    if config.run.device != "cpu" and lacks_bf16():
        changes["compute"] = "fp32"
    return config.model_copy(update={"memory": config.memory.model_copy(update=changes)})


def require_same_shape(config: Config, folder: Path) -> None:
    """Raise UserError if the weights of the run in a folder do not fit the model of this config."""
    source, _ = _newest(folder, [])
    ours, theirs = (
        m.model_dump(exclude={"preset"}) | {"n_kv_heads": m.kv_heads} for m in (config.model, source.model)
    )
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"model.{key}: {value} here, but the run in {folder} (--init-from) has {theirs[key]}; "
                "use that value, or leave out --init-from"
            )


def initialize_from(units: Iterable[Unit], folder: Path) -> None:
    """Take the weights from the newest valid checkpoint of another run of the same shape; the number formats
    may differ. Adapters of that run are merged; adapters of `units` do not change."""
    source, found = _newest(folder, [])
    relora = source.relora if _is_adapted(source, found) else None
    for spec, ours in zip(unit_specs(source.model, relora), units, strict=True):
        theirs = _load(source, found, spec)
        for tensor in spec.tensors:
            if tensor.role not in spec.adapters:
                _take(ours, theirs, tensor, relora)


def _load(source: Config, found: Path, spec: UnitSpec) -> Unit:
    """The weights of one unit of a checkpoint, in host memory."""
    kinds = storage_kinds([spec], source.memory.weights, source.memory.embeddings_kept_in)
    size = sum(field_bytes(weight_fields(spec, kinds)).values())
    unit = Unit(spec, kinds, torch.zeros(size, dtype=torch.uint8))
    checkpoint.load_unit(found, spec.name, unit.weight_tensors(), all_used=False)
    return unit


def _take(ours: Unit, theirs: Unit, spec: TensorSpec, relora: ReloraConfig | None) -> None:
    name = spec.name
    if spec.frozen or ours.kinds[name] != theirs.kinds[name] or ours.has_master(name):
        ours.fill(name, _rows(theirs, spec, relora, ours.weights_slab.device))
        return
    kept = theirs.weights[name].tensors()  # copied as stored: rounding again would lose precision
    for suffix, tensor in ours.weights[name].tensors().items():
        tensor.copy_(kept[suffix])


def _rows(
    unit: Unit, spec: TensorSpec, relora: ReloraConfig | None, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 rows) of a weight, with its adapter merged."""
    weight = unit.weights[spec.name].dense(torch.float32)
    a, b = adapters_of(unit, spec) if spec.frozen else (None, None)
    for start in range(0, spec.shape[0], MERGE_ROWS):
        rows = weight[start : start + MERGE_ROWS]
        if a is not None and b is not None and relora is not None:
            rows = torch.addmm(rows, b[start : start + MERGE_ROWS], a, alpha=relora.scaling)
        yield start, rows.to(device)


def _newest(folder: Path, overrides: list[str]) -> tuple[Config, Path]:
    """The config of a run and its newest valid checkpoint."""
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a run: it has no {CONFIG}")
    config, _ = load_config(folder / CONFIG, overrides)
    found, notes = checkpoint.newest_valid(folder / CHECKPOINTS)
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)
    if found is None:
        raise UserError(f"{folder} has no valid checkpoint yet; continue it with lowres train ... --resume")
    return config, found


def _is_adapted(config: Config, found: Path) -> bool:
    return config.relora.stored_at(int(checkpoint.load_state(found)["step"]))
