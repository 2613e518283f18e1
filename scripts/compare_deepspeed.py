"""Compare the layer-major engine with its state in host memory and DeepSpeed's offload: speed and memory.

    python scripts/compare_deepspeed.py [--preset 20m] [--batch-tokens 8192] [--rounds 3] [--set k=v ...]

All use the same model, AdamW and tokens: layerwise with optimizer state on the host, deepspeed with ZeRO-2,
and deepspeed with ZeRO-3 and offloaded weights. Each measurement runs in a separate process, and the order
alternates between rounds. Number formats are DeepSpeed's default (fp32 state), or as set with --set
memory.weights and memory.moments. tokens/s is the median over all timed steps. Memory is the increase over
the memory after a step of a tiny model, when everything is imported and compiled. On a GPU: the memory that
PyTorch allocates there, and resident host memory; on a CPU resident memory includes both. Prints a table and
writes benchmarks/results/deepspeed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comparison
import records
import torch

from lowres.config import Config
from lowres.config_file import load_config
from lowres.device import prepare_cuda
from lowres.engine import zero
from lowres.memory import GIB, make_plan, require_fit, require_machine
from lowres.meter import rss_gib
from lowres.model import initialize
from lowres.rooms import GPU, HOST, Rooms
from lowres.runs import training_engine

ARMS = {
    "layerwise": ["memory.engine=layerwise", "memory.state_on=host"],
    "deepspeed, stage 2": ["memory.engine=deepspeed"],
    "deepspeed, stage 3": [
        "memory.engine=deepspeed",
        "deepspeed.stage=3",
        "deepspeed.offload_param=cpu",
    ],
}
# the tiny model that runs first, to import and compile: the same except for its size
TINY = ["model.preset=9m", "model.n_layers=1", "model.dim=64", "model.n_heads=2", "model.ffn_dim=128"]
TINY += ["model.vocab_size=300", "data.seq_len=64", "train.batch_tokens=128", "train.micro_batch=1"]


def main() -> None:
    prepare_cuda()
    parser = argparse.ArgumentParser(
        description="Compare layerwise with state on the host and DeepSpeed's offload."
    )
    parser.add_argument("--preset", default="20m")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-batch", default="auto", help="sequences; default: what each plan chooses")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps per process, after one untimed step"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deepspeed.json"))
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    device = torch.device(parsed.device)
    if parsed.measure:
        print(json.dumps(measure(parsed, device)))
        return
    zero.require(
        config_of(parsed, ARMS["deepspeed, stage 2"]), device
    )  # the first time, compiles for minutes
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for i in range(parsed.rounds):
        for name in list(ARMS)[:: 1 if i % 2 == 0 else -1]:
            runs[name].append(in_a_process(name))
            found = runs[name][-1]
            print(f"round {i + 1}, {name}: {found['seconds']} s, loss {found['loss']:.4f}", file=sys.stderr)
    arms = {name: summary(found, parsed.batch_tokens) for name, found in runs.items()}
    table = comparison.markdown(*rows(arms, device))
    print(table)
    options = {k: v for k, v in vars(parsed).items() if k not in ("measure", "out")}
    record = records.provenance(device) | {"options": options, "arms": arms, "table": table.splitlines()}
    records.write(parsed.out, record)


def config_of(parsed: argparse.Namespace, overrides: list[str]) -> Config:
    """AdamW in DeepSpeed's default number formats; --set overrides these, and the arm's keys both."""
    common = [
        f"run.device={parsed.device}",
        f"model.preset={parsed.preset}",
        f"data.seq_len={parsed.seq_len}",
    ]
    common += [f"train.batch_tokens={parsed.batch_tokens}", f"train.micro_batch={parsed.micro_batch}"]
    common += ["optim.name=adamw", "optim.lr=0.001", "memory.weights=fp32", *parsed.overrides, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "compare.toml"
        empty.touch()
        config, _ = load_config(empty, common)
    return config.with_vocab(config.model.vocab_size or 32000)


def measure(parsed: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run steps of one arm in this process: seconds per step, and memory beyond that of the tiny model."""
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    steps(config_of(parsed, [*ARMS[parsed.measure], *TINY]), device, 1)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    on_gpu = 0
    if device.type == "cuda":
        on_gpu = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    found = steps(config_of(parsed, ARMS[parsed.measure]), device, parsed.steps + 1)
    found["resident_bytes"] = int(rss_gib() * GIB) - before
    if device.type == "cuda":
        found["gpu_bytes"] = torch.cuda.max_memory_allocated(device) - on_gpu
    return found


