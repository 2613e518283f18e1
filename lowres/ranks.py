"""The processes of a run. A launcher starts one process (a rank) per GPU and sets environment variables;
without a launcher, a run is rank 0 of 1.

Rank 0 makes decisions and writes files for all. If a rank fails, its process ends, and the launcher ends the
others, which may be waiting for it. `launch` uses PyTorch's launcher or, for several hosts, DeepSpeed's.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lowres.errors import CheckFailed, UserError

if TYPE_CHECKING:  # most of this is for commands that need no PyTorch
    import torch
    from torch import Tensor

# a rank may wait long while the first one tokenises a corpus; the launcher notices ranks that died
PATIENCE = timedelta(days=7)
# a launcher needs at most this many seconds to end the other ranks after one has failed
GRACE = 5.0


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def size_here() -> int:
    """Number of ranks on this machine, from the launcher of PyTorch or DeepSpeed."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_first() -> bool:
    return rank() == 0


def rank_here() -> int:
    """The index of this rank on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_here() -> bool:
    """Whether this is the first rank of its machine."""
    return rank_here() == 0


def say(line: str) -> None:
    """Print a line for the user, on the first rank only: to stderr, above a progress bar."""
    if is_first():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)


def join(device: torch.device) -> None:
    """Connect to the other ranks and select this rank's GPU. Tensors in host memory always use gloo."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(rank_here())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, timeout=PATIENCE)


def wait() -> None:
    """Return when every rank has called this (a barrier)."""
    total(0)


def total(*numbers: float) -> list[float]:
    """The sum of each number over all ranks, the same on every rank."""
    import torch

    sums = torch.tensor(numbers, dtype=torch.float64)
    return add(sums).tolist()


def least(*numbers: float) -> list[float]:
    """The minimum of each number over all ranks, the same on every rank."""
    import torch

    found = torch.tensor(numbers, dtype=torch.float64)
    if size() > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return found.tolist()


def add(tensor: Tensor) -> Tensor:
    """Replace a tensor in host memory by its sum over all ranks."""
    if size() > 1:
        import torch.distributed

        torch.distributed.all_reduce(tensor)
    return tensor


def share(rows: Tensor, filler: int) -> Tensor:
    """This rank's part of rows [n, ...] that all ranks have: every size()-th row. Rows of filler are added at
    the end, so that all parts have the same length."""
    import torch

    missing = -len(rows) % size()
    whole = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), filler)]) if missing else rows
    return whole[rank() :: size()]


def let_the_first_speak() -> None:
    """Call this before reporting a failure: if another rank failed earlier, the launcher now has time to end
    this one, so only the first failure is reported."""
    if size() > 1:
        time.sleep(GRACE)


def launch(arguments: list[str], gpus: int | None, hostfile: Path | None) -> int:
    """Run `lowres` with arguments once per GPU (default: all GPUs), on this machine or on the machines of a
    hostfile in DeepSpeed's format. Returns the exit code of the rank that failed first, or 0."""
    import torch

    found = torch.cuda.device_count()
    if hostfile is None and gpus and 0 < found < gpus:
        raise UserError(f"--gpus: this machine has {found}, not {gpus}")
    if hostfile is not None:
        return _launch_over_hosts(arguments, gpus, hostfile)
    return _launch_here(arguments, gpus or found or 1)


def _launch_here(arguments: list[str], processes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report it in one line
    # an optimizer on the CPU may use all cores, divided among the ranks
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="lowres",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lowres", *arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        failed, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise CheckFailed(
                f"rank {failed} was ended by signal {-failure.exitcode}; continue the run with --resume"
            ) from None
        return failure.exitcode
    return 0


def _launch_over_hosts(arguments: list[str], gpus: int | None, hostfile: Path) -> int:
    if not hostfile.is_file():
        raise UserError(
            f"--hostfile: {hostfile} does not exist; it needs a line `host slots=GPUs` for each machine"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--hostfile: needs DeepSpeed's launcher; pip install deepspeed ninja")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    command += ["--num_gpus", str(gpus)] if gpus else []
    command += ["--no_local_rank", "--module", "lowres", *arguments]
    return subprocess.run(command, check=False).returncode
