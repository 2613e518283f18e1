"""Files that are written whole or not at all, and read without trust. Every error names its file, what is
wrong with it, and the remedy for this kind of error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from lowres.errors import UserError

T = TypeVar("T")
# seconds before writing is tried again: a network file system may recover
PAUSES = (0.5, 2.0, 5.0)
_FULL = "make room on this disk, or raise the quota"
_GONE = "the folder was moved, deleted or unmounted; put it back"
_FAILING = "the disk reports an error; check it (dmesg), and copy what is there to another disk"
_FORBIDDEN = "give this user the right to it"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.EEXIST: "a file is in the place of a folder; move it away",
    errno.EISDIR: "a folder is in the place of the file; move it away",
    errno.EINVAL: "something else is in the place of the file; move it away",
    errno.ELOOP: "a link is in the place of the file; move it away",
    errno.ESTALE: _GONE,
    errno.EIO: _FAILING,
    errno.ENXIO: _FAILING,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: "the disk is read-only, as after an error; check it and mount it again for writing",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; end other programs",
    errno.EFBIG: "this file system, or a limit (ulimit -f), does not allow files of this size; use another",
    errno.ENAMETOOLONG: "give the folder a shorter name",
}
# how the files begin that stand for large ones until Git LFS has fetched them
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
_SHOWN = 60
# another try gives the same error
_FINAL = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG}


class DiskError(UserError):
    """A file cannot be written or read. errno: of the system's error."""

    def __init__(self, path: Path, error: OSError, doing: str) -> None:
        self.path, self.errno = path, error.errno
        super().__init__(f"{path}: cannot be {doing} ({what_failed(error)}); {remedy(error)}")


@contextlib.contextmanager
def named(path: Path, doing: str) -> Iterator[None]:
    """Raise DiskError, which names this file, for an OSError in the block. doing: "written", "read"."""
    try:
        yield
    except OSError as error:
        raise DiskError(path, error, doing) from None


def what_failed(error: OSError) -> str:
    """The system's words for an error, without the file's name."""
    return error.strerror or str(error) or type(error).__name__


def remedy(error: OSError) -> str:
    """What to do about an error of the system."""
    return _REMEDIES.get(error.errno or 0, "check the disk")


def instead(start: bytes) -> str:
    """What a file is that is not what its name says, by its first bytes, and the remedy; empty if they do not
    tell. A download may leave a pointer, a page or a message in its place."""
    if start.startswith(LFS_POINTER):
        return "it is a Git LFS pointer: `git lfs pull` gets the file"
    line = start[:_SHOWN].decode("ascii", "replace").splitlines()
    if not line or line[0].startswith("{") or not line[0].isprintable() or "\ufffd" in line[0]:
        return ""
    return f"it is a text that begins with {line[0]!r}; get the file again"


def retried(action: Callable[[], T]) -> T:
    """The result of an action that writes; after an OSError it is tried again, after growing pauses."""
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno in _FINAL:
                raise
        time.sleep(pause)
    return action()


def open_regular(path: Path, follow: bool = True) -> BinaryIO:
    """An ordinary file, opened for reading. follow: whether it may be a symbolic link. Raises OSError for
    anything else, without waiting: a named pipe would never answer."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "is a link") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not an ordinary file")
    return os.fdopen(descriptor, "rb")


def open_to_write(path: Path, mode: int) -> FileIO:
    """An ordinary file, opened for writing without a buffer. mode: O_TRUNC or O_APPEND. Raises OSError for
    anything else, without waiting: a named pipe would wait for a reader."""
    flags = os.O_WRONLY | os.O_CREAT | mode | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not an ordinary file")
    return FileIO(descriptor, "wb" if mode == os.O_TRUNC else "ab")


def write_all(file: FileIO, text: bytes | memoryview) -> None:
    """Write all of a text. Raises OSError; a full disk may have taken a part."""
    left = memoryview(text).cast("B")
    while len(left):
        written = file.write(left)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[written:]


def read_whole(path: Path, follow: bool = True, limit: int = 1 << 30) -> bytes:
    """The content of an ordinary file. Raises OSError, also if it has more than `limit` bytes."""
    with open_regular(path, follow) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"has more than {limit:,} bytes")
        return file.read()


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that after a crash at any moment it is complete or as it was before. Raises OSError."""
    temporary = path.with_name(path.name + ".unfinished")
    try:
        write_synced(temporary, parts)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def store(path: Path, content: bytes) -> None:
    """`write_whole`, tried again after an error. Raises DiskError."""
    with named(path, "written"):
        retried(lambda: write_whole(path, content))


def write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file and wait until the disk has it. Raises OSError."""
    with open_to_write(path, os.O_TRUNC) as file:
        for part in parts:
            write_all(file, part)
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder. File systems that cannot do this are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
