"""Speed over model sizes and micro-batches: the operations per second of the hardware should not depend on
either, if a step has no cost besides its products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparison
import speed_arms
import torch

from lowres.errors import UserError
from lowres.speed import Subject

MICRO_BATCH = 2  # sequences


def measure(
    presets: list[str],
    counts: list[int],
    seq_len: int,
    overrides: list[str],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Median over steps of each size and number of micro-batches, which take turns."""
    points: list[dict[str, Any]] = []
    for preset in presets:
        tokens = max(counts) * MICRO_BATCH * seq_len
        keys = [f"train.micro_batch={MICRO_BATCH}", *overrides]
        config = speed_arms.ours_config(preset, seq_len, tokens, keys)
        try:
            subject = Subject(config, torch.device("cpu"))
        except UserError as error:
            points.append({"preset": preset, "refused": str(error)})
            continue
        subject.step(min(counts), 0)
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for turn in range(repeats):
            for count in counts:
                began = clock()
                subject.step(count, turn + 1)
                seconds[count].append(clock() - began)
        flops = subject.hardware_flops_per_token
        for count, own in seconds.items():
            rate = count * MICRO_BATCH * seq_len / statistics.median(own)
            points.append(
                {
                    "preset": preset,
                    "parameters": subject.plan.parameters,
                    "micro_batches": count,
                    "seconds": own,
                    "tokens_per_s": rate,
                    "hardware_gflops_per_token": flops / 1e9,
                    "hardware_gflops_per_s": rate * flops / 1e9,
                }
            )
    return {
        "overrides": overrides,
        "micro_batch": MICRO_BATCH,
        "points": points,
        "table": table(points, counts),
    }


def table(points: list[dict[str, Any]], counts: list[int]) -> str:
    """One row a size: tokens/s, and 10^9 operations/s, by number of micro-batches."""
    head = ["model", "GFLOPs a token", *(f"{n} micro-batches" for n in counts)]
    rows = []
    for preset in dict.fromkeys(point["preset"] for point in points):
        own = [point for point in points if point["preset"] == preset]
        if "refused" in own[0]:
            rows.append([preset, own[0]["refused"], *[""] * len(counts)])
            continue
        cells = [f"{p['tokens_per_s']:,.0f} tok/s, {p['hardware_gflops_per_s']:,.0f} GFLOP/s" for p in own]
        rows.append([preset, f"{own[0]['hardware_gflops_per_token']:.2f}", *cells])
    return comparison.markdown(head, rows)


def draw(record: dict[str, Any], path: Path) -> str | None:
    """Operations per second over the size of the model, a line for each number of micro-batches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot = figure.subplots()
    points = [point for point in record["points"] if "refused" not in point]
    for count in dict.fromkeys(point["micro_batches"] for point in points):
        own = [point for point in points if point["micro_batches"] == count]
        plot.plot(
            [point["parameters"] / 1e6 for point in own],
            [point["hardware_gflops_per_s"] for point in own],
            "o-",
            label=f"{count} micro-batches",
        )
    plot.set(xscale="log", xlabel="parameters (millions)", ylabel="10⁹ operations per second", ylim=(0, None))
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path.name
