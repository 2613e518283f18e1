"""Looks at this machine, and says what to mend before a run: driver, CUDA, PyTorch, compilers, memory, disk,
packages.

Each finding is a line. What is wrong or slow has a remedy in it. PyTorch is imported by the checks that need
it, so that a machine without it is told so.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowres.catalogue import recognise

OK, NOTE, MEND = "ok", "note", "mend"
GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
# packages that every run needs, with the oldest version; pyproject.toml says the same
REQUIRED = {
    "torch": "2.8",
    "numpy": "1.26",
    "pydantic": "2.7",
    "safetensors": "0.7",
    "sentencepiece": "0.2.3",
    "tqdm": "4.66.3",
    "pyyaml": "6",
}
# packages that some runs need: the oldest version, and what for
OPTIONAL = {
    "datasets": ("3", 'data.source = "hf:..."'),
    "pyarrow": ("21", ".parquet, .arrow and .feather files"),
    "zstandard": ("0.22", ".zst files"),
    "tokenizers": ("0.21", "a tokenizer.json"),
    "jinja2": ("3.1.6", "chat templates"),
    "bitsandbytes": ("0.49", "memory.moments = int8"),
    "matplotlib": ("3.8", "the picture of the loss"),
    "gguf": ("0.17.1", "lowres export --format gguf"),
    "lm_eval": ("0.4.12", "lowres eval --tasks"),
    "deepspeed": ("0.19", "memory.engine = deepspeed"),
}
# instructions that decide the speed of a CPU, by their flags: INT8 products, BF16 products, wide vectors
INSTRUCTIONS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16", "bf16"),
    "AMX": ("amx_int8",),
    "I8MM": ("i8mm",),
}
CAN_SCHEDULE = hasattr(os, "sched_getaffinity")
# free bytes below which a disk is too small for anything, or for a larger run; and memory for a small one
NO_DISK, LITTLE_DISK, LITTLE_MEMORY = GIB, 20 * GIB, 4 * GIB
SMALL = "begin with a small model: docs/expectations.md"
CUDA_WHEELS = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"


@dataclass(frozen=True)
class Finding:
    """One thing about this machine. state: ok, note (slower, or not possible) or mend (wrong)."""

    state: str
    what: str
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        return f"{self.state:<5} {self.what:<13} {self.text}{f'; {self.remedy}' if self.remedy else ''}"


def examine() -> list[Finding]:
    """Everything that there is to say."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        *(_python, _packages, _card, _compilers, _cpu, _memory, _disk, _optional),
    )
    return [finding for check in checks for finding in check()]


def verdict(findings: list[Finding]) -> str:
    """The last line for people."""
    wrong = sum(finding.state == MEND for finding in findings)
    return f"{wrong} to mend" if wrong else "nothing to mend"


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_older(version: str, least: str) -> bool:
    """Whether a version is before another; only their leading numbers count."""

    def numbers(text: str) -> list[int]:
        found = []
        for part in text.split("+", maxsplit=1)[0].split("."):
            digits = "".join(c for c in part if c.isdigit())
            if not digits or not part[0].isdigit():
                break
            found.append(int(digits))
        return found

    return numbers(version) < numbers(least)


def _python() -> Iterator[Finding]:
    have = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        yield Finding(MEND, "Python", have, "install 3.11 or newer, and `make setup PYTHON=python3.11`")
    else:
        yield Finding(OK, "Python", have)


def _packages() -> Iterator[Finding]:
    good = []
    for package, least in REQUIRED.items():
        have, remedy = version_of(package), f"pip install -U '{package}>={least}'"
        if have is None:
            yield Finding(MEND, "packages", f"{package} is not installed", remedy)
        elif is_older(have, least):
            yield Finding(MEND, "packages", f"{package} {have} is too old", remedy)
        else:
            good.append(f"{package} {have}")
    if good:
        yield Finding(OK, "packages", ", ".join(good))


def _optional() -> Iterator[Finding]:
    good = []
    for package, (least, what) in OPTIONAL.items():
        have = version_of(package)
        if have is None:
            text = f"without {package} there is no {what}"
            yield Finding(NOTE, "packages", text, f"pip install '{package}>={least}'")
        elif is_older(have, least) or (package == "datasets" and have == "5.0.0"):
            text = f"{package} {have} does not serve for {what}"
            yield Finding(MEND, "packages", text, f"pip install -U '{package}>={least}'")
        else:
            good.append(f"{package} {have}")
    if good:
        yield Finding(OK, "optional", ", ".join(good))


# ---- the card


def _torch() -> Any | None:
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library of it is missing
        return None
    return torch


