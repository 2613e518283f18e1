"""A model as a run that has not begun: it can be sampled, evaluated, exported, and named in --init-from.

It has a checkpoint of step 0 without optimizer state, so it is not resumed: runs start from it, as often as
one likes. One unit is in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowres import checkpoint, disk
from lowres.checkpoint import NotFinite, Start, State
from lowres.config import RATE_DEFAULTS, Config
from lowres.config_file import overridden, parse_config, rates_of, to_toml, to_values, with_values
from lowres.data import Tokenizer, open_tokenizer
from lowres.errors import UserError
from lowres.events import Events
from lowres.exchange.stored import (
    StoredModel,
    StoredWeight,
    TrainedModel,
    open_model,
    require_ids,
    take,
    with_model_of,
)
from lowres.exchange.target import whole
from lowres.model import count_parameters, storage_kinds, unit_specs
from lowres.ranks import say
from lowres.runs import CHECKPOINTS, CONFIG
from lowres.storage import Unit, field_bytes, weight_fields
from lowres.wording import command

CONTEXT = 2048  # data.seq_len of a model that is meant for longer sequences
_SPARE = 1 << 20  # bytes for everything but weights and tokenizer


@dataclass(frozen=True)
class Imported:
    """What was made of a model. nbytes: of its checkpoint. rounding: by how much its matrices differ from
    what was read, as a root mean square relative to theirs, measured on the first rows of each."""

    origin: StoredModel
    out: Path
    config: Config
    tokenizer: Tokenizer
    nbytes: int
    rounding: float

    def lines(self) -> list[str]:
        model, kept = self.config.model, self.config.memory
        change = f"{self.rounding:.2%} (root mean square)" if self.rounding else "nothing"
        again = ("lowres", "train", "CONFIG", "--init-from", self.out, "--run", "DIR")
        return [
            f"{self.origin.path}: {self.origin.about}; {count_parameters(model) / 1e6:,.2f} M parameters in "
            f"{model.n_layers} layers, vocabulary {model.vocab:,}; {self.tokenizer.file_name} with "
            f"{self.tokenizer.vocab_size:,} ids",
            f"{self.out}: {kept.weights} weights, {self.nbytes / 2**30:.3f} GiB; rounding has changed the "
            f"matrices by {change}",
            f"to train from it: {command(*again)}",
        ]


def import_model(path: str | Path, out: Path, overrides: list[str]) -> Imported:
    """Make a run at step 0 in the folder `out` of the model in a folder, see `open_model`.

    overrides: `section.key=value`. Raises UserError, or DoesNotFit if the disk is too small; then nothing is
    left.
    """
    checkpoint.require_outside(out, "RUN")
    origin = open_model(path)
    config, tokenizer = _resolved(origin, out, overrides)
    for note in origin.notes + tokenizer.notes:
        say(f"note: {note}")
    kept = config.memory
    kinds = storage_kinds(unit_specs(config.model), kept.weights, kept.embeddings_kept_in)
    units = _Units(origin, kinds)
    state = State(
        step=0,
        tokens=0,
        data="",
        start=Start(**rates_of(config)),
        config=to_values(config),
        run=secrets.token_hex(8),
    )
    files = {tokenizer.file_name: tokenizer.content}
    with whole(out, units.nbytes + 2 * len(tokenizer.content) + _SPARE) as place:
        place.mkdir()
        for name, content in {CONFIG: to_toml(config).encode(), **files}.items():
            disk.write_whole(place / name, content)
        try:
            target = checkpoint.step_folder(place / CHECKPOINTS, 0)
            nbytes = checkpoint.write(target, units, state, files)
        except NotFinite as error:
            raise UserError(
                f"{origin.path}: {error} has numbers that are too large for {kept.weights}; use "
                "--set memory.weights=fp32"
            ) from None
        made = Imported(origin, out, config, tokenizer, nbytes, units.rounding)
        Events(place).write("imported", run=state.run, step=0, source=str(origin.path), text=made.lines()[1])
    return made


def _resolved(origin: StoredModel, out: Path, overrides: list[str]) -> tuple[Config, Tokenizer]:
    """The config of the run, and its tokenizer."""
    config, tokenizer = config_for(origin, overrides)
    # the copy says its form and the ends of documents itself
    own = str(out.absolute() / tokenizer.file_name)
    return with_values(config, "data", tokenizer=own, tokenizer_form="own", bos=None, eos=None), tokenizer


def config_for(origin: StoredModel, overrides: list[str]) -> tuple[Config, Tokenizer]:
    """A config with which a model can be used, and its tokenizer. Raises UserError."""
    values = overridden({"run": {}, "data": {}, "train": {}}, overrides)
    data, train = values["data"], values["train"]
    trained = origin.config.data.seq_len if isinstance(origin, TrainedModel) else None
    length = data.setdefault("seq_len", trained or min(origin.model.max_positions or CONTEXT, CONTEXT))
    if isinstance(length, int) and length > 0 and RATE_DEFAULTS.batch_tokens % length:
        train.setdefault("batch_tokens", length * -(-RATE_DEFAULTS.batch_tokens // length))
    values["run"]["init_from"] = str(origin.path.absolute())
    config, notes = parse_config(values, "--set")
    for note in notes:
        say(f"note: {note}")
    if config.relora.enabled:
        raise UserError(
            "--set relora.enabled: an imported model has no adapters; set it in the config of a run that "
            "starts from the model"
        )
    config, asked = with_model_of(config, origin), config.data
    given = asked.tokenizer or origin.tokenizer
    if given is None:
        raise UserError(
            f"{origin.path}: has no tokenizer.json and no tokenizer.model; give one with --set "
            "data.tokenizer=PATH"
        )
    tokenizer = open_tokenizer(given, asked.tokenizer_form or "own", asked.bos, asked.eos)
    require_ids(origin, tokenizer)
    return config, tokenizer


class _Units:
    """The units of a model in the number formats of a run: name and tensors, one after another in the same
    memory. kinds: formats by the name of the tensor."""

    def __init__(self, origin: StoredModel, kinds: Mapping[str, str]) -> None:
        self._origin, self._kinds = origin, kinds
        self._specs = unit_specs(origin.model)
        self._sizes = [sum(field_bytes(weight_fields(spec, kinds)).values()) for spec in self._specs]
        self._change = self._size = 0.0  # sums of squares

    @property
    def nbytes(self) -> int:
        return sum(self._sizes)

    @property
    def rounding(self) -> float:
        """See `Imported`."""
        return math.sqrt(self._change / self._size) if self._size else 0.0

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        slab = torch.empty(max(self._sizes), dtype=torch.uint8)
        for spec, size in zip(self._specs, self._sizes, strict=True):
            unit = Unit(spec, self._kinds, slab[:size])
            for tensor, stored in self._origin.weights(spec):
                take(unit, tensor.name, stored)
                if len(tensor.shape) == 2:
                    self._compare(unit, tensor.name, stored)
            yield spec.name, unit.weight_tensors()

    def _compare(self, unit: Unit, name: str, stored: StoredWeight) -> None:
        _, rows = next(iter(stored.rows()))
        kept = unit.weights[name].rows(torch.arange(len(rows)), torch.float32)
        self._change += float(kept.sub_(rows).square_().sum())
        self._size += float(rows.square_().sum())
