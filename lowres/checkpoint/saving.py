"""Saving while training goes on: a snapshot in host memory, which a thread writes to the disk.

Where host memory has no room for a snapshot, tensors are written from where they are, a piece at a time, and
training waits. Both write the same bytes.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lowres import disk
from lowres.checkpoint.folder import State, write
from lowres.checkpoint.kept import Kept
from lowres.checkpoint.tensors import host_memory

Units = Callable[[], Iterable[tuple[str, Mapping[str, Tensor]]]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written. seconds: until it was on the disk. paused: for which training waited."""

    step: int
    bytes: int
    seconds: float
    paused: float


class Saver:
    """Writes the checkpoints of a run and keeps what `kept` says.

    beside: whether there is host memory for a snapshot of so many bytes. again: whether writing may be tried
    again after an error, which needs the units a second time.
    """

    def __init__(self, kept: Kept, beside: Callable[[int], bool], again: bool = True) -> None:
        self.kept, self._beside, self._again = kept, beside, again
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._error: BaseException | None = None

    def save(self, units: Units, state: State, more: Mapping[str, bytes]) -> None:
        """Save, or begin to. units: name and tensors of each unit. more: other files. Raises OSError,
        NotFinite."""
        began = time.perf_counter()
        self.finish()
        snapshot = _snapshot(units, self._beside)
        if snapshot is None:
            size = self._write(units, state, more)
            seconds = time.perf_counter() - began
            self._saved.append(Saved(state.step, size, seconds, seconds))
            return
        paused = time.perf_counter() - began

        def work() -> None:
            try:
                size = self._write(lambda: snapshot, state, more)
                self._saved.append(Saved(state.step, size, time.perf_counter() - began, paused))
            except BaseException as error:  # raised by `finish` or `done`
                self._error = error

        self._thread = threading.Thread(target=work, name=f"checkpoint {state.step}", daemon=True)
        self._thread.start()

    def done(self) -> list[Saved]:
        """What was written since the last call. Raises what a save in the background raised."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()
        saved, self._saved = self._saved, []
        return saved

    def finish(self) -> None:
        """Wait until everything is written. Raises what a save in the background raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, units: Units, state: State, more: Mapping[str, bytes]) -> int:
        def once() -> int:
            try:
                return write(self.kept.make_way(state.step), units(), state, more)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if self._again and full and self.kept.make_room():
                    return write(self.kept.make_way(state.step), units(), state, more)
                raise

        size = disk.retried(once) if self._again else once()
        self.kept.add(state.step)
        return size


def _snapshot(units: Units, has_room: Callable[[int], bool]) -> list[tuple[str, dict[str, Tensor]]] | None:
    """A copy of all tensors in host memory; None if there is no room for it."""
    found = [(name, dict(tensors)) for name, tensors in units()] if has_room(0) else []
    sizes = [aligned(tensor.nbytes) for _, tensors in found for tensor in tensors.values()]
    if not found or not has_room(sum(sizes)):
        return None
    slab, at, copies = host_memory(sum(sizes)), 0, []
    for name, tensors in found:
        copied = {}
        for key, tensor in tensors.items():
            part = slab[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copied[key] = part.copy_(tensor.detach())
            at += aligned(tensor.nbytes)
        copies.append((name, copied))
    return copies


def aligned(nbytes: int) -> int:
    """Rounded up to a multiple of 64, so that a view of any format may begin there."""
    return math.ceil(nbytes / 64) * 64
