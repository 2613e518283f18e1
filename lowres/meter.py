"""Measured memory: what really is alive, by room and by phase of the step.

On CUDA the allocator reports it. On a CPU both rooms are the same memory, so every tensor storage is
followed from its allocation until it is freed. A storage that is a slab of the host room counts as host
memory; everything else counts as GPU memory, because it would be there.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowres.rooms import GPU, HOST, Rooms

GIB = 1 << 30


class Meter:
    """Peak memory of a run. On a CPU only the first step and the first evaluation are counted: later ones
    need the same, and counting is slow."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._seen: set[str] = set()
        self._peak = 0

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Measure the block, if none of this kind was measured before."""
        if what in self._seen or self._rooms.device.type == "cuda":
            yield
            return
        self._seen.add(what)
        with LiveTensors(self._rooms) as live:
            yield
        self._peak = max(self._peak, live.peak[GPU])

    def readings(self) -> dict[str, float]:
        """For the metrics, in GiB. peak_mem_gib: in the GPU room, as the allocator reports it on CUDA;
        host_mem_gib: slabs in the host room; peak_rss_gib: resident memory of the process."""
        device = self._rooms.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else self._peak
        host = sum(size for (_, room), size in self._rooms.held().items() if room == HOST)
        return {"peak_mem_gib": peak / GIB, "host_mem_gib": host / GIB, "peak_rss_gib": rss_gib()}


def rss_gib() -> float:
    """Peak resident memory of this process."""
    try:  # getrusage would include the parent's peak before exec
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIB
    except (OSError, IndexError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensor storage that exist while it is active: the slabs of `rooms`, and tensors
    that are made meanwhile. `current` and `peak` are bytes by room, `phases` the peak in the GPU room by
    `rooms.phase`. It sees every operation, so it is slow: use it for one step, or in tests.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; the default imports torch._dynamo, which takes a second."""
        return False

    def __init__(self, rooms: Rooms | None = None) -> None:
        super().__init__()
        self.rooms = rooms
        self.current = {GPU: 0, HOST: 0}
        self.peak = {GPU: 0, HOST: 0}
        self.phases: dict[str, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> LiveTensors:
        for _, room, storage in self.rooms.slabs() if self.rooms else ():
            self._count(storage, room)
        super().__enter__()
        return self

    def reset(self) -> None:
        """Forget the peaks so far."""
        self.peak, self.phases = dict(self.current), {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = (*args, *(kwargs or {}).values())
        given = {id(a.untyped_storage()) for a in inputs if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # a view of an older tensor is not new memory
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._count(tensor.untyped_storage(), self.rooms.allocating if self.rooms else GPU)
        return result

    def _count(self, storage: torch.UntypedStorage, room: str) -> None:
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self._alive.pop(key, None)
            self.current[room] -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.current[room] += size
        self.note(room)

    def note(self, room: str, more: int = 0) -> None:
        """Update the peaks with what is alive now plus `more` bytes that exist only for a moment."""
        now = self.current[room] + more
        self.peak[room] = max(self.peak[room], now)
        if room == GPU and self.rooms is not None:
            phase = self.rooms.phase
            self.phases[phase] = max(self.phases.get(phase, 0), now)
