#!/usr/bin/env python3
"""Attack runs and prepared data in every way that is known, and see whether the results stay exact.

    python scripts/torture.py [--short] [--only NAME ...] [--seed N] [--out FILE] [--soak MINUTES]

Exact: after the fault, going on with --resume gives the tensors of the undisturbed run bit for bit, and
metrics.jsonl has every step once with the same losses. Detected: one line said so, and nothing was lost.
Anything else is a failure, and the exit code is 1. It works in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import records  # noqa: E402
import torch  # noqa: E402
from attacks import configs, disks, hostile, kills, mutations, numbers, signals, soak  # noqa: E402
from attacks.children import Case, each  # noqa: E402
from attacks.world import DETECTED, EXACT, FAILED, HARMLESS, World, verdict  # noqa: E402

OUT = ROOT / "benchmarks/results/torture.json"
MOST_SHOWN = 8  # failures of an attack that are printed, before its line


@dataclass(frozen=True)
class Attack:
    """text: what is done. cases: of a world, in full or in short, from a seed."""

    text: str
    cases: Callable[[World, bool, int], Iterator[Case]]


ATTACKS: dict[str, Attack] = {
    "kill-random": Attack(
        "SIGKILL at random moments, also during saves",
        lambda w, full, seed: chain(
            kills.at_random(w, 100 if full else 6, 10 if full else 2, seed), kills.in_slow_saves(w)
        ),
    ),
    "kill-everywhere": Attack(
        "SIGKILL before every file operation, and in the middle of every write",
        lambda w, full, seed: chain(
            *(kills.at_operations(w, name, 1 if full else 61) for name in kills.RUNS),
            kills.prepared(w, 1 if full else 19),
        ),
    ),
    "disk-full": Attack(
        "no room from any write on; files that may not grow",
        lambda w, full, seed: chain(
            disks.failing(w, "ENOSPC", 1 if full else 19),
            disks.failing(w, "ENOSPC", 2 if full else 41, beside=True),
            disks.full_everywhere(w, 3 if full else 41),
            disks.limited(w, 1 if full else 3),
        ),
    ),
    "disk-errors": Attack(
        "input/output errors at any write, once and from then on",
        lambda w, full, seed: chain(
            disks.failing(w, "EIO", 1 if full else 19, lasting=False),
            disks.failing(w, "EIO", 2 if full else 31),
        ),
    ),
    "damage": Attack(
        "bits that flip and files that are cut, in run folders and prepared data",
        lambda w, full, seed: mutations.flips(w, 300 if full else 10, seed),
    ),
    "hostile": Attack(
        "run folders that no run has written: types, pipes, links, names, forged seals, missing parts",
        lambda w, full, seed: hostile.cases(w, 2000 if full else 24, 11 if full else 7, seed),
    ),
    "signals": Attack(
        "TERM, INT and HUP in every part of a run; two signals",
        lambda w, full, seed: chain(signals.once(w, 1 if full else 8), signals.twice(w, 1 if full else 7)),
    ),
    "processes": Attack("a second process on the same run", lambda w, full, seed: signals.together(w)),
    "output": Attack(
        "stdout and stderr closed, full, or pipes without a reader", lambda w, full, seed: signals.outputs(w)
    ),
    "numbers": Attack(
        "poisoned batches and ruinous learning rates",
        lambda w, full, seed: chain(numbers.poisoned_batches(w, not full), numbers.ruined(w, not full)),
    ),
    "settings": Attack(
        "settings at random, also for resumed runs",
        lambda w, full, seed: chain(configs.neutral(w), configs.cases(w, 1500 if full else 16, seed)),
    ),
    "folder-gone": Attack(
        "the folder of a run is deleted, moved, replaced or made read-only in the middle",
        lambda w, full, seed: disks.folders(w),
    ),
}


def _verdicts(found: Any) -> list[tuple[str, str]]:
    """Those of a case, which may have one or several, or may have raised."""
    if isinstance(found, Exception):
        return [(FAILED, str(found))]
    return found if isinstance(found[0], list) else [found]


def attack(world: World, name: str, full: bool, seed: int, jobs: int) -> dict[str, Any]:
    """Run an attack; returns its record."""
    began, counts, failures = time.monotonic(), Counter[str](), dict[str, str]()
    cases = ATTACKS[name].cases(world, full, seed)
    for case, found in each(((n, partial(verdict, c)) for n, c in cases), jobs):
        for kind, text in _verdicts(found):
            counts[kind] += 1
            if kind == FAILED:
                failures[f"{case} ({len(failures)})"] = text
                if len(failures) <= MOST_SHOWN:
                    print(f"    {case}: {text}", flush=True)
    return {
        "attack": ATTACKS[name].text,
        "tried": sum(counts.values()),
        "exact": counts[EXACT],
        "detected": counts[DETECTED],
        "without_effect": counts[HARMLESS],
        "failed": counts[FAILED],
        "seconds": round(time.monotonic() - began, 1),
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few cases of every attack")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only: a long run, with its memory")
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    began, results = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        tempfile.tempdir = folder
        world = World(Path(folder) / "world")
        if parsed.soak:
            results["soak"] = soak.soak(world, parsed.soak)
            print(json.dumps(results["soak"], indent=1))
        for name in [] if parsed.soak else parsed.only:
            found = results[name] = attack(world, name, not parsed.short, parsed.seed, parsed.jobs)
            print(
                f"{name:<16} {found['tried']:>5} tried {found['exact']:>5} exact {found['detected']:>5} "
                f"detected {found['without_effect']:>5} without effect {found['failed']:>5} {FAILED}"
                f"  ({found['seconds']:.0f} s)",
                flush=True,
            )
    record = records.provenance(torch.device("cpu")) | {
        "seconds": round(time.monotonic() - began, 1),
        "attacks": results,
    }
    records.write(parsed.out, record)
    return 1 if any(found["failed"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
