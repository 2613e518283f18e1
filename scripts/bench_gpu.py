"""All benchmarks of this project that need a GPU, the most valuable first, in 8 minutes.

    python scripts/bench_gpu.py [NAME ...] [--budget-seconds N] [--out DIR] [--set section.key=value ...]

steps_12gb_bf16, steps_12gb_int8, steps_24gb_int8, steps_8gb_int8: optimizer steps of the 7B presets on random
tokens, with the allocator capped at the size of the card; products in bf16 or in INT8. Does it fit, is the
plan right, how fast is it? First steps of a few
micro-batches, then a whole one if there is time. rates: the operations of a step, each measured alone.
profile: where the time of a step goes. uncapped: the 12 GB preset with the whole card, to show the cost of
the cap.

Each benchmark is a separate process and writes benchmarks/results/gpu_NAME.json part by part, so results are
kept if it ends early. A benchmark is skipped if the remaining time is too short. `--config PATH
[--cap-gib N]` uses another config. With `--device cpu` no GPU is needed, to test this script. Exit codes: 0
fine, 1 something failed (the others still ran), 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as on a machine where lowres is not installed

import gpu_profile  # noqa: E402
import gpu_rates  # noqa: E402
import gpu_steps  # noqa: E402
import records  # noqa: E402
import torch  # noqa: E402

from lowres import memory as planning  # noqa: E402
from lowres.device import prepare_cuda  # noqa: E402
from lowres.errors import UserError  # noqa: E402
from lowres.memory import GIB  # noqa: E402

# share of the device's memory for an uncapped run: CUDA needs the rest
MOST_OF_A_CARD = 0.9
# a benchmark is killed this long after its time is over
GRACE_SECONDS = 15.0
# micro-batches of the step that is profiled
PROFILED = 2


@dataclass(frozen=True)
class Benchmark:
    """seconds: needed on an H100 without its last part; reserved for it while earlier ones run."""

    name: str
    seconds: float
    config: Path
    cap_gib: float | None
    measure: Callable[[Benchmark, argparse.Namespace], Iterator[dict[str, Any]]]
    overrides: tuple[str, ...] = ()


INT8, BF16 = ("memory.compute=int8",), ("memory.compute=bf16",)


def benchmarks(parsed: argparse.Namespace) -> list[Benchmark]:
    """All benchmarks, the most valuable first."""
    if parsed.config:
        config, cap = parsed.config, parsed.cap_gib
        steps = [
            Benchmark("steps", 45.0, config, cap, bench_steps),
            Benchmark("steps_int8", 45.0, config, cap, bench_steps, INT8),
        ]
    else:
        config, cap = _preset(12), 12.0
        steps = [Benchmark("steps_12gb_bf16", 45.0, config, cap, bench_steps, BF16)]
        for gib in (12, 24, 8):
            steps.append(Benchmark(f"steps_{gib}gb_int8", 45.0, _preset(gib), float(gib), bench_steps, INT8))
    return [
        *steps,
        Benchmark("rates", 35.0, config, None, bench_rates),
        Benchmark("profile", 60.0, config, cap, bench_profile, INT8),
        Benchmark("uncapped", 50.0, config, None, bench_uncapped, INT8),
    ]


def _preset(gib: int) -> Path:
    return Path(f"configs/llama_7b_{gib}gb.toml")


# ---- the benchmarks, each in its own process


def bench_steps(own: Benchmark, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device, until = torch.device(parsed.device), time.perf_counter() + parsed.seconds
    overrides = [*own.overrides, *parsed.overrides]
    yield from gpu_steps.measure(own.config, device, overrides, own.cap_gib, until)


def bench_uncapped(own: Benchmark, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    overrides = [*own.overrides, *parsed.overrides]
    if parsed.device == "cuda":
        size = torch.cuda.get_device_properties(0).total_memory / GIB * MOST_OF_A_CARD
        overrides.append(f"memory.budget_gib={size:.1f}")
    device, until = torch.device(parsed.device), time.perf_counter() + parsed.seconds
    yield from gpu_steps.measure(own.config, device, overrides, None, until)


def bench_rates(own: Benchmark, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(parsed.device)

    def load(*overrides: str) -> Any:
        return gpu_steps.load(own.config, device, [*parsed.overrides, *overrides])[0]

    for name, value in gpu_rates.measure(load, device):
        yield {name: value}


def bench_profile(own: Benchmark, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(parsed.device)
    config, notes = gpu_steps.load(own.config, device, [*own.overrides, *parsed.overrides])
    yield {"config": str(own.config), "notes": notes}
    gpu_steps.cap_allocator(device, own.cap_gib)
    yield from gpu_profile.measure(gpu_steps.Subject(config, device), PROFILED)


def run_alone(own: Benchmark, parsed: argparse.Namespace) -> int:
    """Run a benchmark in this process; its file is valid JSON after every part."""
    began = time.perf_counter()
    record = machine(parsed) | {"benchmark": own.name, "finished": False}

    def keep(**more: Any) -> None:
        record.update(more)
        write(path_of(own.name, parsed), record | {"wall_seconds": time.perf_counter() - began})

    keep()
    try:
        for part in own.measure(own, parsed):
            keep(**part)
    except (UserError, RuntimeError) as error:
        keep(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return 1
    keep(finished=True)
    return int("error" in record)


def machine(parsed: argparse.Namespace) -> dict[str, Any]:
    """Where and how a record was made."""
    cuda = parsed.device == "cuda"
    driver = records.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return records.provenance(torch.device(parsed.device), parsed.commit) | {
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "driver": driver if cuda else None,
        "host_bytes_available": planning.host_bytes(),
    }


def path_of(name: str, parsed: argparse.Namespace) -> Path:
    out: Path = parsed.out
    return out / f"gpu_{name}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace a record, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)


# ---- one after another


def run_all(chosen: list[Benchmark], parsed: argparse.Namespace) -> int:
    """Run benchmarks while there is time; each may use the time that is not reserved for later ones."""
    end = time.perf_counter() + parsed.budget_seconds
    failed, left_out = False, []
    for i, own in enumerate(chosen):
        left = end - time.perf_counter()
        if left < own.seconds:
            left_out.append(f"{own.name} (needs {own.seconds:.0f} s, {max(0.0, left):.0f} s are left)")
            continue
        seconds = max(own.seconds, left - sum(later.seconds for later in chosen[i + 1 :]))
        record = run_in_a_process(own, seconds, parsed)
        failed |= "error" in record
        print(f"{own.name}: {line_of(record)}", flush=True)
    if left_out:
        print("left out: " + ", ".join(left_out))
    return int(failed)


def run_in_a_process(own: Benchmark, seconds: float, parsed: argparse.Namespace) -> dict[str, Any]:
    """Run a benchmark in a new process, so that its peaks are its own and its end frees everything. Returns
    the record in its file."""
    path = path_of(own.name, parsed)
    path.unlink(missing_ok=True)
    options = ["--alone", "--device", parsed.device, "--out", str(parsed.out), "--seconds", f"{seconds:.0f}"]
    options += [f"--commit={parsed.commit}"] if parsed.commit else []
    options += ["--config", str(parsed.config)] if parsed.config else []
    options += ["--cap-gib", str(parsed.cap_gib)] if parsed.cap_gib else []
    options += [part for override in parsed.overrides for part in ("--set", override)]
    command = [sys.executable, str(Path(__file__).resolve()), own.name, *options]
    error = None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds + GRACE_SECONDS
        )
        if done.returncode:
            error = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    except subprocess.TimeoutExpired:
        error = f"ended after {seconds + GRACE_SECONDS:.0f} s"
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"benchmark": own.name}
    if error and "error" not in record:
        record["error"] = error
        write(path, record)
    return record


def line_of(record: dict[str, Any]) -> str:
    """A record as one line of text."""
    parts = [f"failed: {record['error']}"] if "error" in record else []
    if "memory" in record:
        found = record["memory"]
        plan, peak = found["gpu_plan_bytes"] / GIB, found["gpu_peak_bytes"] / GIB
        cap = f" of {record['cap_bytes'] / GIB:.0f}" if record.get("cap_bytes") else ""
        parts.append(f"peak {peak:.2f} GiB{cap}, plan {plan:.2f} ({plan / peak - 1:+.1%})")
        parts.append(f"reserved {found['gpu_reserved_bytes'] / GIB:.2f}")
    timed = record.get("whole")
    if isinstance(timed, dict):
        (whole,) = timed.values()
        parts.append(f"{whole['seconds']:.2f} s a step, {whole['tokens_per_s']:,.0f} tokens/s")
        parts.append(f"{whole['share_of_gemm_peak']:.1%} of {record['gemm_tflops']:.3g} TFLOPS")
    elif "extrapolated_tokens_per_s" in record:
        parts.append(
            f"extrapolated from {' and '.join(record['short'])} micro-batches: "
            f"{record['extrapolated_seconds_per_step']:.1f} s a step, "
            f"{record['extrapolated_tokens_per_s']:,.0f} tokens/s"
        )
    for key in (
        "ms_by_phase",
        "ms_by_kind",
        "copies_gb_s",
        "update, apollo-mini",
        "dequantise",
        "attention",
    ):
        if key in record:
            parts.append(f"{key} {json.dumps(record[key])}")
    return "; ".join(parts) or "nothing found"


def main() -> int:
    prepare_cuda()
    parser = argparse.ArgumentParser(description="Benchmarks that need a GPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--config", type=Path, help="instead of the presets")
    parser.add_argument("--cap-gib", type=float, help="with --config: most that the allocator may take")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--budget-seconds", type=float, default=450.0, help="for all of them; default 450")
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    known = {own.name: own for own in benchmarks(parsed)}
    unknown = [name for name in parsed.names if name not in known]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(known)}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        return refuse("there is no CUDA device; --device cpu --config configs/tiny.toml tests the script")
    if parsed.device == "cpu" and not parsed.config:
        return refuse("--device cpu: the presets are too large for a CPU; give --config PATH")
    chosen = [known[name] for name in parsed.names] or list(known.values())
    if parsed.alone:
        return run_alone(chosen[0], parsed)
    return run_all(chosen, parsed)


def refuse(message: str) -> int:
    print(f"bench_gpu: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
