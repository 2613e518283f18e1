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


def finish(run: Run, seconds: float) -> None:
    """Write the summary and the loss curve; print the last samples."""
    if not ranks.is_first():
        return
    steps = run.config.train.total_steps
    texts = [one["text"] for one in samples.read(run.folder / SAMPLES) if one["step"] == steps]
    summary: dict[str, Any] = {}
    first = None
    for record in metrics.read(run.folder / METRICS):
        summary |= record
        first = record.get("val_loss") if first is None else first
    optim = run.config.optim
    summary["batch"] = {
        "tokens": run.config.train.batch_tokens,
        "sequences": run.config.batch_sequences,
        "lr": optim.lr,
        "lr_over_batch": optim.lr_over_batch,
        "policy": optim.batch_policy,
        "started_with": run.started_with,
    }
    summary |= {"first_val_loss": first, "wall_seconds": seconds, "versions": _versions()}
    if texts:
        summary["sample"] = texts[0]
        told = "\n---\n".join(texts)
        print(f"--- a sample after {steps} steps ---\n{told}\n---")
    disk.store(run.folder / SUMMARY, json.dumps(summary, indent=1).encode())
    run.events.write("finished", step=steps)
    try:
        picture = draw_loss(run.folder)
    except Exception as error:  # the run is finished, and a picture is only that
        ranks.say(f"note: no loss curve: {first_line(error)}")
        picture = None
    if first is not None and summary.get("val_loss") is not None:
        print(f"validation loss {first:.4f} -> {summary['val_loss']:.4f} in {seconds:.0f} s")
    print(f"run: {run.folder}" + (f", loss curve: {picture}" if picture else ""))


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
