"""Plan presets for graphics cards and predict their speed, for `lowres presets` and docs/expectations.md.

    python scripts/write_presets.py [--check]

Writes lowres/catalogue/planned.json, and the tables between the marks in docs/expectations.md. --check writes
nothing; its exit code is 1 if something is not up to date. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowres import presets
from lowres.catalogue import CARDS, CONSUMER, Everything, Planned
from lowres.catalogue.planned import FILE
from lowres.config_file import load_config
from lowres.device import prepare_cuda
from lowres.memory import GIB, make_plan
from lowres.outlook import preset_sizes
from lowres.probe.roofline import BF16, INT8, estimate

ROOT = Path(__file__).resolve().parent.parent
DOCS, MEASURED = ROOT / "docs" / "expectations.md", "benchmarks/results/speed.json"
BEGIN, END = "<!-- written by scripts/write_presets.py -->", "<!-- end of what it writes -->"
MODELS = ("130m", "350m", "1b", "3b", "7b", "13b")
# of a machine with 32 GB
HOST_GIB = 28.0


def planned(card: str, preset: str) -> Planned:
    """One row. Nothing is rounded to whole numbers but the peaks, to two digits."""
    own = CARDS[card]
    keys = [f"model.preset={preset}", "model.vocab_size=32000", f"memory.budget_gib={own.budget_gib}"]
    config, _ = load_config(ROOT / presets.FROM, [*keys, f"memory.host_budget_gib={HOST_GIB}"])
    plan, size = make_plan(config, torch.device("cuda")), preset_sizes()[preset]
    if plan.problems:
        return Planned(preset, size, card, None, None, None, None)
    peaks = [round(plan.peak(room) / GIB, 2) for room in ("gpu", "host")]
    int8, bf16 = (round(estimate(config, plan, own, how).tokens_per_s, 1) for how in (INT8, BF16))
    return Planned(preset, size, card, peaks[0], peaks[1], int8, bf16)


def measured() -> tuple[list[Planned], str]:
    """What `scripts/bench_speed.py` has measured, and on which machine."""
    record = json.loads((ROOT / MEASURED).read_text("utf-8"))
    rows = [
        Planned(
            found["preset"],
            preset_sizes()[found["preset"]],
            *(None, None, None),
            int8=round(found["arms"]["auto"]["tokens_per_s"], 1),
            bf16=round(found["arms"]["bf16"]["tokens_per_s"], 1),
        )
        for found in record["presets"]
    ]
    return rows, record["machine"]


def markdown(found: Everything) -> str:
    """The tables of docs/expectations.md."""
    lines = []
    for name in CONSUMER:
        own, rows = CARDS[name], [row for row in found.planned if row.card == name]
        lines += [f"**{name}**, {own.memory_gb} GB, {own.budget_gib:g} GiB of it for the run", ""]
        lines += _table([presets.HEAD, *map(presets.cells, rows)])
    lines += [f"**Measured**: {found.cpu}, sequences of 512 tokens ([results](../{found.source}))", ""]
    return "\n".join([*lines, *_table([presets.HEAD, *map(presets.cells, found.measured)])]).rstrip()


def _table(rows: list[list[str]]) -> list[str]:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---|" + "---:|" * (len(rows[0]) - 1), *rest, ""]


def with_tables(text: str, found: Everything) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown(found)}\n\n{END}{after}"


def main() -> int:
    prepare_cuda()
    parser = argparse.ArgumentParser(description="Plan presets for graphics cards, and predict their speed.")
    parser.add_argument("--check", action="store_true", help="only check whether the files are up to date")
    check = parser.parse_args().check
    rows, cpu = measured()
    planned_rows = [planned(card, preset) for card in CONSUMER for preset in MODELS]
    found = Everything(planned_rows, rows, HOST_GIB, cpu, MEASURED)
    wanted: dict[Path, str] = {
        FILE: _json(asdict(found)),
        DOCS: with_tables(DOCS.read_text("utf-8"), found),
    }
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if check and old:
        names = " and ".join(path.name for path in old)
        print(f"{names}: not up to date; run python scripts/write_presets.py", file=sys.stderr)
        return 1
    for path in old:
        path.write_text(wanted[path], "utf-8")
    return 0


def _json(values: dict[str, Any]) -> str:
    """A row a line, so that changes can be read."""
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    parts = [f'"{key}": {json.dumps(value)}' for key, value in values.items() if key not in lists]
    for key, rows in lists.items():
        text = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f'"{key}": [\n{text}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
