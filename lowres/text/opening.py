"""The bytes of a file: on the disk or in an archive, decompressed."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from lowres.disk import DiskError
from lowres.errors import first_line
from lowres.text import archives
from lowres.text.compression import decompressed
from lowres.text.source import BadFileError, File

_raw: dict[Path, IO[bytes]] = {}  # of files that are open
_DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile)
# what says that a file is no use as it is; any other error may go away, and then the rows would change
_ITS_OWN = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ELOOP}


@contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; an error while reading raises BadFileError, which names the file."""
    with faults_of(file.path), ExitStack() as stack:
        if file.archive:
            raw = stack.enter_context(archives.opened_member(file.archive, file.at, file.size))
        else:
            raw = stack.enter_context(file.remote.open() if file.remote else file.path.open("rb"))
        _raw[file.path] = raw
        stack.callback(_raw.pop, file.path, None)
        yield decompressed(raw, file.compression, file.path)


def position(file: File) -> int:
    """How many bytes of a file have been read, compressed as it is, while it is open; 0 if it is not."""
    raw = _raw.get(file.path)
    return raw.tell() if raw else 0


@contextmanager
def opened_for_seeking(file: File) -> Iterator[IO[bytes]]:
    """The same for a kind that is not read from beginning to end. What is compressed, or in an archive, is
    then held in memory."""
    with opened(file) as stream:
        yield io.BytesIO(stream.read()) if file.compression or file.archive else stream


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Raise BadFileError or DiskError, which name this file, for an error of reading in the block."""
    try:
        yield
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
            raise BadFileError(
                f"{path}: cannot be read ({first_line(error)}); mend that, or leave it out with data.exclude"
            ) from None
        raise DiskError(path, error, "read") from None
