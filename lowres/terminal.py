"""Output for people: losing it never ends a command, and text from files cannot control the terminal.

`guard` is for the life of a command. A stream whose other end is gone (a closed pipe, a lost terminal, a full
disk behind a redirection) is replaced by nothing, down to its descriptor, so that C code, child processes and
Python's own flush at exit do not fail either. Everything that is printed goes through `clean`, except what
progress bars move the cursor with.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings and isolates of writing directions
    "\ud800-\udfff]"  # lone surrogates
)
# what tqdm writes on its own to move from line to line
_MOVES = re.compile("(?:\n|\x1b\\[A)+")


def clean(text: str) -> str:
    """The text with everything in it that controls a terminal or the order of writing shown as an escape:
    \\x1b, \\u202e. Newlines and tabs stay."""
    return _CONTROLS.sub(_escape, text)


def aligned(rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> list[str]:
    """Rows of a table as lines. words: columns that begin at the left, as numbers do not."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _shown(text: str) -> str:
    """Clean text, in which a progress bar may return to the start of its line and move to others."""
    if _MOVES.fullmatch(text):
        return text
    start, end = text.startswith("\r"), len(text) - (len(text) > 1 and text.endswith("\r"))
    return text[:start] + clean(text[start:end]) + text[end:]


class Guarded:
    """A text stream whose `write` and `flush` never fail. Everything else is the stream's own.

    lost: why the stream was given up; None while it works. Characters that control a terminal, or that the
    stream's encoding lacks, are written as escapes. Text for a full pipe that does not wait is dropped.
    """

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name, self.stream = name, stream
        self.lost: Exception | None = None

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.stream, attribute)

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self._write(_shown(text))
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self.stream.flush()
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:
                self._lose(error)

    def finish(self) -> None:
        """Write out what waits in the stream, so that Python's own flush at exit cannot fail."""
        if self.lost is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:  # also BlockingIOError: the pipe is still full
                self._lose(error)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _lose(self, error: Exception) -> None:
        """Give the stream up. What waits in it goes nowhere."""
        self.lost = error
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or has no descriptor
            _point_at_nothing(self.stream.fileno())
            self.stream.flush()


@contextmanager
def guard() -> Iterator[list[Guarded]]:
    """Guard sys.stdout and sys.stderr, whatever they are now; they are put back at the end. Streams that are
    guarded already stay as they are. Gives both; at the end, their `lost` is final."""
    _fill_standard_descriptors()
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            before = getattr(sys, name)
            if isinstance(before, Guarded):
                continue
            # Python has None for what was closed when it began
            stream = before or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            guarded = Guarded(name, stream)
            setattr(sys, name, guarded)
            stack.callback(setattr, sys, name, before)
            stack.callback(guarded.finish)
        yield [sys.stdout, sys.stderr]  # type: ignore[list-item]


def lost() -> dict[str, Exception]:
    """The guarded streams that were given up so far, by name ("stdout", "stderr"), with the reason."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Guarded)]
    return {stream.name: stream.lost for stream in streams if stream.lost is not None}


def _fill_standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2. Otherwise the next file to be opened, a checkpoint say, gets that
    number, and what C code or a child process prints goes into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _point_at_nothing(descriptor)


def _point_at_nothing(descriptor: int) -> None:
    """Replace what a descriptor stands for, for child processes too."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing == descriptor:
        os.set_inheritable(descriptor, True)
        return
    try:
        os.dup2(nothing, descriptor)
    finally:
        os.close(nothing)
