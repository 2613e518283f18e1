"""The bytes of a file, decompressed. A file that is cut short is an error, never the end of the text."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lowres.disk import DiskError
from lowres.errors import UserError, first_line
from lowres.text.remote import RemoteFile
from lowres.text.source import BadFileError, File

COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
_DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
# what says that a file is no use as it is; any other error may go away, and then the rows would change
_ITS_OWN = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ELOOP}


@contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; an error while reading raises BadFileError, which names the file."""
    with opened_path(file.path, file.compression, file.remote) as stream:
        yield stream


@contextmanager
def opened_path(path: Path, compression: str, remote: RemoteFile | None = None) -> Iterator[IO[bytes]]:
    try:
        with (
            remote.open() if remote else path.open("rb") as stored,
            _decompressed(path, stored, compression) as stream,
        ):
            yield stream
    except _DAMAGED as error:
        raise BadFileError(
            f"{path}: damaged or truncated ({first_line(error)}); get the file again"
        ) from None
    except OSError as error:
        # bz2 gives an error without a number for data that it does not know
        if error.errno is None:
            raise BadFileError(
                f"{path}: damaged or truncated ({first_line(error)}); get the file again"
            ) from None
        if error.errno in _ITS_OWN:
            raise BadFileError(f"{path}: cannot be read ({first_line(error)})") from None
        raise DiskError(path, error, "read") from None


def _decompressed(path: Path, stored: IO[bytes], compression: str) -> IO[bytes]:
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(stored))
    if compression == ".xz":
        return lzma.open(stored)
    if compression == ".bz2":
        return cast(IO[bytes], bz2.open(stored))
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(path, stored), 1 << 20)
    return stored


class _ZstdReader(io.RawIOBase):
    """Bytes of a .zst file with any number of frames. The reader in `zstandard` treats the end of a truncated
    file as the end of the text, and refuses frames with a window over 128 MiB (`zstd --long=31`)."""

    def __init__(self, path: Path, stored: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: .zst files need the package zstandard: pip install zstandard") from None
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._file = stored
        self._ready = b""

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
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
