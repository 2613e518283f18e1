"""The records of a folder of prepared data. Nothing in them is used before it has been checked.

data.json       `Complete`: written last, so the folder is complete if it exists
progress.json   exists until then: `Started`, which marks the folder as ours, then `Progress`
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, PlainValidator, model_validator

from lowres.data.shards import AGAIN, shard_name, write_file
from lowres.data.tokenizer import Tokenizer
from lowres.disk import DiskError, read_whole, what_failed
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, parse, seal, unseal

FORMAT = 1
DATA, PROGRESS, TOKENIZER = "data.json", "progress.json", "tokenizer.model"


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("should be a string")
    return value


# a path may have bytes that are not UTF-8, which pydantic refuses in a string
Text = Annotated[str, PlainValidator(_is_text)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Number = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(ge=1, lt=1 << 62)]


class Arguments(Record):
    """What determines the content of a prepared folder; see `folder.Job`."""

    source: Text
    source_fingerprint: Text
    tokenizer: Digest | None
    vocab_size: Positive | None
    max_tokens: Number | None
    shard_tokens: Positive
    hold_out: bool


class Entry(Record):
    """A shard."""

    file: str
    tokens: Number
    documents: Number
    bytes: Number
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]


class HeldOutRecord(Record):
    """See `survey.HeldOut`."""

    hashes: list[Digest]
    tail_row: Number | None
    tail_start: Number


class Position(Record):
    """The first token that is not stored yet: token `offset` of the document at row `row`. The row is in the
    source's file number `file`, which begins at `file_row`."""

    row: Number
    offset: Number
    file: Number = 0
    file_row: Number = 0


class Started(Record):
    format: int
    arguments: Arguments


class Manifest(Started):
    """What progress.json and data.json have in common once the tokenizer and the validation data exist.
    `commit`: of the source, if it is a data set on the hub."""

    tokenizer: Digest
    vocab_size: Positive
    notes: list[str]
    val: list[Entry]
    train: list[Entry]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Manifest:
        for part, entries in (("val", self.val), ("train", self.train)):
            if [entry.file for entry in entries] != [shard_name(part, i) for i in range(len(entries))]:
                raise ValueError(f"{part}: the files are not numbered")
        return self


class Progress(Manifest):
    """`characters`: in the source, None if it is a stream that was not read to its end."""

    characters: Number | None
    held_out: HeldOutRecord
    next: Position


class Complete(Manifest):
    train_tokens: Number
    train_documents: Number
    train_bytes: Number
    val_tokens: Number
    val_documents: Number
    val_bytes: Number
    fingerprint: Digest

    @model_validator(mode="after")
    def _check_sums(self) -> Complete:
        found = totals(self)
        for key, value in found.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}: does not follow from the shards")
        return self


M = TypeVar("M", bound=Record)


def totals(manifest: Manifest) -> dict[str, Any]:
    """The keys of `Complete` that follow from the shards."""
    found: dict[str, Any] = {
        f"{part}_{unit}": sum(getattr(entry, unit) for entry in entries)
        for part, entries in (("train", manifest.train), ("val", manifest.val))
        for unit in ("tokens", "documents", "bytes")
    }
    checksums = [entry.crc32 for entry in manifest.train + manifest.val]
    return found | {"fingerprint": hash_of(manifest.tokenizer, checksums)}


def hash_of(*parts: Any) -> str:
    """32 hex digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write(path: Path, record: Record) -> None:
    write_file(path, seal(record.model_dump()))


def found_in(folder: Path) -> str | None:
    """DATA or PROGRESS, whichever a folder of prepared data has; None if the folder is something else, even
    if it has a file of this name. Raises UserError if a prepared folder has lost both."""
    for name in (DATA, PROGRESS):
        if os.path.lexists(folder / name) and (_has_shards(folder) or _is_ours(folder / name)):
            return name
    if _has_shards(folder):
        raise UserError(f"{folder / DATA}: missing; put it back, or {AGAIN}")
    return None


def read_complete(folder: Path) -> Complete:
    """data.json. Raises UserError."""
    return _read(folder / DATA, lambda content: Complete)


def read_progress(folder: Path) -> Started | Progress:
    """progress.json. Raises UserError."""
    return _read(folder / PROGRESS, lambda content: Progress if "tokenizer" in content else Started)


def open_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared folder. Raises UserError if it is not the recorded one."""
    tokenizer = Tokenizer(folder / TOKENIZER, manifest.tokenizer, remedy=AGAIN)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise UserError(f"{folder}: damaged (vocab_size is not that of its tokenizer); {AGAIN}")
    return tokenizer


def _read(path: Path, model_of: Callable[[dict[str, Any]], type[M]]) -> M:
    content: dict[str, Any] = {}
    try:
        text = _text_of(path)
        content = parse(text)
        version = content.get("format")
        if isinstance(version, int) and version != FORMAT and _has_our_keys(content):
            raise UserError(f"{path}: format {version}, but this lowres reads {FORMAT}; {AGAIN}")
        # older versions wrote no seal
        return unseal(text, model_of(content), sealed=False)
    except Damaged as error:
        if _has_our_keys(content) or _has_shards(path.parent):
            raise UserError(f"{path}: damaged ({error}); {AGAIN}") from None
        raise UserError(
            f"{path}: not a record of prepared data ({error}); give a folder made by `lowres data prepare`"
        ) from None


def _text_of(path: Path) -> bytes:
    """Raises Damaged if this is not a file, and DiskError if it cannot be read."""
    try:
        return read_whole(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a folder or a pipe
            raise Damaged(what_failed(error)) from None
        raise DiskError(path, error, "read") from None


def _is_ours(path: Path) -> bool:
    try:
        return _has_our_keys(parse(_text_of(path)))
    except Damaged:
        return False


def _has_our_keys(content: dict[str, Any]) -> bool:
    return content.keys() >= {"format", "arguments"}


def _has_shards(folder: Path) -> bool:
    """Whether a folder has a tokenizer and a first shard, so that it is ours whatever its record says."""
    first = [folder / shard_name(part, 0) for part in ("val", "train")]
    return (folder / TOKENIZER).exists() and any(path.exists() for path in first)
