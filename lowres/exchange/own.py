"""The tokenizer of a run beside the files that other programs read of it.

An exported folder has in its folder OWN the file of the run's tokenizer, so that a run that begins with the
folder has the same tokenizer to the byte. It counts as long as the files that other programs read are those
of the export; with others it would give other ids than they do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from lowres import disk
from lowres.data import Tokenizer, find_tokenizer
from lowres.ranks import say
from lowres.sealed import Damaged, Record, seal, unseal

OWN = "lowres"
RECORD = "tokenizer_files.json"


class _Record(Record):
    """files: BLAKE2b of each by name."""

    files: dict[str, str]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, files: Mapping[str, bytes]) -> None:
    """Write the own tokenizer of a folder. files: what other programs read. Raises OSError."""
    record = {name: _digest(content) for name, content in files.items()}
    disk.write_whole(folder / OWN / RECORD, seal({"files": record}))
    disk.write_whole(folder / OWN / tokenizer.file_name, tokenizer.content)


def own_tokenizer(folder: Path) -> Path | None:
    """The file of the own tokenizer of a folder; None if it has none that counts."""
    found = find_tokenizer(folder / OWN)
    if found is None:
        return None
    try:
        record = unseal(disk.read_whole(folder / OWN / RECORD, limit=1 << 20), _Record)
        changed = [name for name, digest in record.files.items() if _digest_of(folder / name) != digest]
        problem = f"{changed[0]} is not as it was exported" if changed else ""
    except Damaged as error:
        problem = f"{RECORD} {error}"
    except OSError as error:
        problem = f"{RECORD} cannot be read ({disk.what_failed(error)})"
    if problem:
        say(f"note: {found} is not used, because {problem}")
        return None
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of(path: Path) -> str | None:
    try:
        return _digest(disk.read_whole(path))
    except OSError:
        return None
