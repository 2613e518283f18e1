"""Parquet tables."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
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
        # a path of names inside structures is read as its outermost column
        outer = file.column if file.column in table.schema_arrow.names else file.column.split(".")[0]
        for batch in table.iter_batches(batch_size=_ROWS, columns=[outer]):
            for row in batch.to_pylist():
                yield text_of(row, file.column, str(file.path))


def columns(file: File) -> dict[str, str] | None:
    with _table(file) as table:
        return of_arrow(table.schema_arrow)


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


register(Kind("parquet", (".parquet",), Rank.ROWS, read, columns, ids="parquet of ids"))
