"""How a run ends before its last step: a signal or a time limit, which first let it finish a step and save.

SIGINT (Ctrl-C), SIGTERM (Slurm, systemd, a spot machine) and SIGHUP (a closed terminal) are a request. A
second one leaves at once. A signal that the process ignores from its start (nohup) stays ignored.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, BinaryIO

from lowres import ranks

REQUESTS = ("SIGINT", "SIGTERM", "SIGHUP")


class Left(KeyboardInterrupt):
    """A signal that is no request: a second one, or one before the first step. Leave at once. The argument is
    the number of the signal."""


@contextmanager
def loud() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: with a line, and nothing left half done. Several
    ranks are ended by their launcher, after the first of them has spoken."""

    def leave(number: int, _: FrameType | None) -> None:
        raise Left(number)

    before = {}
    if threading.current_thread() is threading.main_thread() and ranks.size() == 1:
        for name in REQUESTS[1:]:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopper:
    """Listens for requests while it is entered. asked: the name of the signal, or "". began: when the time
    limit began, by time.monotonic."""

    def __init__(self, max_minutes: float = 0.0, began: float = 0.0) -> None:
        self._limit, self._began = 60 * max_minutes, began
        self.asked = ""
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (getattr(signal, name) for name in REQUESTS if hasattr(signal, name)):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self._child is not None:
            self._child.send_signal(number)
        if self.asked:
            raise Left(number)
        self.asked = signal.Signals(number).name
        ranks.say(f"{self.asked}: finishing this step, then saving; a second signal leaves at once")

    def run(self, command: list[str], log: BinaryIO, output: BinaryIO | None = None) -> int:
        """Run a child process, and pass requests on to it; returns its exit code. It has a session of its
        own, so that it hears a Ctrl-C once, from here. output: takes its stdout, if that is not for the
        log."""
        self._child = subprocess.Popen(command, stdout=output or log, stderr=log, start_new_session=True)
        try:
            return self._child.wait()
        finally:
            self._child = None

    def reason(self, reserve: float) -> str:
        """Why the run should stop now, or "". reserve: seconds that another step and a save take. All ranks
        get the same answer."""
        late = self._limit and time.monotonic() - self._began + reserve > self._limit
        asked, out = ranks.total(bool(self.asked), bool(late and ranks.is_first()))
        if asked:
            return self.asked or "a signal"
        return f"train.max_minutes = {self._limit / 60:g}" if out else ""
