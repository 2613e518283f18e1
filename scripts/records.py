"""The origin of every file in benchmarks/results: command, commit, machine, versions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """How and where a record was made. commit: default from git."""
    return {
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit or output("git", "describe", "--always", "--dirty"),
        "machine": machine(device),
        "versions": versions(),
    }


def machine(device: torch.device) -> str:
    """The name of the GPU, or the name of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, {(names or ['unknown'])[0]}"


# flags of /proc/cpuinfo that decide which matrix products a CPU has
INSTRUCTIONS = {
    "avx2": "avx2",
    "avx512": "avx512f",
    "vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_tile",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
}


def cpu() -> dict[str, Any]:
    """Model, cores and instruction sets of this CPU, and how busy it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    values = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = values.get("flags", "").split()
    return {
        "model": values.get("model name", "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": {name: flag in flags for name, flag in INSTRUCTIONS.items()},
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "bitsandbytes", "deepspeed", "transformers", "accelerate", "apollo-torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def output(*command: str) -> str | None:
    """The output of a command, or None if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
