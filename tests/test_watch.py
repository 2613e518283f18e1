"""A run is shown while another process has it, and the view ends with that process."""

from __future__ import annotations

import io
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowres.view import View
from lowres.watch import plain, watch
from lowres.watch.card import Card, cards
from lowres.watch.curve import DOTS, EMPTY, curve
from tests.folders import evaluation, lines, records, step_record, write_run
from tests.helpers import lowres_here

CARDS = [Card("RTX 4090", 71.0, 320.0, 450.0, 98.0, 20 << 30, 24 << 30), Card("old \x1b[31m card")]
HOSTILE = "\x1b]0;owned\x07[red]text"


def dots(found: list[str]) -> list[tuple[int, int]]:
    """Column and row, from the bottom, of each dot."""
    height = 4 * len(found)
    return sorted(
        (2 * x + column, height - 1 - 4 * y - row)
        for y, line in enumerate(found)
        for x, cell in enumerate(line)
        for column, bits in enumerate(DOTS)
        for row, bit in enumerate(bits)
        if (ord(cell) - EMPTY) & bit
    )


def test_a_curve_of_dots() -> None:
    found, low, high = curve([0, 1, 2, 3, 4, 5, 6, 7], 4, 2)
    assert dots(found) == [(i, i) for i in range(8)]
    assert (low, high) == (0, pytest.approx(6.79)) and [len(line) for line in found] == [4, 4]
    assert dots(curve([3.0, 3.0], 2, 1)[0]) == [(i, 0) for i in range(4)]
    # no gaps: every column has a dot, and neighbours touch
    there = dots(curve(np.sin(np.arange(999) / 20).tolist(), 30, 6)[0])
    assert {column for column, _ in there} == set(range(60))
    for column in range(1, 60):
        rows, before = ([row for c, row in there if c == at] for at in (column, column - 1))
        assert min(abs(a - b) for a in rows for b in before) <= 1


def test_a_run_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / f"run {HOSTILE}", records(50), pid=os.getpid())
    line = plain.line(View(run), CARDS)
    for part in (
        "training",
        "step 50 of 100",
        "loss 2.7555",
        "validation: 1.5772 bits per byte, loss 3.1544, perplexity 23.439",
        "4,096 tokens/s",
        "12 s left",
    ):
        assert part in line, part
    assert "71 °C 320 of 450 W 98 % busy" in line and "\x1b" not in line and "\\x1b" in line
    empty = plain.line(View(write_run(tmp_path / "empty")))
    assert "step 0 of 100" in empty and "loss" not in empty


def drawn(view: View, width: int) -> str:
    console = pytest.importorskip("rich.console", reason="pip install lowres[watch]")
    from lowres.watch.screen import frame

    screen = console.Console(width=width, record=True, file=io.StringIO())
    screen.print(frame(view, CARDS, width))
    return str(screen.export_text())


@pytest.mark.parametrize("width", [60, 140])
def test_a_run_on_the_screen(tmp_path: Path, width: int) -> None:
    spike = {"time": "2026-01-01T10:05:00+0000", "event": "spike", "step": 3, "text": HOSTILE}
    run = write_run(tmp_path / "run", records(50), [spike], pid=os.getpid())
    text = drawn(View(run), width)
    assert "training loss 2.756" in text and "validation loss 3.154" in text
    assert text.index("validation bits per byte 1.577") < text.index("validation loss 3.154")
    assert ("gradient norm" in text) and "spikes" in text and "[red]text" in text and "\x1b" not in text
    assert "2.50 GiB of 3.00 planned" in " ".join(text.split()) or width < 100
    assert max(len(line) for line in text.splitlines()) <= width
    assert any(ord(cell) > EMPTY for cell in text)
    for metrics in ([], [evaluation(0)], [step_record(1, loss=None, grad_norm=None)]):
        assert "step" in drawn(View(write_run(tmp_path / str(len(metrics)), metrics, plan=None)), width)


def test_it_follows_until_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", records(3, every=0), pid=os.getpid())
    before = {path.name for path in run.iterdir()}
    steps: list[Callable[[], Any]] = [
        lambda: None,  # nothing new, so nothing is printed
        lambda: (run / "metrics.jsonl").write_text(lines([*records(3, every=0), step_record(4)])),
        (run / "run.lock").unlink,
    ]
    monkeypatch.setattr("lowres.watch.follow.time.sleep", lambda seconds: steps.pop(0)())
    watch(run, 0.5)
    printed = capsys.readouterr().out.splitlines()
    assert ["step 3" in printed[0], "step 4" in printed[1], "killed" in printed[2]] == [True] * 3
    assert len(printed) == 3 and steps == []
    assert {path.name for path in run.iterdir()} == before - {"run.lock"}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", records(5), pid=os.getpid())
    assert "step 5 of 100" in lowres_here("watch", run, "--once").stdout
    assert "no such folder" in lowres_here("watch", tmp_path / "none", code=2).stderr
    assert "not a run" in lowres_here("watch", tmp_path, code=2).stderr

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowres.watch.follow.time.sleep", interrupt)
    lowres_here("watch", run)  # Ctrl-C is how one leaves


class Driver(types.ModuleType):
    """NVML with one card that tells most of it, and one that is lost."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.nvmlInit = self.nvmlShutdown = lambda: None
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetTemperature = lambda handle, kind: self.of(handle, 64)
        self.nvmlDeviceGetName = lambda handle: self.of(handle, b"NVIDIA GeForce")
        self.nvmlDeviceGetPowerUsage = lambda handle: self.of(handle, 123_000)
        self.nvmlDeviceGetEnforcedPowerLimit = lambda handle: self.of(1, 0)
        self.nvmlDeviceGetUtilizationRates = lambda handle: self.of(handle, types.SimpleNamespace(gpu=50))
        memory = types.SimpleNamespace(used=1 << 30, total=4 << 30)
        self.nvmlDeviceGetMemoryInfo = lambda handle: self.of(handle, memory)

    @staticmethod
    def of(handle: int, answer: Any) -> Any:
        if handle:
            raise RuntimeError("GPU is lost")
        return answer


def test_the_cards_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert cards() == [Card("NVIDIA GeForce", 64, 123.0, None, 50, 1 << 30, 4 << 30), Card("card 1")]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cards() == []
