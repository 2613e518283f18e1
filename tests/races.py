"""A race detector for copies and computation that needs no GPU.

The engine runs on the CPU with streams and events that only count. Every stream and the host have a vector
clock: for each stream, the number of its accesses that have certainly ended. Work that is enqueued on a
stream comes after the earlier work of this stream and after everything that the host has seen. With
`wait_stream` and `wait_event` a stream, and with a synchronisation the host, sees what another stream has
seen. A dispatch mode sees every operation and records which bytes of which slab it reads or writes.

A race is two accesses to the same bytes, at least one of them a write, if it is not certain that the earlier
one has ended when the later one begins. Freeing memory that may still be in use is a race too.

Memory belongs to the host if it is a slab there, if it was declared so (`Detector.on_host`), or if it was
made only from such memory. An operation on host memory only runs on the host. All others run on the GPU; of
these, only copies may use slabs of the host.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lowres
from lowres import rooms
from lowres.checkpoint import tensors
from lowres.optim import optimizer
from lowres.rooms import HOST, Rooms

SOURCE = Path(lowres.__file__).parent
aten = torch.ops.aten
# they return the result of a computation to Python, so the host waits for it
WAITING = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
}


@dataclass(frozen=True)
class Access:
    """One operation's use of a piece of a slab. time: by the clock of its stream."""

    memory: str
    start: int
    end: int
    stream: str
    time: int
    writes: bool
    operation: str

    def __str__(self) -> str:
        verb = "writes" if self.writes else "reads"
        return f"{self.operation} on {self.stream} {verb} {self.memory} [{self.start}:{self.end}]"


@dataclass
class Slab:
    """The accesses to a slab so far: for each stream, the last read and the last write of every piece."""

    name: str
    room: str
    accesses: dict[str, dict[tuple[int, int, bool], Access]] = field(default_factory=dict)
    latest: dict[str, int] = field(default_factory=dict)


class Stream:
    """Replaces torch.cuda.Stream. The host is a stream too."""

    def __init__(self, detector: Detector, name: str) -> None:
        self.detector, self.name = detector, name
        self.clock: dict[str, int] = {}

    def join(self, clock: dict[str, int]) -> None:
        for name, time in clock.items():
            self.clock[name] = max(time, self.clock.get(name, 0))

    def wait_stream(self, other: Stream) -> None:
        self.join(other.clock)

    def wait_event(self, event: Event) -> None:
        self.join(event.clock)

    def synchronize(self) -> None:
        self.detector.host.join(self.clock)


