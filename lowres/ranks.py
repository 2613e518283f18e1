"""The processes of a run. A launcher starts one for every GPU, each a rank, and says so in the environment;
without one a run is rank 0 of 1.

What is decided or written once is done by the first rank. A rank that fails ends its process, and the
launcher ends the others, which may be waiting for it. Launchers are those of PyTorch and, over a list of
hosts, of DeepSpeed; `launch` calls them.
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

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from lowres.errors import CheckFailed, UserError

# a rank may wait while the first one tokenises a corpus; the launcher sees the dead
PATIENCE = timedelta(days=7)
# seconds in which a launcher ends the other ranks after one has failed
GRACE = 5.0


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def size_here() -> int:
    """Ranks on this machine, as the launcher of PyTorch or of DeepSpeed says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_first() -> bool:
    return rank() == 0


def rank_here() -> int:
    """The number of this rank on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_here() -> bool:
    """Whether this is the first rank of its machine."""
    return rank_here() == 0


def say(line: str) -> None:
    """A line for people, of the first rank: on stderr, above a progress bar."""
    if is_first():
        tqdm.write(line, file=sys.stderr)


def join(device: torch.device) -> None:
    """Meet the other ranks, on this rank's own GPU. Tensors in host memory go over gloo on any device."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(rank_here())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, timeout=PATIENCE)


def wait() -> None:
    """Return when every rank has come here."""
    total(0)


def total(*numbers: float) -> list[float]:
    """The sum of each number over all ranks, the same on every rank."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    return add(sums).tolist()


def least(*numbers: float) -> list[float]:
    """The least of each number over all ranks, the same on every rank."""
    found = torch.tensor(numbers, dtype=torch.float64)
    if size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return found.tolist()


def add(tensor: Tensor) -> Tensor:
    """Replace a tensor in host memory by its sum over all ranks."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(rows: Tensor, filler: int) -> Tensor:
    """This rank's part of rows [n, ...] that all ranks have: every size()-th, after as many rows of filler
    as it takes for all parts to have the same length."""
    missing = -len(rows) % size()
    whole = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), filler)]) if missing else rows
    return whole[rank() :: size()]


def let_the_first_speak() -> None:
    """Before a failure is told: time for the launcher to end this rank, if another failed before it."""
    if size() > 1:
        time.sleep(GRACE)


def launch(arguments: list[str], gpus: int | None, hostfile: Path | None) -> int:
    """Run `lowres` with arguments once for each of some GPUs (default: all), on this machine or on those of
    a hostfile in DeepSpeed's form; returns the exit code of the rank that failed first, or 0."""
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

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say it in one line
    # an optimizer on the CPU uses all cores, but each rank its own
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
                f"rank {failed} was ended by signal {-failure.exitcode}; the run continues with --resume"
            ) from None
        return failure.exitcode
    return 0


def _launch_over_hosts(arguments: list[str], gpus: int | None, hostfile: Path) -> int:
    if not hostfile.is_file():
        raise UserError(
            f"--hostfile: {hostfile} is no file; it has a line `host slots=GPUs` for each machine"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--hostfile: needs DeepSpeed's launcher; pip install deepspeed ninja")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    command += ["--num_gpus", str(gpus)] if gpus else []
    command += ["--no_local_rank", "--module", "lowres", *arguments]
    return subprocess.run(command, check=False).returncode
