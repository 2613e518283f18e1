"""What the model before preference tuning thinks of every answer: the sum of the log-probabilities of its
trained tokens.

It is computed once, by the engine of the run before its first step, so no second model is ever in memory. The
record is sealed, and named by a key: the hash of all that determines it, weights and data. It is kept in the
folder of the run, and in data.cache, where another run on the same model and data finds it. What is computed
so far is there too, so that it goes on after an interruption.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowres import disk, ranks
from lowres.config import Config
from lowres.data.chat.chat_data import ChatData
from lowres.engine import Engine
from lowres.errors import UserError
from lowres.evaluate import sums_of_examples
from lowres.progress import Bar
from lowres.sealed import Damaged, Record, seal, unseal
from lowres.storage import ADAPTER, Unit, compute_dtype

BASELINE = "baseline.json"
# seconds between two writes of what is computed so far
SAVE_EVERY = 60.0


class _Record(Record):
    """key: see `key_of`. sums: fp64 numbers, little-endian, in base64."""

    key: str
    sums: str


class Baseline:
    """sums: fp64, of all training examples and then all validation examples, each in the order of `ChatData`.
    key: see `key_of`."""

    def __init__(self, key: str, sums: Tensor, data: ChatData) -> None:
        self.key, self.sums = key, sums
        first = 2 * data.epoch_examples
        self.training, self.validation = sums[:first], sums[first:]


def key_of(config: Config, device: torch.device, units: Iterable[Unit], data: ChatData) -> str:
    """Changes with the weights, without adapters, and with the examples. The same weights are another model
    with another base of the rotations, say, and give other numbers in another format."""
    memory = config.memory
    activations = str(compute_dtype(memory.activations_in, device))
    numbers = [memory.compute == "int8", activations, memory.stash_dtype, memory.exact_forward]
    arithmetic = json.dumps([config.model.model_dump(), numbers])
    digest = hashlib.blake2b(digest_size=16)
    for text in (data.fingerprint, data.validation_fingerprint, str(data.seq_len), arithmetic):
        digest.update(text.encode())
    for unit in units:
        for spec in unit.spec.tensors:
            if spec.kind == ADAPTER:
                continue
            for _, tensor in sorted(unit.weights[spec.name].tensors().items()):
                digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def in_cache(cache: Path, key: str) -> Path:
    """Where data.cache has the record."""
    return cache / f"baseline-{key}.json"


def read(path: Path, key: str, data: ChatData) -> Baseline | None:
    """The record in a file, if it is as it was written, complete, and what the key says."""
    sums = _read(path, key)
    return Baseline(key, sums, data) if len(sums) == 2 * _pairs(data) else None


def write(path: Path, baseline: Baseline) -> None:
    """Raises DiskError."""
    _write(path, baseline.key, baseline.sums)


def compute(engine: Engine, data: ChatData, sequences: int, key: str, kept: Path, progress: bool) -> Baseline:
    """The sums under the present weights, which have this key. sequences: pairs at one time. kept: a file for
    what is computed so far; it goes on from there. Raises UserError if a sum is not finite."""
    first, total = data.epoch_examples, _pairs(data)
    known = _read(kept, key) if ranks.is_first() else torch.empty(0, dtype=torch.float64)
    sums = torch.zeros(2 * total, dtype=torch.float64)
    sums[: len(known)] = known
    ranks.add(sums)
    done = int(ranks.total(len(known) // 2)[0])
    saved = time.monotonic()
    with Bar("baseline", "pairs", total, done, shown=progress and ranks.is_first(), leave=True) as bar:
        try:
            while done < total:
                training = done < first
                start = 0 if training else first
                end = min(done + sequences, first if training else total)
                pack = data.of_training if training else data.of_validation
                packed = pack(range(done - start, end - start))
                found = sums_of_examples(engine, packed.windows, 2 * sequences)
                if not found.isfinite().all():
                    raise UserError(
                        "run.init_from: the model gives an answer no finite probability; give a sound one"
                    )
                sums[2 * start + packed.examples] = found
                bar.update(end - done)
                done = end
                if ranks.is_first() and time.monotonic() - saved > SAVE_EVERY:
                    _write(kept, key, sums[: 2 * done])
                    saved = time.monotonic()
        except BaseException:
            if ranks.is_first():
                with suppress(disk.DiskError):
                    _write(kept, key, sums[: 2 * done])
            raise
    return Baseline(key, sums, data)


def _pairs(data: ChatData) -> int:
    return data.epoch_examples + data.validation_examples


def _read(path: Path, key: str) -> Tensor:
    """The sums in a file, or none."""
    try:
        found = unseal(disk.read_whole(path, limit=1 << 34), _Record)
        numbers = np.frombuffer(base64.b64decode(found.sums, validate=True), "<f8").astype(np.float64)
    except (OSError, Damaged, ValueError):
        return torch.empty(0, dtype=torch.float64)
    return torch.from_numpy(numbers if found.key == key else numbers[:0])


def _write(path: Path, key: str, sums: Tensor) -> None:
    record = _Record(key=key, sums=base64.b64encode(sums.numpy().astype("<f8").tobytes()).decode())
    with disk.named(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    disk.store(path, seal(record.model_dump()))