class Event:
    """Replaces torch.cuda.Event."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.clock: dict[str, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.detector.host.join(self.clock)


class Detector:
    """Finds races in the code that runs in its context. races: descriptions. answers: places where the host
    waited for a result."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.answers: list[str] = []
        self.host, self.compute = Stream(self, "the host"), Stream(self, "the compute stream")
        self.current = self.compute
        self.copied = 0
        self._streams: list[Stream] = []
        self._slabs: dict[int, Slab] = {}
        self._made: dict[str, int] = {}
        self._of_host: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._alive: list[weakref.ref[torch.UntypedStorage]] = []  # the callback needs a living reference
        self._stack = ExitStack()

    def check(self) -> None:
        """Fail with the first races, if there are any."""
        assert not self.races, "\n".join([f"{len(self.races)} races, first:", *self.races[:4]])

    def __enter__(self) -> Detector:
        enter = self._stack.enter_context
        for name, fake in (
            ("Stream", self._make_stream),
            ("Event", lambda: Event(self)),
            ("stream", self._on),
            ("current_stream", lambda _=None: self.current),
            ("synchronize", self._synchronize),
        ):
            enter(mock.patch.object(torch.cuda, name, fake))
        enter(mock.patch.object(optimizer, "kind_of", lambda _: "cuda"))  # other code has no difference here
        enter(mock.patch.object(rooms, "STREAMED", (*rooms.STREAMED, "cpu")))
        enter(mock.patch.object(Rooms, "slab", self._slab(Rooms.slab)))
        enter(mock.patch.object(tensors, "_bounce", self._bounce(tensors._bounce)))
        enter(mock.patch.object(tensors, "_on_host", self.is_of_host))
        enter(mock.patch.object(tensors, "_fill", self._read_into(tensors._fill)))
        enter(_Calls(self))
        enter(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # streams

    def _make_stream(self, _: torch.device) -> Stream:
        number, way = divmod(len(self._streams), 2)  # a mover makes one in and one out
        self._streams.append(Stream(self, f"mover {number + 1} {('in', 'out')[way]}"))
        return self._streams[-1]

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _synchronize(self, _: object = None) -> None:
        for stream in (self.compute, *self._streams):
            stream.synchronize()

    def answer(self) -> None:
        """The host waits for a result of the computation."""
        self.answers.append(where())
        self.compute.synchronize()

    # memory

    def on_host(self, tensor: Tensor) -> Tensor:
        """Declare that the memory of a tensor belongs to the host."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._of_host[key] = weakref.ref(storage, lambda _: self._of_host.pop(key, None))
        return tensor

    def is_of_host(self, tensor: Tensor) -> bool:
        key = id(tensor.untyped_storage())
        slab = self._slabs.get(key)
        return slab.room == HOST if slab is not None else key in self._of_host

    def _slab(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def slab(made_by: Rooms, component: str, room: str, nbytes: int) -> Tensor:
            made = allocate(made_by, component, room, nbytes)
            storage = made.untyped_storage()
            key, number = id(storage), self._made.get(component, 0)
            self._made[component] = number + 1
            self._slabs[key] = Slab(f"{component} #{number} ({room})", room)
            self._alive.append(weakref.ref(storage, lambda _: self._free(self._slabs.pop(key))))
            self.touch([(made, True)], self.host if room == HOST else self.compute, "zeros")
            return made

        return slab

    def _free(self, slab: Slab) -> None:
        """Host memory is gone at once; freed GPU memory is used again by later work of the compute stream."""
        seen, may_use = dict(self.host.clock), {self.host.name}
        if slab.room != HOST:
            may_use.add(self.compute.name)
            for name, time in self.compute.clock.items():
                seen[name] = max(time, seen.get(name, 0))
        for stream in slab.accesses.keys() - may_use:
            for access in slab.accesses[stream].values():
                if access.time > seen.get(stream, 0):
                    self.races.append(f"{slab.name} is given back ({where()}) while\n  {access}")

    def touch(self, used: list[tuple[Tensor, bool]], stream: Stream, operation: str) -> None:
        """An operation is enqueued on a stream; used: each tensor, and whether it is written."""
        found = [(self._slabs.get(id(t.untyped_storage())), t, writes) for t, writes in used]
        if stream not in (self.compute, self.host):
            assert all(slab is not None for slab, _, _ in found), f"{where()} copies what is no slab"
            self.copied += 1
        slabs = [(slab, t, writes) for slab, t, writes in found if slab is not None and t.numel()]
        if not slabs:
            return
        if stream is not self.host:
            stream.join(self.host.clock)
        time = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        operation = f"{operation} ({where()})"
        for slab, tensor, writes in slabs:
            start, end = _range(tensor)
            access = Access(slab.name, start, end, stream.name, time, writes, operation)
            self._compare(slab, access, stream.clock)
            slab.accesses.setdefault(stream.name, {})[start, end, writes] = access
            slab.latest[stream.name] = time

    def must_not_compute_on_the_host(self, used: list[tuple[Tensor, bool]], func: object) -> None:
        """Record a race if a GPU operation uses a slab of the host: it must be fetched first."""
        for tensor, _ in used:
            slab = self._slabs.get(id(tensor.untyped_storage()))
            if slab is not None and slab.room == HOST:
                self.races.append(f"{func} ({where()}) computes on {slab.name}")

    def _compare(self, slab: Slab, new: Access, clock: dict[str, int]) -> None:
        for stream, latest in slab.latest.items():
            seen = clock.get(stream, 0)
            if stream == new.stream or latest <= seen:
                continue
            for old in slab.accesses[stream].values():
                apart = old.end <= new.start or new.end <= old.start
                if old.time > seen and not apart and (old.writes or new.writes):
                    self.races.append(f"{new}\n  may come before the end of\n  {old}")

    # accesses of the host without an operation

    def _bounce(self, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: self.on_host(make())

    def _read_into(self, read: Callable[..., None]) -> Callable[..., None]:
        def read_into(file: Any, tensor: Tensor, *more: Any) -> None:
            if self.is_of_host(tensor):
                self.touch([(tensor, True)], self.host, "reading a file")
            read(file, tensor, *more)

        return read_into


class _Operations(TorchDispatchMode):
    """Sees every operation: its reads and writes, and whether the host waits for it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and the default calls torch._dynamo for every operation."""
        return False

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self._signatures: dict[Any, tuple[bool, list[tuple[str, bool]]]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_view, arguments = self._signature(func)
        if is_view:
            return result
        used = []
        for i, (name, writes) in enumerate(arguments):
            value = args[i] if i < len(args) else kwargs.get(name)
            values = value if isinstance(value, list | tuple) else (value,)
            used += [(v, writes) for v in values if isinstance(v, Tensor)]
        detector = self.detector
        places = [detector.is_of_host(tensor) for tensor, _ in used]
        by_host = bool(places) and all(places) and detector.current is detector.compute
        stream = detector.host if by_host else detector.current
        detector.touch(used, stream, str(func))
        if by_host:
            given = {id(tensor.untyped_storage()) for tensor, _ in used}
            for made in result if isinstance(result, list | tuple) else (result,):
                if isinstance(made, Tensor) and id(made.untyped_storage()) not in given:
                    detector.on_host(made)
        elif func is not aten.copy_.default:
            detector.must_not_compute_on_the_host(used, func)
            if func in WAITING:
                detector.answer()
        elif any(places) and not _is_non_blocking(args, kwargs):
            detector.answer()
        return result

    def _signature(self, func: Any) -> tuple[bool, list[tuple[str, bool]]]:
        """Whether the operation only makes views; the name of each argument, and whether it is written."""
        if func not in self._signatures:
            schema = func._schema
            alias = [a.alias_info for a in schema.arguments]
            arguments = [
                (a.name, info is not None and info.is_write)
                for a, info in zip(schema.arguments, alias, strict=True)
            ]
            returned = [r.alias_info for r in schema.returns]
            is_view = any(info is not None and not info.is_write for info in returned)
            self._signatures[func] = is_view and not any(w for _, w in arguments), arguments
        return self._signatures[func]


class _Calls(TorchFunctionMode):
    """Sees accesses to memory without an operation; answers `is_cuda` as it would be with a GPU."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func == _IS_CUDA:
            return not self.detector.is_of_host(args[0])
        if func in (Tensor.tolist, Tensor.cpu) and not self.detector.is_of_host(args[0]):
            self.detector.touch([(args[0], False)], self.detector.compute, func.__name__)
            self.detector.answer()
        elif func in (Tensor.tolist, Tensor.numpy):
            assert self.detector.is_of_host(args[0]), f"{where()}: the host looks at memory of the GPU"
            self.detector.touch([(args[0], False)], self.detector.host, func.__name__)
        return func(*args, **(kwargs or {}))


def _is_non_blocking(args: Any, kwargs: Any) -> bool:
    """Whether the host does not wait for this copy."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _range(tensor: Tensor) -> tuple[int, int]:
    """First byte, and last byte + 1, of a non-empty tensor in its storage."""
    last = sum(int((n - 1) * stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.itemsize, (start + last + 1) * tensor.itemsize


def where() -> str:
    """The line of lowres that is running; for a line in `rooms`, the line that called it."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = _file_of_lowres(frame.f_code.co_filename)
        if file:
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a test"


@cache
def _file_of_lowres(name: str) -> str:
    """The path of a file in the package; empty for `rooms` and for files outside the package."""
    path = Path(name)
    return "" if not path.is_relative_to(SOURCE) or path.name == "rooms.py" else str(path.relative_to(SOURCE))
