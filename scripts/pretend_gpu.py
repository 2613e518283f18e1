"""Whole training steps on a simulated CUDA device, and their memory compared with the plan: 4 minutes.

    python scripts/pretend_gpu.py [CASE ...] [--list]

It finds operations on tensors of two devices, operations that CUDA does not support for a dtype, waits for
the device inside a step, and memory that the plan does not list. It uses fake tensors, so nothing is computed
and no card is needed. It cannot find wrong numbers, copies in a wrong order, or kernels that fail; for these
use `pytest -m gpu`.

It needs a CUDA build of PyTorch, so a separate environment of 5.5 GB, and is not part of the tests:

    python -m venv /tmp/cuda
    /tmp/cuda/bin/pip install torch numpy pydantic safetensors sentencepiece tqdm packaging pyyaml
    /tmp/cuda/bin/pip install --no-deps bitsandbytes
    /tmp/cuda/bin/python scripts/pretend_gpu.py

It also needs gcc. Exit codes: 0 all right, 1 something is wrong, 2 it cannot run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pretended_cuda
import torch
from pretended_cases import SkippedError, WrongError, cases, first_line, replace_internals, where
from pretended_cuda import CARDS

DEFAULT_CARD = "8.9"


@dataclass(frozen=True)
class Result:
    """How a case ended: ok, skipped or WRONG, and what it says."""

    ending: str
    text: str
    seconds: float


def result_of(case: Callable[[], str]) -> Result:
    began = time.perf_counter()
    try:
        ending, text = "ok", case()
    except SkippedError as why:
        ending, text = "skipped", str(why)
    except WrongError as found:
        ending, text = "WRONG", str(found)
    except Exception as error:  # any error of PyTorch is a finding
        ending, text = "WRONG", f"{type(error).__name__} at {where(error)}: {first_line(error)}"
    return Result(ending, text, time.perf_counter() - began)


def run_here(names: list[str], card_key: str) -> int:
    """Run cases in this process, which has a simulated card; print a line after each."""
    pretended_cuda.replace_what_computes()
    replace_internals()
    assert torch.cuda.get_device_capability() == CARDS[card_key].capability
    wrong = 0
    for name in names:
        result = result_of(cases()[name])
        wrong += result.ending == "WRONG"
        print(f"{result.ending:<8}{name:<28}{result.seconds:>5.1f} s  {result.text}", flush=True)
    return int(wrong > 0)


def run_with_cards(names: list[str]) -> int:
    """Run cases in processes with the library: one for the default card, and one for each other card."""
    groups: dict[str, list[str]] = {}
    for name in names:
        own = name.removeprefix("card ") if name.startswith("card ") else DEFAULT_CARD
        groups.setdefault(own, []).append(name)
    wrong = False
    for key, members in groups.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *members]
            done = subprocess.run(command, env=pretended_cuda.environment(key, Path(folder)), check=False)
            wrong |= done.returncode != 0
            if done.returncode not in (0, 1):
                print(f"WRONG   the process with card {key} ended with {done.returncode}")
    return int(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="Training steps on a simulated CUDA device.")
    parser.add_argument("names", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parsed = parser.parse_args()
    names = parsed.names or list(cases())
    unknown = [name for name in names if name not in cases()]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; --list prints them all")
    if parsed.list:
        print("\n".join(names))
        return 0
    loaded = pretended_cuda.loaded_card()
    if loaded:
        return run_here(names, loaded)
    if torch.version.cuda is None:
        print(f"pretend_gpu: torch {torch.__version__} is a CPU build; see --help", file=sys.stderr)
        return 2
    return run_with_cards(names)


if __name__ == "__main__":
    sys.exit(main())
