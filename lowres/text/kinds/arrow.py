"""Arrow IPC: streams, as the `datasets` library saves them, and files, which are Feather version 2."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.columns import of_arrow
from lowres.text.kinds.registry import Kind, NotData, Rank, register
from lowres.text.kinds.tables import texts, to_read
from lowres.text.kinds.tokens import ARROW
from lowres.text.opening import opened, opened_for_seeking
from lowres.text.source import BadFileError, File, Source

_FILE, _FEATHER_1 = b"ARROW1", b"FEA1"
# how every message of a stream begins since Arrow 0.15, and its end
_MESSAGE, _END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"


def read(file: File, source: Source) -> Iterator[str]:
    with _batches(file, whole=False) as (_, batches):
        yield from texts(batches, file)


def columns(file: File) -> dict[str, str] | None:
    with _batches(file, whole=True) as (schema, _):
        return of_arrow(schema)


def refused(file: File) -> str | None:
    """`datasets` keeps the results of its operations, and shards of an earlier save, beside the data; what
    counts is in state.json."""
    with opened(file) as stream:
        if stream.read(len(_FEATHER_1)) == _FEATHER_1:
            return "Feather version 1; convert it to .parquet"
    name = file.path.name
    if name.startswith("cache-"):
        return NotData("a cache of the datasets library")
    state = file.path.with_name("state.json")
    if file.archive or not state.is_file():
        return None
    listed, chosen = _state(state, state.stat().st_mtime_ns)
    if name not in listed:
        return NotData("not in the list of state.json: of an earlier save")
    return (
        "its rows are chosen by a file of indices; save it again with datasets 2 or later" if chosen else None
    )


@lru_cache(maxsize=64)
def _state(path: Path, mtime_ns: int) -> tuple[frozenset[str], bool]:
    """(the files of a saved data set, whether a file of indices chooses among their rows)"""
    try:
        found = json.loads(path.read_bytes())
        listed = [each["filename"] for each in found["_data_files"]]
        chosen = bool(found.get("_indices_data_files") or found.get("_indices_files"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BadFileError(f"{path}: cannot be understood ({first_line(error)}); get it again") from None
    for name in listed:
        if not path.with_name(name).exists():
            raise BadFileError(f"{path}: lists {name}, which is missing; get the folder again")
    return frozenset(listed), chosen


@contextmanager
def _batches(file: File, whole: bool) -> Iterator[tuple[Any, Iterator[Any]]]:
    """(schema, record batches), memory-mapped where the file is neither compressed nor in an archive. whole:
    otherwise only the columns of the documents are read of a file's batches."""
    try:
        import pyarrow
        from pyarrow import ipc
    except ImportError:
        raise UserError(
            f"{file.path}: .arrow and .feather files need the package pyarrow: pip install pyarrow"
        ) from None
    with opened_for_seeking(file) as stream:
        in_memory = bool(file.compression or file.archive)
        data = stream.read() if in_memory else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            source = pyarrow.BufferReader(pyarrow.py_buffer(data))
            if data[: len(_FILE)] == _FILE:
                schema = ipc.open_file(source).schema
                wanted = [] if whole else [schema.names.index(name) for name in to_read(file, schema.names)]
                reader = ipc.open_file(source, options=ipc.IpcReadOptions(included_fields=wanted))
                yield schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                # the reader takes the end of a file that is cut between two batches for the end of the data
                if data[: len(_MESSAGE)] == _MESSAGE and data[-len(_END) :] != _END:
                    raise BadFileError(f"{file.path}: has no end: cut short; get the file again")
                reader = ipc.open_stream(source)
                yield reader.schema, iter(reader)
        except pyarrow.ArrowException as error:
            raise BadFileError(
                f"{file.path}: not a complete Arrow file ({first_line(error)}); get the file again"
            ) from None


register(Kind("Arrow", (".arrow", ".feather"), Rank.ROWS, read, columns, refused, ids=ARROW))