def has_nvidia_card() -> bool:
    """Whether the machine has one, with or without a driver."""
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        return True
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def driver() -> str | None:
    """The version of NVIDIA's driver; "" if it is there but does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "" if shutil.which("nvidia-smi") else None  # as in WSL
    words = text.split("\n")[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def _card() -> Iterator[Finding]:
    torch, version = _torch(), driver()
    if torch is None:
        if version_of("torch"):
            yield Finding(MEND, "PyTorch", "it cannot be imported", "pip install --force-reinstall torch")
        return
    build = f"{torch.__version__}, " + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    if torch.cuda.is_available():
        yield Finding(OK, "PyTorch", build)
        yield Finding(OK, "driver", version or "there")
        yield from _devices(torch)
        yield from _locking()
        yield from _triton(torch)
        return
    yield Finding(OK, "PyTorch", build)
    if not has_nvidia_card():
        yield Finding(NOTE, "card", "no NVIDIA card is seen, so runs are on this CPU", SMALL)
    elif version is None:
        remedy = "install NVIDIA's driver (Ubuntu: `sudo ubuntu-drivers install`) and start again"
        yield Finding(MEND, "driver", "there is an NVIDIA card, but no driver", remedy)
    elif torch.version.cuda is None:
        yield Finding(MEND, "PyTorch", "there is a card, but this build has no CUDA", CUDA_WHEELS)
    else:
        remedy = f"install a newer driver, or PyTorch for an older CUDA than {torch.version.cuda}"
        yield Finding(MEND, "driver", f"CUDA does not start with driver {version}".rstrip(), remedy)


def _devices(torch: Any) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        text = f"{found.name}, {found.total_memory / GIB:.1f} GiB, capability {found.major}.{found.minor}"
        capability = (found.major, found.minor)
        if capability < (7, 5):
            yield Finding(MEND, "card", f"{text}, too old", "use a card from Turing on, or run.device=cpu")
        elif capability < (8, 0):
            remedy = "set memory.compute=fp32, which is slower"
            yield Finding(NOTE, "card", f"{text}, without bf16 and fused kernels", remedy)
        else:
            known = recognise(found.name, found.total_memory)
            yield Finding(OK, "card", f"{text}{', its data sheet is known' if known else ''}")


def _locking() -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        yield Finding(OK, "page-locking", "no limit")
    else:
        text = f"a process may lock {limit / GIB:.3g} GiB; offload to host memory locks it"
        remedy = "if a run cannot lock memory: `ulimit -l unlimited`, or --ulimit memlock=-1 for a container"
        yield Finding(NOTE, "page-locking", text, remedy)


def _triton(torch: Any) -> Iterator[Finding]:
    if (have := version_of("triton")) is None:
        yield Finding(
            MEND, "Triton", "is not installed, so no fused kernels and no INT8", "pip install triton"
        )
    elif not any(map(shutil.which, ("cc", "gcc", "clang"))):
        remedy = "install gcc (Debian, Ubuntu: `sudo apt install build-essential`)"
        yield Finding(MEND, "Triton", f"{have}, but it needs a C compiler", remedy)
    else:
        yield Finding(OK, "Triton", have)


# ---- compilers, CPU, memory, disk


def _compilers() -> Iterator[Finding]:
    if _torch() is None:
        return
    from lowres.kernels import native

    try:
        native.load()
        yield Finding(OK, "C++ compiler", "the kernels for this CPU are built")
    except native.UnavailableError as error:
        remedy = "install g++ (Debian, Ubuntu: `sudo apt install build-essential`)"
        yield Finding(MEND, "C++ compiler", f"{error}: a CPU computes several times slower", remedy)


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo says that this CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = (line for line in lines if line.startswith(("flags", "Features")))
    return set(next(found, "").partition(":")[2].split())


def _cpu() -> Iterator[Finding]:
    flags, cores = cpu_flags(), len(os.sched_getaffinity(0)) if CAN_SCHEDULE else os.cpu_count() or 1
    have = [name for name, own in INSTRUCTIONS.items() if not flags.isdisjoint(own)]
    text = f"{platform.machine()}, {cores} cores; {', '.join(have) or 'nothing special'}"
    torch = _torch()
    if torch is None:
        yield Finding(OK, "CPU", text)
        return
    from lowres.kernels import product

    if product.is_exact():
        yield Finding(OK, "CPU", text)
    else:
        text += "; it has no exact INT8 products, which need VNNI or AMX"
        yield Finding(NOTE, "CPU", text, "leave memory.compute=auto")
    if (threads := torch.get_num_threads()) <= cores // 2:
        text = f"PyTorch uses {threads} of {cores} cores"
        yield Finding(NOTE, "threads", text, "unset OMP_NUM_THREADS for a run on the CPU")


def _memory() -> Iterator[Finding]:
    if _torch() is None:
        return
    from lowres.memory import host_bytes

    free = host_bytes()
    if free is None:
        yield Finding(NOTE, "memory", "free memory is not known", "set memory.host_budget_gib")
    elif free < LITTLE_MEMORY:
        remedy = "end other programs, or take a small model"
        yield Finding(NOTE, "memory", f"{free / GIB:.1f} GiB are free", remedy)
    else:
        yield Finding(OK, "memory", f"{free / GIB:.1f} GiB are free")


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    text = f"{free / GIB:.1f} GiB are free in {here}"
    remedy = "free some, or give a run another place with --run and data.cache"
    if not os.access(here, os.W_OK):
        yield Finding(MEND, "disk", f"{here} may not be written to", "go to a folder of your own")
    elif free < NO_DISK:
        yield Finding(MEND, "disk", text, remedy)
    elif free < LITTLE_DISK:
        yield Finding(NOTE, "disk", f"{text}, and a checkpoint of 7B takes 7", remedy)
    else:
        yield Finding(OK, "disk", text)
