"""A grid of runs of equal length: one folder per run, a table, sweep.json and plots.

Each point is trained by `lowres train` in a separate process, so that a failure or lack of memory does not
end the other points. Finished points are skipped, interrupted points are resumed. `lowres eval` gives the
scores of tasks, if some are asked for.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowres import disk, metrics, ranks
from lowres.config import Config
from lowres.config_file import (
    adjusted_keys,
    as_begun,
    as_chosen,
    changed_keys,
    chosen_keys,
    load_config,
    load_resolved,
    toml_value,
    with_places,
)
from lowres.errors import CheckFailed, UserError
from lowres.plots import draw_sweep
from lowres.scores import BITS, LOSS, PERPLEXITY
from lowres.stopping import Stopper

SWEEP, LOG, TASKS = "sweep.json", "train.log", "tasks.json"
# keys whose values are columns of every table
SHOWN_ANYWAY = ("optim.lr", "optim.lr_over_batch")
# keys that may change when a run is resumed, but not if its loss is compared with other runs
COMPARED = (
    "train.tokens",
    "train.batch_tokens",
    "schedule.cooldown_steps",
    "schedule.decay_steps",
    "data.mixture",
)


def parse_grid(grids: list[str]) -> dict[str, list[Any]]:
    """`section.key=a,b,c` as {key: values}. Values are TOML, or otherwise plain strings."""
    axes: dict[str, list[Any]] = {}
    for grid in grids:
        key, equals, text = grid.partition("=")
        key = key.strip()
        if not (equals and re.fullmatch(r"\w+(\.[\w-]+)+", key) and text.strip()):
            raise UserError(f"--grid {grid}: write it as section.key=value,value")
        if key in axes:
            raise UserError(f"--grid {grid}: {key} is given twice; give all its values in one --grid")
        if key in ("train.steps", "train.tokens", "train.epochs"):
            raise UserError(f"--grid {grid}: every point trains for --tokens or --epochs; leave {key} out")
        values = toml_value(f"[{text}]")  # so that a value may be a list
        if not isinstance(values, list):
            values = [toml_value(part) for part in text.split(",")]
        if "" in values or not values:
            raise UserError(f"--grid {grid}: a value is missing; write it as section.key=value,value")
        axes[key] = values
    return axes


def sweep(
    path: Path,
    grids: list[str],
    length: dict[str, int | float],
    folder: Path | None,
    overrides: list[str],
    scoring: list[str],
) -> None:
    """Train the config at every point of the grid for the same number of tokens, and compare.

    length: {"tokens": number} or {"epochs": number}. scoring: arguments of `lowres eval` with tasks; empty
    for none. Raises UserError before any training if a point is not a valid config, and CheckFailed at the
    end if a point failed.
    """
    axes = parse_grid(grids)
    folder = folder or Path("runs") / f"sweep-{load_config(path, overrides)[0].run.name}"
    points = [_Point(path, values, length, folder, overrides, axes) for values in _product(axes)]
    names = [point.folder.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--grid: {names.count(name)} points are called {name}; leave one of them out")
    for point in points:
        point.check(length)
    _require_length(folder, length)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--run {folder}: cannot be created ({error.strerror}); choose another folder"
        ) from None
    records: list[dict[str, Any]] = []

    def store(points: list[dict[str, Any]]) -> None:
        found = {"config": str(path), "set": overrides, **length, "grid": axes, "points": points}
        disk.store(folder / SWEEP, json.dumps(found, indent=1).encode())

    if not (folder / SWEEP).exists():
        store([])
    with Stopper() as stopper:
        for number, point in enumerate(points, 1):
            ranks.say(f"{number} of {len(points)}: {point.folder}")
            record = point.train(points[0].chosen(), stopper)
            if scoring and record["error"] is None and not stopper.asked:
                point.score(record, scoring, stopper)
            if stopper.asked:
                ranks.say(f"stopped by {stopper.asked}; to go on, repeat the command")
                return
            records.append(record)
            store(records)

    print(table(axes, records))
    pictures = draw_sweep(folder, axes, records)
    if pictures is None:
        ranks.say("note: no plots, because matplotlib is not installed (pip install matplotlib)")
    print(f"sweep: {', '.join(map(str, [folder / SWEEP, *(pictures or [])]))}")
    failed = sum(record["error"] is not None for record in records)
    if failed:
        raise CheckFailed(
            f"{failed} of {len(points)} points failed; see {LOG} in their folders, then repeat the command "
            "to try them again"
        )


def _require_length(folder: Path, length: dict[str, int | float]) -> None:
    """Raise UserError if the points that are there were trained for another length."""
    try:
        before = json.loads(disk.read_whole(folder / SWEEP))
        known = {key: before[key] for key in ("tokens", "epochs") if key in before}
    except (OSError, ValueError, TypeError, RecursionError):
        return
    if known and known != length:
        (key,) = length
        raise UserError(
            f"--{key}: {folder} was started with another length; set it back or use another --run DIR"
        )


def _product(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


class _Point:
    """One run of the grid."""

    def __init__(
        self,
        path: Path,
        values: dict[str, Any],
        length: dict[str, int | float],
        folder: Path,
        overrides: list[str],
        axes: dict[str, list[Any]],
    ) -> None:
        self.values = values
        own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        self.path, self.overrides = (
            path,
            [*overrides, *own, *(f"train.{key}={value}" for key, value in length.items())],
        )
        self.config: Config
        self.config, self.notes = load_config(path, self.overrides)
        short = _short(axes)
        named = "_".join(f"{short[key]}-{_text(value)}" for key, value in values.items())
        self.folder = folder / re.sub(r"[^\w.+-]+", "-", named)

    def check(self, length: dict[str, int | float]) -> None:
        """Raise UserError if the point cannot be compared with others."""
        batch, tokens = self.config.train.batch_tokens, length.get("tokens")
        if tokens is not None and tokens < batch:
            raise UserError(
                f"--tokens: {tokens} is less than one step of {batch} tokens (train.batch_tokens)"
            )
        if not self.config.train.eval_every:
            raise UserError("train.eval_every: 0 gives no validation loss to compare; use a higher value")
        if not self._started():
            return
        saved = load_resolved(self.folder / "config.toml")
        vocab = self.config.model.vocab_size or saved.model.vocab_size
        config = self.config.with_vocab(vocab) if vocab else self.config
        config = with_places(as_chosen(as_begun(config, saved), saved), saved)
        differs = changed_keys(saved, config) + adjusted_keys(saved, config)
        for key in COMPARED:
            section, name = key.split(".")
            if key == "train.tokens" and tokens is None:  # see _require_length
                continue
            if getattr(getattr(saved, section), name) != getattr(getattr(config, section), name):
                differs.append(key)
        if differs:
            raise UserError(
                f"{self.folder} was started with another {differs[0]}; set it back or use another --run DIR"
            )

    def _started(self) -> bool:
        return (self.folder / "config.toml").exists()

    def _summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        try:
            summary: dict[str, Any] = json.loads(disk.read_whole(self.folder / "summary.json"))
        except (OSError, ValueError, RecursionError):
            return None
        return summary

    def chosen(self) -> dict[str, str]:
        """What the run has chosen that its config leaves open, once it has started: keys of [memory]."""
        if not self._started():
            return {}
        return chosen_keys(self.config, load_resolved(self.folder / "config.toml"))

    def train(self, chosen: dict[str, str], stopper: Stopper) -> dict[str, Any]:
        """Train unless the run is finished; returns its record for sweep.json. chosen: by the first point.
        All compute alike, as their losses are compared."""
        error = None
        if not self._started():
            own = self.config.memory
            same = [f"memory.{k}={v}" for k, v in chosen.items() if getattr(own, k) == "auto"]
            with suppress(UserError):  # a point with other weights may not be able to
                load_config(self.path, [*self.overrides, *same])
                self.overrides += same
        if self._summary() is None:
            for note in self.notes:
                ranks.say(f"note: {note}")
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "lowres", "train", str(self.path), "--run", str(self.folder)]
            for override in [*self.overrides, "log.progress=false"]:
                command += ["--set", override]
            with (self.folder / LOG).open("wb") as log:
                code = stopper.run(command + ["--resume"] * self._started(), log)
            if code:
                error = self._error(code)
        summary = self._summary()
        if error is None and summary is None:
            error = "it ended without a summary"
        config = self.config
        record: dict[str, Any] = {
            "values": self.values,
            "run": str(self.folder),
            "lr": config.optim.lr,
            "batch_tokens": config.train.batch_tokens,
            "batch_sequences": config.batch_sequences,
            "lr_over_batch": config.optim.lr_over_batch,
            **dict.fromkeys(("steps", "tokens", "val_loss", "val_ppl", "tokens_per_s")),
            "error": error,
        }
        if error is None and summary is not None:
            speeds = [r["tokens_per_s"] for r in metrics.read(self.folder / "metrics.jsonl") if "loss" in r]
            told = ("tokens", BITS, LOSS, PERPLEXITY, "val_accuracy", "val_margin")
            record |= {key: summary[key] for key in told if key in summary} | {"steps": summary["step"]}
            record["tokens_per_s"] = statistics.median(speeds)
        else:
            ranks.say(f"failed: {error}")
        return record

    def score(self, record: dict[str, Any], scoring: list[str], stopper: Stopper) -> None:
        """Add the scores of tasks to the record of a trained point: those in its folder, if they are the ones
        that are asked for."""
        asked = {"asked": scoring, "tokens": record["tokens"]}
        try:
            found = json.loads(disk.read_whole(self.folder / TASKS))
            fits = {key: found[key] for key in asked} == asked
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            command = [sys.executable, "-m", "lowres", "eval", str(self.folder), *scoring, "--json"]
            with tempfile.TemporaryFile() as output, (self.folder / LOG).open("ab") as log:
                code = stopper.run(command, log, output)
                output.seek(0)
                said = output.read()
            if code:
                record["error"] = self._error(code)
                ranks.say(f"failed: {record['error']}")
                return
            found = asked | {"results": json.loads(said)["results"]}
            disk.store(self.folder / TASKS, json.dumps(found, indent=1).encode())
        record["tasks"] = {task: _scores(values) for task, values in found["results"].items()}

    def _error(self, code: int) -> str:
        """The line that says why a process ended: the last from lowres, otherwise the last of its output."""
        if code < 0:
            return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        lines = [
            line for line in (self.folder / LOG).read_text("utf-8", "replace").splitlines() if line.strip()
        ]
        ours = [line.removeprefix("lowres: ") for line in lines if line.startswith("lowres: ")]
        return (ours or lines or [f"exit code {code}"])[-1].strip()


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """The scores of a task from what lm_eval says of it, the main one first; without standard errors."""
    kept = {
        key: value for key, value in values.items() if "_stderr" not in key and isinstance(value, int | float)
    }
    return {key.removesuffix(",none"): value for key, value in kept.items() if "," in key}


def _short(axes: dict[str, list[Any]]) -> dict[str, str]:
    """Keys without their section, if they stay unique."""
    last = [key.partition(".")[2] for key in axes]
    return {key: name if last.count(name) == 1 else key for key, name in zip(axes, last, strict=True)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def table(axes: dict[str, list[Any]], records: list[dict[str, Any]]) -> str:
    """A table of the points in the order of the grid, with the best one marked."""
    short = _short({key: values for key, values in axes.items() if key not in SHOWN_ANYWAY})
    pairs = any("val_accuracy" in record for record in records)
    score, form = ("val_accuracy", ".1%") if pairs else ("val_ppl", ".2f")
    tasks = dict.fromkeys(
        (t, m) for r in records for t, found in r.get("tasks", {}).items() for m in [*found][:1]
    )
    bits = any(BITS in record for record in records)
    head = [*short.values(), "lr", "batch", "lr/batch", *["bits/byte"] * bits, "val loss"]
    head += ["accuracy" if pairs else "perplexity"]
    head += [*(f"{task} {metric}" for task, metric in tasks), "tokens/s", ""]
    losses = [record["val_loss"] for record in records if record["val_loss"] is not None]
    rows = [head]
    for record in records:
        loss, second, speed = record["val_loss"], record.get(score), record["tokens_per_s"]
        of_tasks = [record.get("tasks", {}).get(task, {}).get(metric) for task, metric in tasks]
        remark = "diverged" if loss is None else "best" if loss == min(losses) else ""
        rows.append(
            [
                *(_text(record["values"][key]) for key in short),
                f"{record['lr']:.4g}",
                f"{record['batch_sequences']}",
                f"{record['lr_over_batch']:.3g}",
                *[_cell(record.get(BITS), ".4f")] * bits,
                _cell(loss, ".4f"),
                _cell(second, form),
                *(_cell(value, ".4f") for value in of_tasks),
                _cell(speed, ",.0f"),
                remark if record["error"] is None else f"failed: {record['error']}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
