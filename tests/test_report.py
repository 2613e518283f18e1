"""A report is one file that needs nothing else and shows what the folder of a run holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowres.report import page, write_report
from lowres.report.charts import MOST_COLUMNS
from lowres.view import View
from tests.folders import CONFIG, UNITS, evaluation, records, step_record, write_run
from tests.helpers import lowres_here

ASSETS = files("lowres.report") / "assets"
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
SPIKE = {"time": "2026-01-01T10:05:00+0000", "event": "spike", "step": 33, "text": f"step 33: {HOSTILE}"}
SAMPLES = [{"step": s, "prompt": "Once", "text": f"{HOSTILE} after {s}"} for s in (10, 20, 30)]


class Page(HTMLParser):
    """The elements of a page, the text of its scripts, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.seen, self._open = "", list[str]()
        self.feed(text)
        assert self._open == []
        self.data: dict[str, Any] = json.loads(self.scripts[0], parse_constant=pytest.fail)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "details", "section", "figure", "pre", "button"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif not self._open or self._open[-1] != "style":
            self.seen += data

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """The charts that have a place on the page, by id."""
        places = [attrs["data-chart"] for _, attrs in self.elements if "data-chart" in attrs]
        found: dict[str, dict[str, Any]] = self.data["charts"]
        assert sorted(filter(None, places)) == sorted(found)
        return found


