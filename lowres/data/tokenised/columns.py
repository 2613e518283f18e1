"""Columns of lists of ids, in Arrow tables (`save_to_disk`) and parquet. Every row is a document.

An Arrow table that is not compressed has the ids one after the other, and they are read there. Parquet packs
them, so they are unpacked once, into the cache, as a pair of `megatron`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowres import disk
from lowres.data.manifest import hash_of
from lowres.data.shards import token_dtype
from lowres.data.tokenised.files import Rows, TokenFile
from lowres.data.tokenised.megatron import open_pair, write_index
from lowres.errors import UserError, first_line
from lowres.lock import held
from lowres.text.kinds.tokens import PARQUET
from lowres.text.source import BadFileError, File

_ROWS = 256
_TEMPORARY = ".unfinished"
# how a message of an Arrow stream begins, and how the stream ends
_MESSAGE, _END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"


def open_file(file: File, vocab_size: int, cache: Path) -> TokenFile:
    """Raises UserError for an id outside the vocabulary if the ids are unpacked, and BadFileError."""
    with _faults(file):
        found = None if file.kind == PARQUET else _in_place(file)
        return found or _unpacked(file, vocab_size, cache)


def count(file: File, first: int) -> tuple[int, int, list[int]]:
    """(rows, ids, the first ids), without unpacking anything to the disk."""
    rows, ids, beginning = 0, 0, list[int]()
    with _faults(file):
        for lists in _lists(file):
            values, start, length = _values(lists)
            beginning = beginning or values.slice(start, min(first, length)).to_pylist()
            rows, ids = rows + len(lists), ids + length
    return rows, ids, beginning


@contextlib.contextmanager
def _faults(file: File) -> Iterator[None]:
    """Raise BadFileError for what pyarrow says of a file."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{file.path}: needs the package pyarrow: pip install pyarrow") from None
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own have none
            raise disk.DiskError(file.path, error, "read") from None
        raise BadFileError(
            f"{file.path}: damaged or cut short ({first_line(error)}); get the file again"
        ) from None


def _in_place(file: File) -> TokenFile | None:
    """None if the ids are compressed. A map finds out where they are; it touches none of them."""
    import pyarrow

    places, lengths, dtype = list[tuple[int, int]](), [np.zeros(1, np.int64)], np.dtype("<i4")
    with pyarrow.memory_map(str(file.path)) as mapped:
        beginning = mapped.read_buffer(file.size).address
        mapped.seek(0)
        for number, batch in enumerate(_arrow_batches(mapped, file)):
            lists = _checked(batch.column(0), file, number)
            values, first, count = _values(lists)
            dtype = np.dtype(values.type.to_pandas_dtype()).newbyteorder("<")
            address = values.buffers()[1].address if count else beginning
            offset = address + (values.offset + first) * dtype.itemsize - beginning
            if not 0 <= offset <= file.size - count * dtype.itemsize:
                return None
            places.append((offset if count else 0, count))
            lengths.append(_lengths(lists))
        mapped_rows = np.cumsum(np.concatenate(lengths))
    return TokenFile(file.path, f"Arrow {dtype.name}", dtype, places, Rows(mapped_rows))


def _unpacked(file: File, vocab_size: int, cache: Path) -> TokenFile:
    status = file.path.stat()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", file.path.stem)[:40] or "ids"
    dtype = token_dtype(vocab_size)
    known = hash_of(str(file.path.absolute()), status.st_size, status.st_mtime_ns, file.column, dtype.str)
    folder = cache / f"{name}-{known[:8]}"
    ids, index = folder / "ids.bin", folder / "ids.idx"
    if not index.exists():
        with held(folder, "is being written"):
            _unpack(file, ids, index, dtype, vocab_size)
    made = open_pair(ids)
    made.origin = file.path
    made.what = f"{'parquet' if file.kind == PARQUET else 'compressed Arrow'}, unpacked into {folder}"
    return made


def _unpack(file: File, ids: Path, index: Path, dtype: np.dtype, vocab_size: int) -> None:
    lengths, row = list[np.ndarray](), 0
    temporary = ids.with_name(ids.name + _TEMPORARY)
    try:
        with disk.named(ids, "written"):
            out = disk.open_to_write(temporary, os.O_TRUNC)
        with out:
            for lists in _lists(file):
                values, first, count = _values(_checked(lists, file, row))
                found = values.slice(first, count).to_numpy()
                here = _lengths(lists)
                if count and not 0 <= found.min() <= found.max() < vocab_size:
                    bad = int(np.argmax((found < 0) | (found >= vocab_size)))
                    at = row + int(np.searchsorted(np.cumsum(here), bad, side="right"))
                    raise UserError(
                        f"{file.path}: row {at}: id {found[bad]} is not in the vocabulary of {vocab_size:,}; "
                        "set data.vocab_size or data.tokenizer to what the ids were made with"
                    )
                with disk.named(ids, "written"):
                    disk.write_all(out, memoryview(found.astype(dtype)))
                lengths.append(here)
                row += len(here)
            with disk.named(ids, "written"):
                os.fsync(out.fileno())
        with disk.named(ids, "written"):
            os.replace(temporary, ids)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # last, so the pair is complete if it exists
    write_index(index, np.concatenate([*lengths, np.empty(0, np.int64)]), dtype)


def _lists(file: File) -> Iterator[Any]:
    if file.kind == PARQUET:
        import pyarrow.parquet

        with file.path.open("rb") as stream:
            table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            for batch in table.iter_batches(_ROWS, columns=[file.column]):
                yield batch.column(0)
    else:
        with file.path.open("rb") as stream:
            for batch in _arrow_batches(stream, file):
                yield batch.column(0)


def _arrow_batches(stream: Any, file: File) -> Iterator[Any]:
    """Record batches with only the column of ids."""
    from pyarrow import ipc

    beginning = stream.read(6)
    is_file = beginning == b"ARROW1"
    if not is_file and beginning.startswith(_MESSAGE):
        stream.seek(-len(_END), os.SEEK_END)
        # the reader takes a cut between two batches for the end
        if stream.read() != _END:
            raise BadFileError(f"{file.path}: has no end: cut short; get the file again")
    stream.seek(0)
    table = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
    batches = (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else iter(table)
    for batch in batches:
        yield batch.select([file.column])


def _checked(lists: Any, file: File, at: int) -> Any:
    """The array. Raises BadFileError for a null, which is no id, and pyarrow's errors for lengths that cannot
    be."""
    lists.validate(full=True)
    values, first, count = _values(lists)
    if lists.null_count or values.slice(first, count).null_count:
        raise BadFileError(
            f'{file.path}: the column "{file.column}" has nulls (at row or batch {at}); remove them'
        )
    return lists


def _values(lists: Any) -> tuple[Any, int, int]:
    """(values, first, count): the ids of an array of lists, where they are."""
    from pyarrow import types

    values = lists.values
    if types.is_fixed_size_list(lists.type):
        width = lists.type.list_size
        return values, lists.offset * width, len(lists) * width
    first, last = lists.offsets[0].as_py(), lists.offsets[-1].as_py()
    return values, first, last - first


def _lengths(lists: Any) -> np.ndarray:
    """int64 [rows]"""
    from pyarrow import types

    if types.is_fixed_size_list(lists.type):
        return np.full(len(lists), lists.type.list_size, np.int64)
    return np.diff(lists.offsets.to_numpy()).astype(np.int64)
