"""The rooms that tensors live in: the compute device ("gpu") and host memory ("host").

Everything large is a slab: one allocation of exactly the bytes that are needed, with the name of its
component, so that the memory in use can be counted (`Rooms.held`). On a CUDA machine host slabs are
page-locked, so that copies can run in parallel with computation. They are allocated normally and then
registered with CUDA: PyTorch's pinned allocator rounds up to powers of two, and 6 GiB would become 8.

On a machine without a GPU both rooms are the same memory. Components keep their rooms, the same copies
happen, and the memory that a GPU would need can be counted.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres.errors import DoesNotFit
from lowres.marks import TRANSFER, mark

GPU, HOST = "gpu", "host"
# since PyTorch 2.13 its pinned allocator can be set not to round up, which `lowres.device` does
EXACT_LOCKING = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


@dataclass(frozen=True)
class Component:
    """Bytes of one thing in one room (gpu, host or disk). phase: when it is alive; "" means always."""

    name: str
    room: str
    bytes: int
    phase: str = ""


@dataclass(frozen=True)
class Slab:
    """A description of one or more equal slabs of a component. bytes: of each."""

    component: str
    room: str
    bytes: int
    count: int = 1

    @property
    def total(self) -> int:
        return self.bytes * self.count


# texts of other errors than torch.OutOfMemoryError that mean a full GPU: from CUDA's libraries and its driver
FULL = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)
# texts in the RuntimeError of PyTorch's CPU allocator
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory")
# cudaErrorMemoryAllocation; and cudaErrorOperatingSystem, if the limit of locked memory is reached
_CANNOT_LOCK = (2, 304)


@dataclass(frozen=True)
class Homes:
    """What lives in host memory between its uses; everything else is on the GPU.

    weights, state: names of units. stash: how many of its boundaries, counted from the first. carry: whether
    it does.
    """

    weights: frozenset[str] = frozenset()
    state: frozenset[str] = frozenset()
    stash: int = 0
    carry: bool = False


class Rooms:
    """Allocates slabs and knows which ones exist.

    For measurements: `phase` is the phase of the step, `allocating` the room that new tensors count to.
    `on_phase` is called with the phase that begins; `phase` is still the one that ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_phase: list[Callable[[str], None]] = []
        self._phase = ""
        self.allocating = GPU
        self._slabs: list[tuple[str, str, weakref.ref[torch.UntypedStorage]]] = []

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        for told in self.on_phase:
            told(phase)
        self._phase = phase

    def slab(self, component: str, room: str, nbytes: int) -> Tensor:
        """uint8 [nbytes], all zero. Raises DoesNotFit if the memory cannot be allocated."""
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
        """Allocate the slabs of a description."""
        return [self.slab(slab.component, slab.room, slab.bytes) for _ in range(slab.count)]

    def _allocate(self, room: str, nbytes: int) -> Tensor:
        if self.device.type == "cuda" and room == HOST:
            return _page_locked(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    @contextmanager
    def allocate_in(self, room: str) -> Iterator[None]:
        """New tensors in the block count to this room."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the GPU is full."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)


def _is_lack_of_memory(error: Exception) -> bool:
    """False for the RuntimeError that every CUDA call raises after a kernel has failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OSError):
        return True
    return any(text in str(error) for text in _NO_MEMORY)


def _page_locked(nbytes: int) -> Tensor:
    """Zeroed host memory in whole pages, registered with CUDA until it is freed."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # locking 24 GiB in pages of 4 KiB takes long
    slab = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(slab.data_ptr(), nbytes, 0))
    if failed:
        error = MemoryError if failed in _CANNOT_LOCK else RuntimeError
        raise error(f"cudaHostRegister: error {failed}")
    weakref.finalize(slab.untyped_storage(), _unlock, slab.data_ptr(), memory)
    return slab


def _unlock(address: int, memory: mmap.mmap) -> None:
    """memory: what is at the address. Held until now, as it must be unregistered before it is freed."""
    with suppress(RuntimeError):  # if the device has failed
        torch.cuda.synchronize()  # a copy may still be running
    torch.cuda.cudart().cudaHostUnregister(address)


def place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor is: its storage, and the offset in it in elements. Unlike `data_ptr`, it also works for
    tensors without memory, which a plan traces."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


STREAMED = ("cuda",)  # types of devices that copy in parallel with computation
Event = torch.cuda.Event | None
Copies = Iterable[tuple[Tensor, Tensor]]  # (destination, source)


class Mover:
    """Copies between the rooms in parallel with computation: one stream per direction.

    Every copy waits for the computation that was enqueued before it: this may still read what a fetch will
    overwrite, and write what a store will read. On a CPU a copy is done when the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        streamed = device.type in STREAMED
        self._in = torch.cuda.Stream(device) if streamed else None
        self._out = torch.cuda.Stream(device) if streamed else None

    def fetch(self, copies: Copies, after: Iterable[Event] = ()) -> Event:
        """Host to GPU. after: earlier copies that wrote the source or read the destination. Returns an event
        for `wait` and `after`."""
        return _copy(self._in, copies, after)

    def store(self, copies: Copies) -> Event:
        """GPU to host. Returns an event for `wait` and `after`."""
        return _copy(self._out, copies, ())

    def wait(self, event: Event) -> None:
        """Let the following computation wait for a copy."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def finish(self) -> None:
        """Wait on the host until all copies are done."""
        if self._in is not None and self._out is not None:
            self._in.synchronize()
            self._out.synchronize()

    def join(self) -> None:
        """Let the following computation wait for all copies. As soon as its result is there, the copies are
        done and the CPU may read host slabs."""
        if self._in is not None and self._out is not None:
            torch.cuda.current_stream().wait_stream(self._in)
            torch.cuda.current_stream().wait_stream(self._out)


def _copy(stream: torch.cuda.Stream | None, copies: Copies, after: Iterable[Event]) -> Event:
    if stream is None:
        with mark(TRANSFER, "between the rooms"):
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
