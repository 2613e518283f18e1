"""Folders of runs that nobody has trained, for tests of what looks at them."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNITS = ("embed", "layers.0", "layers.1", "head")
CONFIG: dict[str, dict[str, Any]] = {
    "run": {"name": "made", "seed": 0},
    "optim": {"name": "adamw", "lr": 0.01},
    "train": {"steps": 100, "batch_tokens": 1024},
}
PLAN = {
    "device": "CPU, 1 threads",
    "model_flops_per_token": 6_000_000,
    "peak_tflops": 0.1,
    "parameters": 1_000_000,
    "gpu_peak_bytes": 3 << 30,
    "host_peak_bytes": 0,
    "components": [
        {"name": "block matrices: int8 codes", "room": "gpu", "bytes": 1 << 30, "phase": ""},
        {"name": "norms: fp32", "room": "gpu", "bytes": 1 << 20, "phase": ""},
        {"name": "optimizer state", "room": "gpu", "bytes": 1 << 29, "phase": ""},
        {"name": "master copy", "room": "gpu", "bytes": 1 << 28, "phase": ""},
        {"name": "loss chunk", "room": "gpu", "bytes": 1 << 29, "phase": "loss"},
        {"name": "checkpoint", "room": "disk", "bytes": 1 << 30, "phase": ""},
    ],
    "held": [
        {"name": "weights", "room": "gpu", "bytes": (1 << 30) + (1 << 20)},
        {"name": "optimizer state", "room": "gpu", "bytes": 3 << 28},
    ],
}


def step_record(step: int, **more: Any) -> dict[str, Any]:
    found = {
        "step": step,
        "tokens": 1024 * step,
        "loss": 2.0 + 4.0 * math.exp(-step / 30),
        "lr": 0.01,
        "lr_over_batch": 0.000625,
        "grad_norm": 1.0 + step % 3,
        "tokens_per_s": 5000.0,
        "wall_s": 0.25 * step,
        "peak_mem_gib": 2.5,
        "host_mem_gib": 0.0,
        "peak_rss_gib": 3.0,
        "skipped": 0,
    }
    found |= {f"update/{unit}": 1e-3 * (1 + i) for i, unit in enumerate(UNITS)} if step % 10 == 0 else {}
    return found | more


def evaluation(step: int, **more: Any) -> dict[str, Any]:
    loss = 2.1 + 4.0 * math.exp(-step / 30)
    return {"step": step, "val_loss": loss, "val_ppl": math.exp(loss), "val_bits_per_byte": loss / 2} | more


def records(steps: int, every: int = 20) -> list[dict[str, Any]]:
    """Of a run of so many steps that is evaluated every so often; 0: never."""
    found = [evaluation(0)] if every else []
    for step in range(1, steps + 1):
        found += [step_record(step), *([evaluation(step)] if every and step % every == 0 else [])]
    return found


def lines(found: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in found)


def write_run(
    folder: Path,
    metrics: Iterable[dict[str, Any]] = (),
    events: Iterable[dict[str, Any]] = (),
    samples: Iterable[dict[str, Any]] = (),
    config: dict[str, dict[str, Any]] | None = None,
    plan: dict[str, Any] | None = PLAN,
    summary: dict[str, Any] | None = None,
    pid: int | None = None,
) -> Path:
    """pid: of the process that has the run."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = (
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in (config or CONFIG).items()
    )
    (folder / "config.toml").write_text("\n".join(sections), "utf-8")
    started = {"time": "2026-01-01T10:00:00+0000", "event": "started", "step": 0, "lowres": "0.1.0"}
    for name, found in (("metrics", metrics), ("events", [started, *events]), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text(lines(found), "utf-8")
    for name, content in (("plan", plan), ("summary", summary)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    if pid is not None:
        holder = {"host": socket.gethostname(), "pid": pid, "since": "2026-01-01 10:00:00 +0000"}
        (folder / "run.lock").write_text(json.dumps(holder))
    return folder
