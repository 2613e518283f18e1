"""The charts of a report as data: what is drawn, with which numbers. `assets/page.js` draws them.

A line's `x` says whether its numbers belong to the buckets of the steps or of the evaluations of its run, and
`at` to which of them; a chart can so be drawn over steps, tokens, FLOPs or hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from lowres.scores import BITS, LOSS, OF, PERPLEXITY, TASK, of_tasks
from lowres.view import Curve, View
from lowres.view.columns import Numbers

GIB = 1 << 30
# numbers in the records of steps that have a chart of their own, or need none
KNOWN = {
    *("step", "tokens", "loss", "lr", "lr_over_batch", "grad_norm", "tokens_per_s", "wall_s", "skipped"),
    *("peak_mem_gib", "host_mem_gib", "peak_rss_gib", "cycle", "merges", "targets"),
}
KNOWN_SCORES = {"step", LOSS, PERPLEXITY}
UPDATE, SHARE = "update/", "share/"
TITLES = {
    BITS: "Validation: bits per byte",
    "merge_cosine": "Merges: cosine of the applied and the intended change",
    "merge_norm": "Merges: norm of the applied change divided by the intended one",
    "effective_rank": "Merges: effective rank of all changes so far",
    "padding": "Padding, share of the tokens",
}
MOST_LINES = 24  # in a chart by part
MOST_TASKS = 24
MOST_COLUMNS = 200  # of a heat map
# kinds of events that a chart marks
MARKED = {"spike": "spike", "rolled back": "rolled back to here", "memory": "smaller micro-batch"}


def numbers(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """For JSON: as many digits as a chart can show."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def run_data(view: View) -> dict[str, Any]:
    """What all charts of a run share: where its buckets are on every axis, and what is marked."""
    plan = view.plan
    flops = plan.get("model_flops_per_token")
    steps = {key: view.steps.curve(key) for key in ("step", "tokens", "wall_s")}
    # buckets without a time are those of older records
    axes = {"step": numbers(steps["step"].greatest, 15)}
    for name, key, per in (("tokens", "tokens", 1.0), ("hours", "wall_s", 3600.0)):
        if len(steps[key].at) == len(steps["step"].at) > 0:
            axes[name] = numbers(steps[key].greatest / per, 8)
    if "tokens" in axes and isinstance(flops, int | float) and flops > 0:
        axes["flops"] = numbers(steps["tokens"].greatest * flops, 8)
    scored = view.evaluations.curve("step").greatest
    there = {"step": numbers(scored, 15)}
    if len(steps["step"].at):
        for name, values in axes.items():
            if name != "step":  # an evaluation before the first step is at 0
                start = np.concatenate([[0.0], steps["step"].greatest])
                own = np.concatenate([[0.0], np.array(values, dtype=float)])
                there[name] = numbers(np.interp(scored, start, own), 8)
    return {"name": view.name, "steps": axes, "evaluations": there, "marks": _marks(view)}


