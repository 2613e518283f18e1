"""The documents of Arrow data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowres.text.columns import document_of, taken
from lowres.text.source import BadFileError, File

_ROWS = 256


def outermost(column: str, names: list[str]) -> str:
    """The column to read: a path of names inside structures is read as its outermost column."""
    return column if column in names else column.split(".", maxsplit=1)[0]


def to_read(file: File, names: list[str]) -> list[str]:
    """Those of the columns `names` that have the documents of a file, by their outermost names."""
    return [outermost(column, names) for column in taken(file)]


def texts(batches: Iterable[Any], file: File, row: int = 0) -> Iterator[str]:
    """batches: record batches that hold at least the columns. row: of the first, for messages."""
    for batch in batches:
        wanted = to_read(file, batch.schema.names)
        whole = batch.select(wanted)
        values = whole.to_struct_array() if file.fields else whole.column(0)
        for start in range(0, len(values), _ROWS):
            for value in _decoded(values.slice(start, _ROWS), file.path, row):
                row += 1
                if isinstance(value, str):
                    yield value
                else:
                    found = value if file.fields else {wanted[0]: value}
                    yield document_of(found, file, f"{file.path}:{row}")


def _decoded(values: Any, path: Path, row: int) -> Iterator[Any]:
    """Arrow does not look whether its strings are UTF-8; Python does."""
    try:
        yield from values.to_pylist()
    except UnicodeDecodeError:
        for value in values:
            row += 1
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                raise BadFileError(f"{path}:{row}: not UTF-8 text; correct that row") from None
