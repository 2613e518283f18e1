"""Prints the README's table of what fits where: planned GPU memory of every preset.

    python scripts/what_fits.py [--batch-tokens 32768] [--seq-len 2048]

The layer-major engine with INT8 weights and APOLLO-Mini, bf16 compute and micro-batches of one
sequence. A card is counted as 2 GiB smaller than it is called, for CUDA itself and a desktop.
"""

from __future__ import annotations

import argparse

import torch

from lowres.config import PRESETS, parse_config
from lowres.memory import GIB, Plan, make_plan

CARDS_GIB = (6, 8, 12, 16, 24, 32)
RESERVED_GIB = 2


def plan_of(preset: str, batch_tokens: int, seq_len: int) -> Plan:
    config, _ = parse_config(
        {
            "model": {"preset": preset},
            "data": {"seq_len": seq_len},
            "train": {"batch_tokens": batch_tokens, "micro_batch": 1},
        }
    )
    return make_plan(config, torch.device("cuda"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned GPU memory of every preset, as a table.")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=2048)
    parsed = parser.parse_args()
    print("| model | parameters | weights and optimizer | stash and carry | GPU peak | smallest card |")
    print("|---|---|---|---|---|---|")
    for preset in PRESETS:
        plan = plan_of(preset, parsed.batch_tokens, parsed.seq_len)
        boundary = sum(c.bytes for c in plan.components if c.name in ("stash", "carry")) / GIB
        rest = sum(c.bytes for c in plan.components if c.room == "disk") / GIB
        peak = plan.peak("gpu") / GIB
        card = next((f"{gib} GB" for gib in CARDS_GIB if peak <= gib - RESERVED_GIB), "none")
        print(
            f"| {preset} | {plan.parameters / 1e6:,.0f} M | {rest:.2f} GiB | {boundary:.2f} GiB "
            f"| {peak:.1f} GiB | {card} |"
        )


if __name__ == "__main__":
    main()
