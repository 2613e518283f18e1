"""A run on the whole terminal. It needs rich, which draws; text of files is shown as it is, without control
characters and without markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowres.scores import BITS, LOSS, SHOWN, number_in_words, of_tasks
from lowres.terminal import clean
from lowres.view import Columns, View, duration
from lowres.view.folder import TRAINING
from lowres.watch.card import Card
from lowres.watch.curve import curve
from lowres.watch.plain import MOST_TASKS, about

GIB = 1 << 30
HEIGHT = 8  # lines of a curve
WIDE = 100  # characters from which on two curves fit side by side
EVENTS = 5
NUMBERS = (
    ("loss", "loss", ".4f"),
    ("grad_norm", "gradient norm", ".3g"),
    ("lr", "learning rate", ".3e"),
    ("lr_over_batch", "lr / batch", ".3e"),
    ("skipped", "units not updated", ",d"),
)
SCORES = [(shown.key, f"validation {shown.name}", shown.form) for shown in SHOWN]


def frame(view: View, cards: Sequence[Card], width: int) -> RenderableType:
    """The run as it is now, for a terminal of this width."""
    state = view.state()
    title = Text.assemble(
        (clean(view.name), "bold"), "  ", (clean(state.text), "green" if state.name == TRAINING else "yellow")
    )
    parts: list[RenderableType] = [title, _progress(view)]
    parts += _curves(view, width)
    tables = Table.grid(padding=(0, 4))
    tables.add_row(_numbers(view), _memory(view, cards))
    parts += [tables, *_events(view)]
    return Group(*parts)


def _progress(view: View) -> RenderableType:
    grid, total, left = Table.grid(padding=(0, 2)), view.total, view.seconds_left
    told = f"step {view.step:,}" + (f" of {total:,}" if total else "")
    if isinstance(tokens := view.last.get("tokens"), int):
        told += f", {tokens / 1e6:,.4g} M tokens"
    if isinstance(spent := view.last.get("wall_s"), int | float):
        told += f", {duration(spent)} so far"
    if left and view.step != total:
        told += f", {duration(left)} left"
    grid.add_row(ProgressBar(total=total or 1, completed=min(view.step, total or 0), width=40), Text(told))
    return grid


def _curves(view: View, width: int) -> Iterator[RenderableType]:
    beside = width >= WIDE
    each = max(20, (width // 2 if beside else width) - 16)
    panels = [
        panel
        for columns, key, title in (
            (view.steps, "loss", "training loss"),
            (view.evaluations, BITS, "validation bits per byte"),
            (view.evaluations, LOSS, "validation loss"),
            (view.steps, "grad_norm", "gradient norm"),
            (view.steps, "tokens_per_s", "tokens/s"),
        )
        if (panel := _curve(columns, key, title, each)) is not None
    ]
    if not beside:
        yield from panels[:3]
        return
    grid = Table.grid(expand=True)
    for first in range(0, len(panels), 2):
        grid.add_row(*panels[first : first + 2])
    yield grid


def _curve(columns: Columns, key: str, title: str, width: int) -> Panel | None:
    values = columns.curve(key).mean
    if len(values) < 2:
        return None
    lines, low, high = curve(values.tolist(), width, HEIGHT)
    labels = [f"{high:.4g}"] + [""] * (HEIGHT - 2) + [f"{low:.4g}"]
    text = Text("\n".join(f"{label:>9} {line}" for label, line in zip(labels, lines, strict=True)))
    return Panel(text, title=f"{title} {values[-1]:.4g}", title_align="left", border_style="dim")


def _numbers(view: View) -> Table:
    table = Table.grid(padding=(0, 2))
    for record, rows in ((view.last, NUMBERS), (view.evaluated, SCORES)):
        for key, name, form in rows:
            value = record.get(key)
            if isinstance(value, int | float):
                table.add_row(Text(name, "dim"), format(value, form))
            elif key in record:
                table.add_row(Text(name, "dim"), Text("not finite", "red"))
    for task, found in islice(of_tasks(view.tasks).items(), MOST_TASKS):
        for metric, score in found.items():
            table.add_row(Text(clean(f"{task} {metric}"), "dim"), number_in_words(score))
    if (rate := view.tokens_per_s) is not None:
        table.add_row(Text("tokens/s", "dim"), f"{rate:,.0f}")
        flops, peak = (view.plan.get(key) for key in ("model_flops_per_token", "peak_tflops"))
        if isinstance(flops, int | float) and isinstance(peak, int | float) and peak > 0:
            table.add_row(Text("share of peak", "dim"), f"{rate * flops / peak / 1e12:.1%}")
    counts = view.history.counts
    for name, number in (
        ("spikes", counts["spike"]),
        ("rollbacks", counts["rolled back"]),
        ("steps that skipped", view.skipped),
        ("steps without a loss", view.lost),
    ):
        if number:
            table.add_row(Text(name, "dim"), Text(f"{number:,}", "yellow"))
    return table


def _memory(view: View, cards: Sequence[Card]) -> Table:
    """Measured peaks against the plan, and the cards."""
    table = Table.grid(padding=(0, 2))
    for name, key, planned in (
        ("GPU", "peak_mem_gib", "gpu_peak_bytes"),
        ("host", "host_mem_gib", "host_peak_bytes"),
        ("process", "peak_rss_gib", ""),
    ):
        used, plan = view.last.get(key), view.plan.get(planned)
        if not isinstance(used, int | float):
            continue
        told, bar = f"{used:.2f} GiB", _bar(None)
        if isinstance(plan, int | float) and plan > 0:
            told += f" of {plan / GIB:.2f} planned"
            bar = _bar(used * GIB / plan)
        table.add_row(Text(name, "dim"), bar, told)
    for card in cards:
        share, told = None, ""
        if card.used is not None and card.total:
            share, told = card.used / card.total, f"{card.used / GIB:.1f} of {card.total / GIB:.1f} GiB"
        table.add_row(Text(clean(about(card) or card.name), "dim"), _bar(share), told)
    return table


def _bar(share: float | None) -> RenderableType:
    return "" if share is None else ProgressBar(total=1.0, completed=min(1.0, share), width=20)


def _events(view: View) -> Iterator[RenderableType]:
    found: list[dict[str, Any]] = []
    for kind in view.history.counts:
        found += [e for e in view.history.of(kind) if kind != "saved" and (e.get("text") or e.get("error"))]
    for event in sorted(found, key=lambda one: str(one.get("time", "")))[-EVENTS:]:
        text = clean(str(event.get("text") or event.get("error"))).replace("\n", " ")
        yield Text(
            f"{clean(str(event.get('time', '')))[:19]}  {text}", "dim", no_wrap=True, overflow="ellipsis"
        )
