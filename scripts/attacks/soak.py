"""A long run whose memory, open files and threads are sampled.

The first third is the warm-up. After it, the largest value of the last third may not be larger than that of
the middle third: open files and threads exactly, resident memory with 1 % and 4 MiB to spare.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from attacks.world import World

SPARE_BYTES, SPARE_PART = 4 << 20, 0.01
SAMPLES = 300


def soak(world: World, minutes: float) -> dict[str, Any]:
    """The record of a run that saves and evaluates all the time; `failures` is empty if all is flat."""
    folder = world.root / "soak"
    keys = (
        "train.steps=100000000",
        "train.checkpoint_every=20",
        "train.eval_every=50",
        "schedule.name=constant",
    )
    command = [sys.executable, "-m", "lowres", *map(str, world.train(folder, *keys))]
    samples: list[dict[str, int]] = []
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, stdout=nothing, stderr=nothing)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end and process.poll() is None:
            time.sleep(60 * minutes / SAMPLES)
            if (folder / "checkpoints").exists() and (sample := _sample(process.pid)):
                samples.append(sample)
        early = process.poll()
        process.terminate()
        code = process.wait(120)
    failures = _growth(samples)
    if early is not None or code != 0:
        failures["end"] = f"exit {code}{' before the end' if early is not None else ''}"
    return {
        "attack": f"{minutes:g} minutes of training, with saves and evaluations",
        "samples": len(samples),
        "first": samples[0] if samples else {},
        "middle": samples[len(samples) // 2] if samples else {},
        "last": samples[-1] if samples else {},
        "failed": len(failures),
        "failures": failures,
    }


def _sample(pid: int) -> dict[str, int] | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
        values = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "rss_bytes": int(values["VmRSS"].split()[0]) * 1024,
            "threads": int(values["Threads"]),
            "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        }
    except (OSError, KeyError):
        return None


def _growth(samples: list[dict[str, int]]) -> dict[str, str]:
    """What is larger in the last third than in the middle one, by name."""
    third = len(samples) // 3
    if not third:
        return {"samples": f"only {len(samples)}"}
    found = {}
    for name in samples[0]:
        middle = max(one[name] for one in samples[third : 2 * third])
        last = max(one[name] for one in samples[2 * third :])
        most = middle * (1 + SPARE_PART) + SPARE_BYTES if name == "rss_bytes" else middle
        if last > most:
            found[name] = f"{last:,} in the last third, {middle:,} in the middle one"
    return found
