"""What a run writes while it goes on, for those who look at it: names of files, and lines that are read once
each, also while more are written. It imports no torch, so looking at a run costs no second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from lowres import disk

# see lowres.runs
CONFIG, CHECKPOINTS, SUMMARY, PLAN = "config.toml", "checkpoints", "summary.json", "plan.json"
METRICS, EVENTS, SAMPLES = "metrics.jsonl", "events.jsonl", "samples.jsonl"

BLOCK = 1 << 21  # bytes that are read at a time
LONGEST = 1 << 24  # bytes of a line; a longer one is no record
MOST = 1 << 29  # bytes of a file that are read, some seconds of work


class Lines:
    """The JSON objects in the lines of a file that another process may append to, or replace by another.

    unread: complete lines so far that are no JSON object. restarts: how often the file was found to be
    another one, or shorter, so that reading began again and what was read before does not count. skips: of
    so many blocks only one was read, because the file is larger than `most` bytes.
    """

    def __init__(self, path: Path, most: int = MOST) -> None:
        self.path, self.most = path, most
        self.unread, self.restarts, self.skips = 0, 0, 1
        self._file: BinaryIO | None = None
        self._rest = b""

    def more(self) -> Iterator[list[dict[str, Any]]]:
        """What has been added since the last call, in blocks. Look at `restarts` with each block. Raises
        DiskError."""
        with disk.named(self.path, "read"):
            if not self._opened():
                return
            file = self._file
            assert file is not None
            skips = -(-(os.fstat(file.fileno()).st_size - file.tell()) // self.most)
            self.skips = max(self.skips, skips)
            while content := file.read(BLOCK):
                whole, newline, rest = (self._rest + content).rpartition(b"\n")
                self._rest = rest if len(rest) < LONGEST else b"-"
                if newline:
                    yield self._objects(whole)
                if skips > 1 and len(content) == BLOCK:
                    file.seek((skips - 1) * BLOCK, os.SEEK_CUR)
                    file.readline()
                    self._rest = b""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> bool:
        """Open the file, or find out that the one that is open is no longer it."""
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False
        if self._file is not None:
            known = os.fstat(self._file.fileno())
            if os.path.samestat(known, now) and now.st_size >= self._file.tell():
                return True
            self.close()
            self.restarts, self.unread, self.skips, self._rest = self.restarts + 1, 0, 1, b""
        self._file = disk.open_regular(self.path)
        return True

    def _objects(self, lines: bytes) -> list[dict[str, Any]]:
        try:  # the usual case, in one call
            found = from_json(b"[" + lines.replace(b"\n", b",") + b"]", cache_strings="keys")
        except ValueError:
            found = [_object(line) for line in lines.split(b"\n")]
        objects = [one for one in found if type(one) is dict]
        self.unread += max(0, lines.count(b"\n") + 1 - len(objects))
        return objects


def _object(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return None
