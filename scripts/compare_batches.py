"""How far one optimizer is behind another, over the size of the batch, with equal numbers of tokens.

    python scripts/compare_batches.py [SOURCE] [--optimizers adamw adam-mini] [--batches 1024 8192 32768]

SOURCE: as for `lowres train`, default stdlib. For each batch, both optimizers get a sweep of rates of their
own, over all tokens, and a beta2, also of the AdamW for other tensors, that averages over as many tokens as
its default does at the first batch. Prints a table and writes benchmarks/results/batches.json and .png. Runs
are kept in runs/compare_batches; finished runs are not repeated, interrupted runs continue.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comparison
import records
import torch

from lowres.catalogue import RULES
from lowres.config_file import load_config


def main() -> None:
    parsed = arguments()
    common = [f"data.source={parsed.source}", f"run.seed={parsed.seed}", *parsed.overrides]
    arms = {f"{name}, {batch}": (name, batch) for batch in parsed.batches for name in parsed.optimizers}

    def tune(arm: str) -> dict[str, Any]:
        name, batch = arms[arm]
        times, found = batch / parsed.batches[0], RULES[name]
        overrides = [*common, f"optim.name={name}", f"train.batch_tokens={batch}"]
        for key, betas in (("betas", found.betas), ("adamw_betas", found.adamw_betas)):
            if betas:
                overrides.append(f"optim.{key}={[betas[0], round(betas[1] ** times, 6)]}")
        # a first guess; the sweep goes on where it is wrong
        lr = float(f"{parsed.lr * math.sqrt(times):.2g}")
        folder = parsed.runs / comparison.folder_of(arm)
        return comparison.best_rate(parsed.config, overrides, lr, parsed.tokens, folder)

    best = comparison.in_parallel(tune, arms, parsed.jobs)
    first, *others = parsed.optimizers
    gaps = {
        name: {
            batch: math.expm1(
                comparison.val_loss(best[f"{name}, {batch}"]) - comparison.val_loss(best[f"{first}, {batch}"])
            )
            for batch in parsed.batches
        }
        for name in others
    }
    head = ["batch, tokens", "steps", *(f"{name}: lr, loss" for name in parsed.optimizers)]
    head += [f"{name} against {first}" for name in others]
    table = comparison.markdown(head, [row(batch, parsed, best, gaps) for batch in parsed.batches])
    print(table)
    config, _ = load_config(parsed.config, common)
    # before the plot, which git may track: it would mark the commit as dirty
    record = records.provenance(torch.device("cpu")) | {
        "source": parsed.source,
        "model": config.model.model_dump(),
        "tokens": parsed.tokens,
        "seed": parsed.seed,
        "points": {
            arm: {key: point[key] for key in ("lr", "val_loss", "rates")} for arm, point in best.items()
        },
        "perplexity_change": gaps,
        "table": table.splitlines(),
    }
    picture = draw(
        parsed.out.with_suffix(".png"), gaps, f"{parsed.tokens / 1e6:.1f} M tokens, against {first}"
    )
    records.write(parsed.out, record)
    print(f"compare_batches: {parsed.out}{f', {picture}' if picture else ''}", file=sys.stderr)


def row(
    batch: int,
    parsed: argparse.Namespace,
    best: Mapping[str, Mapping[str, Any]],
    gaps: Mapping[str, Mapping[int, float]],
) -> list[str]:
    points = [best[f"{name}, {batch}"] for name in parsed.optimizers]
    cells = [f"{point['lr']:g}: {comparison.val_loss(point):.3f}" for point in points]
    changes = [f"{100 * gap[batch]:+.1f} %" for gap in gaps.values()]
    return [f"{batch:,}", f"{math.ceil(parsed.tokens / batch):,}", *cells, *changes]


def draw(path: Path, gaps: Mapping[str, Mapping[int, float]], title: str) -> Path | None:
    """The change of perplexity over the batch. Returns None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot = figure.subplots()
    for name, gap in gaps.items():
        plot.plot(list(gap), [100 * change for change in gap.values()], "o-", label=name)
    plot.axhline(0, color="black", lw=0.8)
    plot.set_xscale("log", base=2)
    plot.set(xlabel="tokens in a batch", ylabel="change of perplexity, %", title=title)
    plot.grid(alpha=0.3)
    plot.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare optimizers over the size of the batch.")
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--config", type=Path, default=Path("configs/compare_relora.toml"))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "adam-mini"], choices=RULES)
    parser.add_argument(
        "--batches",
        type=comparison.above_zero,
        nargs="+",
        default=[1024, 8192, 32768],
        help="in tokens",
    )
    parser.add_argument("--tokens", type=comparison.above_zero, default=1 << 22, help="of a run")
    parser.add_argument(
        "--lr", type=float, default=0.002, help="middle of the first sweep at the first batch"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--jobs", type=comparison.above_zero, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_batches"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/batches.json"))
    return parser.parse_args()


if __name__ == "__main__":
    comparison.run_script(main)
