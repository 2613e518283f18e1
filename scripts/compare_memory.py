"""Does what saves memory learn as well as what does not?

    python scripts/compare_memory.py weights|stash [CONFIG] [--seeds 0 1 2] [--set section.key=value ...]

weights: INT8 against fp32 weights. stash: the inputs of the layers kept in INT8 instead of the format
of the computation, with the forward pass going on from the stored or from the exact values. Trains the
config once a seed with each (paired: same data order and initial values), prints a table and writes
benchmarks/results/int8_SUBJECT.json. Runs are kept in runs/compare_memory and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lowres.config import load_config

# subject -> overrides by name; the first is what the others are compared to
SUBJECTS = {
    "weights": {"fp32": ["memory.weights=fp32"], "int8": ["memory.weights=int8"]},
    "stash": {
        "exact": ["memory.stash_dtype=auto"],
        "int8": ["memory.stash_dtype=int8"],
        "int8, exact forward": ["memory.stash_dtype=int8", "memory.exact_forward=true"],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Does what saves memory learn as well?")
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_memory"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/int8_SUBJECT.json")
    parsed = parser.parse_args()
    kinds = SUBJECTS[parsed.subject]

    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in parsed.seeds:
        for kind, own in kinds.items():
            overrides = [*parsed.overrides, *own, f"run.seed={seed}"]
            folder = parsed.runs / f"{parsed.subject}-{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
            results[kind].append(run(parsed.config, overrides, folder))

    first, *others = kinds
    means = {kind: statistics.fmean(r["val_loss"] for r in results[kind]) for kind in kinds}
    for kind in kinds:
        losses = ", ".join(f"{r['val_loss']:.4f}" for r in results[kind])
        print(f"{kind}: validation loss {losses}; mean {means[kind]:.4f}")
    differences = {kind: means[kind] / means[first] - 1 for kind in others}
    for kind in others:
        perplexity = math.exp(means[kind] - means[first]) - 1
        print(f"{kind} against {first}: loss {differences[kind]:+.2%}, perplexity {perplexity:+.2%}")

    config, _ = load_config(parsed.config, parsed.overrides)
    record = {
        "command": " ".join(["python", "scripts/compare_memory.py", *sys.argv[1:]]),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {cpu_name()}",
        "versions": results[first][0]["versions"],
        "source": config.data.source,
        "tokens_per_run": results[first][0]["tokens"],
        "seeds": parsed.seeds,
        "val_loss": {kind: [r["val_loss"] for r in results[kind]] for kind in kinds},
        "mean_val_loss": means,
        f"over_{first}_minus_1": differences,
        "wall_seconds": {kind: [round(r["wall_seconds"], 1) for r in results[kind]] for kind in kinds},
    }
    out = parsed.out or Path(f"benchmarks/results/int8_{parsed.subject}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def run(config: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The summary of a run, trained now unless it is there already."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "lowres", "train", str(config), "--run", str(folder)]
        command += [part for override in overrides for part in ("--set", override)]
        if (folder / "config.toml").exists():
            command.append("--resume")
        subprocess.run(command, check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
