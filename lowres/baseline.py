"""What the model before preference tuning thinks of every answer: the sum of the log-probabilities of its
trained tokens.

It is computed once, by the engine of the run before its first step, so no second model is ever in memory. The
record is sealed. It is kept in the folder of the run, and in data.cache under the hash of all that determines
it, where another run on the same model and data finds it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from lowres import disk
from lowres.config import Config
from lowres.data.chat.chat_data import ChatData, Packed
from lowres.engine import Engine
from lowres.errors import UserError
from lowres.evaluate import sums_of_examples
from lowres.ranks import is_first
from lowres.sealed import Damaged, Record, seal, unseal
from lowres.storage import Unit, compute_dtype

BASELINE = "baseline.json"


class _Record(Record):
    """key: of the data. training, validation: fp64 numbers, little-endian, in base64."""

    key: str
    training: str
    validation: str
    tokens: Annotated[int, Field(ge=1)]


class Baseline:
    """training, validation: fp64 [examples], in the order of `ChatData`."""

    def __init__(self, training: Tensor, validation: Tensor) -> None:
        self.training, self.validation = training, validation


def read(path: Path, data: ChatData) -> Baseline | None:
    """The record in a file, if it is as it was written and of these data."""
    try:
        found = unseal(disk.read_whole(path, limit=1 << 34), _Record)
        made = Baseline(_decoded(found.training), _decoded(found.validation))
    except (OSError, Damaged, ValueError):
        return None
    expected = [2 * data.epoch_examples, 2 * data.validation_examples]
    if found.key != key_of(data) or [len(made.training), len(made.validation)] != expected:
        return None
    return made


def write(path: Path, baseline: Baseline, data: ChatData) -> None:
    """Raises DiskError."""
    record = _Record(
        key=key_of(data),
        training=_encoded(baseline.training),
        validation=_encoded(baseline.validation),
        tokens=data.seq_len,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.store(path, seal(record.model_dump()))


def key_of(data: ChatData) -> str:
    """Changes with the examples."""
    return _hash([data.fingerprint.encode(), data.validation_fingerprint.encode(), b"%d" % data.seq_len])


def in_cache(config: Config, device: torch.device, units: Iterable[Unit], data: ChatData) -> Path:
    """Where data.cache has the record of these weights and data. The same weights are another model with
    another base of the rotations, say, and give other numbers in another format."""
    memory = config.memory
    activations = str(compute_dtype(memory.activations_in, device))
    numbers = [memory.compute == "int8", activations, memory.stash_dtype, memory.exact_forward]
    arithmetic = json.dumps([config.model.model_dump(), numbers]).encode()
    weights = (
        tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
        for unit in units
        for _, tensor in sorted(unit.weight_tensors().items())
    )
    name = f"baseline-{_hash([key_of(data).encode(), arithmetic, *weights])}.json"
    return Path(config.data.cache).expanduser() / name


def compute(engine: Engine, data: ChatData, sequences: int, progress: bool) -> Baseline:
    """The sums under the present weights. sequences: pairs at one time. Raises UserError if one is not
    finite."""
    total = data.epoch_examples + data.validation_examples
    silent = not (progress and is_first())
    with tqdm(total=total, desc="baseline", unit=" pairs", disable=True if silent else None) as bar:

        def of(pack: Callable[[Sequence[int]], Packed], count: int) -> Tensor:
            found = torch.zeros(2 * count, dtype=torch.float64)
            for first in range(0, count, sequences):
                packed = pack(range(first, min(first + sequences, count)))
                found[packed.examples] = sums_of_examples(engine, packed.windows, 2 * sequences)
                bar.update(min(sequences, count - first))
            return found

        made = Baseline(
            of(data.of_training, data.epoch_examples), of(data.of_validation, data.validation_examples)
        )
    if not (made.training.isfinite().all() and made.validation.isfinite().all()):
        raise UserError("run.init_from: the model gives an answer no finite probability; give a sound one")
    return made


def _hash(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _encoded(numbers: Tensor) -> str:
    return base64.b64encode(numbers.numpy().astype("<f8").tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype(np.float64))
