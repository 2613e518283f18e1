"""A simulated CUDA device: complete enough for PyTorch to run a whole training step.

Under FakeTensorMode every operation determines shapes, dtypes and devices and computes nothing. Operations on
tensors of two devices raise, as on a card. PyTorch still asks the CUDA runtime for a device and a stream; a
small library that is loaded before the real ones answers. Streams, events and page-locked memory are replaced
in Python, so the order of copies is not tested here.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 1 << 30
CUDA = torch.device("cuda", 0)
# set in a process with the library: the name of its card
LOADED = "LOWRES_PRETENDED_CARD"


@dataclass(frozen=True)
class Card:
    """What the CUDA runtime reports about a card. shared: largest shared memory of a block, bytes."""

    name: str
    capability: tuple[int, int]
    gib: int
    processors: int
    shared: int


CARDS = {
    f"{card.capability[0]}.{card.capability[1]}": card
    for card in (
        Card("RTX 2080 Ti", (7, 5), 11, 68, 65536),
        Card("A100", (8, 0), 40, 108, 166912),
        Card("RTX 3090", (8, 6), 24, 82, 101376),
        Card("RTX 4090", (8, 9), 24, 128, 101376),
        Card("H100", (9, 0), 80, 132, 232448),
        Card("RTX 5090", (12, 0), 32, 170, 101376),
    )
}

RUNTIME = """
#include <driver_types.h>
#include <string.h>
typedef void *handle;
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, NAME);
    p->major = MAJOR; p->minor = MINOR; p->totalGlobalMem = (size_t)GIBS << 30;
    p->multiProcessorCount = PROCESSORS; p->sharedMemPerBlockOptin = SHARED; p->sharedMemPerBlock = 49152;
    p->warpSize = 32; p->maxThreadsPerMultiProcessor = 1536; p->maxThreadsPerBlock = 1024;
    p->regsPerMultiprocessor = 65536; p->l2CacheSize = 72 << 20;
    return 0;
}
int cudaMemGetInfo(size_t *unused, size_t *total) { *unused = *total = (size_t)GIBS << 30; return 0; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaSetDevice(int d) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
int cudaStreamCreateWithPriority(handle *s, unsigned f, int p) { *s = (handle)0x1000; return 0; }
int cudaStreamIsCapturing(handle s, int *status) { *status = 0; return 0; }
int cudaStreamQuery(handle s) { return 0; }
int cudaStreamSynchronize(handle s) { return 0; }
int cudaStreamWaitEvent(handle s, handle e, unsigned f) { return 0; }
int cudaEventCreateWithFlags(handle *e, unsigned f) { *e = (handle)0x2000; return 0; }
int cudaEventRecord(handle e, handle s) { return 0; }
int cudaEventRecordWithFlags(handle e, handle s, unsigned f) { return 0; }
int cudaEventQuery(handle e) { return 0; }
int cudaEventSynchronize(handle e) { return 0; }
int cudaEventDestroy(handle e) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
"""
DRIVER = """
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int ordinal) { *d = 0; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) { *f = 0; *active = 0; return 0; }
"""


def environment(key: str, folder: Path) -> dict[str, str]:
    """Environment of a process with a card of CARDS. folder: where its library is built."""
    card = CARDS[key]
    facts = {
        "NAME": f'"{card.name}"',
        "MAJOR": card.capability[0],
        "MINOR": card.capability[1],
        "GIBS": card.gib,
        "PROCESSORS": card.processors,
        "SHARED": card.shared,
    }
    runtime = [
        *(f"-I{place}" for place in _headers()),
        *(f"-D{name}={value}" for name, value in facts.items()),
    ]
    _compile(RUNTIME, folder / "libpretended.so", runtime)
    _compile(DRIVER, folder / "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])
    library = {"LD_PRELOAD": str(folder / "libpretended.so"), "LD_LIBRARY_PATH": str(folder)}
    return os.environ | library | {LOADED: key}


def loaded_card() -> str | None:
    """The key in CARDS of this process's card."""
    return os.environ.get(LOADED)


