"""The rooms that tensors live in: the compute device ("gpu") and host memory ("host").

Everything large is a slab: one allocation of exactly the bytes that are needed, under the name of the
component it belongs to, so that what is really held can be counted (`Rooms.held`). On a CUDA machine
host slabs are page-locked, for copies beside the computation. They are registered, not allocated, as
such: PyTorch's pinned allocator rounds up to powers of two, and 6 GiB would become 8.

On a machine without a GPU both rooms are the same memory. Components keep their rooms, copies happen
where they would, and what the GPU would hold can be counted.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres.errors import DoesNotFit

GPU, HOST = "gpu", "host"
# since PyTorch 2.13 its allocator of locked memory can be told not to round up, and is (`lowres.device`)
EXACT_LOCKING = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


@dataclass(frozen=True)
class Component:
    """Bytes of one thing in one room (gpu, host or disk). phase: when it is alive; "" is always."""

    name: str
    room: str
    bytes: int
    phase: str = ""


@dataclass(frozen=True)
class Slab:
    """One or more equal slabs that are to be allocated for a component. bytes: of each."""

    component: str
    room: str
    bytes: int
    count: int = 1

    @property
    def total(self) -> int:
        return self.bytes * self.count


# what PyTorch's allocator of CPU memory says in a RuntimeError
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory")
# cudaErrorMemoryAllocation, and cudaErrorOperatingSystem where the limit of locked memory is reached
_CANNOT_LOCK = (2, 304)


@dataclass(frozen=True)
class Homes:
    """What lives in host memory between its uses; everything else is on the GPU.

    weights, state: names of units. stash: as many of the first boundaries. carry: whether it does.
    """

    weights: frozenset[str] = frozenset()
    state: frozenset[str] = frozenset()
    stash: int = 0
    carry: bool = False


class Rooms:
    """Allocates slabs and knows which exist.

    For measurements: `phase` is what a step is doing, `allocating` the room that a new tensor is for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase = ""
        self.allocating = GPU
        self._slabs: list[tuple[str, str, weakref.ref[torch.UntypedStorage]]] = []

    def slab(self, component: str, room: str, nbytes: int) -> Tensor:
        """uint8 [nbytes], all zero. Raises DoesNotFit if the memory cannot be had."""
        try:
            with self.allocate_in(room):
                slab = self._allocate(room, nbytes)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
            if not _is_lack_of_memory(error):
                raise
            raise DoesNotFit(
                f"{component}: {nbytes / 2**30:.2f} GiB of {room} memory cannot be allocated "
                f"({str(error).splitlines()[0]}); lower memory.budget_gib or memory.host_budget_gib"
            ) from None
        self._slabs.append((component, room, weakref.ref(slab.untyped_storage())))
        return slab

    def make(self, slab: Slab) -> list[Tensor]:
        """All slabs of a description."""
        return [self.slab(slab.component, slab.room, slab.bytes) for _ in range(slab.count)]

    def _allocate(self, room: str, nbytes: int) -> Tensor:
        if self.device.type == "cuda" and room == HOST:
            return _page_locked(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    @contextmanager
    def allocate_in(self, room: str) -> Iterator[None]:
        """Count tensors that are made in the block to a room."""
        before, self.allocating = self.allocating, room
        try:
            yield
        finally:
            self.allocating = before

    def slabs(self) -> list[tuple[str, str, torch.UntypedStorage]]:
        """Component, room and memory of every slab that is still in use."""
        alive = [(component, room, ref()) for component, room, ref in self._slabs]
        return [(component, room, storage) for component, room, storage in alive if storage is not None]

    def held(self) -> dict[tuple[str, str], int]:
        """Bytes in slabs by component and room."""
        found: dict[tuple[str, str], int] = {}
        for component, room, storage in self.slabs():
            found[component, room] = found.get((component, room), 0) + storage.nbytes()
        return found


def _is_lack_of_memory(error: Exception) -> bool:
    """Not so a RuntimeError that any CUDA call raises after a kernel went wrong."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OSError):
        return True
    return any(text in str(error) for text in _NO_MEMORY)


def _page_locked(nbytes: int) -> Tensor:
    """Zeroed host memory in whole pages, registered with CUDA until it is freed."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # 24 GiB in pages of 4 KiB take long to lock
    slab = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(slab.data_ptr(), nbytes, 0))
    if failed:
        error = MemoryError if failed in _CANNOT_LOCK else RuntimeError
        raise error(f"cudaHostRegister: error {failed}")
    weakref.finalize(slab.untyped_storage(), _unlock, slab.data_ptr(), memory)
    return slab


def _unlock(address: int, memory: mmap.mmap) -> None:
    """memory: what is there. It is held until now, as it may not go before it is unregistered."""
    with suppress(RuntimeError):  # of a device that has failed
        torch.cuda.synchronize()  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor is: its storage and the offset in it, in elements. Unlike `data_ptr` also of the tensors
    without memory that a plan traces."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


STREAMED = ("cuda",)  # types of devices that copy beside the computation
Event = torch.cuda.Event | None
Copies = Iterable[tuple[Tensor, Tensor]]  # (destination, source)


class Mover:
    """Copies between the rooms, beside the computation: one stream in each direction.

    Both wait for the computation that was enqueued before them: it may still read what a fetch will
    overwrite, and write what a store will read. On a CPU a copy is done when the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        streamed = device.type in STREAMED
        self._in = torch.cuda.Stream(device) if streamed else None
        self._out = torch.cuda.Stream(device) if streamed else None

    def fetch(self, copies: Copies, after: Iterable[Event] = ()) -> Event:
        """Host to GPU, after earlier copies that wrote the source or read the destination. Returns what
        `wait` and `after` take."""
        return _copy(self._in, copies, after)

    def store(self, copies: Copies) -> Event:
        """GPU to host. Returns what `wait` and `after` take."""
        return _copy(self._out, copies, ())

    def wait(self, event: Event) -> None:
        """Let the computation that follows wait for a copy."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def finish(self) -> None:
        """Wait on the host until all copies are done."""
        if self._in is not None and self._out is not None:
            self._in.synchronize()
            self._out.synchronize()

    def join(self) -> None:
        """Let the computation that follows wait for all copies. Who then waits for its result has waited for
        them too, and the CPU may look at host slabs."""
        if self._in is not None and self._out is not None:
            torch.cuda.current_stream().wait_stream(self._in)
            torch.cuda.current_stream().wait_stream(self._out)


def _copy(stream: torch.cuda.Stream | None, copies: Copies, after: Iterable[Event]) -> Event:
    if stream is None:
        for destination, source in copies:
            destination.copy_(source)
        return None
    stream.wait_stream(torch.cuda.current_stream())
    for event in after:
        if event is not None:
            stream.wait_event(event)
    with torch.cuda.stream(stream):
        for destination, source in copies:
            destination.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record(stream)
    return done
