"""A folder that one process keeps for itself. The lock ends with the process, even when that is killed.

The lock is on a file in the folder (flock), which says who has it. A file that a killed process has left
means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from lowres.disk import DiskError, read_whole, what_failed
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, checked, parse
from lowres.terminal import clean

LOCK = "run.lock"
# what file systems without locks answer
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
# another process may remove the file between two looks at it, but not for ever
_TRIES = 100
# descriptors of the locks of this process
_open: set[int] = set()


class Holder(Record):
    """The content of a lock's file."""

    host: str = Field(max_length=255)
    pid: int
    since: str = Field(max_length=40)


@dataclass(frozen=True)
class Held:
    """note: a line for the user if other processes are not kept out."""

    note: str | None = None


@contextmanager
def held(folder: Path, what: str = "in use", name: str = LOCK) -> Iterator[Held]:
    """Keep a folder for this process, and make it, with its parents, if it is missing. At the end the lock's
    file is removed, and with it the folders that were made here, if nothing else is in them.

    Raises UserError if another process has the folder ("FOLDER: WHAT by process ..."), or if there cannot be
    such a folder; DiskError if it cannot be written to.
    """
    path, made = folder.absolute() / name, list[Path]()
    try:
        descriptor, note = _take(path, made, f"{folder}: {what}")
        try:
            yield Held(note)
        finally:
            _give_back(descriptor, path)
    finally:
        with contextlib.suppress(OSError):  # something is in it
            for each in reversed(made):
                each.rmdir()


def holder(folder: Path, name: str = LOCK) -> Holder | None:
    """Who has a folder, as far as the lock's file says; a killed process leaves it behind. It touches no
    lock."""
    try:
        return checked(parse(read_whole(folder / name, follow=False, limit=4096)), Holder)
    except (OSError, Damaged):
        return None


def _take(path: Path, made: list[Path], what: str) -> tuple[int | None, str | None]:
    """The descriptor of the locked file, or None and a note. Adds every folder that it makes to `made`."""
    for _ in range(_TRIES):
        _make(path.parent, made)
        try:
            import fcntl
        except ImportError:  # Windows
            return None, None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the process that had made the folder has removed it
            continue
        except OSError as error:
            raise DiskError(path, error, "written") from None
        _open.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, descriptor):
                _sign(descriptor)
                return descriptor, None
        except BlockingIOError:
            holder = _holder(descriptor)
            _close(descriptor)
            raise UserError(f"{what} by {holder}; wait for it, or give another folder") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                _close(descriptor)
                raise DiskError(path, error, "locked") from None
            _give_back(descriptor, path)
            return None, (
                f"{path.parent}: its file system has no locks ({what_failed(error)}); take care that no two "
                "processes use it"
            )
        _close(descriptor)
    raise UserError(f"{what} by processes that come and go; wait for them, or give another folder")


def _make(folder: Path, made: list[Path]) -> None:
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster, or it is a broken link
                each.mkdir()
                made.append(each)
    except NotADirectoryError as error:
        raise UserError(f"{Path(error.filename).parent}: this is a file; give a folder") from None
    except OSError as error:
        raise DiskError(folder, error, "made") from None
    if not folder.is_dir():
        raise UserError(f"{folder}: this is not a folder; give another")


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write into the file who has it."""
    holder = Holder(host=socket.gethostname(), pid=os.getpid(), since=time.strftime("%Y-%m-%d %H:%M:%S %z"))
    with contextlib.suppress(OSError):  # the disk is full, but the lock holds
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder.model_dump()).encode(), 0)


def _holder(descriptor: int) -> str:
    """Who has the file, in words."""
    try:
        found = checked(parse(os.pread(descriptor, 4096, 0)), Holder)
    except (Damaged, OSError):
        return "another process"
    return clean(f"process {found.pid} on {found.host} since {found.since}")


def _give_back(descriptor: int | None, path: Path) -> None:
    """Remove the file and end the lock. A copy of this process that came from fork() has no lock to end."""
    if descriptor in _open:
        with contextlib.suppress(OSError):
            if _is(path, descriptor):
                path.unlink()
        _close(descriptor)


def _close(descriptor: int) -> None:
    _open.discard(descriptor)
    os.close(descriptor)


def _leave_to_parent() -> None:
    """A lock lasts as long as any copy of its descriptor, so a copy of this process must not have one: as a
    worker of a data loader, it would keep the folder after its parent was killed."""
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
