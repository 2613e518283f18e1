"""Parquet tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.columns import of_arrow
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.kinds.tables import texts, to_read
from lowres.text.kinds.tokens import PARQUET
from lowres.text.opening import opened_for_seeking
from lowres.text.source import BadFileError, File, Source

_ROWS = 256
# the column of a row group may hold gigabytes; the default reads all of it first, whatever the buffer
_IN_PIECES = {"buffer_size": 1 << 20, "pre_buffer": False}


def read(file: File, source: Source) -> Iterator[str]:
    with _table(file) as table:
        yield from _texts(file, table, 0)


def read_from(file: File, source: Source, start: int) -> Iterator[str | None]:
    """Groups of rows before `start` are not decoded."""
    with _table(file) as table:
        passed, first = 0, 0
        while first < table.num_row_groups and passed + _rows_of(table, first) <= start:
            passed += _rows_of(table, first)
            first += 1
        yield from repeat(None, passed)
        yield from _texts(file, table, first, passed)


def _rows_of(table: Any, group: int) -> int:
    return int(table.metadata.row_group(group).num_rows)


def _texts(file: File, table: Any, first: int, passed: int = 0) -> Iterator[str]:
    """From row group `first` on, before which `passed` rows are."""
    wanted, groups = to_read(file, table.schema_arrow.names), list(range(first, table.num_row_groups))
    batches = table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=wanted)
    yield from texts(batches, file, passed)


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


register(
    Kind("parquet", (".parquet", ".parq", ".pq"), Rank.ROWS, read, columns, ids=PARQUET, read_from=read_from)
)
