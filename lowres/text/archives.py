"""Archives: a tar or zip file is a folder that is read where it lies. Nothing is extracted.

`tarfile` takes a damaged header, or the end of a file that is cut between two members, for the end of the
archive, and stops at the end of the first of several archives in one file. Here the first two are errors, and
reading goes on to the end of the file.

A compressed tar is read forward, like a tape: a tape that has been used waits where it is, so members that
are opened in their order cost one pass. What was read of the last member opened is held, as its kind is found
out before it is read.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from lowres.text.compression import COMPRESSIONS, decompressed
from lowres.text.source import BadFileError
from lowres.text.walk import Found

_TARS = {".tar": "", ".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
_TARS |= {f".tar{suffix}": suffix for suffix in COMPRESSIONS}
SUFFIXES = (*_TARS, ".zip")
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_HELD = 1 << 24
_PIECE = 1 << 15
_MOST_IDLE = 4


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def members(archive: Found) -> Iterator[Found]:
    """What is in an archive, in its order. Errors of reading are those of `tarfile`, `zipfile` and of the
    decompression."""
    compression = _tar_compression(archive.path)
    if compression is None:
        found = _in_zip(archive)
    elif compression:
        found = _on_tape(archive)
    else:
        found = _in_tar(archive)
    for name, at, size, fault in found:
        inner = name.removeprefix("./").lstrip("/")
        reason = "hidden" if _is_hidden(inner) else fault
        if not reason and is_archive(inner):
            reason = "an archive inside an archive; unpack the outer one"
        path = archive.path / inner
        yield Found(f"{archive.name}/{inner}", path, size, archive.mtime_ns, reason, archive.path, at)


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or any(part.startswith(".") and part.strip(".") for part in parts)


@contextmanager
def opened_member(archive: Path, at: int, size: int) -> Iterator[IO[bytes]]:
    """The bytes of a member. at, size: of its Found."""
    if _tar_compression(archive) == "":
        with archive.open("rb") as file:
            file.seek(at)
            yield io.BufferedReader(_Part(file, size), _PIECE)
        return
    with _lent(archive) as reader:
        yield reader.member(at)


class _Reader(Protocol):
    """An open archive."""

    def member(self, at: int) -> IO[bytes]: ...

    def close(self) -> None: ...


_idle: dict[tuple[Any, ...], _Reader] = {}


@contextmanager
def _lent(archive: Path) -> Iterator[Any]:
    """An archive that is open for this user alone, and waits for the next one afterwards."""
    status = archive.stat()
    # a file that is open in two processes has one position
    key = (os.getpid(), str(archive), status.st_size, status.st_mtime_ns)
    compression = _tar_compression(archive)
    reader = _idle.pop(key, None)
    reader = reader or (_Zip(archive) if compression is None else _Tape(archive, compression))
    try:
        yield reader
    except (BadFileError, GeneratorExit):
        _keep(key, reader)
        raise
    except BaseException:
        reader.close()
        raise
    _keep(key, reader)


def _keep(key: tuple[Any, ...], reader: _Reader) -> None:
    if (other := _idle.pop(key, None)) is not None:
        other.close()
    while len(_idle) >= _MOST_IDLE:
        _idle.pop(next(iter(_idle))).close()
    _idle[key] = reader


def _tar_compression(path: Path) -> str | None:
    """The compression of a tar, "" for none; None if the archive is a zip."""
    name = path.name.lower()
    return next((_TARS[suffix] for suffix in _TARS if name.endswith(suffix)), None)


# ---------------------------------------------------------------------------- zip


def _in_zip(archive: Found) -> Iterator[tuple[str, int, int, str]]:
    with _lent(archive.path) as reader:
        listed = reader.infos()
    for info in listed:
        if info.is_dir():
            continue
        reason = ""
        if info.flag_bits & 1:
            reason = "encrypted; unpack the archive"
        elif info.compress_type not in _ZIP_METHODS:
            reason = f"compressed by a method that Python cannot read ({info.compress_type}); unpack it"
        elif (info.external_attr >> 16) & 0o170000 == 0o120000:
            reason = "a link inside an archive"
        yield info.filename, info.header_offset, info.file_size, reason


class _Zip:
    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._by_place = {info.header_offset: info for info in self._zip.infolist()}

    def infos(self) -> list[zipfile.ZipInfo]:
        return self._zip.infolist()

    def member(self, at: int) -> IO[bytes]:
        return self._zip.open(self._by_place[at])

    def close(self) -> None:
        self._zip.close()


# ---------------------------------------------------------------------------- tar


class _Header(tarfile.TarInfo):
    """A header that is no end where `tarfile` would take it for one."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            made = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if tar.ended:
                raise
            raise tarfile.ReadError("the archive has no end: cut short") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header inside the archive: {error}") from None
        tar.ended = False
        return made


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    ignore_zeros = True  # several archives in one file
    ended = False

    def forward(self) -> tarfile.TarInfo | None:
        """The next member; nothing of those before is kept."""
        found = self.next()
        self.members: list[tarfile.TarInfo] = []
        return found


