"""Rows of a data set that the `datasets` library streams, over lost connections.

A lost connection does not lose the row that was next: reading goes on there, in the same files of the same
commit. `datasets` has tries of its own inside a read (20, 5 s apart), but none when it opens a data set. What
is wrong with the data set itself (not found, another schema, damaged) is an error at once.
"""

from __future__ import annotations

import errno
import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

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
_LOCAL = "to train on local text instead: --set data.source=PATH, or make ... DATA=PATH"
_LATER = "start the same command again when there is a connection, a run with --resume; nothing is lost"
# versions of `datasets` in which the state no longer moves after it was loaded once (their issue 8308), so
# that a second lost connection would bring rows again
_STATES_THAT_STOP = ("5.0.0",)
T = TypeVar("T")


def rows(source: str, start: int) -> Iterator[dict[str, Any]]:
    """The rows of hf:<dataset>[:<config>[:<split>]] from `start` on. Raises UserError."""
    name, config, split = (source.removeprefix("hf:") + "::").split(":")[:3]
    if not name or source.count(":") > 3:
        raise UserError(f"{source}: write it as hf:<dataset>[:<config>[:<split>]]")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: hf: sources need the package datasets: pip install datasets") from None
    # what is lost is said in one line, here
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    row, failures, begun = start, 0, time.monotonic()
    opened: Any = None  # kept, because a data set that is opened again may be of another commit
    state: dict[str, Any] | None = None  # where it goes on; so the rows before are not read again
    has_state = getattr(datasets, "__version__", "") not in _STATES_THAT_STOP
    while True:
        try:
            with _watched(source, row if state is None else 0) as watch:
                if opened is None:
                    opened = datasets.load_dataset(
                        name,
                        config or None,
                        split=split or "train",
                        streaming=True,
                        trust_remote_code=False,  # version 3 would ask, and run a data set's script
                    ).skip(row)
                elif state is not None:
                    opened.load_state_dict(state)
                for found in watch.over(opened):
                    state = opened.state_dict() if has_state and hasattr(opened, "state_dict") else None
                    row, failures = row + 1, 0
                    _reached.add(source)
                    yield found
            return
        except UserError:
            raise
        except Exception as error:  # all errors of `datasets` and its libraries
            offline = getattr(getattr(datasets, "config", None), "HF_HUB_OFFLINE", False)
            known = source in _reached or start > 0
            pauses = PAUSES if known else FIRST_PAUSES
            patient = failures < len(pauses) and (known or time.monotonic() - begun < FIRST_SECONDS)
            if offline or not is_lost(error):
                raise UserError(f"{source}: {_in_words(error)}; {_LOCAL}") from None
            if not patient:
                raise UserError(f"{source}: {_in_words(error)}; {_LATER if known else _LOCAL}") from None
            if state is None:
                opened = None
            say(f"{source}: connection lost: {_in_words(error)}; next try in {pauses[failures]} s")
            time.sleep(pauses[failures])
            failures += 1


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


def _in_words(error: BaseException) -> str:
    return f"{first_line(error)} ({type(error).__name__})"


class _Watch:
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
            yield item
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
def _watched(source: str, row: int) -> Iterator[_Watch]:
    """row: to which the data set must be read first."""
    doing = f"it is read up to row {row:,}, to go on there" if row else "no answer yet"
    watch = _Watch(f"waiting for {source}: {doing}")
    try:
        yield watch
    finally:
        watch.end()
