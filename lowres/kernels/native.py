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
import shutil
import subprocess
import tempfile
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

# what a profile counts a kernel as, by its name without the number format
KINDS = {
    "int8_update": marks.UPDATE,
    "int8": marks.UPDATE,
    "bf16_update": marks.UPDATE,
    "bf16": marks.UPDATE,
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
    """The library, built if the cache does not have it. Raises UnavailableError."""
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None
    )
    if compiler is None:
        raise UnavailableError("there is no C++ compiler (g++ or clang++)")
    path = _cache() / f"kernels-{_fingerprint(compiler)}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(
            f"the kernels for CPUs cannot be built with {compiler}: {_reason(error)}"
        ) from None


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
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowres"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"lowres-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # in a folder that all may write, it could be someone else's
        raise OSError(f"{folder} belongs to someone else")
    return folder


def _fingerprint(compiler: str) -> str:
    """Of all that the library depends on: the code, the compiler, and the CPU, as caches may be shared."""
    found = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        found.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    found.update(repr((FLAGS, TUNED, version, platform.machine(), _cpu_flags(), torch.__version__)).encode())
    return found.hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(compiler: str, path: Path) -> None:
    """Compile and link under another name, then rename, so that no one loads half a library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for tuned in TUNED:
            objects = []
            commands = []
            for source in sorted(SOURCES.glob("*.cpp")):
                objects.append(str(Path(folder) / f"{source.stem}.o"))
                commands.append([compiler, *FLAGS, *tuned, "-c", str(source), "-o", objects[-1]])
            running = [
                subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for c in commands
            ]
            errors = [process.communicate(timeout=300)[1] for process in running]
            if not any(process.returncode for process in running):
                break
        else:
            text = next(e for e in errors if e).decode(errors="replace")
            raise OSError(next((line for line in text.splitlines() if "error" in line), text[:200]))
        library = Path(folder) / "kernels.so"
        # Without -fopenmp: the library then takes the OpenMP that PyTorch has loaded. Two of them would keep
        # two pools of threads that wait for work by spinning. If there is none to take, it gets its own.
        for more in ([], ["-fopenmp"]):
            command = [compiler, "-shared", *objects, *more, "-o", str(library)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            try:
                ctypes.CDLL(str(library), mode=os.RTLD_NOW)
                break
            except OSError:
                if more:
                    raise
        os.replace(library, path)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or b"").decode(errors="replace").strip().splitlines()[-1:][0]
    return str(error)
