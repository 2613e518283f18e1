"""The folder of prepared data: what it was made from, what is in it, and which process may write to it.

tokenizer.model      the tokenizer, trained or copied; or tokenizer.json
val_00000.bin        the held-out documents
train_00000.bin ...  all other documents in the order of the source, cut into shards
data.json            everything about them; written last, so the folder is complete if it exists
progress.json        exists until then: what is done and where to continue
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowres.data.manifest import (
    DATA,
    FORMAT,
    PROGRESS,
    Arguments,
    Complete,
    Entry,
    Manifest,
    Progress,
    Started,
    found_in,
    hash_of,
    read_complete,
    read_progress,
    totals,
    write,
)
from lowres.data.shards import write_shard
from lowres.data.tokenizer import Tokenizer, check_enough_pieces, check_vocab_size
from lowres.errors import UserError
from lowres.text import Source, fingerprint

SHARD_TOKENS = 1 << 26
# what a killed preparation leaves of a file that it was writing
_LEFT_OVER = (".unfinished", ".tmp")


@dataclass(frozen=True)
class Job:
    """Everything that determines the content of a prepared folder.

    `exact_vocab`: if true, an impossible vocab_size is an error; if false, it is lowered, with a note.
    """

    source: Source
    tokenizer: Tokenizer | None = None
    vocab_size: int | None = None
    exact_vocab: bool = True
    max_tokens: int | None = None
    shard_tokens: int = SHARD_TOKENS
    hold_out: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            check_vocab_size(self.vocab_size)

    @cached_property
    def arguments(self) -> Arguments:
        """The arguments as recorded in the folder, to recognise the same job when it runs again."""
        return Arguments(
            source=self.source.name,
            source_fingerprint=fingerprint(self.source),
            tokenizer=self.tokenizer.fingerprint if self.tokenizer else None,
            vocab_size=None if self.tokenizer else self.vocab_size,
            max_tokens=self.max_tokens,
            shard_tokens=self.shard_tokens,
            hold_out=self.hold_out,
        )

    def content_hash(self) -> str:
        """8 hex digits that differ whenever the prepared data differ."""
        return hash_of(FORMAT, self.arguments.model_dump(exclude={"source"}))[:8]


def find_manifest(job: Job, out: Path) -> Started | Progress | Complete | None:
    """The manifest of this job in the folder; None if there is none.

    Raises UserError if the folder holds anything else.
    """
    asked = job.arguments
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out}: this is a file; give a folder for the prepared data")
    name = found_in(out)
    if name is None:
        if any(not file.name.endswith(_LEFT_OVER) for file in out.iterdir()):
            raise UserError(f"{out}: not empty and not a folder of prepared data; give another folder")
        return None
    state = read_complete(out) if name == DATA else read_progress(out)
    recorded = state.arguments
    if recorded.source_fingerprint == asked.source_fingerprint:
        # maybe the same files by another path
        recorded = recorded.model_copy(update={"source": asked.source})
    elif recorded.source == asked.source:
        raise UserError(
            f"{out}: the files of {job.source.name} have changed since then; give another folder or remove it"
        )
    for key, value in asked:
        if value != getattr(recorded, key):
            raise UserError(
                f"{out}: was prepared with {key} {_shown(getattr(recorded, key))}, not {_shown(value)}; "
                "give another folder or remove it"
            )
    if asked.vocab_size and job.exact_vocab and isinstance(state, Progress | Complete):
        # an earlier job with exact_vocab=False may have used fewer pieces
        check_enough_pieces(state.vocab_size, asked.vocab_size)
    return state.model_copy(update={"arguments": recorded})


def _shown(value: Any) -> str:
    return "left to default" if value is None else str(value)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder. The lock ends when the process ends, even if it is killed."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is preparing it; wait or give another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def store_shard(out: Path, name: str, tokens: np.ndarray, tokenizer: Tokenizer) -> Entry:
    """Write a shard; returns its entry in the manifest."""
    checksum = write_shard(out / name, tokens, tokenizer.vocab_size)
    # in parts, because bincount makes a copy of eight bytes per token
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start : start + (1 << 20)], minlength=tokenizer.vocab_size)
    return Entry(
        file=name,
        tokens=len(tokens),
        documents=int(counts[tokenizer.delimiter]),
        bytes=int(counts @ tokenizer.token_bytes().numpy()),
        crc32=checksum,
    )


def finish(out: Path, state: Progress) -> None:
    """Replace progress.json by data.json."""
    common = {key: getattr(state, key) for key in Manifest.model_fields}
    write(out / DATA, Complete(**common, **totals(state)))
    forget_progress(out)


def forget_progress(out: Path) -> None:
    """Remove what data.json has replaced, unless the folder may only be read."""
    with contextlib.suppress(OSError):
        (out / PROGRESS).unlink()
