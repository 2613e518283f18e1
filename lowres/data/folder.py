"""The folder of prepared data: what it was made from, what is in it, and which process may write to it.

tokenizer.model      the tokenizer, trained or copied; or tokenizer.json
val_00000.bin        the held-out documents
train_00000.bin ...  all other documents in the order of the source, cut into shards
*.hashes             beside each of them, the hashes of the documents that begin in it
data.json            everything about them; written last, so the folder is complete if it exists
progress.json        exists until then: what is done and where to continue
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowres.data.chat.encoder import ChatEncoder
from lowres.data.encoders import Encoder, TextEncoder
from lowres.data.hashes import write_hashes
from lowres.data.manifest import (
    DATA,
    FORMAT,
    PROGRESS,
    Arguments,
    Complete,
    Dropped,
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
from lowres.text import TRAIN, Source, fingerprint
from lowres.text.source import PAIRS
from lowres.wording import counted

# a kill loses at most so many, 10 to 30 seconds of work
SHARD_TOKENS = 1 << 23
# what shards are for, in notes
OF_TRAINING, OF_VALIDATION = " of the training data", " of the validation data"
LOCK = "prepare.lock"
# what a killed preparation leaves of a file that it was writing
_LEFT_OVER = (".unfinished", ".tmp", LOCK)


@dataclass(frozen=True)
class Job:
    """Everything that determines the content of a prepared folder.

    `exact_vocab`: if true, an impossible vocab_size is an error; if false, it is lowered, with a note.
    `hold_out`: whether there are validation data, from `part` of the source or its own validation split.
    `max_overlap`: only checked; the largest share of that split which may also be in the training text.
    `chats`: how they are encoded, with `tokenizer`; None for text.
    """

    source: Source
    tokenizer: Tokenizer | None = None
    vocab_size: int | None = None
    exact_vocab: bool = True
    max_tokens: int | None = None
    shard_tokens: int = SHARD_TOKENS
    hold_out: bool = True
    part: str = TRAIN
    drop_duplicates: bool = False
    max_overlap: float = 1.0
    chats: ChatEncoder | None = None

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.tokenizer is None:
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
            part=self.part,
            drop_duplicates=self.drop_duplicates,
            chats=self.chats.arguments if self.chats else None,
        )

    def encoder(self, tokenizer: Tokenizer) -> Encoder:
        """How the documents are encoded. tokenizer: of the folder."""
        return self.chats or TextEncoder(tokenizer)

    def content_hash(self) -> str:
        """8 hex digits that differ whenever the prepared data differ."""
        return hash_of(FORMAT, self.arguments.determining())[:8]


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
        # the size of a shard is no choice of the user: it goes on as it began
        if value != getattr(recorded, key) and key != "shard_tokens":
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


def store_shard(
    out: Path,
    name: str,
    words: np.ndarray,
    hashes: Sequence[int],
    tokenizer: Tokenizer,
    flag_bits: int = 0,
) -> Entry:
    """Write a shard and the content hashes of the documents that begin in it; returns its entry in the
    manifest. flag_bits: see `encoders`."""
    hashes_checksum = write_hashes(out, name, hashes)
    checksum = write_shard(out / name, words, tokenizer.vocab_size << flag_bits)
    # in parts, because bincount makes a copy of eight bytes per token
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(words), 1 << 20):
        ids = words[start : start + (1 << 20)] >> flag_bits
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
    return Entry(
        file=name,
        tokens=len(words),
        documents=len(hashes),
        bytes=int(counts @ tokenizer.token_bytes().numpy()),
        crc32=checksum,
        hashes=hashes_checksum,
    )


def finish(out: Path, state: Progress) -> None:
    """Replace progress.json by data.json."""
    common = {key: getattr(state, key) for key in Manifest.model_fields}
    held_out = state.held_out
    # the documents themselves are no copies
    originals = 0 if held_out.own_split else len(held_out.hashes) - len(held_out.ends)
    left_out = {
        "copies of validation documents": max(0, state.dropped.held_out - originals),
        "exact copies of earlier documents": state.dropped.duplicates,
    }
    found = [f"left out{OF_TRAINING}: {count:,} {what}" for what, count in left_out.items() if count]
    common["notes"] = state.notes + found + chat_notes(state.arguments, state.dropped, OF_TRAINING)
    write(out / DATA, Complete(**common, **totals(state)))
    forget_progress(out)


def left_out_notes(manifest: Manifest, of: str = OF_TRAINING, instead: str = "") -> list[str]:
    """What of the source is not in the shards. of: which of them; instead: what to call them."""
    return [note.replace(of, instead) for note in manifest.notes if of in note]


def chat_notes(arguments: Arguments, dropped: Dropped, of: str) -> list[str]:
    """What of the chats is not in the shards, and why. of: what these are for."""
    chats, notes = arguments.chats, []
    if chats is None:
        return []
    if dropped.bad:
        notes.append(f"left out{of}: {counted(dropped.bad, 'bad row')}; the first is {dropped.first_bad}")
    if dropped.untrained:
        nothing = f"without a token to train on in their first {chats.seq_len:,} tokens"
        notes.append(f"left out{of}: {dropped.untrained:,} {chats.form} {nothing}")
    if dropped.shortened:
        notes.append(
            f"cut at data.seq_len = {chats.seq_len:,}: {dropped.shortened:,} "
            f"{'answers' if chats.form == PAIRS else 'chats'}{of}, by {dropped.cut_off:,} tokens"
        )
    return notes


def forget_progress(out: Path) -> None:
    """Remove what data.json has replaced, and the lock of a process that was killed, unless the folder may
    only be read."""
    for name in (PROGRESS, LOCK):
        with contextlib.suppress(OSError):
            (out / name).unlink()
