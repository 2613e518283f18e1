"""ReLoRA beside full training and plain LoRA, on the same text at equal tokens.

    python scripts/compare_relora.py [SOURCE] [--jobs 2] [--set section.key=value ...]

SOURCE is that of `lowres train`, default stdlib. All arms but full training have the same warm start. The
adapters' learning rate (relora.lr_factor) is the best of three on the first seed, for LoRA and ReLoRA each;
INT8 takes that of fp32. Prints a table and writes benchmarks/results/relora.json and .png. Runs are kept in
runs/compare_relora; what is finished is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import comparison
import records
import torch

from lowres import metrics
from lowres.config import load_config

# rank 8 of 160, and seven cycles: what the merges add up to may have rank 48 and more
RELORA = ("relora.enabled=true", "relora.rank=8", "relora.alpha=8", "relora.rewarmup_steps=16")
WARM, CYCLE = 0.25, 0.125  # parts of the run
FACTORS = (1, 2, 4)
ARMS = ("full", "LoRA", "ReLoRA", "ReLoRA, int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="ReLoRA, LoRA and full training at equal tokens.")
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--config", type=Path, default=Path("configs/compare.toml"))
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of a run")
    parser.add_argument("--lr", type=float, default=0.002, help="of full training and the warm start")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_relora"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/relora.json"))
    parsed = parser.parse_args()
    common = [f"data.source={parsed.source}", f"optim.lr={parsed.lr}"]
    config, _ = load_config(parsed.config, [*common, *parsed.overrides, f"train.tokens={parsed.tokens}"])
    steps = config.train.total_steps
    warm = [*RELORA, f"relora.start_step={round(WARM * steps)}"]
    settings = {
        "full": [],
        "LoRA": [*warm, "relora.cycle_steps=0"],
        "ReLoRA": [*warm, f"relora.cycle_steps={round(CYCLE * steps)}"],
    }

    def tune(name: str) -> float:
        """The best factor on the first seed."""
        grid = f"relora.lr_factor={','.join(map(str, FACTORS))}"
        overrides = [*common, *settings[name], *parsed.overrides, f"run.seed={parsed.seeds[0]}"]
        folder = parsed.runs / "rates" / name
        found = comparison.points(parsed.config, overrides, grid, parsed.tokens, folder)
        return float(comparison.best_of(found)["values"]["relora.lr_factor"])

    factors = comparison.in_parallel(tune, ["LoRA", "ReLoRA"], parsed.jobs)
    for name, factor in factors.items():
        settings[name].append(f"relora.lr_factor={factor}")
    factors["ReLoRA, int8"] = factors["ReLoRA"]
    settings["ReLoRA, int8"] = [*settings["ReLoRA"], "memory.weights=int8", "memory.embeddings=auto"]

    def train(name: str) -> list[dict[str, Any]]:
        folder = parsed.runs / comparison.folder_of(name)
        overrides = [*common, *settings[name], *parsed.overrides]
        return comparison.over_seeds(parsed.config, overrides, parsed.seeds, parsed.tokens, folder)

    runs = comparison.in_parallel(train, ARMS, parsed.jobs)
    against = {"LoRA": "full", "ReLoRA": "full", "ReLoRA, int8": "ReLoRA"}
    summaries = comparison.summarise(runs, against)
    gap = summaries["LoRA"]["mean_val_loss"] - summaries["full"]["mean_val_loss"]
    for name, found in summaries.items():
        found.update(survival(runs[name]), lr_factor=factors.get(name))
        found["gap_recovered"] = (summaries["LoRA"]["mean_val_loss"] - found["mean_val_loss"]) / gap

    head = [
        "training",
        "lr factor",
        "val. loss",
        "perplexity",
        "against",
        "gap recovered",
        "merges: norm, cosine",
    ]
    table = comparison.markdown(head, [row(name, found) for name, found in summaries.items()])
    print(table)
    picture = comparison.draw_curves(
        parsed.out.with_suffix(".png"), runs, f"{parsed.tokens / 1e6:.1f} M tokens a run"
    )
    record = records.provenance(torch.device("cpu")) | {
        "source": parsed.source,
        "model": config.model.model_dump(),
        "tokens": runs["full"][0]["tokens"],
        "batch_tokens": config.train.batch_tokens,
        "seeds": parsed.seeds,
        "settings": settings,
        "arms": summaries,
        "table": table.splitlines(),
    }
    records.write(parsed.out, record)
    print(f"compare_relora: {parsed.out}{f', {picture}' if picture else ''}", file=sys.stderr)


def survival(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over all merges of all seeds of what was applied against what was intended."""
    logs = (metrics.read(Path(run["run"]) / "metrics.jsonl") for run in runs)
    merges = [record for log in logs for record in log if "merge_cosine" in record]
    return {
        key: statistics.fmean(record[key] for record in merges) if merges else None
        for key in ("merge_norm", "merge_cosine")
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    merged = found["merge_norm"] is not None
    return [
        name,
        "" if found["lr_factor"] is None else f"{found['lr_factor']:g}",
        comparison.loss_text(found),
        f"{found['perplexity']:.1f}",
        f"{comparison.change_text(found)} ({found['against']})" if "against" in found else "",
        f"{found['gap_recovered']:.0%}",
        f"{found['merge_norm']:.3f}, {found['merge_cosine']:.3f}" if merged else "",
    ]


if __name__ == "__main__":
    main()
