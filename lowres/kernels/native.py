"""The kernels for CPUs: C++ in `cpu/`, compiled at the first use and kept in a cache folder.

The library is built for the CPU of this machine by the compiler that is there ($CXX, c++, g++ or clang++).
It takes a second or two, once for a version of lowres and a kind of CPU. Without a compiler everything works
with PyTorch's operations; `load` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowres import marks
from lowres.marks import mark

SOURCES = Path(__file__).parent / "cpu"
# results must not depend on which additions the compiler fuses with multiplications; rounding modes and
# floating-point traps are never changed, so loops may be vectorised freely
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# for this CPU, the first that the compiler knows; ARM compilers call it -mcpu
TUNED = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())

# names of folders in which a library is being built, and how long that may take
UNFINISHED, TIMEOUT_S = "building-", 300
# what a profile counts a kernel as, by its name without the number format
KINDS = {
    "int8_update": marks.UPDATE,
    "int8": marks.UPDATE,
    "bf16_update": marks.UPDATE,
    "bf16": marks.UPDATE,
    "blocks": marks.UPDATE,
    "int8_fill": marks.UPDATE,
    "dequantise": marks.DEQUANTISE,
    "quantise_rows": marks.QUANTISE,
    "quantise_columns": marks.QUANTISE,
    "norm": marks.NORM,
    "norm_backward": marks.NORM,
    "swiglu": marks.SWIGLU,
    "swiglu_backward": marks.SWIGLU,
    "rotate": marks.ROPE,
    "epilogue": marks.GEMM,
    "cross_entropy": marks.LOSS,
    "group_encode": marks.QUANTISE,
    "group_decode": marks.DEQUANTISE,
}


class UnavailableError(Exception):
    """There are no compiled kernels on this machine; the text says why."""


@cache
def load() -> ctypes.CDLL:
    """The library, built if the cache does not have it whole. Raises UnavailableError with one line."""
    try:
        path = _cache() / f"kernels-{_fingerprint()}.so"
        if _is_whole(path):
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"there is no folder for compiled kernels: {_one_line(str(error))}") from None
    reason = "there is no C++ compiler (g++ or clang++)"
    for compiler in _compilers():
        try:
            _build(compiler, path)
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            text = f"the kernels for CPUs cannot be built with {' '.join(compiler)}: {_reason(error)}"
            reason = _one_line(text)
    raise UnavailableError(reason)


def _compilers() -> Iterator[list[str]]:
    """Commands, $CXX first, perhaps with arguments."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            yield command


@dataclass(frozen=True)
class Strided:
    """A tensor whose kernel takes its strides as arguments; other tensors must be contiguous."""

    tensor: Tensor


Argument = Tensor | Strided | int | float | None


def call(name: str, *arguments: Argument) -> None:
    """Call a kernel. Tensors are passed as addresses, int as int64 and float as double."""
    function = getattr(load(), name)
    with mark(KINDS[name.rsplit("_", 1)[0]], name):
        function(*map(_passed, arguments))


def _passed(argument: Argument) -> Any:
    if isinstance(argument, Strided):
        return ctypes.c_void_p(argument.tensor.data_ptr())
    if isinstance(argument, Tensor):
        assert argument.is_contiguous(), "a kernel for CPUs got a tensor that is not contiguous"
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(0)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def suffix(dtype: torch.dtype) -> str:
    """What the name of a kernel ends with for tensors of this dtype."""
    return DTYPES[dtype]


def _cache() -> Path:
    """A folder that keeps compiled kernels, in the user's cache or else among temporary files."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lowres"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    folder = Path(tempfile.gettempdir()) / f"lowres-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # in a folder that all may write, it could be someone else's
        raise OSError(f"{folder} belongs to someone else")
    return folder


def _fingerprint() -> str:
    """Of what the library depends on: the code, and the CPU, as caches may be shared."""
    found = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        found.update(path.read_bytes())
    found.update(repr((FLAGS, TUNED, platform.machine(), _cpu_flags(), torch.__version__)).encode())
    return found.hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was built. To load one that was cut short would end the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _sum_of(path).read_text()
    except OSError:
        return False


def _build(compiler: list[str], path: Path) -> None:
    """Compile and link under another name, then rename, so that no one loads half a library."""
    for left in path.parent.glob(f"{UNFINISHED}*"):  # by builds that were killed
        if time.time() - left.stat().st_mtime > TIMEOUT_S:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:
        objects = _compile(compiler, Path(folder))
        library = Path(folder) / "kernels.so"
        # Without -fopenmp: the library then takes the OpenMP that PyTorch has loaded. Two of them would keep
        # two pools of threads that wait for work by spinning. If there is none to take, it gets its own.
        for more in ([], ["-fopenmp"]):
            command = [*compiler, "-shared", *objects, *more, "-o", str(library)]
            subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S)
            try:
                ctypes.CDLL(str(library), mode=os.RTLD_NOW)
                break
            except OSError:
                if more:
                    raise
        with library.open("rb") as file:
            os.fsync(file.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        _sum_of(path).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        os.replace(library, path)


def _compile(compiler: list[str], folder: Path) -> list[str]:
    """Object files of all sources, for this CPU if the compiler can."""
    errors: list[str] = []
    for tuned in TUNED:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        running = [
            subprocess.Popen(
                [*compiler, *FLAGS, *tuned, "-c", str(source), "-o", out],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for source, out in zip(sources, objects, strict=True)
        ]
        errors = [p.communicate(timeout=TIMEOUT_S)[1].decode(errors="replace") for p in running]
        if not any(process.returncode for process in running):
            return objects
    failed = next(process.returncode for process in running if process.returncode)
    raise OSError(_telling("\n".join(errors)) or f"it ended with {failed}")


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        text = (error.stderr or b"").decode(errors="replace")
        return _telling(text) or f"it ended with {error.returncode}"
    return str(error)


def _telling(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = (line for word in ("error", "cannot find") for line in lines if word in line)
    return next(found, lines[-1] if lines else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
