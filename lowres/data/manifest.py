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

from lowres.data.shards import AGAIN, is_shard, shard_name, write_file
from lowres.data.tokenizer import Tokenizer, find_tokenizer, open_tokenizer
from lowres.disk import DiskError, read_whole, what_failed
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, parse, seal, unseal
from lowres.text import TRAIN

FORMAT = 1
DATA, PROGRESS = "data.json", "progress.json"


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("should be a string")
    return value


# a path may have bytes that are not UTF-8, which pydantic refuses in a string
Text = Annotated[str, PlainValidator(_is_text)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
# a content hash; older versions wrote twice as many digits
Hash = Annotated[str, Field(pattern=r"^([0-9a-f]{16}){1,2}$")]
Checksum = Annotated[int, Field(ge=0, lt=1 << 32)]
Number = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(ge=1, lt=1 << 62)]


class Chats(Record):
    """What determines the words of chats; see `chat.encoder`. template: its fingerprint. The rest are keys of
    the config."""

    form: Text
    template: Text
    train_on: Text
    seq_len: Positive
    bad_rows: Text


class Arguments(Record):
    """What determines the content of a prepared folder; see `folder.Job`. chats: None for text."""

    source: Text
    source_fingerprint: Text
    tokenizer: Digest | None
    vocab_size: Positive | None
    max_tokens: Number | None
    shard_tokens: Positive
    hold_out: bool
    part: Text = TRAIN
    drop_duplicates: bool = False
    chats: Chats | None = None

    def determining(self) -> dict[str, Any]:
        """Without the name of the source, and without what has its default, so that a key which is new
        changes no hash."""
        return self.model_dump(exclude={"source"}, exclude_defaults=True)


class Entry(Record):
    """A shard. hashes: the checksum of the file beside it (`hashes`); None in what older versions wrote."""

    file: str
    tokens: Number
    documents: Number
    bytes: Number
    crc32: Checksum
    hashes: Checksum | None = None


class End(Record):
    row: Number
    start: Number


class HeldOutRecord(Record):
    """See `validation.HeldOut`. own_split: whether they are documents of the source's own validation split.
    tail_row, tail_start: the only end, as older versions wrote it."""

    hashes: list[Hash]
    own_split: bool = False
    ends: list[End] = Field(default_factory=list)
    tail_row: Number | None = None
    tail_start: Number = 0


class Dropped(Record):
    """Documents of the source that are not trained on. held_out: validation documents and copies of them.
    duplicates: copies of earlier training documents. bad: rows that are no chats or pairs; first_bad: where
    the first is, and why. untrained: chats without a token to train on. shortened: examples that are cut, by
    `cut_off` tokens in all."""

    held_out: Number = 0
    duplicates: Number = 0
    bad: Number = 0
    first_bad: Text = ""
    untrained: Number = 0
    shortened: Number = 0
    cut_off: Number = 0

    def plus(self, other: Dropped) -> Dropped:
        counts = ("held_out", "duplicates", "bad", "untrained", "shortened", "cut_off")
        found = {key: getattr(self, key) + getattr(other, key) for key in counts}
        return Dropped(first_bad=self.first_bad or other.first_bad, **found)


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
    """`characters`: in the source, None if it was not read to its end. `skipped`: its damaged files, with
    what is wrong. `dropped`: before `next`."""

    characters: Number | None
    held_out: HeldOutRecord
    next: Position
    skipped: dict[Text, Text] = Field(default_factory=dict)
    dropped: Dropped = Dropped()


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


def recorded_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared folder. Raises UserError if it is not the recorded one."""
    path = find_tokenizer(folder) or folder / "tokenizer.model"
    tokenizer = open_tokenizer(path, form="own", fingerprint=manifest.tokenizer, remedy=AGAIN)
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
    arguments = content.get("arguments")
    return "format" in content and isinstance(arguments, dict) and "source_fingerprint" in arguments


def _has_shards(folder: Path) -> bool:
    """Whether a folder has a first shard, so that it is ours whatever its record says."""
    return any(is_shard(folder / shard_name(part, 0)) for part in ("val", "train"))
