"""The page of a report: one HTML file that needs nothing else, and may load nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowres import __version__, disk
from lowres.errors import UserError
from lowres.report.charts import own_charts, run_data, shared_charts
from lowres.report.tables import (
    Row,
    differences,
    figures,
    happened,
    settings,
    versions,
)
from lowres.scores import BITS
from lowres.view import View, find_runs

REPORT = "report.html"
# buckets of all runs together: so the page stays below 5 MB
BUCKETS, FEWEST = 1024, 64
MOST_RUNS = 60


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about these runs, or the points of these sweeps; returns the file. out: default:
    report.html in the folder of the only run, otherwise here. Raises UserError."""
    runs = find_runs(folders)
    if len(runs) > MOST_RUNS:
        raise UserError(f"report: {len(runs)} runs are more than a page can show; give up to {MOST_RUNS}")
    target = out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    if target.is_dir():
        raise UserError(f"--out {target}: this is a folder; give a file")
    buckets = max(FEWEST, min(BUCKETS, 2 * (6 * BUCKETS // len(runs) // 2)))
    disk.store(target, page([View(run, buckets) for run in runs]).encode())
    return target


def page(views: Sequence[View]) -> str:
    """The page as HTML."""
    shared = shared_charts(views)
    own = [own_charts(run, view) for run, view in enumerate(views)]
    runs = [run_data(view) for view in views]
    data = {
        "runs": runs,
        "charts": {one["id"]: one for charts in (shared, *own) for one in charts},
    }
    title = views[0].name if len(views) == 1 else f"{len(views)} runs"
    body = [
        _header(title, views, runs),
        _section("summary", "Summary", _comparison([view.name for view in views], figures(views))),
    ]
    if len(views) > 1:
        rows = differences(views)
        text = _comparison([view.name for view in views], rows) if rows else "<p>No setting differs.</p>"
        body.append(_section("differences", "What differs", text))
    body.append(_section("curves", "Curves", _figures_of(shared) or "<p>No step has been logged yet.</p>"))
    body += [_of_run(run, view, own[run], len(views) > 1) for run, view in enumerate(views)]
    return _document(f"{title} - lowres report", "\n".join(body), data)


# ---- the parts of the page


def _header(title: str, views: Sequence[View], runs: Sequence[dict[str, Any]]) -> str:
    names = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "hours": "hours"}
    offered = [axis for axis in names if all(axis in run["steps"] for run in runs)]
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" * (axis == "step")}>'
        f"{names[axis]}</label>"
        for axis in offered
    )
    notes = []
    if unread := sum(view.unread for view in views):
        notes.append(f"{unread:,} lines of the logs could not be read.")
    if any(view.sampled for view in views):
        notes.append("A log is so long that only a part of it was read, evenly spread.")
    told = "".join(f"<p class=note>{note}</p>" for note in notes)
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    return (
        f"<header><div><h1>{escape(title)}</h1><p>lowres {__version__}, {made}</p></div>"
        f"<fieldset class=choice><legend>Curves over</legend>{choices}</fieldset>"
        '<button id="theme" type="button">Dark or light</button></header>'
        f"{told}<noscript><p class=note>The charts are drawn by a script in this page. The tables need "
        "none.</p></noscript>"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>'


def _figures_of(charts: Iterable[dict[str, Any]]) -> str:
    """A place for each chart, with what it says in words."""
    places, charts = [], list(charts)
    alone = all(one["id"] != BITS for one in charts)  # otherwise the loss stands beside the bits per byte
    for one in charts:
        name = escape(one["id"])
        size = " wide" if one["kind"] != "lines" or (one["id"] == "loss" and alone) else ""
        rows = len(one.get("rows", ()))
        height = {"heat": 150 + 15 * rows, "bars": 110 + 34 * rows}.get(one["kind"], 320)
        places.append(
            f'<figure class="chart{size}"><figcaption><h3>{escape(one["title"])}</h3>'
            f"<p>{escape(one['about'])}</p></figcaption>"
            f'<div class=drawing role=img data-chart="{name}" style="height:{height}px" '
            f'aria-label="{escape(one["title"])}. {escape(one["spoken"])}"></div></figure>'
        )
    return f"<div class=charts>{''.join(places)}</div>" if places else ""


def _of_run(run: int, view: View, charts: Sequence[dict[str, Any]], several: bool) -> str:
    """What belongs to one run."""
    parts = [_figures_of(charts)]
    if events := happened(view):
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in one) + "</tr>" for one in events
        )
        head = "<tr><th>time<th>step<th>event<th>what</tr>"
        table = f"<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
        parts.append(_details("What happened", table, is_open=len(events) <= 12))
    parts += [_samples(view)]
    kept = "".join(
        f"<h4>[{escape(section)}]</h4>{_pairs(keys)}" for section, keys in settings(view).items() if keys
    )
    parts.append(_details("Settings", kept) if kept else "")
    known = versions(view)
    parts.append(_details("Versions and machine", _pairs(known)) if known else "")
    content = "".join(parts)
    if several:
        content = _details(f"{view.name}: memory, updates, events, samples, settings", content)
    return _section(f"run-{run}", view.name if several else "The run", content)


def _samples(view: View) -> str:
    found = []
    for prompt, samples in view.samples.by_prompt().items():
        texts = "".join(
            f"<dt>after {sample.step:,} steps</dt><dd><pre>{escape(sample.text)}</pre></dd>"
            for sample in samples
        )
        found.append(f"<h4>{escape(prompt) or 'without a prompt'}</h4><dl class=samples>{texts}</dl>")
    last = view.summary.get("sample")
    if not found and isinstance(last, str):
        found.append(f"<pre>{escape(last[:4000])}</pre>")
    return _details("Samples", "".join(found), is_open=True) if found else ""


def _details(title: str, content: str, is_open: bool = False) -> str:
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(title)}</summary>{content}</details>"


def _pairs(pairs: dict[str, str]) -> str:
    rows = "".join(f"<tr><th scope=row>{escape(k)}<td>{escape(v)}</tr>" for k, v in pairs.items())
    return f"<div class=scroll><table><tbody>{rows}</tbody></table></div>"


def _comparison(names: Sequence[str], rows: Sequence[Row]) -> str:
    """A row for each figure and a column for each run."""
    head = "".join(f"<th scope=col>{escape(name)}" for name in names) if len(names) > 1 else ""
    head = f"<thead><tr><td>{head}</tr></thead>" if head else ""
    lines = "".join(
        f"<tr><th scope=row>{escape(name)}" + "".join(f"<td>{escape(c)}" for c in cells) + "</tr>"
        for name, cells in rows
    )
    return f"<div class=scroll><table>{head}<tbody>{lines}</tbody></table></div>"


def _document(title: str, body: str, data: dict[str, Any]) -> str:
    """The whole file. Its policy lets no other script run than these two, and nothing be loaded."""
    scripts = [_asset("echarts.min.js"), _asset("page.js")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    # as text in a script element, "<" could end it
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head>\n"
        f"<body><main>{body}</main>\n"
        f'<script type="application/json" id="data">{content}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("lowres.report") / "assets" / name).read_text("utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
