"""Every benchmark of this project that needs a GPU; all of them take less than 10 minutes.

    python scripts/bench_gpu.py [memory ...] [--out DIR] [--steps N] [--set section.key=value ...]

Without a name all are run, from the root of the repository. Each writes benchmarks/results/gpu_NAME.json,
with the machine and the command, and prints a table. Exit codes: 0 fine, 1 something failed (the others
were run), 2 no GPU.

memory: optimizer steps of the 7B presets on random tokens, each in a process of its own with the
allocator capped at the size of the preset's card. Does it fit, and is the plan right? `--config PATH
[--cap-gib N]` takes another config, and with `--device cpu` no GPU is needed, to test this script.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
import torch

from lowres import checkpoint
from lowres import memory as planning
from lowres.config import Config
from lowres.config_file import load_config
from lowres.device import prepare_cuda
from lowres.engine import make_engine
from lowres.errors import UserError
from lowres.memory import GIB
from lowres.meter import LiveTensors, rss_gib
from lowres.model import empty_units, initialize
from lowres.optim import make_optimizer
from lowres.optim.schedule import factor
from lowres.rooms import GPU, HOST, Homes, Rooms

# config and GiB of the card that it is for
CARDS = [(Path(f"configs/llama_7b_{gib}gb.toml"), float(gib)) for gib in (24, 12, 8)]


@dataclass(frozen=True)
class Result:
    """What a benchmark found: for its file, and for people."""

    record: dict[str, Any]
    table: str
    failed: bool = False


# ---- memory


def bench_memory(parsed: argparse.Namespace) -> Result:
    cards = [(path, parsed.cap_gib) for path in parsed.config] or CARDS
    found = {}
    for path, cap in cards:
        options = ["memory", "--config", str(path), "--device", parsed.device]
        options += ["--steps", str(parsed.steps), "--warmup", str(parsed.warmup)]
        options += [part for override in parsed.overrides for part in ("--set", override)]
        options += ["--cap-gib", str(cap)] if cap else []
        found[path.stem] = in_a_process(options, parsed.timeout)
        print(memory_line(path.stem, found[path.stem]), file=sys.stderr)
    head = (
        f"{'config':<22}{'cap':>5}{'GPU plan':>10}{'peak':>8}{'reserved':>10}{'host plan':>11}{'held':>8}"
        f"{'RSS':>8}{'s/step':>9}{'tokens/s':>10}"
    )
    lines = [head, *(memory_line(name, entry) for name, entry in found.items())]
    failed = any("error" in entry for entry in found.values())
    return Result({"presets": found}, "\n".join([*lines, "(GiB)"]), failed)


def memory_line(name: str, entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{name:<22}failed: {entry['error']}"
    cap = entry["cap_bytes"]
    gib = {key: entry[key] / GIB for key in MEMORY_COLUMNS}
    return (
        f"{name:<22}{f'{cap / GIB:.0f}' if cap else '-':>5}{gib['gpu_plan_bytes']:>10.2f}"
        f"{gib['gpu_peak_bytes']:>8.2f}{gib['gpu_reserved_bytes']:>10.2f}{gib['host_plan_bytes']:>11.2f}"
        f"{gib['host_held_bytes']:>8.2f}{gib['peak_rss_bytes']:>8.2f}{entry['seconds_per_step']:>9.2f}"
        f"{entry['tokens_per_s']:>10,.0f}"
    )


MEMORY_COLUMNS = (
    "gpu_plan_bytes",
    "gpu_peak_bytes",
    "gpu_reserved_bytes",
    "host_plan_bytes",
    "host_held_bytes",
    "peak_rss_bytes",
)


class PhaseRooms(Rooms):
    """Rooms that note the allocator's peak by phase of the step. The allocator's books are kept where
    kernels are enqueued, as `phase` is, so nothing has to wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, int] = {}
        self.reserved = 0
        super().__init__(device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "phase" and self.device.type == "cuda":
            self.note()
        super().__setattr__(name, value)

    def note(self) -> None:
        """Count the peak since the last time to the phase that ends."""
        phase = self.__dict__.get("phase", "")
        peak = torch.cuda.max_memory_allocated(self.device)
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)