def _headers() -> list[Path]:
    """Folders with CUDA's headers in a CUDA build of PyTorch: those of the runtime, and those of Triton
    (which may be older) for the compiler headers that these include."""
    found = [path.parent for site in sys.path for path in Path(site).glob("nvidia/**/include/driver_types.h")]
    triton = importlib.util.find_spec("triton")
    places = triton.submodule_search_locations or () if triton else ()
    return [*found, *(Path(place) / "backends/nvidia/include" for place in places)]


def _compile(text: str, library: Path, options: list[str]) -> None:
    command = ["gcc", "-w", "-shared", "-fPIC", *options, "-x", "c", "-o", str(library), "-"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip().splitlines()[-1]}")


class _Nothing:
    """Replaces a stream, an event, or the context manager of a current stream."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _do_nothing(self, *arguments: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = record = _do_nothing

    def elapsed_time(self, later: _Nothing) -> float:
        return 1.0


def _address(tensor: Tensor) -> int:
    """Unique per place, because the code compares addresses and fake tensors have none."""
    return (id(tensor.untyped_storage()) << 48) + int(tensor.storage_offset()) * tensor.element_size()


def _no_content(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
    """uint8 memory to read into and to write out, instead of a fake tensor's."""
    assert tensor.dtype == torch.uint8 and tensor.device.type == "cpu", "only bytes on the host have content"
    return numpy.zeros(tuple(tensor.shape), numpy.uint8)


def replace_what_computes() -> None:
    """Replace, in this process, everything that would need a card."""
    replaced: Any = torch.cuda
    replaced.Stream = replaced.Event = replaced.stream = _Nothing
    replaced.current_stream = _Nothing
    replaced.max_memory_allocated = replaced.max_memory_reserved = lambda *arguments: GIB
    tensors: Any = Tensor
    tensors.pin_memory = lambda self, *arguments: self
    fakes: Any = FakeTensor
    fakes.data_ptr, fakes.numpy = _address, _no_content
    internals: Any = fake_tensor
    internals.init_gpu_context = lambda *arguments, **more: None  # it would allocate
    torch.autograd.set_multithreading_enabled(False)


@dataclass(frozen=True)
class Place:
    """A line of code: path inside the package, function, line number."""

    path: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} in {self.function}"


class Waits(TorchDispatchMode):
    """Records where the host waits for the device; every number that the host reads is 1.

    The host waits when it reads a number, and in a copy between device and host that is not `non_blocking`.
    places: the innermost lines of the package, in order; repeated waits of one line count once. inside: how
    often each operation waits by itself, by name. attention: the chosen kernels.
    """

    ATTENTION = "_scaled_dot_product_"
    INSIDE = ("_linalg_svd", "_linalg_eigh", "nonzero")

    def __init__(self, package: Path) -> None:
        super().__init__()
        self.package = package
        self.places: list[Place] = []
        self.inside: dict[str, int] = {}
        self.attention: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if args[0].is_cuda:
                self._note()
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name in ("_to_copy", "copy_") and self._blocks(name, args, kwargs):
            self._note()
        if name in self.INSIDE and args[0].is_cuda:
            self.inside[name] = self.inside.get(name, 0) + 1
        if name.startswith(self.ATTENTION):
            kind = name.removeprefix(self.ATTENTION).removesuffix("_backward").removesuffix("_for_cpu")
            self.attention.add(kind.removesuffix("_attention"))
        return func(*args, **kwargs)

    @staticmethod
    def _blocks(name: str, args: Any, kwargs: Any) -> bool:
        if name == "copy_":
            target, source = args[0].device, args[1].device
            free = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, free = args[0].device, kwargs.get("non_blocking", False)
            target = torch.device(kwargs.get("device") or source)
        return target.type != source.type and not free

    def _note(self) -> None:
        frame: Any = sys._getframe(2)
        place = Place("elsewhere", "?", 0)
        while frame is not None:
            path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
            # a dispatch mode of the package only passes operations on
            if path.is_relative_to(self.package) and function != "__torch_dispatch__":
                place = Place(str(path.relative_to(self.package)), function, frame.f_lineno)
                break
            frame = frame.f_back
        if not self.places or self.places[-1] != place:
            self.places.append(place)


@contextmanager
def pretended(package: Path) -> Iterator[Waits]:
    """In the block, tensors are fake and the device exists; yields the waits."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits(package) as waits:
        yield waits