def _marks(view: View) -> list[dict[str, Any]]:
    found = []
    for kind, text in MARKED.items():
        found += [(event.get("step"), text) for event in view.history.of(kind)]
    found += [(e.get("step"), "resumed") for e in view.history.of("started") if e.get("step")]
    cycle, start = view.key("relora.cycle_steps"), view.key("relora.start_step", 0)
    if view.key("relora.enabled") is True and all(isinstance(x, int) for x in (cycle, start)) and cycle > 0:
        merged = range(start + cycle, view.step + 1, cycle)
        found += [(step, "merge") for step in merged[:: max(1, len(merged) // 100)]]
    steps = {(step, text) for step, text in found if isinstance(step, int) and 0 <= step <= view.step}
    return [{"step": step, "text": text} for step, text in sorted(steps)][:300]


def line(run: int, name: str, curve: Curve, values: Numbers, x: str = "steps", **more: Any) -> dict[str, Any]:
    """A line of a chart. more: dashed, faint, points (whether each number has a dot)."""
    return {"run": run, "name": name, "x": x, "at": curve.at.tolist(), "y": numbers(values), **more}


def chart(
    name: str, title: str, lines: Sequence[dict[str, Any]], about: str = "", **more: Any
) -> dict[str, Any] | None:
    """A chart of lines; None if there is nothing to draw. more: log (y axis), unit, percent."""
    lines = [one for one in lines if one["y"]]
    if not lines:
        return None
    spoken = "; ".join(_spoken(one) for one in lines if not one.get("faint"))
    found = {"id": name, "kind": "lines", "title": title, "about": about, "spoken": spoken, "lines": lines}
    return found | more


def _spoken(one: Mapping[str, Any]) -> str:
    """A line in words, for those who cannot see it."""
    values = [value for value in one["y"] if value is not None]
    ends = f"from {values[0]:g} to {values[-1]:g}, least {min(values):g}, greatest {max(values):g}"
    return f"{one['name']}: {ends}"


def shared_charts(views: Sequence[View]) -> list[dict[str, Any]]:
    """The charts in which all runs are drawn together."""
    several = len(views) > 1
    found = []
    scores = dict.fromkeys(key for v in views for key in v.evaluations.keys if OF not in key)
    scores = dict.fromkeys([*filter(scores.__contains__, [BITS]), *scores])
    for key in [key for key in scores if key not in KNOWN_SCORES]:
        lines = []
        for run, view in enumerate(views):
            curve = view.evaluations.curve(key)
            lines.append(line(run, _named(views, run, ""), curve, curve.mean, "evaluations", points=True))
        title = TITLES.get(key, "Validation: " + key.removeprefix("val_").replace("_", " "))
        found.append(chart(key, title, lines))
    found.insert(BITS in scores, _loss(views))
    found += _tasks(views)

    def of(key: str, title: str, about: str = "", envelope: bool = False, **more: Any) -> None:
        lines = []
        for run, view in enumerate(views):
            curve = view.steps.curve(key)
            if envelope and view.steps.stride > 1 and not several:
                lines += [
                    line(run, "least", curve, curve.least, faint=True),
                    line(run, "greatest", curve, curve.greatest, faint=True),
                ]
            lines.append(line(run, _named(views, run, ""), curve, curve.mean))
        found.append(chart(key, title, lines, about, **more))

    of("lr", "Learning rate")
    of("lr_over_batch", "Learning rate / batch in sequences")
    of("grad_norm", "Gradient norm", envelope=True, log=True)
    of("tokens_per_s", "Throughput", unit="tokens/s")
    found.append(_share_of_peak(views))
    if any(view.skipped for view in views):
        of("skipped", "Units that were not updated", "The mean over the steps of a point.")
    others = dict.fromkeys(key for view in views for key in view.steps.keys if "/" not in key)
    for key in [key for key in others if key not in KNOWN]:
        of(key, TITLES.get(key, "Training: " + key.replace("_", " ")))
    return [one for one in found if one is not None]


def _named(views: Sequence[View], run: int, what: str) -> str:
    """What a line is called in the legend."""
    names = [view.name for view in views]
    own = names[run] if names.count(names[run]) == 1 else str(views[run].folder)
    return what if len(views) == 1 and what else f"{own} {what}".strip()


def _loss(views: Sequence[View]) -> dict[str, Any] | None:
    lines = []
    for run, view in enumerate(views):
        curve = view.steps.curve("loss")
        if view.steps.stride > 1 and len(views) == 1:
            lines += [
                line(run, "least", curve, curve.least, faint=True),
                line(run, "greatest", curve, curve.greatest, faint=True),
            ]
        lines.append(line(run, _named(views, run, "training"), curve, curve.mean))
        scores = view.evaluations.curve("val_loss")
        name = _named(views, run, "validation")
        lines.append(line(run, name, scores, scores.mean, "evaluations", points=True, dashed=True))
    pairs = all(view.key("objective.name") == "dpo" for view in views)
    about = "Nats per token." if not pairs else "Of pairs; it has no unit."
    if any(view.steps.stride > 1 for view in views):
        about += " Each point of the training loss is the mean of neighbouring steps."
    return chart("loss", "Loss", lines, about)


def _tasks(views: Sequence[View]) -> list[dict[str, Any] | None]:
    """A chart for each task, with a line for each metric."""
    keys = [key for view in views for key in view.evaluations.keys if key.startswith(TASK)]
    tasks = of_tasks(dict.fromkeys(keys))
    left = len(tasks) - MOST_TASKS
    found = []
    for task, metrics in islice(tasks.items(), MOST_TASKS):
        lines = []
        for metric in metrics:
            for run, view in enumerate(views):
                curve = view.evaluations.curve(f"{TASK}{task}/{metric}")
                name = _named(views, run, metric)
                lines.append(line(run, name, curve, curve.mean, "evaluations", points=True))
        about = f"{left} more tasks are left out." if left > 0 else ""
        found.append(chart(f"{TASK}{task}", f"Task: {task}", lines, about))
    return found


def _share_of_peak(views: Sequence[View]) -> dict[str, Any] | None:
    """Model FLOPs per second, divided by those of the fastest matrix product where that is known."""
    known = [all(isinstance(v.plan.get(k), int | float) for k in PEAK) for v in views]
    lines = []
    for run, view in enumerate(views):
        flops, peak = (view.plan.get(key) for key in PEAK)
        if not isinstance(flops, int | float) or (any(known) and not (known[run] and peak)):
            continue
        curve = view.steps.curve("tokens_per_s")
        rate = curve.mean * flops / 1e12
        lines.append(line(run, _named(views, run, ""), curve, rate / peak if any(known) and peak else rate))
    if any(known):
        about = "Model FLOPs per second, divided by those of the fastest matrix product of the machine."
        return chart("share_of_peak", "Share of peak", lines, about, percent=True)
    return chart(
        "model_tflops", "Model TFLOPs per second", lines, "The peak of this machine was not measured."
    )


PEAK = ("model_flops_per_token", "peak_tflops")


def own_charts(run: int, view: View) -> list[dict[str, Any]]:
    """The charts of one run that cannot be drawn together with those of others."""
    found = []
    for prefix, title, columns, x in (
        (BITS + OF, "Validation: bits per byte by part", view.evaluations, "evaluations"),
        (LOSS + OF, "Validation loss by part", view.evaluations, "evaluations"),
        (SHARE, "Share of the parts in the training tokens", view.evaluations, "evaluations"),
    ):
        keys = [key for key in columns.keys if key.startswith(prefix)]
        lines = []
        for key in keys[:MOST_LINES]:
            curve = columns.curve(key)
            lines.append(line(run, key.removeprefix(prefix), curve, curve.mean, x, points=True, own=True))
        left = len(keys) - MOST_LINES
        about = f"{left} more parts are left out." if left > 0 else ""
        found.append(chart(f"{prefix[:-1]}-{run}", title, lines, about, percent=prefix == SHARE))
    found += [_updates(run, view), *_memory(run, view)]
    return [one for one in found if one is not None]


def _updates(run: int, view: View) -> dict[str, Any] | None:
    """The size of the updates of each unit over time."""
    keys = [key for key in view.steps.keys if key.startswith(UPDATE)]
    curves = [view.steps.curve(key) for key in keys]
    there = sorted({int(at) for curve in curves for at in curve.at})
    if not there:
        return None
    columns = [part.tolist() for part in np.array_split(np.array(there), min(MOST_COLUMNS, len(there)))]
    place = {at: index for index, part in enumerate(columns) for at in part}
    cells = []
    for row, curve in enumerate(curves):
        sums, counts = np.zeros(len(columns)), np.zeros(len(columns))
        for at, value in zip(curve.at, curve.mean, strict=True):
            if value > 0:  # as its logarithm is drawn
                sums[place[int(at)]] += np.log10(value)
                counts[place[int(at)]] += 1
        cells += [[int(c), row, float(f"{sums[c] / counts[c]:.4g}")] for c in np.flatnonzero(counts)]
    if not cells:
        return None
    names = [key.removeprefix(UPDATE) for key in keys]
    values = [10 ** cell[2] for cell in cells]
    return {
        "id": f"updates-{run}",
        "kind": "heat",
        "title": "Size of the updates",
        "about": "RMS of the update of a step divided by the RMS of the weights that it changes.",
        "spoken": f"{len(names)} units over time, from {min(values):.2g} to {max(values):.2g}",
        "run": run,
        "rows": names,
        "columns": [part[-1] for part in columns],
        "cells": cells,
    }


def _memory(run: int, view: View) -> list[dict[str, Any]]:
    """Planned and allocated bytes by component, and the planned and measured peak, in each room."""
    found = []
    for room, name, key in (("gpu", "GPU", "peak_mem_gib"), ("host", "host", "host_mem_gib")):
        rows = _components(view, room)
        peak = _bytes(view.plan.get(f"{room}_peak_bytes")), _greatest(view, key)
        if any(peak):
            rows.insert(0, ("all together, at its peak", *peak))
        if not rows:
            continue
        about = "What lives only in a part of a step, which is named, is measured as part of the peak."
        if room == "gpu" and str(view.plan.get("device", "")).startswith("CPU"):
            about += " There is no GPU; this is what one would hold."
        largest = max(size or 0 for row in rows for size in row[1:])
        unit, per = ("GiB", GIB) if largest >= GIB / 10 else ("MiB", 1 << 20)
        bars = [[None if s is None else float(f"{s / per:.5g}") for s in row[1:]] for row in rows]
        found.append(
            {
                "id": f"memory-{room}-{run}",
                "kind": "bars",
                "title": f"Memory: {name}",
                "about": about,
                "spoken": "; ".join(
                    f"{row[0]}: plan {_said(a)}, there {_said(b)} {unit}"
                    for row, (a, b) in zip(rows, bars, strict=True)
                ),
                "unit": unit,
                "rows": [row[0] for row in rows],
                "bars": [
                    {"name": "plan", "values": [bar[0] for bar in bars]},
                    {"name": "measured or allocated", "values": [bar[1] for bar in bars]},
                ],
            }
        )
    return found


Row = tuple[str, float | None, float | None]  # a component; bytes that are planned, and that are there


def _components(view: View, room: str) -> list[Row]:
    """The components in a room. Slabs hold several: all weights are one, and so are state and master copy."""
    planned: dict[str, tuple[float, str]] = {}
    for one in _records(view.plan.get("components"), room):
        planned[str(one.get("name"))] = _bytes(one.get("bytes")) or 0.0, str(one.get("phase") or "")
    held = {str(one.get("name")): _bytes(one.get("bytes")) for one in _records(view.plan.get("held"), room)}
    weights = [size for name, (size, _) in planned.items() if ": " in name]
    rows: list[Row] = [("weights", sum(weights), held.get("weights"))] if weights else []
    for name, (size, phase) in planned.items():
        if ": " in name:
            rows.append((f"of these {name}", size, None))
        elif name == "optimizer state" and "master copy" in planned:
            rows.append((f"{name} and master copy", size + planned["master copy"][0], held.get(name)))
        elif name != "master copy":
            rows.append((f"{name} ({phase})" if phase else name, size, held.get(name)))
    return rows


def _records(found: Any, room: str) -> list[dict[str, Any]]:
    records = found if isinstance(found, list) else []
    return [one for one in records if isinstance(one, dict) and one.get("room") == room]


def _greatest(view: View, key: str) -> float | None:
    """Bytes."""
    found = view.steps.curve(key).greatest
    return float(found.max()) * GIB if len(found) else None


def _bytes(size: Any) -> float | None:
    return float(size) if isinstance(size, int | float) else None


def _said(size: float | None) -> str:
    return "unknown" if size is None else f"{size:.4g}"
