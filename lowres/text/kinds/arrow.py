"""Arrow tables, as streams and files of its IPC format: what `datasets` keeps and `save_to_disk` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.columns import of_arrow, text_of
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.kinds.tokens import ARROW
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

_MAGIC = b"ARROW1"


def read(file: File, source: Source) -> Iterator[str]:
    assert file.column is not None
    with _batches(file) as (_, batches):
        for batch in batches:
            for row in batch.select([file.column.split(".")[0]]).to_pylist():
                yield text_of(row, file.column, str(file.path))


def columns(file: File) -> dict[str, str] | None:
    with _batches(file) as (schema, _):
        return of_arrow(schema)


def _refused(file: File) -> str | None:
    name = file.name.rsplit("/", 1)[-1]
    return "a cache of the datasets library" if name.startswith("cache-") else None


@contextmanager
def _batches(file: File) -> Iterator[tuple[Any, Iterator[Any]]]:
    """(schema, record batches)"""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(f"{file.path}: .arrow files need the package pyarrow: pip install pyarrow") from None
    with opened(file) as stream:
        try:
            if stream.peek(6).startswith(_MAGIC) if hasattr(stream, "peek") else False:
                table = pyarrow.ipc.open_file(stream)
                yield table.schema, (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                table = pyarrow.ipc.open_stream(stream)
                yield table.schema, iter(table)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise BadFileError(
                f"{file.path}: not a complete Arrow file ({first_line(error)}); get the file again"
            ) from None


register(Kind("Arrow table", (".arrow", ".feather"), Rank.ROWS, read, columns, _refused, ids=ARROW))
