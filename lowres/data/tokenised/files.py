"""Token ids in a file, as somebody else wrote them.

They are read, not mapped, for the reason that `lowres.data.shards` gives. There is no copy of them: a window
is read from where it is in the file.
"""

from __future__ import annotations

import errno
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np

from lowres.data.manifest import hash_of
from lowres.disk import DiskError, open_regular, retried, what_failed
from lowres.errors import UserError

_PIECE = 1 << 20  # ids
# what is read of a file that is too large to be read as a whole before the first step
_SAMPLES, _SAMPLE = 1024, 1 << 12


class Documents(Protocol):
    """Where the documents of a file begin."""

    def __len__(self) -> int: ...

    def start(self, document: int) -> int:
        """The number of its first id; for the number of documents, that of all ids."""


@dataclass(frozen=True)
class Rows:
    """Documents of these lengths. starts: int64 [documents + 1]."""

    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def start(self, document: int) -> int:
        return int(self.starts[document])


@dataclass(frozen=True)
class Seen:
    """What was found when a file was read. checksums: of its pieces. whole: whether all of it was read.
    separators: how many of the ids are the one that was counted."""

    checksums: tuple[int, ...]
    largest: int
    separators: int
    whole: bool


class TokenFile:
    """The ids of a file.

    `what`: its format, for the user; `dtype`; `documents`: None if the file does not tell. The file is open
    only while it is read. If it changes meanwhile, what was seen of it is compared again. Raises UserError,
    which names the file and the place, for an id outside `vocab_size`, and for a file that was changed.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        dtype: np.dtype,
        places: Sequence[tuple[int, int]],
        documents: Documents | None = None,
    ) -> None:
        """places: (offset in bytes, number of ids) of each run of ids, in order."""
        self.path, self.what, self.dtype, self.documents = path, what, dtype, documents
        self.vocab_size: int | None = None
        self.origin = path  # what the user has given
        self._offsets = [offset for offset, _ in places]
        self._starts = list(accumulate((count for _, count in places), initial=0))
        self._stamp: tuple[int, ...] | None = None
        self._seen: Seen | None = None
        try:
            with open_regular(path) as file:
                self._stamp = _stamp(file)
        except OSError as error:
            self._fail(error)

    def __len__(self) -> int:
        """Number of ids."""
        return self._starts[-1]

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        """Ids [count] of type `dtype`, read-only: from `start` on, fewer at the end (None: all)."""
        left = max(0, len(self) - start)
        count = left if count is None else min(count, left)
        try:
            ids = retried(lambda: self._read(start, count))
        except OSError as error:
            self._fail(error)
        self._check(ids, start)
        return ids

    def look(self, everything: bool, separator: int | None) -> Seen:
        """Read the whole file, or a sample of it, check its ids, and remember what was there."""
        try:
            with open_regular(self.path) as file:
                self._seen = self._look(file, everything, separator)
        except OSError as error:
            self._fail(error)
        return self._seen

    def fingerprint(self, start: int, count: int) -> str:
        """Changes with the ids from `start` on, as far as they were seen."""
        assert self._seen is not None
        return hash_of(len(self), self.dtype.name, self._seen.checksums, start, count)

    def document_at(self, position: int) -> int | None:
        """The start of the document that has this id; None if it is not known."""
        if self.documents is None:
            return None
        number = bisect_right(range(len(self.documents)), position, key=self.documents.start)
        return self.documents.start(max(0, number - 1))

    def _read(self, start: int, count: int) -> np.ndarray:
        with open_regular(self.path) as file:
            if _stamp(file) != self._stamp:
                self._compare(file)
            return self._ids(file, start, count)

    def _ids(self, file: BinaryIO, start: int, count: int) -> np.ndarray:
        parts = list[np.ndarray]()
        place = bisect_right(self._starts, start) - 1
        while count:
            here = min(count, self._starts[place + 1] - start)
            size = self.dtype.itemsize
            file.seek(self._offsets[place] + (start - self._starts[place]) * size)
            data = file.read(here * size)
            if len(data) != here * size:
                raise self._changed("it ends before its last id")
            parts.append(np.frombuffer(data, self.dtype))
            start, count, place = start + here, count - here, place + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.dtype)])

    def _look(self, file: BinaryIO, everything: bool, separator: int | None) -> Seen:
        checksums, largest, separators = list[int](), -1, 0
        for start, count in _pieces(len(self), everything):
            ids = self._ids(file, start, count)
            checksums.append(zlib.crc32(ids.view(np.uint8).data))
            self._check(ids, start)
            largest = max(largest, int(ids.max()))
            separators += 0 if separator is None else int(np.count_nonzero(ids == separator))
        return Seen(tuple(checksums), largest, separators, everything)

    def _check(self, ids: np.ndarray, start: int) -> None:
        if self.vocab_size is None or not len(ids) or (ids.min() >= 0 and ids.max() < self.vocab_size):
            return
        first = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
        raise UserError(
            f"{self.origin}: id {ids[first]} at token {start + first:,} is not in the vocabulary of "
            f"{self.vocab_size:,}; set data.vocab_size or data.tokenizer to what the ids were made with, and "
            "data.token_dtype if the file does not say its own"
        )

    def _compare(self, file: BinaryIO) -> None:
        """A file that was written to must hold what was seen."""
        stamp, seen = _stamp(file), self._seen
        if self._stamp is not None and stamp[1] != self._stamp[1]:
            raise self._changed(f"it has {stamp[1]:,} bytes, not {self._stamp[1]:,}")
        if seen is not None and self._look(file, seen.whole, None).checksums != seen.checksums:
            raise self._changed("other ids")
        self._stamp = stamp

    def _changed(self, what: str) -> UserError:
        return UserError(f"{self.path}: changed while it was used ({what}); put it back as it was")

    def _fail(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # or not an ordinary file
            raise UserError(f"{self.path}: cannot be read ({what_failed(error)}); put it back") from None
        raise DiskError(self.path, error, "read") from None


@dataclass(frozen=True)
class Span:
    """`count` ids of a file from `start` on, with the interface of `lowres.data.shards.Shard`."""

    file: TokenFile
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        left = max(0, self.count - start)
        return self.file.read(self.start + start, left if count is None else min(count, left))


class Part:
    """The ids of one part of a corpus, with the interface of the shards of a prepared folder."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = [span for span in spans if len(span)]

    def fingerprint(self) -> str:
        """Changes with the ids."""
        return hash_of([span.file.fingerprint(span.start, span.count) for span in self.spans])

    def lengths(self) -> list[int]:
        return [len(span) for span in self.spans]

    def shard(self, i: int) -> Span:
        return self.spans[i]

    def head(self, count: int | None) -> np.ndarray:
        """int64: the first `count` ids of the spans in order (None: all)."""
        parts: list[np.ndarray] = [np.empty(0, np.int64)]
        for span in self.spans:
            left = None if count is None else count - sum(map(len, parts))
            if left == 0:
                break
            parts.append(span.read(0, left).astype(np.int64))
        return np.concatenate(parts)


def _pieces(tokens: int, everything: bool) -> list[tuple[int, int]]:
    """(start, count) of what is read."""
    if everything or tokens <= _SAMPLES * _SAMPLE:
        return [(start, min(_PIECE, tokens - start)) for start in range(0, tokens, _PIECE)]
    step = (tokens - _SAMPLE) / (_SAMPLES - 1)
    return [(int(i * step), _SAMPLE) for i in range(_SAMPLES)]


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
