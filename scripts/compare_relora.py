"""Compare ReLoRA with full training and LoRA, on the same text with equal numbers of tokens.

    python scripts/compare_relora.py [SOURCE] [--factors 2 4] [--jobs 2] [--set section.key=value ...]

SOURCE: as for `lowres train`, default stdlib. LoRA trains adapters from step 0; the other arms with adapters
share the same full-rank warm start. The adapters' learning rate (relora.lr_factor) comes from a separate
sweep per arm on the first seed, and the best run is reused for that seed; variants of ReLoRA use the factor
of ReLoRA. Prints a table and writes benchmarks/results/relora.json and .png. Runs are kept in
runs/compare_relora; finished runs are not repeated, interrupted runs continue.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comparison
import records
import torch

from lowres import metrics
from lowres.config_file import load_config

FULL, LORA, WARM, RELORA = "full", "LoRA", "warm start + LoRA", "ReLoRA"
INT8, KEPT = "ReLoRA, int8", "ReLoRA, a tenth of the moments kept"
TUNED = (LORA, WARM, RELORA)
AGAINST = {LORA: FULL, WARM: FULL, RELORA: FULL, INT8: RELORA, KEPT: RELORA}


def main() -> None:
    parsed = arguments()
    common = [f"data.source={parsed.source}", f"optim.lr={parsed.lr}"]
    config, _ = load_config(parsed.config, [*common, *parsed.overrides, f"train.tokens={parsed.tokens}"])
    settings = arms(parsed, config.train.total_steps)
    settings = {name: own for name, own in settings.items() if parsed.only is None or name in parsed.only}
    against = {name: other for name, other in AGAINST.items() if {name, other} <= settings.keys()}

    def tune(name: str) -> list[dict[str, Any]]:
        """One run on the first seed for every factor."""
        overrides = [*common, *settings[name], *parsed.overrides, f"run.seed={parsed.seeds[0]}"]
        grid = f"relora.lr_factor={','.join(f'{factor:g}' for factor in parsed.factors)}"
        folder = parsed.runs / "rates" / comparison.folder_of(name)
        return comparison.points(parsed.config, overrides, grid, parsed.tokens, folder)

    tried = comparison.in_parallel(tune, [name for name in TUNED if name in settings], parsed.jobs)
    best = {name: comparison.best_of(found) for name, found in tried.items()}
    factors = {name: float(point["values"]["relora.lr_factor"]) for name, point in best.items()}
    if RELORA in factors:
        factors |= {name: factors[RELORA] for name in (INT8, KEPT) if name in settings}
    for name, factor in factors.items():
        settings[name].append(f"relora.lr_factor={factor:g}")

    def train(name: str) -> list[dict[str, Any]]:
        first = [best[name]] if name in best else []
        rest = parsed.seeds[len(first) :]
        if not rest:
            return first
        folder = parsed.runs / comparison.folder_of(name)
        overrides = [*common, *settings[name], *parsed.overrides]
        return first + comparison.over_seeds(parsed.config, overrides, rest, parsed.tokens, folder)

    runs = comparison.in_parallel(train, settings, parsed.jobs)
    summaries = comparison.summarise(runs, against)
    for name, found in summaries.items():
        found.update(survival(runs[name]), lr_factor=factors.get(name))
        found["gap_recovered"] = {
            lora: recovered(summaries, lora, name) if {FULL, lora} <= settings.keys() else None
            for lora in (LORA, WARM)
        }

    head = [
        "training",
        "lr factor",
        "val. loss",
        "perplexity",
        "against",
        "of LoRA's gap",
        "of the gap after the warm start",
        "merges: norm, cosine",
    ]
    table = comparison.markdown(head, [row(name, found) for name, found in summaries.items()])
    print(table)
    # before the plot, which git may track: it would mark the commit as dirty
    record = records.provenance(torch.device("cpu")) | {
        "source": parsed.source,
        "model": config.model.model_dump(),
        "tokens": next(iter(runs.values()))[0]["tokens"],
        "batch_tokens": config.train.batch_tokens,
        "seeds": parsed.seeds,
        "settings": settings,
        "rates": {
            name: {f"{p['values']['relora.lr_factor']:g}": p["val_loss"] for p in found}
            for name, found in tried.items()
        },
        "arms": summaries,
        "table": table.splitlines(),
    }
    picture = comparison.draw_curves(
        parsed.out.with_suffix(".png"), runs, f"{parsed.tokens / 1e6:.1f} M tokens per run"
    )
    records.write(parsed.out, record)
    print(f"compare_relora: {parsed.out}{f', {picture}' if picture else ''}", file=sys.stderr)


def arms(parsed: argparse.Namespace, steps: int) -> dict[str, list[str]]:
    """Every arm and the settings it changes. steps: of a run."""
    start = steps // 4 if parsed.start_step is None else parsed.start_step
    cycle = steps // 4 if parsed.cycle_steps is None else parsed.cycle_steps
    alpha = parsed.rank if parsed.alpha is None else parsed.alpha
    relora = ["relora.enabled=true", f"relora.rank={parsed.rank}", f"relora.alpha={alpha}"]
    relora += [f"relora.rewarmup_steps={parsed.rewarmup_steps}"]
    warm = [*relora, f"relora.start_step={start}"]
    settings = {
        FULL: [],
        LORA: [*relora, "relora.start_step=0", "relora.cycle_steps=0"],
        WARM: [*warm, "relora.cycle_steps=0"],
        RELORA: [*warm, f"relora.cycle_steps={cycle}"],
    }
    settings[INT8] = [*settings[RELORA], "memory.weights=int8", "memory.embeddings=auto"]
    settings[KEPT] = [*settings[RELORA], "relora.reset=magnitude", "relora.reset_keep=0.1"]
    return settings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ReLoRA, LoRA and full training with equal tokens.")
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--config", type=Path, default=Path("configs/compare_relora.toml"))
    parser.add_argument("--tokens", type=comparison.above_zero, default=5 << 19, help="of a run")
    parser.add_argument("--lr", type=float, default=0.004, help="of full training and the warm start")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    # 4 of 96 is about the ratio of 128 to the 4,096 of a 7B; three cycles can add up to a change of rank 12
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, help="default: the rank")
    parser.add_argument(
        "--start-step", type=int, help="steps of the warm start; default: a quarter of the run"
    )
    parser.add_argument("--cycle-steps", type=int, help="default: a quarter of the run")
    parser.add_argument("--rewarmup-steps", type=int, default=16)
    parser.add_argument("--factors", type=float, nargs="+", default=[2, 4], help="relora.lr_factor to try")
    parser.add_argument("--only", nargs="+", choices=[*AGAINST, FULL], metavar="NAME", help="of the arms")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--jobs", type=comparison.above_zero, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_relora"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/relora.json"))
    return parser.parse_args()


def recovered(summaries: Mapping[str, dict[str, Any]], lora: str, name: str) -> float:
    """How much of the gap between an arm with LoRA and full training another arm recovers, as a fraction."""
    loss = {arm: found["mean_val_loss"] for arm, found in summaries.items()}
    gap = loss[lora] - loss[FULL]
    return float((loss[lora] - loss[name]) / gap) if gap else math.nan


def survival(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Applied against intended change: means over all merges of all seeds."""
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
        *(
            "" if name in (FULL, lora) or part is None else f"{part:.0%}"
            for lora, part in found["gap_recovered"].items()
        ),
        f"{found['merge_norm']:.3f}, {found['merge_cosine']:.3f}" if merged else "",
    ]


if __name__ == "__main__":
    comparison.run_script(main)