def measure_memory(parsed: argparse.Namespace) -> dict[str, Any]:
    """Steps of one config, as the trainer takes them: the plan, a rehearsal, then steps on random tokens."""
    device, (path,) = torch.device(parsed.device), parsed.config
    config, _ = load_config(path, [*parsed.overrides, f"run.device={device.type}"])
    config = config.with_vocab(config.model.vocab_size or config.data.vocab_size or config.model.vocab)
    cap = None
    if device.type == "cuda":
        torch.cuda.init()
        if parsed.cap_gib:
            cap = int(parsed.cap_gib * GIB)
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    began = time.perf_counter()
    plan = planning.make_plan(config, device, on_this_machine=True)
    planning.require_fit(plan)
    planning.require_machine(plan, device)  # a stash larger than the host's memory would end the machine

    rooms, choice, kept = PhaseRooms(device), plan.choice, config.memory
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms, choice.homes.weights)
    optimizer = make_optimizer(config)
    optimizer.attach(units.values(), rooms, choice.homes.state)
    engine = make_engine(config, units, optimizer, rooms, choice)
    engine.reserve(config.batch_sequences, config.data.seq_len, training=True)
    initialize(units.values(), config.run.seed, device)
    tokens = random_tokens(config, min(config.batch_sequences, 2 * choice.micro_batch), 0)
    live = LiveTensors(rooms) if device.type == "cpu" else None
    with live or nullcontext():
        rehearsed = engine.step(tokens, 0, 0.0, rehearsal=True)
        engine.evaluate(tokens)
    largest = max(units, key=lambda name: sum(t.nbytes for t in units[name].tensors().values()))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 0, [(largest, units[largest].tensors())], {}, keep=0)
    setup = time.perf_counter() - began

    seconds, losses = [], [rehearsed.loss]
    for step in range(parsed.warmup + parsed.steps):
        batch = random_tokens(config, config.batch_sequences, step + 1)
        before = time.perf_counter()
        report = engine.step(batch, step, factor(config, step))  # ends when the device is done
        seconds.append(time.perf_counter() - before)
        losses.append(report.loss)
    timed = statistics.median(seconds[parsed.warmup :])

    if live is None:
        rooms.note()
        free, total = torch.cuda.mem_get_info(device)
        phases, peak, reserved, used = rooms.peaks, max(rooms.peaks.values()), rooms.reserved, total - free
    else:
        phases, peak, reserved, used = live.phases, live.peak[GPU], live.peak[GPU], 0
    planned = phase_plans(plan)
    held = sum(size for (_, room), size in rooms.held().items() if room == HOST)
    finite = all(math.isfinite(loss) for loss in losses)
    return {
        **({} if finite else {"error": f"a loss is not finite: {losses}"}),
        "config": str(path),
        "cap_bytes": cap,
        "gpu_plan_bytes": plan.peak(GPU),
        "gpu_peak_bytes": peak,
        "gpu_reserved_bytes": reserved,
        "gpu_used_bytes": used,  # of the whole device, CUDA's own included
        "gpu_plan_over_peak": plan.peak(GPU) / peak,
        "gpu_peak_bytes_by_phase": phases,
        "gpu_plan_bytes_by_phase": planned,
        "gpu_plan_over_peak_by_phase": {p: planned[p] / phases[p] for p in planned if phases.get(p)},
        "host_plan_bytes": plan.peak(HOST),
        "host_held_bytes": held,
        "host_plan_over_held": plan.peak(HOST) / held if held else None,
        "peak_rss_bytes": peak_rss(),
        "tokens_per_step": config.train.batch_tokens,
        "seconds_per_step": timed,
        "seconds_of_steps": seconds,
        "warmup_steps": parsed.warmup,
        "setup_seconds": setup,
        "tokens_per_s": config.train.batch_tokens / timed,
        "losses": losses,  # the first is the rehearsal's
        "micro_batch": choice.micro_batch,
        "band": choice.band,
        "on_host": count_homes(choice.homes),
    }


def random_tokens(config: Config, sequences: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.model.vocab, (sequences, config.data.seq_len + 1), generator=generator)


def phase_plans(plan: planning.Plan) -> dict[str, int]:
    """Planned bytes on the GPU by phase, with what is always there."""
    own = [c for c in plan.components if c.room == GPU]
    always = sum(c.bytes for c in own if not c.phase)
    phases = dict.fromkeys(c.phase for c in own if c.phase)
    return {phase: always + sum(c.bytes for c in own if c.phase == phase) for phase in phases}


def count_homes(homes: Homes) -> dict[str, int]:
    return {
        "weights": len(homes.weights),
        "state": len(homes.state),
        "stash": homes.stash,
        "carry": int(homes.carry),
    }


def peak_rss() -> int:
    """Most resident memory of this process. Not from getrusage, where that of its parent may count."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(rss_gib() * GIB)


# ---- all of them

BENCHMARKS: dict[str, Callable[[argparse.Namespace], Result]] = {"memory": bench_memory}
# what a benchmark does in a process of its own; returns its part of the record, with "error" if it failed
MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"memory": measure_memory}


def in_a_process(options: list[str], timeout: float) -> dict[str, Any]:
    """A measurement in a fresh process, so that its peaks are its own and its end frees everything."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, str(Path(__file__).resolve()), *options, "--record", str(record)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout:.0f} s"}
        if record.exists():
            found: dict[str, Any] = json.loads(record.read_text("utf-8"))
            return found
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {done.returncode}: {last}"}


def measured(name: str, parsed: argparse.Namespace) -> dict[str, Any]:
    try:
        return MEASUREMENTS[name](parsed)
    except (UserError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def main() -> int:
    prepare_cuda()
    parser = argparse.ArgumentParser(description="Benchmarks that need a GPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--config", type=Path, action="append", default=[], help="instead of the presets")
    parser.add_argument("--cap-gib", type=float, help="with --config: most that the allocator may take")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one config")
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # of a measurement in this process
    parsed = parser.parse_args()
    names = parsed.names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        return refuse("there is no CUDA device; --device cpu --config configs/tiny.toml tests the script")
    if parsed.device == "cpu" and not parsed.config:
        return refuse("--device cpu: the presets are too large for a CPU; give --config PATH")
    if parsed.record:
        parsed.record.write_text(json.dumps(measured(names[0], parsed)), "utf-8")
        return 0

    failed, tables = False, []
    for name in names:
        began = time.perf_counter()
        result = BENCHMARKS[name](parsed)
        failed |= result.failed
        record = {**machine(parsed), **result.record, "wall_seconds": time.perf_counter() - began}
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / f"gpu_{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        tables.append(f"{name} ({record['machine']}, {record['wall_seconds']:.0f} s)\n{result.table}")
    print("\n\n".join(tables))
    return int(failed)


def refuse(message: str) -> int:
    print(f"bench_gpu: {message}", file=sys.stderr)
    return 2


def machine(parsed: argparse.Namespace) -> dict[str, Any]:
    """Where and how a record was made."""
    cuda = parsed.device == "cuda"
    driver = records.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return records.provenance(torch.device(parsed.device), parsed.commit) | {
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "driver": driver if cuda else None,
        "host_bytes_available": planning.host_bytes(),
    }


if __name__ == "__main__":
    sys.exit(main())
