"""events.jsonl: what happened to a run, one JSON object per line, for people who ask why.

started (machine, versions, and what the bits of a result depend on; settings that changed on resume), saved,
imported, spike, bad, rolled back, set aside (a damaged checkpoint), memory (a smaller micro-batch), note,
stopped, finished. A line that cannot be written does not stop a run.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lowres import __version__, disk, ranks
from lowres.records import EVENTS


def read(folder: Path) -> list[dict[str, Any]]:
    """The events of a run; lines that cannot be read are left out."""
    try:
        lines = disk.read_whole(folder / EVENTS, limit=1 << 40).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = event.get("step", 0) if isinstance(event, dict) else None
        if isinstance(step, int):
            found.append({"step": step} | event)
    return found


class Events:
    """Appends to the events of a run, on the first rank only."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS
        self._folder: os.stat_result | None = None

    def write(self, event: str, **more: Any) -> None:
        """Append one line. more: values that JSON can hold."""
        if not ranks.is_first():
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with suppress(OSError):
            here = self._path.parent.stat()
            self._folder = self._folder or here
            if not os.path.samestat(self._folder, here):  # the folder was moved, and another is there
                return
            text = json.dumps({"time": now, "event": event, **more}, default=str)
            with disk.open_to_write(self._path, os.O_APPEND) as file:
                disk.write_all(file, f"{text}\n".encode())

    def say(self, event: str, text: str, **more: Any) -> None:
        """Append one line, and print its text."""
        ranks.say(text)
        self.write(event, text=text, **more)

    def started(self, **more: Any) -> None:
        """The start of a process: with the same values here, results are the same bit for bit."""
        self.write(
            "started",
            host=socket.gethostname(),
            pid=os.getpid(),
            lowres=__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            processor=torch.backends.cpu.get_cpu_capability(),
            threads=torch.get_num_threads(),
            ranks=ranks.size(),
            **more,
        )