def page_of(*runs: Path) -> Page:
    return Page(page([View(run) for run in runs]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is worth looking at."""
    found = records(60)
    found[40] |= {"skipped": 2, "loss": None}  # step 39
    samples: list[dict[str, Any]] = [*SAMPLES, {"step": 30, "text": "without a prompt"}]
    config = CONFIG | {"data": {"source": f"hf:{HOSTILE}"}}
    return write_run(tmp_path_factory.mktemp("report") / "run", found, [SPIKE], samples, config)


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(run: Path) -> None:
    text = page([View(run)])
    found = Page(text)
    assert [tag for tag, attrs in found.elements if "src" in attrs or tag in ("link", "iframe", "img")] == []
    (policy,) = (a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    kinds = [attrs.get("type") for tag, attrs in found.elements if tag == "script"]
    assert kinds == ["application/json", None, None]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts[1:]]
    assert allowed == digests and "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    # what files say is text: the only tags are ours
    assert HOSTILE in found.seen and not any("onerror" in attrs for _, attrs in found.elements)
    assert found.elements[0] == ("html", {"lang": "en"})


def test_the_library_is_the_one_that_is_named() -> None:
    digest = hashlib.sha256((ASSETS / "echarts.min.js").read_bytes()).hexdigest()
    assert digest in (ASSETS / "README.md").read_text("utf-8")
    assert "Apache License" in (ASSETS / "echarts.LICENSE").read_text("utf-8")


def test_every_number_has_its_chart(run: Path) -> None:
    found = page_of(run)
    charts = found.charts
    assert {
        "loss",
        "val_bits_per_byte",
        "lr",
        "lr_over_batch",
        "grad_norm",
        "tokens_per_s",
        "skipped",
    } < charts.keys()
    training, validation = charts["loss"]["lines"]
    steps = found.data["runs"][0]["steps"]
    assert steps["step"] == list(range(1, 61)) and steps["tokens"][-1] == 60 * 1024
    assert steps["hours"][-1] == pytest.approx(15 / 3600) and steps["flops"][0] == 1024 * 6e6
    assert 38 not in training["at"] and len(training["at"]) == 59
    assert training["y"][0] == pytest.approx(2 + 4 * np.exp(-1 / 30), rel=1e-4)
    assert found.data["runs"][0]["evaluations"]["step"] == [0, 20, 40, 60]
    assert found.data["runs"][0]["evaluations"]["tokens"] == [0, 20480, 40960, 61440]
    assert validation["x"] == "evaluations" and validation["at"] == [0, 1, 2, 3]
    (share,) = charts["share_of_peak"]["lines"]
    assert share["y"][0] == pytest.approx(5000 * 6e6 / 1e11, rel=1e-4)
    assert {"step": 33, "text": "spike"} in found.data["runs"][0]["marks"]
    heat = charts["updates-0"]
    assert heat["rows"] == list(UNITS) and len(heat["columns"]) == 6
    assert {(row, value) for _, row, value in heat["cells"]} == {
        (i, float(f"{np.log10(1e-3 * (1 + i)):.4g}")) for i in range(4)
    }
    bars = charts["memory-gpu-0"]
    assert bars["rows"][:2] == ["all together, at its peak", "weights"] and "memory-host-0" not in charts
    rows = dict(zip(bars["rows"], zip(*(bar["values"] for bar in bars["bars"]), strict=True), strict=True))
    assert rows["all together, at its peak"] == (3.0, 2.5)
    assert rows["weights"] == (pytest.approx(1.001, abs=1e-3), pytest.approx(1.001, abs=1e-3))
    assert rows["optimizer state and master copy"] == (0.75, 0.75) and rows["loss chunk (loss)"] == (
        0.5,
        None,
    )
    # and everything is said in words too
    spoken = {a["data-chart"]: a["aria-label"] for _, a in found.elements if "data-chart" in a}
    assert "training: from 5.8" in (spoken["loss"] or "")
    for text in ("60 of 100", "killed after 60 steps", "Once", "after 30 steps", "adamw", "0.1.0", "spikes"):
        assert text in found.seen
    # a chart over the steps of a long run has an envelope
    assert len(page_of(run).charts["grad_norm"]["lines"]) == 1


def test_runs_that_have_little_to_show(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "nothing yet": {"metrics": []},
        "one evaluation": {"metrics": [evaluation(0)]},
        "no evaluation": {"metrics": records(9, every=0), "plan": None},
        "only lost": {"metrics": [step_record(i, loss=None, grad_norm=None) for i in (1, 2)]},
        "another objective": {
            "metrics": [step_record(1, margin=0.5), {"step": 1, "val_loss": 0.6, "val_accuracy": 0.7}]
        },
        "odd plan": {"metrics": records(9), "plan": {"components": 3, "held": [1], "peak_tflops": "x"}},
    }
    for name, content in cases.items():
        found = page_of(write_run(tmp_path / name, **content))
        assert name in found.seen and isinstance(found.charts, dict)
    ids = page_of(tmp_path / "another objective").charts.keys()
    assert {"margin", "val_accuracy"} < ids
    assert "loss" not in page_of(tmp_path / "only lost").charts
    (tmp_path / "only lost" / "config.toml").unlink()
    assert "steps without a finite loss" in page_of(tmp_path / "only lost").seen


def test_mixtures_and_merges(tmp_path: Path) -> None:
    relora = CONFIG | {"relora": {"enabled": True, "start_step": 10, "cycle_steps": 10}}
    scores = {
        "val_bits_per_byte/code": 1.0,
        "val_loss/code": 2.0,
        "val_loss/books": 3.0,
        "share/code": 0.7,
        "share/books": 0.3,
    }
    metrics = [evaluation(0, **scores)]
    metrics += [
        step_record(i, cycle=1, merges=i // 10, **({"merge_cosine": 0.9} if i == 20 else {}))
        for i in range(1, 31)
    ]
    found = page_of(write_run(tmp_path / "run", metrics, config=relora))
    assert [line["name"] for line in found.charts["val_loss-0"]["lines"]] == ["code", "books"]
    assert found.charts["val_bits_per_byte-0"]["lines"][0]["y"] == [1.0]
    assert [*found.data["charts"]][:2] == ["val_bits_per_byte", "loss"]
    assert found.charts["share-0"]["percent"] and found.charts["merge_cosine"]["lines"][0]["at"] == [19]
    marks = [(mark["step"], mark["text"]) for mark in found.data["runs"][0]["marks"]]
    assert marks == [(20, "merge"), (30, "merge")] and "cycle" not in found.charts


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "other",
        records(40),
        config=CONFIG | {"optim": {"name": "adamw", "lr": 0.003}},
        plan=None,
    )
    found = page_of(run, other)
    lines = found.charts["loss"]["lines"]
    assert [(line["run"], line["name"]) for line in lines] == [
        (index, f"{name} {what}")
        for index, name in ((0, "run"), (1, "other"))
        for what in ("training", "validation")
    ]
    assert [line["run"] for line in found.charts["share_of_peak"]["lines"]] == [0]
    assert {"updates-0", "updates-1", "memory-gpu-0"} <= found.charts.keys()
    differs = found.seen.partition("What differs")[2].partition("Curves")[0]
    assert "optim.lr" in differs and "0.003" in differs and "optim.name" not in differs
    # FLOPs are not known of one of them, so no curve is drawn over them
    axes = [attrs["value"] for tag, attrs in found.elements if tag == "input"]
    assert axes == ["step", "tokens", "hours"]
    assert [a.get("value") for t, a in page_of(run).elements if t == "input"] == [
        "step",
        "tokens",
        "flops",
        "hours",
    ]


def test_a_long_run_is_a_short_page(tmp_path: Path) -> None:
    metrics = records(30_000, every=500)
    metrics[20_000]["loss"] = 50.0
    long = write_run(tmp_path / "long", metrics, config=CONFIG | {"train": {"steps": 30_000}})
    target = write_report([long])
    assert target == long / "report.html" and target.stat().st_size < 1.6e6
    found = Page(target.read_text("utf-8"))
    least, greatest, training, _ = found.charts["loss"]["lines"]
    assert 256 <= len(training["y"]) <= 1024 and max(greatest["y"]) == 50.0 and max(training["y"]) < 7
    assert min(least["y"]) == pytest.approx(2.0, rel=1e-3) and greatest["faint"]
    assert len(found.charts["updates-0"]["columns"]) == MOST_COLUMNS


def test_the_command(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    assert str(target) in lowres_here("report", run, "--out", target).stdout
    assert Page(target.read_text("utf-8")).data["runs"][0]["name"] == "run"
    assert "no such folder" in lowres_here("report", tmp_path / "none", code=2).stderr
    assert "not a run" in lowres_here("report", tmp_path, code=2).stderr
    assert "--out" in lowres_here("report", run, "--out", tmp_path, code=2).stderr


BROWSER = next(
    filter(
        None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))
    ),
    None,
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium-headless-shell)")
def test_a_browser_draws_it(run: Path, tmp_path: Path) -> None:
    """Without an error or a warning, in light and dark; the pictures are not empty, and differ."""
    image = pytest.importorskip("PIL.Image")
    other = write_run(tmp_path / "other", records(30))
    target = write_report([run, other], tmp_path / "two.html")
    text = target.read_text("utf-8").replace("<details>", "<details open>")
    target.write_text(text.replace("<details><summary>", "<details open><summary>"), "utf-8")
    pictures = []
    for scheme in (0, 1):  # dark, light
        picture = tmp_path / f"{scheme}.png"
        options = f"""--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr
            --dump-dom --virtual-time-budget=3000 --window-size=1200,1600 --screenshot={picture}
            --blink-settings=preferredColorScheme={scheme} --user-data-dir={tmp_path / "own"}""".split()
        done = subprocess.run(
            [str(BROWSER), *options, target.as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        drawn = Page(done.stdout)
        state = drawn.elements[0][1]
        assert state["data-errors"] == "0" and state["data-charts"] == str(len(drawn.charts))
        assert sum(tag == "canvas" for tag, _ in drawn.elements) >= len(drawn.charts)
        pictures.append(np.asarray(image.open(picture).convert("RGB")).astype(int))
    dark, light = pictures
    assert dark.shape == (1600, 1200, 3) and dark[0, 0].max() < 40 and light[0, 0].min() > 240
    # lines of a curve are where a chart is: colours that neither text nor background has
    for shot in pictures:
        coloured = shot.max(2) - shot.min(2) > 60
        assert coloured[400:].mean() > 0.002
