"""Do INT8 weights learn as well as fp32 weights?

    python scripts/compare_weights.py [CONFIG] [--seeds 0 1 2] [--set section.key=value ...]

Trains the config once a seed with fp32 weights and once with INT8 weights (paired: same data order
and initial values), prints a table and writes benchmarks/results/int8_weights.json. Runs are kept in
runs/compare_weights and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lowres.config import load_config

KINDS = ("fp32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Do INT8 weights learn as well as fp32 weights?")
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_weights"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8_weights.json"))
    parsed = parser.parse_args()

    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in parsed.seeds:
        for kind in KINDS:
            overrides = [*parsed.overrides, f"memory.weights={kind}", f"run.seed={seed}"]
            results[kind].append(run(parsed.config, overrides, parsed.runs / f"{kind}-{seed}"))

    means = {kind: statistics.fmean(r["val_loss"] for r in results[kind]) for kind in KINDS}
    for kind in KINDS:
        losses = ", ".join(f"{r['val_loss']:.4f}" for r in results[kind])
        print(f"{kind}: validation loss {losses}; mean {means[kind]:.4f}")
    difference = means["int8"] / means["fp32"] - 1
    print(f"int8 against fp32: {difference:+.2%} in validation loss")

    config, _ = load_config(parsed.config, parsed.overrides)
    record = {
        "command": " ".join(["python", "scripts/compare_weights.py", *sys.argv[1:]]),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {cpu_name()}",
        "versions": results["fp32"][0]["versions"],
        "source": config.data.source,
        "tokens_per_run": results["fp32"][0]["tokens"],
        "seeds": parsed.seeds,
        "val_loss": {kind: [r["val_loss"] for r in results[kind]] for kind in KINDS},
        "mean_val_loss": means,
        "int8_over_fp32_minus_1": difference,
        "wall_seconds": {kind: [round(r["wall_seconds"], 1) for r in results[kind]] for kind in KINDS},
    }
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(record, indent=1) + "\n")


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
