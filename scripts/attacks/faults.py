"""File operations counted, and at the n-th one the process is killed or the operation fails.

What counts is an operation on something below a folder: to open a file for writing, write (each call of the
system, as C does it), fsync, rename, remove, make a folder, truncate. Reading does not count.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowres import disk

# operations that need room on a disk
TAKE_ROOM = ("open", "write", "fsync", "mkdir", "pwrite")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Install it in a child only: it replaces functions of `os`, `io` and `builtins` for good.

    below: folder whose operations count. at: number of the operation, from 1, at which something happens; 0 =
    never. what: "kill"; "torn", which writes half and then kills; or a number of an error, with which this
    operation fails and, if `lasting`, all later ones. kinds: operations that count (empty: all). log: file to
    which the name of each is added, through a descriptor that is opened now.
    """

    def __init__(
        self,
        below: Path,
        at: int = 0,
        what: str | int = "kill",
        lasting: bool = False,
        kinds: tuple[str, ...] = (),
        log: Path | None = None,
    ) -> None:
        self._below, self._at, self._what = os.path.realpath(below), at, what
        self._lasting, self._kinds, self._count = lasting, kinds, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if log else None
        self._write = os.write
        self._install()
        disk.PAUSES = (0.0, 0.0, 0.0)

    # ---- what happens

    def _is_there(self, path: Any, folder: int | None = None) -> bool:
        if isinstance(path, int):
            try:
                there = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        else:
            there = os.fsdecode(path)
            if folder is not None and not os.path.isabs(there):
                there = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), there)
            there = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(there))), Path(there).name)
        return there == self._below or there.startswith(self._below + "/")

    def _meets(self, kind: str, path: Any, folder: int | None = None) -> bool:
        """Count an operation; whether it is one at which something happens."""
        if (self._kinds and kind not in self._kinds) or not self._is_there(path, folder):
            return False
        self._count += 1
        if self._log is not None:
            name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
            self._write(self._log, f"{kind} {Path(name).name}\n".encode())
        return bool(self._at) and (self._count == self._at or (self._lasting and self._count > self._at))

    def _strike(self, path: Any) -> None:
        if isinstance(self._what, str):
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError(self._what, os.strerror(self._what), *(() if isinstance(path, int) else (path,)))

    # ---- where it is noticed

    def _install(self) -> None:
        for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate"):
            self._replace(name, "unlink" if name == "remove" else name)
        self._replace("fsync", "fsync")
        self._replace("pwrite", "pwrite")
        opened = os.open

        def os_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & _WRITING and self._meets("open", path, named.get("dir_fd")):
                self._strike(path)
            return opened(path, flags, *more, **named)

        os.open = os_open
        io_open = builtins.open

        def any_open(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+") or not self._is_there(file):
                return io_open(file, mode, buffering, *more, **named)
            if not isinstance(file, int) and self._meets("open", file):
                self._strike(file)
            raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd=named.get("closefd", True))
            raw.faults = self
            if buffering == 0:
                return raw
            whole: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return whole
            text = {key: value for key, value in named.items() if key in ("encoding", "errors", "newline")}
            return io.TextIOWrapper(whole, **text)

        builtins.open = io.open = any_open
        # so that copies are written by `write`
        inside: Any = shutil
        inside._USE_CP_SENDFILE = False

    def _replace(self, name: str, kind: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def counted(path: Any, *more: Any, **named: Any) -> Any:
            if self._meets(kind, path, named.get("dir_fd", named.get("src_dir_fd"))):
                self._strike(path)
            return original(path, *more, **named)

        setattr(os, name, counted)

    def before_write(self, raw: _Raw, data: Any) -> Any:
        """The data that are written now; may not return."""
        if not self._meets("write", raw.fileno()):
            return data
        half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
        first = self._count == self._at
        if self._what == "torn":
            io.FileIO.write(raw, half)
        elif self._what == errno.ENOSPC and first and len(half):
            return half  # a full disk takes a part, and fails at the next call
        self._strike(raw.fileno())


class _Raw(io.FileIO):
    faults: Faults

    def write(self, data: Any, /) -> int:
        return super().write(self.faults.before_write(self, data))


def count(log: Path) -> list[str]:
    """The operations in a log."""
    return log.read_text("utf-8").splitlines() if log.exists() else []
