"""The device of a run: which one it is, and how CUDA is set up."""

from __future__ import annotations

import os

import torch

from lowres import ranks
from lowres.config import Config
from lowres.errors import UserError
from lowres.kernels import forms, product
from lowres.model import count_parameters
from lowres.rooms import EXACT_LOCKING
from lowres.storage import compute_dtype
from lowres.target import CPU, CUDA, kind_of

# a model of this width is not trained on a CPU
LARGE_WIDTH = 2048
# updated numbers: PyTorch's operations take some seconds for these, and a compiler takes one or two
WORTH_COMPILING = 2_000_000_000
# compute capabilities: the oldest supported one (Turing, which emulates bf16), the first with bf16 (Ampere)
OLDEST, BF16 = (7, 5), (8, 0)
# PyTorch's allocator reads the first of these that is set; PyTorch 2.8 knows only the first name
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def prepare_cuda() -> None:
    """Set up CUDA for lowres. Call it before CUDA starts, as the command line and `open_run` do; later, the
    settings of the allocator have no effect. Settings of the user stay as they are."""
    if not any(name in os.environ for name in SETTINGS):
        # expandable segments waste less memory between allocations; DeepSpeed locks large host buffers,
        # which would otherwise be rounded up to powers of two, and kept when they are freed
        exact = ",pinned_max_cached_size_mb:4" if EXACT_LOCKING else ""
        os.environ[SETTINGS[0]] = f"expandable_segments:True{exact}"
    # A kernel may split a long sum, and by default adds the parts in bf16 if the result is bf16. That would
    # affect activations, the gradients of adapters' inputs, and weight gradients that PyTorch computes
    # (autograd and deepspeed engines). Layer-major weight gradients are fp32 products. Of fp16 are Muon's.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def lacks_bf16() -> bool:
    """Whether the CUDA device, if there is one, can only emulate bf16."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(_own()) < BF16


def _own() -> int | None:
    """The CUDA device of this process; None means PyTorch's current one."""
    return ranks.rank_here() if ranks.size() > 1 else None


def pick_device(config: Config) -> torch.device:
    """The device for run.device. Raises UserError if there is none, or if it is too old for the config."""
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        large = ", or run steps of a real 7B model on this CPU: make smoke-7b-cpu"
        raise UserError(
            "run.device: this config is for a GPU and no CUDA device is available; "
            f"use --set run.device=cpu{large if config.model.dim >= LARGE_WIDTH else ''}"
        )
    if not available or config.run.device == "cpu":
        return torch.device("cpu")
    device, capability = torch.device("cuda"), torch.cuda.get_device_capability(_own())
    name = f"{torch.cuda.get_device_name(_own())} (compute capability {capability[0]}.{capability[1]})"
    if capability < OLDEST:
        raise UserError(f"run.device: {name} is too old, the minimum is 7.5; use --set run.device=cpu")
    if lacks_bf16() and compute_dtype(config.memory.activations_in, device) == torch.bfloat16:
        wide = "fp32" if config.memory.engine == "deepspeed" else "int8"
        weights = f" --set memory.weights={wide}" if config.memory.weights == "bf16" else ""
        raise UserError(
            f"memory.compute: {name} has no bf16, which needs 8.0; "
            f"use --set memory.compute=fp32{weights}, which is correct but slower"
        )
    return device


def wants_kernels(config: Config, kind: str) -> bool:
    """Whether a run on this kind of device uses compiled kernels, as far as is known before it starts."""
    return _asks_for_kernels(config, kind) and forms.possible(kind)


def _asks_for_kernels(config: Config, kind: str) -> bool:
    """On a CPU a small run does without: its updates take less time than the compiler."""
    kept = config.memory
    if kept.kernels == "plain":
        return False
    updates = count_parameters(config.model) * config.train.total_steps
    return kept.kernels == "fused" or kept.compute == "int8" or kind == CUDA or updates >= WORTH_COMPILING


def use_kernels(config: Config, device: torch.device) -> list[str]:
    """Turn the compiled kernels on or off for a run; returns notes for the user. Raises UserError if INT8
    products are not possible."""
    kind, int8 = kind_of(device), config.memory.compute == "int8"
    if not _asks_for_kernels(config, kind):
        forms.disable(kind)
        return []
    notes = [note] if (note := forms.enable(kind)) else []
    if int8 and kind == CUDA and notes:
        reason = notes[0].split(";")[0]
        raise UserError(f"memory.compute: {reason}, so INT8 cannot be multiplied; use bf16 or fp32")
    if int8 and kind == CPU and not product.is_exact():
        notes.append(
            "this CPU has no exact INT8 product (VNNI or AMX), so memory.compute=int8 multiplies in fp32 "
            "here, which gives the same result but is slower than memory.compute=fp32"
        )
    return notes
