"""Parquet tables."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.columns import of_arrow, text_of
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

_ROWS = 256


def read(file: File, source: Source) -> Iterator[str]:
    assert file.column is not None
    with _table(file) as table:
        yield from _texts(file, file.column, table, range(table.num_row_groups))


def read_from(file: File, source: Source, start: int) -> Iterator[str | None]:
    """Groups of rows before `start` are not decoded."""
    assert file.column is not None
    with _table(file) as table:
        groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        first, passed = 0, 0
        while first < len(groups) and passed + groups[first] <= start:
            passed += groups[first]
            first += 1
        yield from repeat(None, passed)
        yield from _texts(file, file.column, table, range(first, len(groups)))


def columns(file: File) -> dict[str, str] | None:
    with _table(file) as table:
        return of_arrow(table.schema_arrow)


def _texts(file: File, column: str, table: Any, groups: range) -> Iterator[str]:
    # a path of names inside structures is read as its outermost column
    outer = column if column in table.schema_arrow.names else column.split(".", 1)[0]
    for batch in table.iter_batches(batch_size=_ROWS, row_groups=list(groups), columns=[outer]):
        for row in batch.to_pylist():
            yield text_of(row, column, str(file.path))


@contextmanager
def _table(file: File) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.path}: .parquet files need the package pyarrow: pip install pyarrow"
        ) from None
    with opened(file) as stream:
        # parquet is read from its end, and seeking in compressed data would decompress it many times
        seekable = io.BytesIO(stream.read()) if file.compression else stream
        try:
            yield pyarrow.parquet.ParquetFile(seekable)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise BadFileError(
                f"{file.path}: not a complete parquet file ({first_line(error)}); get the file again"
            ) from None


register(Kind("parquet", (".parquet",), Rank.ROWS, read, columns, read_from=read_from))
