"""The device of a run: which one, how CUDA is set up before it starts, and what an error of it means."""

from __future__ import annotations

import os

import torch

from lowres import ranks
from lowres.config import Config
from lowres.errors import UserError
from lowres.rooms import EXACT_LOCKING
from lowres.storage import compute_dtype

# a model this wide is not trained on a CPU
LARGE_WIDTH = 2048
# compute capabilities: the oldest that is served (Turing, which emulates bf16), the first with bf16 (Ampere)
OLDEST, BF16 = (7, 5), (8, 0)
# the allocator of PyTorch takes its settings from the first of these that is set; 2.8 knows only that one
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# what errors that are not torch.OutOfMemoryError say when the GPU is full: libraries of CUDA, and its driver
FULL = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)


def prepare_cuda() -> None:
    """Set up CUDA for lowres. For whoever runs it as a program or opens a run, before CUDA starts; later only
    what is not of the allocator has an effect. Settings of the user's own stay."""
    if not any(name in os.environ for name in SETTINGS):
        # segments that grow leave less memory unusable between allocations; DeepSpeed locks large host
        # buffers, which would be rounded up to powers of two, and kept when freed
        exact = ",pinned_max_cached_size_mb:4" if EXACT_LOCKING else ""
        os.environ[SETTINGS[0]] = f"expandable_segments:True{exact}"
    # A long sum may be split into parts, which by default meet in bf16 where the result is bf16: activations,
    # the gradients of adapters' inputs, and the weight gradients of the engines that leave them to PyTorch.
    # Layer-major weight gradients are fp32 products and have nothing to lose.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def lacks_bf16() -> bool:
    """Whether there is a CUDA device that can only emulate bf16."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(_own()) < BF16


def _own() -> int | None:
    """The CUDA device of this process; None is PyTorch's current one."""
    return ranks.rank_here() if ranks.size() > 1 else None


def pick_device(config: Config) -> torch.device:
    """The device that run.device asks for. Raises UserError if there is none, or if it is too old for the
    config."""
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        large = ", or see a real 7B take steps without one: make smoke-7b-cpu"
        raise UserError(
            "run.device: this config is for a GPU and no CUDA device is available; "
            f"use --set run.device=cpu{large if config.model.dim >= LARGE_WIDTH else ''}"
        )
    if not available or config.run.device == "cpu":
        return torch.device("cpu")
    device, capability = torch.device("cuda"), torch.cuda.get_device_capability(_own())
    name = f"{torch.cuda.get_device_name(_own())} (compute capability {capability[0]}.{capability[1]})"
    if capability < OLDEST:
        raise UserError(f"run.device: {name} is too old, 7.5 is the least; use --set run.device=cpu")
    if lacks_bf16() and compute_dtype(config.memory.compute, device) == torch.bfloat16:
        wide = "fp32" if config.memory.engine == "deepspeed" else "int8"
        weights = f" --set memory.weights={wide}" if config.memory.weights == "bf16" else ""
        raise UserError(
            f"memory.compute: {name} has no bf16, which needs 8.0; "
            f"use --set memory.compute=fp32{weights}, which is right but slower"
        )
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU is full."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)
