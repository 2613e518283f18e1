"""Decompressed bytes. Data that is cut short is an error, never the end of the text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any, cast

from lowres.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")


def decompressed(raw: IO[bytes], compression: str, path: Path) -> IO[bytes]:
    """A stream of what is in `raw`. compression: a suffix of COMPRESSIONS, or "". path: for messages."""
    if compression == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return lzma.open(raw)
    if compression == ".bz2":
        return cast(IO[bytes], bz2.open(raw))
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(raw, path), 1 << 20)
    return raw


class _ZstdReader(io.RawIOBase):
    """Bytes of any number of zstd frames. The reader in `zstandard` treats the end of a truncated file as
    the end of the text, and refuses frames with a window over 128 MiB (`zstd --long=31`)."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: .zst files need the package zstandard: pip install zstandard") from None
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._file = raw
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = data or self._file.read(1 << 17)
            if not data:
                if self._frame and not self._frame.eof:
                    raise EOFError("the compressed data ends in the middle")
                return 0
            if not self._frame or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
