"""What a run says as it goes, at its end, and of the passes over its data."""

import io
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest

from lowres import progress
from lowres.progress import Bar
from tests.helpers import lowres_here


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, silent", [(io.StringIO, False), (io.StringIO, True), (Terminal, False)])
def test_a_log_gets_a_line_a_minute(
    stream: type[io.StringIO], silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, err = [100.0], stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        patch.setattr(time, "monotonic", lambda: now[0])
        with Bar("step", total=1000, done=4, shown=not silent) as bar:
            for step in range(5, 20):
                bar.update(1, f"loss {step}")
                now[0] += 25
        with Bar("reading", "chars", shown=not silent) as bar:
            for _ in range(6):
                now[0] += 25
                bar.update(25_000)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("step ")]
    steps = [] if silent or stream is Terminal else [5, 8, 11, 14, 17]
    assert lines == [f"step {step} of 1,000: loss {step}" for step in steps]
    chars = [line for line in err.getvalue().splitlines() if line.startswith("reading ")]
    assert chars == ["reading 75.0k chars", "reading 150k chars"] * bool(steps)
    assert bool(err.getvalue()) == (not silent)


def test_a_run_that_is_redirected(
    config: Path, corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, epochs, and an end without an old loss."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    run, cache = tmp_path / "run", tmp_path / "cache"
    keys = (
        f"data.source={corpus / 'cmd.py'}",
        f"data.tokenizer={prepared / 'tokenizer.model'}",
        f"data.cache={cache}",
        "train.steps=8",
        "log.progress=true",
    )
    done = lowres_here("train", config, *(part for key in keys for part in ("--set", key)), "--run", run)
    [manifest] = cache.glob("*/data.json")
    epoch = json.loads(manifest.read_text())["train_tokens"] // 64 * 64
    assert 8 * 1024 / 4 < epoch < 8 * 1024
    line = r"^step (\d) of 8: epoch ([\d.]+), loss [\d.]+, lr \S+, [\d,]+ tokens/s$"
    found = re.findall(line, done.stderr, re.M)
    assert [int(step) for step, _ in found] == [*range(1, 9)]
    assert [float(epochs) for _, epochs in found] == pytest.approx(
        [n * 1024 / epoch for n in range(1, 9)], abs=0.006
    )
    passes = re.search(r"note: the run reads its [\d,]+ training tokens ([\d.]+) times$", done.stderr, re.M)
    assert passes and float(passes[1]) == pytest.approx(8 * 1024 / epoch, rel=0.01)
    change = r"([\d.]+) -> ([\d.]+)"
    closing = rf"^validation: {change} bits per byte, loss {change}, perplexity {change} in \d+ s$"
    closed = re.search(closing, done.stdout, re.M)
    assert closed
    first, last = (math.exp(float(loss)) for loss in closed.group(3, 4))
    assert (first, last) == pytest.approx(tuple(map(float, closed.group(5, 6))), rel=1e-3)
    # a tenth of it is for validation: how many tokens, in training and after
    [tokens] = re.findall(r"^every 10 steps: evaluated on (\d+) tokens$", done.stderr, re.M)
    assert int(tokens) == json.loads(manifest.read_text())["val_tokens"] - 1 < 1000
    said = lowres_here("eval", run)
    numbers = r"[\d.]+ bits per byte, loss [\d.]+, perplexity [\d.]+ per token"
    assert re.fullmatch(rf"{numbers}, over {tokens} tokens\n", said.stdout)
    for stream in (done.stderr, said.stderr):
        assert f"warning: only {tokens} validation tokens, whose loss is known to about 0.1" in stream
    # longer, without another evaluation
    more = ("--set", "train.steps=30", "--set", "train.eval_every=0")
    done = lowres_here("train", run, "--resume", *more)
    assert re.search(r"after about 4 times a text teaches little more .*train\.epochs=4", done.stderr)
    summary = json.loads((run / "summary.json").read_text())
    assert "the validation scores at the end are not known, at step 8 they were" in done.stdout
    assert "->" not in done.stdout and "val_loss" not in summary and summary["first_val_loss"] > 5
