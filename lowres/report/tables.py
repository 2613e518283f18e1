"""The tables of a report: what a run has reached, what differs between runs, what happened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lowres.scores import BITS, LOSS, SHOWN, number_in_words, of_tasks
from lowres.view import View, duration
from lowres.view.folder import KILLED, STOPPED, TRAINING

Row = tuple[str, list[str]]  # a name, and a cell for each run
# events that say nothing about the run
SILENT = {"saved", "started", "finished", "stopped"}
MOST_EVENTS = 200
MOST_TASKS = 24
# where a run is, and not what
PLACES = {"run.name", "run.rescue", "data.cache"}
NOTHING = "-"


def figures(views: Sequence[View]) -> list[Row]:
    """The main numbers of each run."""
    rows: dict[str, list[str]] = {}
    for index, view in enumerate(views):
        for name, cell in _figures(view):
            rows.setdefault(name, [NOTHING] * len(views))[index] = cell
    return [(name, cells) for name, cells in rows.items() if any(cell != NOTHING for cell in cells)]


def _figures(view: View) -> Iterator[tuple[str, str]]:
    state, last, total = view.state(), view.last, view.total
    yield "state", state.text
    yield "steps", f"{view.step:,}" + (f" of {total:,}" if total else "")
    yield "tokens", _count(last.get("tokens"))
    parameters = view.plan.get("parameters")
    yield "parameters", _count(parameters)
    yield "training loss, last", _plain(last.get("loss"), ".4f")
    for key, name, form in SHOWN:
        yield f"validation {name}, last", _plain(view.evaluated.get(key), form)
        least = view.evaluations.curve(key).least
        if key in (BITS, LOSS) and len(least):
            yield f"validation {name}, lowest", _plain(float(least.min()), form)
    for task, found in islice(of_tasks(view.tasks).items(), MOST_TASKS):
        for metric, score in found.items():
            yield f"{task}: {metric}, last", number_in_words(score)
    yield "learning rate, last", _plain(last.get("lr"), ".3g")
    yield "tokens/s", _plain(view.tokens_per_s, ",.0f")
    yield "time", duration(last.get("wall_s"))
    if state.name in (TRAINING, KILLED, STOPPED) and view.step != total:
        yield "left at this speed", duration(view.seconds_left)
    yield "memory", ", ".join(_memory(view)) or NOTHING
    yield "steps that skipped an update", f"{view.skipped:,}" if view.step else NOTHING
    yield "steps without a finite loss", f"{view.lost:,}" if view.lost else NOTHING
    counts = view.history.counts
    yield "spikes", _some(counts["spike"])
    yield "rollbacks", _some(counts["rolled back"])
    yield "merges", _some(view.last.get("merges"))
    kept = view.checkpoints()
    yield "checkpoints", ", ".join(f"{step:,}" for step in kept[-6:]) or NOTHING


def _memory(view: View) -> Iterator[str]:
    for key, what in (("peak_mem_gib", "GPU"), ("host_mem_gib", "host"), ("peak_rss_gib", "process")):
        value = view.last.get(key)
        if isinstance(value, int | float):
            yield f"{what} {value:.2f} GiB"


def _count(number: Any) -> str:
    if not isinstance(number, int | float):
        return NOTHING
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.4g} {name}"
    return f"{number:,.0f}"


def _plain(number: Any, form: str) -> str:
    return format(number, form) if isinstance(number, int | float) else NOTHING


def _some(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) and number else NOTHING


def settings(view: View) -> dict[str, dict[str, str]]:
    """The config by section, as text."""
    return {
        section: {key: _value(value) for key, value in keys.items()}
        for section, keys in view.config.items()
        if isinstance(keys, dict)
    }


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def versions(view: View) -> dict[str, str]:
    """What the run was computed with: the summary's versions, and what its last process said at its start."""
    found = {"device": str(view.plan.get("device", ""))}
    started = view.history.started
    for key in ("host", "device", "lowres", "python", "torch", "processor", "threads", "ranks"):
        if key in started:
            found.setdefault(key, str(started[key]))
    known = view.summary.get("versions")
    found |= {str(key): str(value) for key, value in known.items()} if isinstance(known, dict) else {}
    return {key: value for key, value in found.items() if value}


def differences(views: Sequence[View]) -> list[Row]:
    """Every setting and version that is not the same in all runs."""
    flat = []
    for view in views:
        own = {f"{s}.{key}": value for s, keys in settings(view).items() for key, value in keys.items()}
        flat.append(own | {key: value for key, value in versions(view).items() if key != "host"})
    keys = dict.fromkeys(
        key for own in flat for key in own if key not in PLACES and not key.startswith("log.")
    )
    rows = [(key, [own.get(key, NOTHING) for own in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def happened(view: View) -> list[tuple[str, str, str, str]]:
    """Time, step, kind and text of what happened, oldest first: of each kind as much as can be looked at."""
    found = []
    for kind in view.history.counts:
        if kind in SILENT:
            continue
        for event in view.history.of(kind):
            found.append((str(event.get("time", "")), str(event.get("step", "")), kind, _text(event)))
    starts = view.history.of("started")
    for event in starts:
        changed = event.get("changed")
        what = f"; changed: {_value(changed)}" if changed else ""
        text = f"from step {event.get('step', 0)} on {event.get('host', 'a machine')}{what}"
        found.append((str(event.get("time", "")), str(event.get("step", "")), "started", text))
    for kind in ("stopped", "finished"):
        for event in view.history.of(kind):
            found.append((str(event.get("time", "")), str(event.get("step", "")), kind, _text(event)))
    return sorted(found)[-MOST_EVENTS:]


def _text(event: dict[str, Any]) -> str:
    if text := event.get("text") or event.get("error"):
        return str(text)
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "step", "text")}
    return _value(rest) if rest else ""
