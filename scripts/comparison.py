"""Compares ways to train with the same config, seeds and tokens.

An arm is a name and the settings it changes. Seeds are paired: with the same seed, all arms start from the
same values and see the same data in the same order, so differences are more exact than losses. Every arm is
a `lowres sweep` over seeds in its own folder: it can be resumed, and a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowres import metrics
from lowres.errors import CheckFailed, UserError
from lowres.sweep import SWEEP

MOST_EXTENSIONS = 3  # how often a sweep of rates may be extended beyond its first three
SMOOTHED = 0.03  # share of a run over which a point of a training curve is averaged


def run_script(main: Callable[[], None]) -> None:
    """Run a script; an error that its user can fix is one line without a traceback, and exit code 1."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from None


def above_zero(text: str) -> int:
    """Parse a whole number above 0 from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def in_parallel(work: Callable[[str], Any], names: Iterable[str], jobs: int) -> dict[str, Any]:
    """Results by name. The started processes share the cores evenly."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    names = list(names)
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def points(
    config: Path, overrides: Sequence[str], grid: str, tokens: int, folder: Path
) -> list[dict[str, Any]]:
    """The points of a sweep over one key; those that exist are not trained again."""
    command = [sys.executable, "-m", "lowres", "sweep", str(config), "--grid", grid]
    command += ["--tokens", str(tokens), "--run", str(folder)]
    command += [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (
        0,
        CheckFailed.exit_code,
    ):  # a point failed, which its record says
        raise SystemExit((done.stderr.strip().splitlines() or [f"{folder}: the sweep failed"])[-1])
    found: list[dict[str, Any]] = json.loads((folder / SWEEP).read_text("utf-8"))["points"]
    for point in found:
        # a point that diverges is a result; one that cannot start is not
        if point["error"] and not (Path(point["run"]) / "metrics.jsonl").exists():
            raise UserError(point["error"])
    return found


def best_rate(config: Path, overrides: Sequence[str], lr: float, tokens: int, folder: Path) -> dict[str, Any]:
    """The point with the best learning rate, of factors of two around lr, which go on until the best rate
    lies between two others. Its key `rates` has all validation losses by rate."""
    grid = [lr / 2, lr, lr * 2]
    for _ in range(MOST_EXTENSIONS + 1):
        values = ",".join(f"{rate:g}" for rate in grid)
        found = points(config, overrides, f"optim.lr={values}", tokens, folder)
        best = best_of(found)
        place = found.index(best)
        if 0 < place < len(grid) - 1:
            break
        grid = [grid[0] / 2, *grid] if place == 0 else [*grid, grid[-1] * 2]
    print(f"{folder.name}: lr {best['lr']:g}, {best['val_loss']}", file=sys.stderr, flush=True)
    return best | {"rates": {f"{p['lr']:g}": p["val_loss"] for p in found}}


def over_seeds(
    config: Path, overrides: Sequence[str], seeds: Sequence[int], tokens: int, folder: Path
) -> list[dict[str, Any]]:
    """One point of the sweep for each seed."""
    grid = f"run.seed={','.join(map(str, seeds))}"
    found = points(config, overrides, grid, tokens, folder)
    losses = ", ".join("diverged" if p["val_loss"] is None else f"{p['val_loss']:.4f}" for p in found)
    print(f"{folder.name}: {losses}", file=sys.stderr, flush=True)
    return found


def best_of(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The point with the lowest validation loss; one that diverged or failed comes last."""
    return min(found, key=lambda p: math.inf if p["val_loss"] is None else p["val_loss"])


def val_loss(run: Mapping[str, Any]) -> float:
    """Validation loss of a point; NaN if it diverged or failed."""
    return math.nan if run["val_loss"] is None else float(run["val_loss"])


def folder_of(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def summarise(
    arms: Mapping[str, list[dict[str, Any]]], first: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Mean and spread by arm. first: the arm to compare each with. For these, the change of perplexity over
    pairs of the same seed: mean, and standard error of the mean (None for one pair)."""
    found: dict[str, dict[str, Any]] = {}
    for name, runs in arms.items():
        losses = [val_loss(run) for run in runs]
        mean = statistics.fmean(losses)
        found[name] = {"val_loss": losses, "mean_val_loss": mean, "perplexity": math.exp(mean)}
        found[name]["spread"] = statistics.stdev(losses) if len(losses) > 1 else None
        if name in first:
            others = arms[first[name]]
            pairs = [
                mine - run["val_loss"] for mine, run in zip(losses, others, strict=False)
            ]  # one arm may have fewer seeds
            error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
            found[name] |= {
                "against": first[name],
                "perplexity_change": math.expm1(statistics.fmean(pairs)),
                "standard_error": error,
            }
    return found


def loss_text(summary: Mapping[str, Any]) -> str:
    """`3.012 ± 0.012`: mean over seeds and their standard deviation."""
    spread = "" if summary["spread"] is None else f" ± {summary['spread']:.3f}"
    return f"{summary['mean_val_loss']:.3f}{spread}"


def change_text(summary: Mapping[str, Any]) -> str:
    """`+1.2 ± 0.3 %` if the arm is compared with another; else empty."""
    if "against" not in summary:
        return ""
    error = summary["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * summary['perplexity_change']:+.1f}{spread} %"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def draw_curves(path: Path, arms: Mapping[str, list[dict[str, Any]]], title: str) -> Path | None:
    """Plot the training loss of each arm over tokens (running mean, averaged over seeds) and its final
    validation losses. Returns None without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    plot = figure.subplots()
    lowest, highest = math.inf, -math.inf
    for i, (name, runs) in enumerate(arms.items()):
        # a run that diverged may have stopped before the others
        losses = [statistics.fmean(step) for step in zip(*map(_losses, runs), strict=False)]
        smooth = _smooth(losses)
        tokens = [r["tokens"] for r in _records(runs[0])][: len(losses)]
        colour, style = colormaps["tab10"](i % 10), "--" if i >= 10 else "-"
        plot.plot(tokens, smooth, style, color=colour, lw=1.2, label=name)
        ends = [run["val_loss"] for run in runs if run["val_loss"] is not None]
        plot.plot([tokens[-1] * 1.01] * len(ends), ends, "_", color=colour, ms=9)
        finite = [loss for loss in (*ends, *smooth) if math.isfinite(loss)]
        lowest = min([lowest, *finite])
        start = smooth[len(smooth) // 8]  # where the steep part is over
        highest = max(highest, start if math.isfinite(start) else highest)
    if lowest < highest:
        plot.set_ylim(lowest - 0.03 * (highest - lowest), highest)
    plot.set(xlabel="tokens", title=title)
    plot.set_ylabel("training loss (nats a token); marks: validation at the end")
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def draw_differences(
    path: Path, arms: Mapping[str, list[dict[str, Any]]], first: str, title: str
) -> Path | None:
    """Plot the difference of the training loss of each arm from the first one's over tokens: running mean of
    the differences between runs of the same seed, each seed and their mean. None without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    plot = figure.subplots()
    base = [_losses(run) for run in arms[first]]
    widest = 0.0
    for i, name in enumerate(n for n in arms if n != first):
        colour = colormaps["tab10"](i)
        pairs = [
            [mine - other for mine, other in zip(_losses(run), losses, strict=False)]
            for run, losses in zip(arms[name], base, strict=False)
        ]
        lines = [_smooth(pair) for pair in pairs]
        mean = [statistics.fmean(step) for step in zip(*lines, strict=False)]
        tokens = [r["tokens"] for r in _records(arms[name][0])][: len(mean)]
        for line in lines:
            plot.plot(tokens, line[: len(tokens)], color=colour, lw=0.6, alpha=0.4)
        plot.plot(tokens, mean, color=colour, lw=1.6, label=name)
        widest = max([widest, *(abs(v) for v in mean[len(mean) // 8 :])])
    plot.axhline(0, color="black", lw=0.8)
    plot.set_ylim(-3 * widest, 3 * widest)
    plot.set(xlabel="tokens", title=f"{title}: training loss minus that of {first}", ylabel="nats a token")
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _records(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [r for r in metrics.read(Path(run["run"]) / "metrics.jsonl") if "loss" in r]


def _losses(run: Mapping[str, Any]) -> list[float]:
    return [r["loss"] or math.nan for r in _records(run)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over SMOOTHED of the length."""
    width = max(1, round(SMOOTHED * len(values)))
    return [statistics.fmean(values[max(0, j - width + 1) : j + 1]) for j in range(len(values))]
