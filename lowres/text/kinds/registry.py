"""What a kind of file says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import PurePath

from lowres.text.compression import COMPRESSIONS
from lowres.text.source import File, Source


class Rank(IntEnum):
    """How surely a file is data. Where a folder has TOKENS or ROWS, what is PROSE only describes or makes
    them."""

    TOKENS = 0  # ids of a tokenizer
    ROWS = 1  # a document per row
    TEXT = 2  # text files
    PROSE = 3  # markdown, source code, any other text


class NotData(str):
    """Why a file has no documents, where nothing is wrong with it: settings, a cache."""


@dataclass(frozen=True)
class Kind:
    """suffixes: lower case. read: the text of every row, "" for one without text; raises BadFileError.
    read_from: the same from a row on, as fast as it can be: None for each row before that.
    columns: of the first row of a table (see `columns`); None if there is no row. refused: why a file of this
    suffix has no documents, None if it has; see also NotData. look: what a file of this suffix is by its
    content: of another kind, or why it is left out. ids: the kind of the same tables with a column of ids
    instead of text. by_content: files of this suffix may be no text at all."""

    name: str
    suffixes: tuple[str, ...]
    rank: Rank
    read: Callable[[File, Source], Iterator[str]]
    columns: Callable[[File], dict[str, str] | None] | None = None
    refused: Callable[[File], str | None] | None = None
    look: Callable[[File], File | str] | None = None
    ids: str | None = None
    by_content: bool = False
    read_from: Callable[[File, Source, int], Iterator[str | None]] | None = None


KINDS: dict[str, Kind] = {}
_SAME = {".zstd": ".zst", ".gzip": ".gz"}
_BY_SUFFIX: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    KINDS[kind.name] = kind
    for suffix in kind.suffixes:
        _BY_SUFFIX[suffix] = kind


def kind_of_name(name: str) -> tuple[Kind | None, str]:
    """(kind or None, compression) by the suffixes of a file's name, in any case."""
    path = PurePath(name.lower())
    compression = _SAME.get(path.suffix, path.suffix)
    if compression in COMPRESSIONS:
        path = path.with_suffix("")
    else:
        compression = ""
    return _BY_SUFFIX.get(path.suffix), compression


def names() -> str:
    """The known suffixes, for messages."""
    listed = [
        suffix for kind in KINDS.values() if kind.rank in (Rank.ROWS, Rank.TEXT) for suffix in kind.suffixes
    ]
    return (
        f"{', '.join(listed)}, any text in UTF-8, each also with {', '.join(COMPRESSIONS)}, in .tar or .zip; "
        "token ids in .bin and .npy"
    )
