"""The folder of prepared data: what it was made from, what is in it, and which process may write to it.

    tokenizer.model      the tokenizer, trained or copied
    val_00000.bin        the held-out documents
    train_00000.bin ...  all other documents in the order of the source, cut into shards
    data.json            everything about them; written last, so the folder is complete if it exists
    progress.json        exists until then: what is done and where to continue

A *manifest* is the content of data.json or progress.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowres.data.shards import write_atomically, write_shard
from lowres.data.sources import fingerprint
from lowres.data.tokenizer import Tokenizer, check_enough_pieces, check_vocab_size
from lowres.errors import UserError

FORMAT = 1
SHARD_TOKENS = 1 << 26
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Everything that determines the content of a prepared folder.

    `exact_vocab`: if true, an impossible vocab_size is an error; if false, it is lowered, with a note.
    """

    source: str
    tokenizer: str | None = None
    vocab_size: int | None = None
    exact_vocab: bool = True
    max_tokens: int | None = None
    shard_tokens: int = SHARD_TOKENS
    hold_out: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            check_vocab_size(self.vocab_size)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments as recorded in the folder, to recognise the same job when it runs again."""
        return {
            "source": self.source,
            "source_fingerprint": fingerprint(self.source),
            "tokenizer": Tokenizer(self.tokenizer).fingerprint if self.tokenizer else None,
            "vocab_size": None if self.tokenizer else self.vocab_size,
            "max_tokens": self.max_tokens,
            "shard_tokens": self.shard_tokens,
            "hold_out": self.hold_out,
        }

    def content_hash(self) -> str:
        """8 hex digits that differ whenever the prepared data differ."""
        arguments = {key: value for key, value in self.arguments.items() if key != "source"}
        return hash_of(FORMAT, arguments)[:8]


def read_manifest(folder: Path, name: str) -> Manifest:
    """data.json or progress.json of a prepared folder."""
    try:
        manifest = json.loads((folder / name).read_text("utf-8"))
        version, _ = manifest["format"], manifest["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / name}: damaged; remove the folder and prepare the data again") from None
    if version != FORMAT:
        raise UserError(
            f"{folder / name}: format {version}, but this lowres reads {FORMAT}; "
            "remove the folder and prepare the data again"
        )
    return dict(manifest)


def write_manifest(folder: Path, name: str, content: Manifest) -> None:
    write_atomically(folder / name, json.dumps(content, indent=1).encode())


def find_manifest(job: Job, out: Path) -> Manifest | None:
    """The manifest of this job in the folder; None if there is none.

    Raises UserError if the folder holds anything else.
    """
    asked = job.arguments
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out}: this is a file; give a folder for the prepared data")
    name = next((name for name in ("data.json", "progress.json") if (out / name).exists()), None)
    if name is None:
        if any(not file.name.endswith(".tmp") for file in out.iterdir()):
            raise UserError(f"{out}: not empty and not a folder of prepared data; give another folder")
        return None
    state = read_manifest(out, name)
    recorded = state["arguments"]
    if recorded["source_fingerprint"] == asked["source_fingerprint"]:
        recorded["source"] = asked["source"]  # the same files by another path
    elif recorded["source"] == asked["source"]:
        raise UserError(
            f"{out}: the files of {job.source} have changed since then; give another folder or remove it"
        )
    for key, value in asked.items():
        if value != recorded[key]:
            raise UserError(
                f"{out}: was prepared with {key} {_shown(recorded[key])}, not {_shown(value)}; "
                "give another folder or remove it"
            )
    if asked["vocab_size"] and job.exact_vocab:
        # an earlier job with exact_vocab=False may have used fewer pieces
        check_enough_pieces(state.get("vocab_size", asked["vocab_size"]), asked["vocab_size"])
    return state


def _shown(value: Any) -> str:
    return "left to default" if value is None else str(value)


def is_complete(state: Manifest) -> bool:
    return "fingerprint" in state


@contextmanager
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


def store_shard(out: Path, name: str, tokens: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a shard; returns its entry in the manifest."""
    checksum = write_shard(out / name, tokens, tokenizer.vocab_size)
    # in parts, because bincount makes a copy of eight bytes per token
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start : start + (1 << 20)], minlength=tokenizer.vocab_size)
    return {
        "file": name,
        "tokens": len(tokens),
        "documents": int(counts[tokenizer.bos_id]),
        "bytes": int(counts @ tokenizer.token_bytes().numpy()),
        "crc32": checksum,
    }


def finish(out: Path, state: Manifest) -> None:
    """Replace progress.json by data.json."""
    data = {key: value for key, value in state.items() if key not in ("held_out", "next", "characters")}
    for part in ("train", "val"):
        for unit in ("tokens", "documents", "bytes"):
            data[f"{part}_{unit}"] = sum(shard[unit] for shard in state[part])
    data["fingerprint"] = hash_of(state["tokenizer"], [s["crc32"] for s in state["train"] + state["val"]])
    write_manifest(out, "data.json", data)
    (out / "progress.json").unlink()


def hash_of(*parts: Any) -> str:
    """32 hex digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
