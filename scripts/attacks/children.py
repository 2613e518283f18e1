"""Commands in forked copies of this process, so that each takes milliseconds instead of the import of torch.

This process must have no threads of torch (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lowres.cli import main

CRASHED = 70  # exit code of a child that raised
PATIENCE = 90.0  # seconds until a child counts as hanging
Command = Sequence[object] | Callable[[], int | None]


@dataclass(frozen=True)
class Done:
    """The end of a child. code: exit code, negative if a signal ended it; None if it hung."""

    code: int | None
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return (self.err.strip().splitlines() or [""])[-1]

    def ill(self) -> str:
        """What no command may do: raise, hang, fail without a line or with several; "" if nothing."""
        if self.code is None:
            return "hangs"
        if self.code == CRASHED or "Traceback" in self.text:
            return f"traceback: {self.line}"
        if self.code < 0:
            return f"ended by signal {-self.code}"
        lines = [line for line in self.err.splitlines() if line.startswith("lowres: ")]
        if self.code and len(lines) != 1:
            return f"exit {self.code} with {len(lines)} lines: {self.err[-200:]!r}"
        return ""


@dataclass
class Child:
    """A command that runs. Its output goes to files unless `before` redirects it."""

    pid: int
    out: Path
    err: Path
    began: float = field(default_factory=time.monotonic)
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def send(self, number: int) -> None:
        """Send a signal, unless the child has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, patience: float = PATIENCE) -> Done:
        """Wait for the end, and kill the child if it does not come."""
        deadline, pause, hung = time.monotonic() + patience, 0.001, False
        while not self.ended():
            if time.monotonic() > deadline:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(pause)
            pause = min(0.02, pause * 1.3)
        out, err = (path.read_text("utf-8", "replace") for path in (self.out, self.err))
        self.out.unlink()
        self.err.unlink()
        return Done(None if hung else self.status, out, err)


def start(command: Command, before: Callable[[], object] | None = None) -> Child:
    """Start a command line, or call a function, in a copy of this process. before: is called in it first."""
    names = []
    for _ in range(2):
        handle, name = tempfile.mkstemp(prefix="torture-")
        os.close(handle)
        names.append(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest has threads, which a child does not use
        pid = os.fork()
    if pid:
        return Child(pid, Path(names[0]), Path(names[1]))
    code = CRASHED
    try:
        for descriptor, name in zip((1, 2), names, strict=True):
            handle = os.open(name, os.O_WRONLY)
            os.dup2(handle, descriptor)
            os.close(handle)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # that of tqdm is shared by forked processes, and stays closed if one is killed while it has it
        tqdm.set_lock(threading.RLock())
        if before is not None:
            before()
        code = _call(command)
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _call(command: Command) -> int:
    if callable(command):
        return command() or 0
    try:
        return main([str(part) for part in command])
    except SystemExit as left:  # of argparse
        return left.code if isinstance(left.code, int) else 1


def run(command: Command, before: Callable[[], object] | None = None, patience: float = PATIENCE) -> Done:
    return start(command, before).wait(patience)


# ---- many at a time

Case = tuple[str, Callable[[], Any]]


def each(cases: Iterable[Case], jobs: int, patience: float = 300.0) -> Iterator[tuple[str, Any]]:
    """Name and result of every case, each in a child of its own, `jobs` at a time. A result is what JSON can
    hold; of a case that raised or hung, it is the text of that as an exception."""
    waiting, running = iter(cases), list[tuple[str, Child]]()
    left = True
    while left or running:
        while left and len(running) < jobs:
            try:
                name, action = next(waiting)
            except StopIteration:
                left = False
                break
            running.append((name, start(lambda action=action: print(json.dumps(action())))))  # type: ignore[misc]
        for one in [*running]:
            name, child = one
            late = time.monotonic() - child.began > patience
            if not (child.ended() or late):
                continue
            running.remove(one)
            done = child.wait(0)
            failed = done.code != 0
            text = "the case hung" if done.code is None else f"the case raised: {done.err.strip()[-600:]}"
            yield name, RuntimeError(text) if failed else json.loads(done.out.splitlines()[-1])
        time.sleep(0.003)
