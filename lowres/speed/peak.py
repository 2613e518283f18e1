"""The fastest matrix products of this machine, as the measure of everything else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowres.probe.rates import timed

ENOUGH_SECONDS, LEAST_REPEATS, MOST_REPEATS = 0.3, 3, 20
# sides of the square products whose rate counts as the peak
SIDES = {"cuda": 8192, "cpu": 2048}
FP32, BF16, INT8 = "fp32", "bf16", "int8"
DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, INT8: torch.int8}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a call; on a GPU the device time only."""
    return statistics.median(_times(work, device))


def _times(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] | None = None
) -> list[float]:
    def of_clock() -> float:
        assert clock is not None
        start = clock()
        work()
        return clock() - start

    began = time.perf_counter()
    found: list[float] = []
    work()
    while len(found) < LEAST_REPEATS or (
        len(found) < MOST_REPEATS and time.perf_counter() - began < ENOUGH_SECONDS
    ):
        found.append(timed(work, device) if clock is None else of_clock())
    return found


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, because a chip may be faster on zeros."""
    if dtype == torch.int8:
        return torch.randint(-64, 65, shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=torch.float32, device=device).mul_(0.02).to(dtype)


def gemm_peak(
    dtype: torch.dtype,
    device: torch.device,
    side: int | None = None,
    clock: Callable[[], float] | None = None,
) -> float | None:
    """10^12 operations per second of the fastest large square product in a number format (fp32, bf16 or int8
    tensors): the best time with the second matrix by rows or by columns. None: this machine has no such
    product. clock: another one for a CPU, in seconds; default: wall time."""
    side = side or SIDES[device.type]
    a, b = random((side, side), dtype, device), random((side, side), dtype, device)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    try:
        best = min(min(_times(partial(product, a, second), device, clock)) for second in (b.T, b))
    except (RuntimeError, NotImplementedError):
        return None
    return 2 * side**3 / best / 1e12
