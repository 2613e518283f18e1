"""A model on the disk, whoever wrote it: its shape, its tokenizer, and its weights one by one.

Everything that takes weights from the disk without the state of training goes through this: `--init-from`,
`lowres import` and `lowres export`. One tensor is in memory at a time.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowres import checkpoint
from lowres.checkpoint import State
from lowres.config import Config, ModelConfig, ReloraConfig
from lowres.config.checks import check
from lowres.config_file import filled
from lowres.data import Tokenizer, find_tokenizer
from lowres.data.chat import open_template
from lowres.errors import UserError
from lowres.exchange.families import CONFIG_JSON, describe, zero_biases
from lowres.exchange.folder import WeightsFolder
from lowres.exchange.own import own_tokenizer
from lowres.model import EMBEDDING_NAME, HEAD_NAME, storage_kinds, unit_specs
from lowres.relora import adapters_of
from lowres.runs import CHECKPOINTS, CONFIG, newest
from lowres.storage import FORMATS, MATRIX, TensorSpec, Unit, UnitSpec, field_bytes, weight_fields
from lowres.target import row_chunks

Rows = Iterator[tuple[int, Tensor]]


class StoredWeight(Protocol):
    """One weight."""

    @property
    def kind(self) -> str:
        """The number format in which it is stored: a name of `storage.FORMATS`, or fp16."""

    def rows(self) -> Rows:
        """(first row, fp32 rows) pieces in host memory, in order; a 1-D tensor has elements for rows."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that store it, by suffix to its name; only of a kind in FORMATS."""

    @property
    def merged(self) -> float:
        """Squared norm of what adapters add to it."""


class StoredModel(Protocol):
    """path: as the user gave it. model: without a preset. kind: the number format in which its matrices are
    stored (without adapters). tokenizer: its file, or None. trained_on_text: here, where bos begins every
    document; chats begin as their template writes them. about: what it is, in a few words. notes: what the
    user should know of it."""

    path: Path
    model: ModelConfig
    kind: str
    tokenizer: Path | None
    trained_on_text: bool
    about: str
    notes: list[str]

    def weights(self, unit: UnitSpec) -> Iterator[tuple[TensorSpec, StoredWeight]]:
        """The tensors of a unit without adapters, in its order; each is valid until the next one. Raises
        UserError, which names the file, if it cannot be read."""


def open_model(path: str | Path, step: int | None = None) -> StoredModel:
    """The model in a folder: a run, one of its checkpoints, or a Hugging Face folder. step: of the
    checkpoint; None is the newest valid one. Raises UserError."""
    path = Path(path).expanduser()
    if not path.is_dir():
        problem = "is a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {problem}; give a run, a checkpoint, or a Hugging Face folder")
    ours = any(os.path.lexists(path / name) for name in (CONFIG, CHECKPOINTS, checkpoint.MANIFEST))
    if os.path.lexists(path / CONFIG_JSON) or not ours:
        if step is not None:
            raise UserError(f"--checkpoint: {path} is no run; leave it out")
        return FolderModel(path)
    return TrainedModel(path, step)


def is_tuned(model: StoredModel) -> bool:
    """Whether it was trained here on chats or on pairs of answers."""
    return isinstance(model, TrainedModel) and model.config.objective.name != "pretrain"


def answer_ends(model: StoredModel, tokenizer: Tokenizer) -> list[int]:
    """The ids with which an answer of a model that was tuned here may end, beside the end of a document.
    Raises UserError if its chat template cannot be read."""
    return sorted(open_template(None, tokenizer).ends - {tokenizer.end_id}) if is_tuned(model) else []


