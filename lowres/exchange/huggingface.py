"""A folder that Hugging Face's libraries read: weights, config, tokenizer and model card.

config.json, generation_config.json                  for transformers 4 and 5
model.safetensors, or shards of it and an index      the weights, in one number format
tokenizer.json and what belongs to it                see lowres.data.tokenizer
README.md                                            the model card, and loss.png if the run has one
lowres/                                              what only this program reads: see `own` and `scales`, and
                                                     config.toml, the settings of the run
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowres import disk
from lowres.config import ModelConfig
from lowres.config_file import to_toml
from lowres.data import Tokenizer, open_tokenizer
from lowres.data.tokenizer import Exported, exported
from lowres.data.tokenizer.huggingface import JsonTokenizer
from lowres.exchange import card, shards
from lowres.exchange.casts import DTYPES, Cast
from lowres.exchange.describing import config_json, family_of, needs_zero_biases
from lowres.exchange.families import CONFIG_JSON, Family, zero_biases
from lowres.exchange.own import OWN, write_tokenizer
from lowres.exchange.scales import write_scales
from lowres.exchange.stored import FolderModel, StoredModel, StoredWeight, TrainedModel, answer_ends
from lowres.exchange.target import whole
from lowres.model import unit_specs
from lowres.ranks import say
from lowres.runs import CONFIG
from lowres.storage import Fields, UnitSpec

GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 10**9
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# what headers and records may take
_ROOM = 1 << 20

Tensors = Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]


def export_folder(model: StoredModel, out: Path, dtype: str, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write a model as a new folder; returns lines for the user. dtype: a name of `casts.DTYPES`. Raises
    UserError, DoesNotFit."""
    tokenizer = open_tokenizer(model.tokenizer, form="own") if model.tokenizer else None
    files = _tokenizer_files(model, tokenizer)
    family = family_of(model.model, files.get(JsonTokenizer.file_name))
    described = _described(model, family, tokenizer, dtype)
    texts = {CONFIG_JSON: _json(described), GENERATION: _generation(model, described, tokenizer), **files}
    texts |= card.files(model, family, dtype)
    fields, cast, scales = _fields(model.model, family, DTYPES[dtype]), Cast(dtype), dict[str, Tensor]()
    small = sum(map(len, texts.values())) + (len(tokenizer.content) if tokenizer else 0)
    small += 4 * sum(shape[0] for _, shape in fields.values()) if model.kind == "int8" else 0
    with whole(out, shards.size_of(fields) + small + _ROOM) as folder:
        (folder / OWN).mkdir(parents=True)
        for name, content in texts.items():
            disk.write_whole(folder / name, content)
        if isinstance(model, TrainedModel):
            disk.write_whole(folder / OWN / CONFIG, to_toml(card.without_places(model.config)).encode())
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer, files)
        count = shards.write(folder, fields, shard_bytes, _tensors(model, family, cast, scales))
        if scales:
            write_scales(folder / OWN, scales)
        disk.sync_folder(folder)
    numbers = sum(torch.Size(shape).numel() for _, shape in fields.values())
    size = f"{numbers:,} numbers in {dtype}, {count} {'files' if count > 1 else 'file'} of weights"
    return [f"{out}: {described['architectures'][0]}, {size}", *cast.lines()]


def _fields(model: ModelConfig, family: Family, dtype: torch.dtype) -> Fields:
    """The tensors of the folder, in the order of the model."""
    found: Fields = {}
    for unit in unit_specs(model):
        found |= {spec.name: (dtype, spec.shape) for spec in unit.tensors}
        found |= {name: (dtype, shape) for name, shape in _zeros(model, family, unit)}
    return found


def _tensors(model: StoredModel, family: Family, cast: Cast, scales: dict[str, Tensor]) -> Tensors:
    """The tensors of `_fields`, one at a time. scales: takes those of INT8 weights."""
    for unit in unit_specs(model.model):
        for spec, weight in model.weights(unit):
            if weight.kind == "int8":
                scales[spec.name] = weight.tensors()[".scales"].clone()
            cast.merged += weight.merged
            yield spec.name, _cast(cast, spec.name, weight)
        for name, shape in _zeros(model.model, family, unit):
            yield name, iter([(0, torch.zeros(shape, dtype=DTYPES[cast.dtype]))])


def _cast(cast: Cast, name: str, weight: StoredWeight) -> Iterator[tuple[int, Tensor]]:
    for first, rows in weight.rows():
        yield first, cast.rows(name, rows)


def _zeros(model: ModelConfig, family: Family, unit: UnitSpec) -> list[tuple[str, tuple[int, ...]]]:
    """The biases of a unit that only its family has, and their shapes."""
    if not needs_zero_biases(model, family):
        return []
    return [(n, shape) for n, shape in zero_biases(model).items() if n.startswith(f"model.{unit.name}.")]


def _described(model: StoredModel, family: Family, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    shape = model.model
    if isinstance(model, FolderModel):
        ids = {key: model.described.values.get(key) for key in _IDS}
    else:
        ends = (tokenizer.bos_id, tokenizer.end_id) if tokenizer else ()
        ids = dict.fromkeys(_IDS) | {key: i for key, i in zip(_IDS, ends, strict=False) if i >= 0}
    if shape.max_positions is None and isinstance(model, TrainedModel):
        shape = shape.model_copy(update={"max_positions": model.config.data.seq_len})
    return config_json(shape, family, ids | {"dtype": _NAMES[dtype], "torch_dtype": _NAMES[dtype]})


def _generation(model: StoredModel, described: dict[str, Any], tokenizer: Tokenizer | None) -> bytes:
    """The content of generation_config.json: as it was, or where a text begins, and where it or an answer
    ends."""
    path = model.path / GENERATION
    if isinstance(model, FolderModel) and path.is_file():
        with disk.named(path, "read"):
            return disk.read_whole(path, limit=1 << 24)
    found = {key: described[key] for key in _IDS if described[key] is not None}
    if tokenizer is not None and (more := answer_ends(model, tokenizer)):
        found["eos_token_id"] = [tokenizer.end_id, *more]
    return _json(found)


def _tokenizer_files(model: StoredModel, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What other programs read of a tokenizer, by name."""
    found = exported(tokenizer, model.trained_on_text) if tokenizer else Exported()
    notes = list(found.notes)
    if tokenizer is None or not tokenizer.has_text:
        what = "has no tokenizer" if tokenizer is None else "knows token ids without text"
        notes.append(f"{model.path} {what}, so the export has no tokenizer")
    for note in notes:
        say(f"note: {note}")
    return found.files


def _json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2)}\n".encode()
