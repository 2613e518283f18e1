"""Shards: files of token ids.

offset  size  little-endian
0       8     magic "lowres\0\0"
8       4     version of the format
12      4     bytes per token: 2, or 4 if the vocabulary has more than 65,536 pieces
16      8     number of tokens
24      8     vocabulary size
32      4     CRC-32 of the tokens
36      28    zeros
64            the tokens

They are read, not mapped: with a map, an error of the disk, or a file that is cut while it is in use, would
end the process by a signal.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from lowres.disk import DiskError, open_regular, retried, what_failed, write_whole
from lowres.errors import UserError

MAGIC = b"lowres\0\0"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sIIQQI28x")
_PIECE = 1 << 22  # bytes that are verified at a time
AGAIN = "move the folder away and prepare the data again"


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_name(part: str, number: int) -> str:
    return f"{part}_{number:05}.bin"


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of a prepared folder so that it is complete or absent after a crash at any moment."""
    try:
        retried(lambda: write_whole(path, *parts))
    except OSError as error:
        raise DiskError(path, error, "written") from None


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> int:
    """Write token ids (any integer type, all < vocab_size); returns their CRC-32."""
    payload = np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size)).view(np.uint8).data
    checksum = zlib.crc32(payload)
    header = _HEADER.pack(MAGIC, VERSION, token_dtype(vocab_size).itemsize, len(tokens), vocab_size, checksum)
    write_file(path, header, payload)
    return checksum


def is_shard(path: Path) -> bool:
    """Whether a file begins as a shard does."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class Shard:
    """The tokens of a file, which is verified as a whole when it is opened, and again if it changes.

    `vocab_size`, `tokens`, `crc32`: what the header must say, if that is known. The file is open only while
    it is read, as a run may have thousands of shards. Raises UserError, which names the file and the remedy,
    if the file is missing, truncated, changed, in another format, not the expected one, or not readable.
    """

    def __init__(
        self, path: Path, vocab_size: int | None = None, tokens: int | None = None, crc32: int | None = None
    ) -> None:
        self.path = path
        self._expected = {"vocabulary": vocab_size, "tokens": tokens, "checksum": crc32}
        self._count, self._vocab_size = 0, 0
        self._dtype = token_dtype(0)
        self._stamp: tuple[int, ...] | None = None
        try:
            with open_regular(path) as file:
                self._verify(file)
        except OSError as error:
            self._fail(error)

    def __len__(self) -> int:
        """Number of tokens."""
        return self._count

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        """uint16 or uint32 [count], read-only: the tokens from `start` on, fewer at the end (None: all)."""
        left = max(0, self._count - start)
        count = left if count is None else min(count, left)
        try:
            tokens = retried(lambda: self._read(start, count))
        except OSError as error:
            self._fail(error)
        # bytes that changed without a trace are found where they leave the vocabulary
        if count and (largest := int(tokens.max())) >= self._vocab_size:
            raise self._damaged(f"token {largest} is not in its vocabulary of {self._vocab_size}")
        return tokens

    def _read(self, start: int, count: int) -> np.ndarray:
        with open_regular(self.path) as file:
            if _stamp(file) != self._stamp:
                self._verify(file)
            file.seek(HEADER_BYTES + start * self._dtype.itemsize)
            data = file.read(count * self._dtype.itemsize)
        if len(data) != count * self._dtype.itemsize:
            raise self._damaged("it ends before its last token")
        return np.frombuffer(data, self._dtype)

    def _verify(self, file: BinaryIO) -> None:
        """Compare header and tokens with each other and with what is expected."""
        stamp = _stamp(file)
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise UserError(f"{self.path}: not a token file; {AGAIN}")
        _, version, token_bytes, count, vocab_size, checksum = _HEADER.unpack(header)
        if version != VERSION:
            raise UserError(
                f"{self.path}: format version {version}, but this lowres reads version {VERSION}; {AGAIN}"
            )
        if token_bytes not in (2, 4) or os.fstat(file.fileno()).st_size != HEADER_BYTES + count * token_bytes:
            raise self._damaged(f"its size does not match its {count} tokens")
        found = {"vocabulary": vocab_size, "tokens": count, "checksum": checksum}
        for what, expected in self._expected.items():
            if expected not in (None, found[what]):
                raise UserError(
                    f"{self.path}: not the file listed in data.json (another {what}: {found[what]} instead "
                    f"of {expected}); {AGAIN}"
                )
        dtype = np.dtype(f"<u{token_bytes}")
        crc, largest = 0, -1
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
            if len(piece) % token_bytes:
                break  # cut in the meantime
            largest = max(largest, int(np.frombuffer(piece, dtype).max()))
        if crc != checksum:
            raise self._damaged("its checksum is wrong")
        if largest >= vocab_size:
            raise self._damaged(f"token {largest} is not in its vocabulary of {vocab_size}")
        if self._stamp is not None and (count, vocab_size) != (self._count, self._vocab_size):
            raise self._damaged("it was replaced by another one")
        self._count, self._vocab_size, self._dtype, self._stamp = count, vocab_size, dtype, stamp

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: damaged: {what}; {AGAIN}")

    def _fail(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # or not an ordinary file
            raise UserError(
                f"{self.path}: cannot be read ({what_failed(error)}); put it back, or {AGAIN}"
            ) from None
        raise DiskError(self.path, error, "read") from None


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
