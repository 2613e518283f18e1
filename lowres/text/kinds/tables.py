"""The texts of a column of Arrow data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowres.text.columns import text_of
from lowres.text.source import BadFileError

_ROWS = 256


def outermost(column: str, names: list[str]) -> str:
    """The column to read: a path of names inside structures is read as its outermost column."""
    return column if column in names else column.split(".", maxsplit=1)[0]


def texts(batches: Iterable[Any], column: str, path: Path, row: int = 0) -> Iterator[str]:
    """batches: record batches that hold at least the column. row: of the first, for messages."""
    for batch in batches:
        outer = outermost(column, batch.schema.names)
        values = batch.column(batch.schema.get_field_index(outer))
        for start in range(0, len(values), _ROWS):
            for value in _decoded(values.slice(start, _ROWS), path, row):
                row += 1
                if isinstance(value, str):
                    yield value
                else:
                    yield text_of({outer: value}, column, f"{path}:{row}")


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
