"""What a finished run leaves: a summary, the loss curve, and its last samples for the user."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lowres import __version__, disk, metrics, ranks, samples
from lowres.errors import first_line
from lowres.plots import draw_loss
from lowres.records import METRICS, SAMPLES, SUMMARY
from lowres.running import Run
from lowres.scores import in_words
from lowres.wording import counted


def finish(run: Run, seconds: float) -> None:
    """Write the summary and the loss curve; print the last samples."""
    if not ranks.is_first():
        return
    total = run.config.train.total_steps
    texts = [one["text"] for one in samples.read(run.folder / SAMPLES) if one["step"] == total]
    summary: dict[str, Any] = {}
    first, last = None, None
    for record in metrics.read(run.folder / METRICS):
        if "val_loss" in record:
            first, last = first or record, record
        if "val_loss" not in record or record["step"] == total:  # no evaluation of earlier weights
            summary |= record
    optim = run.config.optim
    summary["batch"] = {
        "tokens": run.config.train.batch_tokens,
        "sequences": run.config.batch_sequences,
        "lr": optim.lr,
        "lr_over_batch": optim.lr_over_batch,
        "policy": optim.batch_policy,
        "started_with": run.started_with,
    }
    summary |= {
        "first_val_loss": None if first is None else first["val_loss"],
        "wall_seconds": seconds,
        "versions": _versions(),
    }
    if texts:
        summary["sample"] = texts[0]
        told = "\n---\n".join(texts)
        print(f"--- a sample after {counted(total, 'step')} ---\n{told}\n---")
    disk.store(run.folder / SUMMARY, json.dumps(summary, indent=1).encode())
    run.events.write("finished", step=total)
    try:
        picture = draw_loss(run.folder)
    except Exception as error:  # the run is finished, and a picture is only that
        ranks.say(f"note: no loss curve: {first_line(error)}")
        picture = None
    print(_closing(first, last, total, seconds))
    print(f"run: {run.folder}" + (f", loss curve: {picture}" if picture else ""))


def _closing(first: dict[str, Any] | None, last: dict[str, Any] | None, total: int, seconds: float) -> str:
    """The line that ends a run. first, last: its evaluations, if there were some."""
    if first is None or last is None:
        return f"{counted(total, 'step')} in {seconds:.0f} s, never evaluated (train.eval_every is 0)"
    if last["step"] < total:
        return (
            f"{counted(total, 'step')} in {seconds:.0f} s; the validation scores at the end are not known, "
            f"at step {last['step']:,} they were {in_words(last)}; `lowres eval` evaluates"
        )
    return f"validation: {in_words(last, first)} in {seconds:.0f} s"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lowres": __version__}
    for package in (
        "torch",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "safetensors",
        "pydantic",
        "datasets",
        "triton",
        "deepspeed",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
