"""The pairs of Megatron-LM: NAME.bin holds ids, NAME.idx says where sequences and documents begin.

offset      little-endian, in the index
0           magic "MMIDIDX\\0\\0"
9           uint64 version, 1
17          uint8 type of the ids, see _TYPES
18          uint64 sequences, uint64 entries of the document index
34          int32 length of every sequence
            int64 offset in bytes of every sequence in the .bin
            int64 document index: the first sequence of every document, and the number of all
            int8 mode of every sequence, in some
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lowres.data.shards import write_file
from lowres.data.tokenised.files import TokenFile
from lowres.disk import open_regular
from lowres.text.kinds.tokens import MEGATRON_MAGIC
from lowres.text.source import BadFileError

_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {name: code for code, name in _TYPES.items()}
_PIECE = 1 << 20


def open_pair(path: Path) -> TokenFile:
    """path: of the .bin. Raises BadFileError if it and its index are not what belongs together."""
    index = path.with_suffix(".idx")
    try:
        size = path.stat().st_size
        with open_regular(index) as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(MEGATRON_MAGIC):
                raise BadFileError(f"{index}: not an index of Megatron-LM, or cut short; get it again")
            _, version, code, sequences, entries = _HEADER.unpack(header)
            if version != 1:
                raise BadFileError(
                    f"{index}: version {version} is not known, only 1; write it with that version"
                )
            if code not in _TYPES:
                raise BadFileError(f"{index}: the type with code {code} is not one of token ids")
            dtype = np.dtype(_TYPES[code])
            expected = _HEADER.size + 12 * sequences + 8 * entries
            if index.stat().st_size not in (expected, expected + sequences):
                raise BadFileError(
                    f"{index}: its size does not match its {sequences:,} sequences; get it again"
                )
            tokens = _total(file, index, sequences, dtype)
            documents = _Index(index, sequences, entries, dtype.itemsize, tokens)
            _check_documents(file, index, sequences, entries)
    except OSError as error:
        raise BadFileError(f"{index}: cannot be read ({error.strerror}); put it beside {path.name}") from None
    if size != tokens * dtype.itemsize:
        what = "cut short" if size < tokens * dtype.itemsize else "not that of its index"
        raise BadFileError(
            f"{path}: {what}: it has {size / dtype.itemsize:,.15g} ids, {index.name} says "
            f"{tokens:,}; get both again"
        )
    return TokenFile(path, f"Megatron-LM {dtype.name}", dtype, [(0, tokens)], documents)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """The index of documents of these lengths (int32), one after the other."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    header = _HEADER.pack(MEGATRON_MAGIC, 1, _CODES[dtype.str.replace("|", "")], len(lengths), len(starts))
    pointers = starts[:-1] * dtype.itemsize
    documents = np.arange(len(starts), dtype="<i8")
    write_file(
        path, header, lengths.astype("<i4").tobytes(), pointers.astype("<i8").tobytes(), documents.tobytes()
    )


class _Index:
    """Where documents begin, read from the index when it is asked: there may be too many for memory."""

    def __init__(self, path: Path, sequences: int, entries: int, itemsize: int, tokens: int) -> None:
        self._path, self._sequences, self._entries = path, sequences, entries
        self._itemsize, self._tokens = itemsize, tokens

    def __len__(self) -> int:
        return self._entries - 1

    def start(self, document: int) -> int:
        pointers = _HEADER.size + 4 * self._sequences
        with open_regular(self._path) as file:
            first = _number(file, pointers + 8 * self._sequences + 8 * document)
            if first >= self._sequences:
                return self._tokens
            return _number(file, pointers + 8 * first) // self._itemsize


def _number(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    return int.from_bytes(file.read(8), "little")


def _total(file: BinaryIO, index: Path, sequences: int, dtype: np.dtype) -> int:
    """Number of ids. The sequences must follow each other without gaps, so that the .bin is read as it is."""
    tokens, sizes_at = 0, _HEADER.size
    for start in range(0, sequences, _PIECE):
        count = min(_PIECE, sequences - start)
        lengths = _array(file, sizes_at + 4 * start, count, "<i4").astype(np.int64)
        pointers = _array(file, sizes_at + 4 * sequences + 8 * start, count, "<i8")
        ends = tokens + np.cumsum(lengths)
        if lengths.min() < 0 or not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
            raise BadFileError(
                f"{index}: its sequences do not follow each other in the .bin; write both again with "
                "Megatron-LM's tools"
            )
        tokens = int(ends[-1])
    return tokens


def _check_documents(file: BinaryIO, index: Path, sequences: int, entries: int) -> None:
    last = 0
    for part in _document_index(file, sequences, entries):
        if part[0] < last or np.any(np.diff(part) < 0):
            last = -1
            break
        last = int(part[-1])
    if not entries or last != sequences:
        raise BadFileError(f"{index}: its document index is damaged; get it again")


def _document_index(file: BinaryIO, sequences: int, entries: int) -> Iterator[np.ndarray]:
    at = _HEADER.size + 12 * sequences
    for start in range(0, entries, _PIECE):
        yield _array(file, at + 8 * start, min(_PIECE, entries - start), "<i8")


def _array(file: BinaryIO, offset: int, count: int, dtype: str) -> np.ndarray:
    file.seek(offset)
    return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)
