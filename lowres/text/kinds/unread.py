"""Kinds of file that hold text which lowres does not read, each with what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.source import BadFileError, File, Source

_EXTRACT = "extract its text to .txt or .jsonl first"
_UNPACK = "unpack it, or pack it again as .zst or .gz"
_REASONS = {
    "PDF": ((".pdf", ".djvu", ".ps"), _EXTRACT),
    "electronic book": ((".epub", ".mobi", ".azw", ".azw3"), _EXTRACT),
    "office document": (
        (".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx", ".odp", ".xls", ".xlsx", ".ods", ".pages"),
        _EXTRACT,
    ),
    "archive": ((".7z", ".rar", ".cab", ".iso"), "unpack it, or pack it again as .tar.gz, .tar.zst or .zip"),
    "compressed file": ((".lz4", ".br", ".sz", ".snappy", ".lzo", ".z", ".lzma"), _UNPACK),
    "table": ((".avro", ".orc", ".dta", ".sav", ".rds", ".rdata"), "convert it to .parquet"),
    "database": ((".sqlite", ".sqlite3", ".db", ".mdb", ".lmdb"), "export its text to .parquet or .jsonl"),
    "pickle": ((".pkl", ".pickle"), "it can run code when it is read; convert it to .parquet"),
    "web archive's metadata": ((".wat",), "the .wet files beside it hold the text"),
}


def _refuses(reason: str) -> Callable[[File], str]:
    return lambda file: reason


def _read(file: File, source: Source) -> Iterator[str]:
    raise BadFileError(f"{file.path}: {_REASONS[file.kind][1]}")


for _name, (_suffixes, _remedy) in _REASONS.items():
    register(Kind(_name, _suffixes, Rank.PROSE, _read, refused=_refuses(f"{_name}; {_remedy}")))