def _described(member: tarfile.TarInfo) -> tuple[str, int, int, str]:
    reason = ""
    if member.issym() or member.islnk():
        reason = "a link inside an archive"
    elif not member.isreg():
        reason = "not an ordinary file"
    elif member.issparse():
        reason = "a file with holes; unpack the archive"
    return member.name, member.offset_data, member.size, reason


def _in_tar(archive: Found) -> Iterator[tuple[str, int, int, str]]:
    with archive.path.open("rb") as file, _Tar.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        while (member := tar.forward()) is not None:
            if not member.isdir():
                yield _described(member)


def _on_tape(archive: Found) -> Iterator[tuple[str, int, int, str]]:
    at = -1
    while True:
        # its user may open the member before it asks for the next
        with _lent(archive.path) as tape:
            member = tape.after(at)
        if member is None:
            return
        at = member.offset_data
        if not member.isdir():
            yield _described(member)


class _Tape:
    """A compressed tar."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._compression = path, compression
        self._rewind()

    def _rewind(self) -> None:
        self._file = self._path.open("rb")
        self._stream = decompressed(self._file, self._compression, self._path)
        self._tar = _Tar.open(fileobj=self._stream, mode="r|", encoding="utf-8", bufsize=_PIECE)
        self._member: tarfile.TarInfo | None = None
        self._part: _Part | None = None
        self._at_end = False

    def after(self, at: int) -> tarfile.TarInfo | None:
        """The member after the one at `at`; the first for -1."""
        if self._at(at):
            return self._forward()
        self.close()
        self._rewind()
        while self._at_place() < at and self._forward() is not None:
            pass
        return self._forward()

    def member(self, at: int) -> IO[bytes]:
        place = self._at_place()
        if place == at and self._part:
            if self._part.again():
                return io.BufferedReader(self._part, _PIECE)
            place = at + 1
        if place > at or self._at_end:
            self.close()
            self._rewind()
        while self._at_place() < at:
            if self._forward() is None:
                raise EOFError("the archive has changed")
        assert self._member
        self._part = _Part(self._tar.fileobj, self._member.size, hold=True)
        return io.BufferedReader(self._part, _PIECE)

    def _at(self, at: int) -> bool:
        return self._at_place() == at and not self._at_end

    def _at_place(self) -> int:
        return self._member.offset_data if self._member else -1

    def _forward(self) -> tarfile.TarInfo | None:
        self._member, self._part = self._tar.forward(), None
        self._at_end = self._member is None
        return self._member

    def close(self) -> None:
        self._file.close()


class _Part(io.RawIOBase):
    """The next `size` bytes of a stream. hold: keep what was read, up to _HELD, to be read again."""

    def __init__(self, stream: Any, size: int, hold: bool = False) -> None:
        self._stream, self._left = stream, size
        self._held = bytearray() if hold else None
        self._again = 0  # how much of what is held comes first

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing, as it may be read again."""

    def again(self) -> bool:
        """Begin from the first byte, if that is possible."""
        self._again = 0
        return self._held is not None

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        if self._held is not None and self._again < len(self._held):
            data = bytes(self._held[self._again : self._again + size])
        else:
            data = self._stream.read(min(size, self._left))
            if not data and self._left and size:
                raise EOFError("the archive ends inside a member")
            self._left -= len(data)
            if self._held is not None:
                self._held += data
        self._again += len(data)
        if self._held is not None and len(self._held) > _HELD:
            self._held = None
        buffer[: len(data)] = data
        return len(data)