class TrainedModel:
    """The model of a run at a checkpoint, with its adapters merged in fp32. run: its folder. state: of the
    checkpoint."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path = path
        self.run = path.parent.parent if (path / checkpoint.MANIFEST).exists() else path
        self.config, self.checkpoint, self.state = _checkpoint(path, step)
        self.model = self.config.model.model_copy(update={"preset": None})
        self.kind = self.config.memory.weights
        self.tokenizer = _tokenizer(path, self.checkpoint)
        # one that was only imported has not been trained
        self.trained_on_text = self.config.objective.name == "pretrain" and self.state.step > 0
        self.about = f"step {self.state.step} of a run, {self.config.memory.weights}"
        self.notes: list[str] = []
        self._relora = self.config.relora if self.config.relora.stored_at(self.state.step) else None
        self._units = {unit.name: unit for unit in unit_specs(self.model, self._relora)}

    def weights(self, unit: UnitSpec) -> Iterator[tuple[TensorSpec, StoredWeight]]:
        stored = self._units[unit.name]
        adapters = stored.adapters
        for plain, spec in zip(
            unit.tensors, (s for s in stored.tensors if s.role not in adapters), strict=True
        ):
            own = [s for role, s in adapters.items() if spec.frozen and role.startswith(f"{spec.role}.")]
            yield plain, _OfCheckpoint(self._load(UnitSpec(unit.name, (spec, *own))), spec, self._relora)

    def _load(self, spec: UnitSpec) -> Unit:
        """Some tensors of a unit, in host memory."""
        kept = self.config.memory
        kinds = storage_kinds([spec], kept.weights, kept.embeddings_kept_in)
        size = sum(field_bytes(weight_fields(spec, kinds)).values())
        unit = Unit(spec, kinds, checkpoint.host_memory(size))
        checkpoint.load_unit(self.checkpoint, spec.name, unit.weight_tensors(), all_used=False)
        return unit


@dataclass
class _OfCheckpoint:
    """A weight and its adapters, if it has some. relora: their settings."""

    unit: Unit
    spec: TensorSpec
    relora: ReloraConfig | None

    @property
    def kind(self) -> str:
        return "fp32" if self.spec.frozen else self.unit.kinds[self.spec.name]

    def rows(self) -> Rows:
        weight, adapter = self.unit.weights[self.spec.name], self._adapter
        # small pieces: among large ones, what is kept of each would hold the memory of malloc
        for piece in row_chunks(self.spec.shape, self.unit.weights_slab.device):
            rows = weight.rows(torch.arange(piece.start, piece.stop), torch.float32)
            if adapter is not None:
                a, b, scaling = adapter
                rows = torch.addmm(rows, b[piece], a, alpha=scaling)
            yield piece.start, rows

    def tensors(self) -> dict[str, Tensor]:
        if self.spec.frozen:
            return {"": torch.cat([rows for _, rows in self.rows()])}
        return self.unit.weights[self.spec.name].tensors()

    @property
    def merged(self) -> float:
        if self._adapter is None:
            return 0.0
        a, b, scaling = self._adapter
        # of B A, without computing it
        return scaling**2 * float(((b.T @ b).double() * (a @ a.T).double()).sum())

    @property
    def _adapter(self) -> tuple[Tensor, Tensor, float] | None:
        """A [rank, n], B [m, rank], and the factor of their product."""
        if not self.spec.frozen or self.relora is None:
            return None
        return *adapters_of(self.unit, self.spec), self.relora.scaling


class FolderModel:
    """A Hugging Face folder. described: what its config.json says."""

    trained_on_text = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.described = describe(path)
        self.model, self.notes = self.described.model, self.described.notes
        self.tokenizer = own_tokenizer(path) or find_tokenizer(path)
        self._folder = WeightsFolder(path)
        specs = [spec for unit in unit_specs(self.model) for spec in unit.tensors]
        self._folder.require(
            {spec.name: spec.shape for spec in specs},
            unused=self.described.unused,
            zeros=zero_biases(self.model) if self.described.has_zero_biases else {},
        )
        self.kind = self._folder.kind_of(next(spec.name for spec in specs if spec.kind == MATRIX))
        self.about = f"{self.described.family.architecture}, {' and '.join(self._folder.kinds)}"
        if self.model.tie_embeddings and HEAD_NAME in self._folder:
            self._require_tied()

    def weights(self, unit: UnitSpec) -> Iterator[tuple[TensorSpec, StoredWeight]]:
        for spec in unit.tensors:
            yield spec, self._folder.weight(spec.name)

    def _require_tied(self) -> None:
        # transformers 5 then leaves the two untied, and 4 does not read the head
        if not self._folder.are_equal(HEAD_NAME, EMBEDDING_NAME):
            raise UserError(
                f"{self.path / CONFIG_JSON}: tie_word_embeddings is true, but {HEAD_NAME} is not "
                f"{EMBEDDING_NAME}; if the model has a head of its own, set it to false in a copy of the file"
            )


def _checkpoint(path: Path, step: int | None) -> tuple[Config, Path, State]:
    """The config, the checkpoint and the state that a run, or one of its checkpoints, means."""
    if (path / checkpoint.MANIFEST).exists():
        if step not in (None, checkpoint.step_of(path)):
            raise UserError(f"--checkpoint: {path} is a checkpoint itself; leave it out")
        return newest(path.parent.parent, only=path)
    if step is None:
        return newest(path)
    return newest(path, only=checkpoint.step_folder(path / CHECKPOINTS, step))


def _tokenizer(path: Path, place: Path) -> Path | None:
    """The tokenizer of a run: that in its own folder, which stays when the checkpoint at `place` goes, if it
    is still the same."""
    stored, beside = find_tokenizer(place), find_tokenizer(path)
    same = stored is None or (beside and beside.is_file() and filecmp.cmp(stored, beside, shallow=False))
    return beside if same else stored


def with_model_of(config: Config, origin: StoredModel) -> Config:
    """The config with the model of `origin`. Raises UserError if it gives a key of [model] another value."""
    ours, theirs = config.model, origin.model
    for key in sorted(ours.model_fields_set - {"preset", "max_positions"}):
        # what follows from other keys if it is not given
        values = [
            {"n_kv_heads": m.kv_heads, "head_dim": m.head_width}.get(key, getattr(m, key))
            for m in (ours, theirs)
        ]
        if getattr(ours, key) is not None and values[0] != values[1]:
            raise UserError(
                f"model.{key}: {values[0]} here, but the model in {origin.path} has {values[1]}; use that "
                "value, or leave the key out"
            )
    config = config.model_copy(update={"model": filled(ours, theirs)})
    try:
        check(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def require_ids(origin: StoredModel, tokenizer: Tokenizer) -> None:
    """Raise UserError if a tokenizer has ids that the model does not know. A model may know more: rows of its
    embedding that fill it up to a round number."""
    if tokenizer.vocab_size > origin.model.vocab:
        raise UserError(
            f"data.tokenizer: {tokenizer.path} has {tokenizer.vocab_size:,} ids, but the embedding of "
            f"{origin.path} has {origin.model.vocab:,} rows; give the tokenizer of this model"
        )


def initialize_from(units: Iterable[Unit], origin: StoredModel) -> None:
    """Take the weights of another model of the same shape; the number formats may differ. Adapters of
    `units` do not change."""
    for spec, ours in zip(unit_specs(origin.model), units, strict=True):
        for tensor, theirs in origin.weights(spec):
            take(ours, tensor.name, theirs)


def take(ours: Unit, name: str, theirs: StoredWeight) -> None:
    """Give a weight of a unit the value of a stored one."""
    if theirs.kind not in FORMATS or ours.kinds[name] != theirs.kind or ours.has_master(name):
        device = ours.weights_slab.device
        ours.fill(name, ((first, rows.to(device)) for first, rows in theirs.rows()))
        return
    kept = theirs.tensors()  # copied as stored: rounding again would lose precision
    for suffix, tensor in ours.weights[name].tensors().items():
        tensor.copy_(kept[suffix])
