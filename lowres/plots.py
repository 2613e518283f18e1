"""Plots: the loss curve of a run, and two plots of a sweep."""

from __future__ import annotations

import io
import re
import statistics
from pathlib import Path
from typing import Any

from lowres import disk, metrics


def draw_loss(run: Path) -> Path | None:
    """Plot training and validation loss against tokens into the run's folder; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = metrics.read(run / "metrics.jsonl")
    steps = [r for r in records if r.get("loss") is not None]
    evaluations = [r for r in records if r.get("val_loss") is not None]
    tokens_at = {r["step"]: r["tokens"] for r in steps} | {0: 0}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], lw=0.8, alpha=0.6, label="training")
    axes.plot(
        [tokens_at[r["step"]] for r in evaluations],
        [r["val_loss"] for r in evaluations],
        marker="o",
        ms=3,
        label="validation",
    )
    unit = "" if any("margin" in r for r in steps) else " (nats per token)"  # of pairs it has none
    axes.set(xlabel="tokens", ylabel=f"loss{unit}")
    axes.set_title(run.name, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(figure, run / "loss.png")


def draw_sweep(folder: Path, axes: dict[str, list[Any]], points: list[dict[str, Any]]) -> list[Path] | None:
    """Plot the final validation loss of a sweep: loss.png over the grid, if the grid has only one or two
    numeric axes, and lr_over_batch.png; and against the same ratio the scores of tasks, if there are some,
    lr_over_batch_<task>.png. Returns the files; None without matplotlib.

    points: see lowres.sweep; points without a loss are left out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    points = [point for point in points if point["val_loss"] is not None]
    numeric = [key for key, values in axes.items() if all(_is_number(v) for v in values) and len(values) > 1]
    names = [key for key, values in axes.items() if key not in numeric and len(values) > 1]
    drawn: list[Path] = []
    if not points:
        return drawn
    if numeric and not names and len(numeric) <= 2:
        figure = Figure(figsize=(7, 5), layout="constrained")
        (_contours if len(numeric) == 2 else _curve)(figure, numeric, points)
        drawn.append(_saved(figure, folder / "loss.png"))

    # ---- against lr over batch: one curve for each combination of values, except of the first numeric axis
    others = [key for key in axes if key not in numeric[:1] and len(axes[key]) > 1]
    figure = Figure(figsize=(7, 5), layout="constrained")
    plot = figure.subplots()
    _against_ratio(plot, folder.name, others, [(point, point["val_loss"]) for point in points])
    _loss_axis(plot, [point["val_loss"] for point in points])
    drawn.append(_saved(figure, folder / "lr_over_batch.png"))
    scores = dict.fromkeys((t, next(iter(of))) for p in points for t, of in p.get("tasks", {}).items() if of)
    for task, metric in scores:
        scored = [(p, p["tasks"][task][metric]) for p in points if metric in p.get("tasks", {}).get(task, {})]
        figure = Figure(figsize=(7, 5), layout="constrained")
        plot = figure.subplots()
        _against_ratio(plot, folder.name, others, scored)
        plot.set_ylabel(f"{task}: {metric}", parse_math=False)
        plot.grid(alpha=0.3, which="both")
        name = re.sub(r"[^\w.+-]+", "-", task)
        drawn.append(_saved(figure, folder / f"lr_over_batch_{name}.png"))
    return drawn


def _against_ratio(
    plot: Any, title: str, others: list[str], scored: list[tuple[dict[str, Any], float]]
) -> None:
    """A curve of scores for each combination of the values of the axes `others`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point, score in scored:
        label = ", ".join(f"{key} = {point['values'][key]}" for key in others)
        curves.setdefault(label, []).append((point["lr_over_batch"], score))
    for label, pairs in curves.items():
        plot.plot(*zip(*sorted(pairs), strict=True), marker="o", ms=4, lw=1, label=label)
    plot.set(xscale="log", xlabel="learning rate / batch in sequences")
    plot.set_title(title, parse_math=False)
    if any(curves):
        plot.legend(fontsize="small")


def _saved(figure: Any, target: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    disk.store(target, picture.getvalue())
    return target


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _top(losses: list[float]) -> float:
    """Upper end of a loss axis: one bad run must not make the other curves look flat."""
    least = min(losses)
    return min(max(losses), least + 4 * (statistics.median(losses) - least))


def _loss_axis(plot: Any, losses: list[float]) -> None:
    """Label the loss axis and limit it to the range of most losses."""
    margin = 0.05 * (_top(losses) - min(losses))
    beyond = ""
    if max(losses) > _top(losses) + margin > min(losses):
        plot.set_ylim(min(losses) - margin, _top(losses) + margin)
        beyond = f"; up to {max(losses):.3g} outside the plot"
    plot.set_ylabel(f"validation loss (nats per token{beyond})")
    plot.grid(alpha=0.3, which="both")


def _scale(values: list[float]) -> str:
    return "log" if min(values) > 0 and max(values) / min(values) >= 4 else "linear"


def _curve(figure: Any, axes: list[str], points: list[dict[str, Any]]) -> None:
    (key,) = axes
    pairs = sorted((point["values"][key], point["val_loss"]) for point in points)
    plot = figure.subplots()
    plot.plot(*zip(*pairs, strict=True), marker="o")
    plot.set(xlabel=key, xscale=_scale([x for x, _ in pairs]))
    _loss_axis(plot, [loss for _, loss in pairs])


def _contours(figure: Any, axes: list[str], points: list[dict[str, Any]]) -> None:
    import numpy as np

    loss_at = {tuple(point["values"][key] for key in axes): point["val_loss"] for point in points}
    xs, ys = (sorted({at[i] for at in loss_at}) for i in range(2))
    losses = np.array([[loss_at.get((x, y), np.nan) for x in xs] for y in ys])
    least, most = np.nanmin(losses), np.nanmax(losses)
    top = _top(list(loss_at.values()))
    plot = figure.subplots()
    if len(xs) > 1 and len(ys) > 1 and top > least:
        filled = plot.contourf(
            xs,
            ys,
            np.ma.masked_invalid(losses),
            levels=np.linspace(least, top, 13),
            cmap="viridis_r",
            extend="max" if top < most else "neither",
        )
        figure.colorbar(filled, format="%.3f", label="validation loss (nats per token)")
    for (x, y), loss in loss_at.items():
        mark = "*" if loss == least else "o"
        plot.plot(x, y, mark, color="black", ms=10 if loss == least else 4, clip_on=False)
        plot.annotate(
            f"{loss:.3f}",
            (x, y),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.7},
        )
    for scaled, ticked, values in (
        (plot.set_xscale, plot.set_xticks, xs),
        (plot.set_yscale, plot.set_yticks, ys),
    ):
        scaled(_scale(values))
        ticked(values, [f"{value:g}" for value in values])
    plot.minorticks_off()
    plot.use_sticky_edges = False  # for a margin around the outer points and their numbers
    plot.margins(0.08)
    plot.set(xlabel=axes[0], ylabel=axes[1], title="validation loss; the star is the lowest")