def steps(config: Config, device: torch.device, count: int) -> dict[str, Any]:
    """Build the engine like a run and do steps on random tokens; the first is not timed."""
    plan = make_plan(config, device, on_this_machine=True)
    require_fit(plan)
    require_machine(plan, device)
    engine, _ = training_engine(config, plan, Rooms(device), False)
    engine.reserve(config.batch_sequences, config.data.seq_len, training=True)
    initialize(engine.units(write=True), config.run.seed, device)
    seconds = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        shape = (config.batch_sequences, config.data.seq_len + 1)
        batch = torch.randint(config.model.vocab, shape, generator=generator)
        began = time.perf_counter()
        report = engine.step(batch, step, 1.0)  # returns when the device has finished
        seconds.append(round(time.perf_counter() - began, 4))
    return {
        "parameters": plan.parameters,
        "micro_batch": plan.micro_batch,
        "seconds": seconds[1:],
        "loss": report.loss,
        "gpu_plan_bytes": plan.peak(GPU),
        "host_plan_bytes": plan.peak(HOST),
    }


def in_a_process(name: str) -> dict[str, Any]:
    """Run this script again for one arm. malloc returns freed memory to the system, so peaks show memory that
    is in use."""
    command = [sys.executable, *sys.argv, "--measure", name]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    if done.returncode:
        raise SystemExit(f"{name}: its process ended with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def resident() -> int:
    return int(Path("/proc/self/status").read_text("utf-8").split("VmRSS:")[1].split()[0]) * 1024


def summary(found: list[dict[str, Any]], batch_tokens: int) -> dict[str, Any]:
    """Medians over rounds; speeds over all timed steps."""
    seconds = [s for run in found for s in run["seconds"]]
    memory = {
        key: int(statistics.median(run[key] for run in found)) for key in found[0] if key.endswith("_bytes")
    }
    return {
        "tokens_per_s": batch_tokens / statistics.median(seconds),
        **memory,
        "micro_batch": found[0]["micro_batch"],
        "loss": found[0]["loss"],
        "parameters": found[0]["parameters"],
        "seconds": [run["seconds"] for run in found],
    }


def rows(arms: dict[str, dict[str, Any]], device: torch.device) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; ratios are layerwise divided by the row."""
    columns = {"resident": "resident_bytes", "plan, GPU": "gpu_plan_bytes", "plan, host": "host_plan_bytes"}
    if device.type == "cuda":
        columns = {"GPU": "gpu_bytes", "host": "resident_bytes"} | dict(list(columns.items())[1:])
    head = [
        "engine",
        "tokens/s",
        *(f"{name}, GiB" for name in columns),
        "speed ratio",
        "memory ratio",
        "loss",
    ]
    first, lines = arms["layerwise"], []
    for name, arm in arms.items():
        sizes = [f"{arm[key] / GIB:.2f}" for key in columns.values()]
        ratios = [f"{first[key] / arm[key]:.2f}" for key in ("tokens_per_s", "resident_bytes")]
        lines.append([name, f"{arm['tokens_per_s']:,.0f}", *sizes, *ratios, f"{arm['loss']:.4f}"])
    return head, lines


if __name__ == "__main__":
    main()
