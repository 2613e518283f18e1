"""Validation texts with names: [[data.validation]]. Each is opened as data.val_source is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowres.config import DataConfig, ObjectiveConfig
from lowres.data.base import Data, NamedText
from lowres.data.batches import consecutive_windows, count_targets
from lowres.data.chat.chat_data import all_packed
from lowres.data.chat.opening import chat_encoder
from lowres.data.chat.template import open_template
from lowres.data.manifest import hash_of, read_complete
from lowres.data.opening import named, source_of, text_notes, token_listing, validation_folder
from lowres.data.stored import Stored
from lowres.data.tokenised import Part, ids_of
from lowres.errors import UserError
from lowres.text import TRAIN, VALIDATION, Listing
from lowres.text.source import TEXT, File


def open_texts(
    config: DataConfig, data: Data, progress: bool, objective: ObjectiveConfig | None
) -> list[NamedText]:
    """The texts of the config, prepared first if needed; adds notes on them to those of the data. data: what
    is trained on. objective: see `mixing.open_data`. Raises UserError."""
    found = []
    for number, text in enumerate(config.validation):
        key, own = f"data.validation.{text.name}", config.of_text(number)
        with named(key):
            if objective is not None and objective.form != TEXT:
                found.append(_chats(text.name, own, data, objective, progress))
            elif (listing := token_listing(source_of(own, own.val_source))) is not None:
                found.append(_ids(text.name, own, listing, data, _files_of_ids(config)))
            else:
                found.append(_text(text.name, own, data, progress))
    return found


def _key(name: str) -> str:
    return f"data.validation.{name}.source"


def _text(name: str, config: DataConfig, data: Data, progress: bool) -> NamedText:
    if not data.tokenizer.has_text:
        raise UserError(
            f"{config.val_source} is text, and the training data are token ids; set data.tokenizer to what "
            "they were made with"
        )
    folder = validation_folder(config, data.tokenizer, progress, key=_key(name))
    assert folder is not None
    manifest = read_complete(folder)
    stored = Stored(folder, data.vocab_size, lambda: manifest.train + manifest.val)
    stored.verify_if_small()
    if sum(stored.lengths()) < 2:
        raise UserError(f"{config.val_source} has no text to evaluate; give another")
    data.notes += text_notes(folder, _key(name), data.hashes(), config.max_overlap)
    return NamedText(name, stored.fingerprint(), partial(_windows, stored, data.seq_len))


def _windows(stored: Stored | Part, seq_len: int, max_tokens: int) -> Tensor:
    """See `Data.validation`."""
    tokens = torch.from_numpy(stored.head(max_tokens + 1 if max_tokens else None))
    return consecutive_windows(tokens, seq_len)


def _chats(
    name: str, config: DataConfig, data: Data, objective: ObjectiveConfig, progress: bool
) -> NamedText:
    tokenizer = data.tokenizer
    chats = chat_encoder(config, objective, tokenizer, open_template(config.chat_template, tokenizer))
    folder = validation_folder(config, tokenizer, progress, chats, _key(name))
    assert folder is not None
    manifest, packed = read_complete(folder), partial(all_packed, folder, data.seq_len)
    answers = count_targets(packed().windows)
    data.notes += text_notes(folder, _key(name), data.hashes(), config.max_overlap, answers)
    fingerprint = hash_of([entry.crc32 for entry in manifest.train + manifest.val])
    return NamedText(name, fingerprint, lambda max_tokens: packed(max_tokens).windows)


def _ids(name: str, config: DataConfig, listing: Listing, data: Data, trained: set[str]) -> NamedText:
    """Of a source of token ids, which have no text that could be compared: its files are none of those that
    are trained on."""
    if not trained:
        raise UserError(f"{config.val_source} holds token ids, and the training data are text; give text")
    part = ids_of(listing, data.tokenizer, Path(config.cache).expanduser())
    both = sorted(_real(listing.part(VALIDATION) or listing.part(TRAIN)) & trained)
    if both:
        raise UserError(f"{both[0]} is trained on; leave it out there with data.exclude")
    return NamedText(name, part.fingerprint(), partial(_windows, part, data.seq_len))


def _files_of_ids(config: DataConfig) -> set[str]:
    """The real paths of the files of ids that are trained on."""
    parts = [config.of_part(number) for number in range(len(config.mixture))] or [config]
    listings = filter(None, (token_listing(source_of(part)) for part in parts))
    return set().union(*(_real(listing.part(TRAIN)) for listing in listings))


def _real(files: Iterable[File]) -> set[str]:
    return {os.path.realpath(file.path) for file in files}
