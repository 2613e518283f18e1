"""Lost connections: what they are, how long they are waited for, and what is said meanwhile."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lowres.errors import UserError, first_line
from lowres.ranks import say

# seconds before each new try, about ten minutes in all
PAUSES = (1, 2, 4, 8, 16, 32, *[60] * 9)
# for a source that has never answered: there is nothing to lose yet, and its name or the network may be wrong
FIRST_PAUSES = PAUSES[:3]
FIRST_SECONDS = 15.0
# seconds after which a line says what is waited for
SILENCE = 3.0

_reached: set[str] = set()  # sources that have given a row to this process
_NETWORK = {
    getattr(errno, name)
    for name in (
        "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "ENETDOWN", "ENETUNREACH",
        "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN",
    )
    if hasattr(errno, name)
}  # fmt: skip
# by the package and the class, as a package that is not installed raises nothing
_LOST = {
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
    ("requests", "ChunkedEncodingError"),
    ("urllib3", "ProtocolError"),
    ("urllib3", "TimeoutError"),
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    # the hub could not be asked, and the file is not in its cache
    ("huggingface_hub", "LocalEntryNotFoundError"),
}
_LOST_HERE = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    ssl.SSLError,
    http.client.IncompleteRead,
    http.client.BadStatusLine,
)
LOCAL = "to train on local text instead: --set data.source=PATH, or make ... DATA=PATH"
_LATER = "start the same command again when there is a connection, a run with --resume; nothing is lost"
T = TypeVar("T")


class Patience:
    """How long one reader of a source waits for lost connections: about ten minutes without an answer."""

    def __init__(self, source: str, offline: bool = False) -> None:
        self._source, self._offline = source, offline
        self._failures, self._begun = 0, time.monotonic()

    def answered(self) -> None:
        self._failures = 0
        reached(self._source)

    def wait(self, error: Exception) -> None:
        """Pause before the next try. Raises UserError if the connection is not to blame, or has been lost for
        too long."""
        known = self._source in _reached
        pauses = PAUSES if known else FIRST_PAUSES
        patient = known or time.monotonic() - self._begun < FIRST_SECONDS
        if self._offline or not is_lost(error):
            raise UserError(f"{self._source}: {in_words(error)}; {LOCAL}") from None
        if self._failures >= len(pauses) or not patient:
            raise UserError(f"{self._source}: {in_words(error)}; {_LATER if known else LOCAL}") from None
        say(f"{self._source}: connection lost: {in_words(error)}; next try in {pauses[self._failures]} s")
        time.sleep(pauses[self._failures])
        self._failures += 1


def reached(source: str) -> None:
    """The source has answered, now or in an earlier process: it is worth waiting for."""
    _reached.add(source)


def is_lost(error: BaseException) -> bool:
    """Whether an error, or its cause, is one of the connection or of an overloaded server."""
    at: BaseException | None = error
    while at is not None:
        status = _status(at)
        if status is not None:
            return status in (408, 425, 429) or status >= 500
        if isinstance(at, ssl.SSLCertVerificationError):
            return False
        classes = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(at).__mro__}
        if isinstance(at, _LOST_HERE) or classes & _LOST:
            return True
        if isinstance(at, OSError) and at.errno in _NETWORK:
            return True
        at = at.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error is about."""
    response = getattr(error, "response", None)
    for found in (getattr(response, "status_code", None), getattr(error, "status", None)):
        if isinstance(found, int) and 400 <= found < 600:
            return found
    return None


def in_words(error: BaseException) -> str:
    return f"{first_line(error)} ({type(error).__name__})"


class Watch:
    """Says once, in each wait for a row, that it takes long. A thread looks, as a timer for each row would
    take more time than the row."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._since: float | None = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="waiting", daemon=True).start()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items. The time that their user takes does not count."""
        iterator = iter(items)
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._since = None
            given = [item]
            del item  # it may be large
            yield given.pop()
            self._since = time.monotonic()

    def end(self) -> None:
        self._ended.set()

    def _look(self) -> None:
        said: float | None = None
        while not self._ended.wait(SILENCE / 8):
            since = self._since
            if since is not None and since != said and time.monotonic() - since > SILENCE:
                said = since
                say(self._line)


@contextmanager
def watched(source: str, row: int) -> Iterator[Watch]:
    """row: to which the data set must be read first."""
    doing = f"it is read up to row {row:,}, to go on there" if row else "no answer yet"
    watch = Watch(f"waiting for {source}: {doing}")
    try:
        yield watch
    finally:
        watch.end()
