"""Parquet tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.columns import of_arrow
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.kinds.tables import outermost, texts
from lowres.text.kinds.tokens import PARQUET
from lowres.text.opening import opened_for_seeking
from lowres.text.source import BadFileError, File, Source

_ROWS = 256
# the column of a row group may hold gigabytes; the default reads all of it first, whatever the buffer
_IN_PIECES = {"buffer_size": 1 << 20, "pre_buffer": False}


def read(file: File, source: Source) -> Iterator[str]:
    assert file.column is not None
    with _table(file) as table:
        outer = outermost(file.column, table.schema_arrow.names)
        yield from texts(table.iter_batches(batch_size=_ROWS, columns=[outer]), file.column, file.path)


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
    with opened_for_seeking(file) as stream:
        try:
            yield pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True, **_IN_PIECES)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise BadFileError(
                f"{file.path}: not a complete parquet file ({first_line(error)}); get the file again"
            ) from None
        except OSError as error:
            if "crypt" not in str(error):
                raise
            raise BadFileError(f"{file.path}: encrypted; decrypt it first") from None


register(Kind("parquet", (".parquet", ".parq", ".pq"), Rank.ROWS, read, columns, ids=PARQUET))
