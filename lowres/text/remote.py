"""The bytes of a remote file. A lost connection loses none of them: reading goes on at the byte that was
next, so what decompresses and parses them never sees it."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from typing import IO, Any, cast

from lowres.errors import UserError
from lowres.text.connection import Patience

_BUFFER = 1 << 20
# a request is for at least _LEAST bytes, and twice as many as the one before while reading goes straight on:
# the first look at a file costs little, and later the time of a request is small beside that of its bytes
_LEAST, _MOST = 1 << 20, 1 << 24


@dataclass(frozen=True)
class RemoteFile:
    """url: as `fsspec` opens it; of a fixed commit, so that its bytes never change. source: for messages."""

    source: str
    url: str

    def open(self) -> IO[bytes]:
        return cast(IO[bytes], io.BufferedReader(_Bytes(self), _BUFFER))


class _Bytes(io.RawIOBase):
    def __init__(self, file: RemoteFile) -> None:
        self._remote = file
        self._patience = Patience(file.source)
        self._file: Any = None  # while there is a connection
        self._size = -1  # until it was opened once
        self._at = 0
        self._ready = memoryview(b"")  # from `_at` on
        self._ask = _LEAST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            self._try(lambda file: b"")
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        target = max(0, start + offset)
        if 0 <= target - self._at <= len(self._ready):
            self._ready = self._ready[target - self._at :]
        else:
            self._ready, self._ask = memoryview(b""), _LEAST
        self._at = target
        return target

    def readinto(self, buffer: Any) -> int:
        if not self._ready:
            self._ready = memoryview(self._try(lambda file: self._next(file, max(len(buffer), self._ask))))
            self._ask = min(2 * self._ask, _MOST)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._at += count
        return count

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _next(self, file: Any, count: int) -> bytes:
        count = min(count, self._size - self._at)
        if count <= 0:
            return b""
        file.seek(self._at)
        data: bytes = file.read(count)
        # a server that ends early must not look like the end of the text
        if len(data) < count:
            raise ConnectionError(f"{len(data)} bytes of the {count} asked for")
        return data

    def _try(self, action: Any) -> bytes:
        """The action on the opened file, again after each lost connection. Raises UserError."""
        while True:
            try:
                if self._file is None:
                    self._file, self._size = _opened(self._remote.url)
                data: bytes = action(self._file)
            except UserError:
                raise
            except Exception as error:  # of fsspec and the libraries below it
                self._disconnect()
                self._patience.wait(error)
            else:
                self._patience.answered()
                return data

    def _disconnect(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):
                file.close()


def _opened(url: str) -> tuple[Any, int]:
    """The file, and its size in bytes."""
    import fsspec

    system, path = fsspec.url_to_fs(url)
    file = system.open(path, "rb", cache_type="none")
    return file, int(file.size)
