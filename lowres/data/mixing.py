"""From the configuration to the data of a run: one source or a mixture of several, and validation texts.

All parts of a mixture have one tokenizer: data.tokenizer; or that of the parts that are tokens already; or
one that is trained on text of all parts in the proportion of their weights. It is kept in data.cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lowres.config import DataConfig, MixturePart, ObjectiveConfig
from lowres.data import opening
from lowres.data.base import Data
from lowres.data.chat.opening import open_chats
from lowres.data.hashes import common
from lowres.data.manifest import hash_of
from lowres.data.mixture import MixedData, Part
from lowres.data.named import open_texts
from lowres.data.opening import (
    given_tokenizer,
    holds_ids,
    named,
    open_source,
    own_tokenizer,
    prepared_again,
    refuse_ends,
    source_of,
)
from lowres.data.prepare import default_vocab
from lowres.data.shards import write_file
from lowres.data.survey import LOOKAHEAD_CHARS, SAMPLE_CHARS, Survey, sample
from lowres.data.tokenizer import Tokenizer, train
from lowres.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lowres.data.validation import check_overlap
from lowres.errors import UserError
from lowres.text import fingerprint, is_stream
from lowres.text.source import TEXT


def open_data(
    config: DataConfig,
    vocab_size: int | None,
    seed: int,
    progress: bool,
    objective: ObjectiveConfig | None = None,
) -> Data:
    """The data that the config names, prepared first if needed. objective: of the run; default: pretraining.

    `vocab_size`: model.vocab_size, None if the config does not set it. A tokenizer that is trained has at
    most this many pieces; an existing tokenizer with more raises UserError.
    """
    data = _open(config, vocab_size, seed, progress, objective)
    try:
        data.texts = open_texts(config, data, progress, objective)
    except BaseException:
        data.close()
        raise
    return data


def _open(
    config: DataConfig, vocab_size: int | None, seed: int, progress: bool, objective: ObjectiveConfig | None
) -> Data:
    """The same without the validation texts that have names."""
    if objective is not None and objective.form != TEXT:
        return open_chats(config, objective, vocab_size, seed, progress)
    if not config.mixture:
        return open_source(config, vocab_size, seed, progress)
    given, is_trained = _with_shared_tokenizer(config, vocab_size, progress)
    parts: list[Part] = []
    try:
        for part, of_part in _parts(given):
            with named(f"data.mixture.{part.name}"):
                data = open_source(of_part, vocab_size, seed, progress, of_validation=config)
            parts.append(Part(part.name, data, part.weight, part.epochs))
        mixed = MixedData(parts, seed, own_validation=config.val_source is None)
        if config.val_source is None:
            mixed.notes += _overlaps(parts, config.max_overlap)
    except BaseException:
        for one in parts:
            one.data.close()
        raise
    if is_trained and vocab_size and mixed.vocab_size < (config.vocab_size or vocab_size):
        mixed.notes.append(
            f"vocab_size: the text gives only {mixed.vocab_size} pieces instead of {vocab_size}"
        )
    return mixed


def with_tokenizer(config: DataConfig, tokenizer: Path, instead: bool = False) -> DataConfig:
    """The config with the tokenizer of a run, unless it says which, or can only mean that one: a mixture that
    has changed would train another. instead: also in the place of the one that it names, of which the run has
    a copy."""
    if instead if config.tokenizer is not None else config.mixture:
        return _with(config, tokenizer)
    return config


def _with(config: DataConfig, tokenizer: Path) -> DataConfig:
    """The config with a tokenizer as it was stored."""
    own = {"tokenizer": str(tokenizer), "tokenizer_form": "own", "bos": None, "eos": None, "vocab_size": None}
    return config.model_copy(update=own)


def cache_bytes(config: DataConfig, vocab_size: int | None, tokens: int) -> int:
    """Bytes that a run of `tokens` training tokens in all, from its first step on, will still add to
    config.cache at most; see `opening.cache_bytes`."""
    if not config.mixture:
        return opening.cache_bytes(config, vocab_size, tokens)
    given, _ = _with_shared_tokenizer(config, vocab_size, progress=False)
    found = 0
    for part, of_part in _parts(given):
        # the parts with a limit may leave their weight to the others
        lasting = sum(other.weight for other in config.mixture if other.epochs is None or other is part)
        if part.weight > 0 and is_stream(part.source):
            most = math.ceil(tokens * part.weight / lasting)
            found += opening.cache_bytes(of_part, vocab_size, most)
    return found


def _parts(config: DataConfig) -> Iterator[tuple[MixturePart, DataConfig]]:
    """The parts of a mixture, each with the config of its own source."""
    for number, part in enumerate(config.mixture):
        yield part, config.of_part(number)


def _overlaps(parts: list[Part], allowed: float) -> list[str]:
    """How many validation documents of a part are in the training text of another, so far as that is known.
    Raises UserError if they are too many."""
    notes = []
    for part in parts:
        own = np.concatenate([np.empty(0, np.uint64), *part.data.hashes(validation=True)])
        for other in parts:
            if other is not part and other.weight > 0:
                what = f"data.mixture.{part.name} beside {other.name}"
                found = common(own, other.data.hashes())
                notes += check_overlap(found, len(np.unique(own)), allowed, what)
    return notes


def _with_shared_tokenizer(
    config: DataConfig, vocab_size: int | None, progress: bool
) -> tuple[DataConfig, bool]:
    """The config with the tokenizer of all parts, and whether that was trained on them. Raises UserError if a
    part is tokens of another one."""
    found: dict[str, Tokenizer] = {}
    ids = list[str]()
    for part, of_part in _parts(config):
        with named(f"data.mixture.{part.name}"):
            if (own := own_tokenizer(part.source)) is not None:
                found[part.name] = own
            elif holds_ids(of_part):
                ids.append(part.name)
    if ids and not config.tokenizer:
        if len(ids) == len(config.mixture):
            return config, False  # the ids are the vocabulary, which has to be the same
        raise UserError(
            f"data.mixture.{ids[0]}: holds token ids, and other parts do not; set data.tokenizer to what "
            "they were made with"
        )
    if given := given_tokenizer(config):
        whose, wanted, with_it = "data.tokenizer", given, config
    elif found:
        whose, wanted = next(iter(found.items()))
        with_it = _with(config, wanted.path)
    else:
        refuse_ends(config)
        return _with(config, _trained(config, vocab_size, progress)), True
    for name, own in found.items():
        if own.fingerprint != wanted.fingerprint:
            raise UserError(
                f"data.mixture.{name}: {own.path.parent} was prepared with another tokenizer than {whose}; "
                + prepared_again(own.path.parent, wanted, f"data.mixture.{name}.source")
            )
    return with_it, False


def _trained(config: DataConfig, vocab_size: int | None, progress: bool) -> Path:
    """A tokenizer that is trained on text of the parts, in the proportion of their weights."""
    total = sum(part.weight for part in config.mixture)
    shares, sources = [], []
    for number, part in enumerate(config.mixture):
        with named(f"data.mixture.{part.name}"):
            sources.append(source_of(config.of_part(number)))
            shares.append((fingerprint(sources[-1]), part.weight / total))
    key = hash_of(sorted(shares), config.vocab_size, vocab_size)[:8]
    path = Path(config.cache).expanduser() / f"mixture-{key}" / SentencePieceTokenizer.file_name
    if path.exists():
        return path
    blocks, characters, complete = list[str](), 0, True
    for part, source, (_, share) in zip(config.mixture, sources, shares, strict=True):
        if share > 0:
            with named(f"data.mixture.{part.name}"):
                found = sample(source, int(SAMPLE_CHARS * share), int(LOOKAHEAD_CHARS * share), progress)
            blocks, characters, complete = blocks + found[0], characters + found[1], complete and found[2]
    seen = Survey(characters, complete, blocks)
    asked = config.vocab_size or vocab_size or default_vocab(seen)
    model, _ = train(blocks, asked, exact=config.vocab_size is not None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created ({error.strerror})") from None
    write_file(path, model)
    return path
