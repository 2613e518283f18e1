"""Prints the README's table "What fits where": planned GPU and host memory for every preset and card.

    python scripts/what_fits.py [--batch-tokens 131072] [--seq-len 2048] [--host-gib 28]
    python scripts/what_fits.py --tuning [--seq-len 2048] [--host-gib 44]    (the table of docs/tuning.md)

The layer-major engine with INT8 weights, APOLLO-Mini, 8-bit moments of embedding and head, bf16 compute. The
plan chooses micro-batch, band and what is on the host.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

import torch

from lowres.config import PRESETS
from lowres.config_file import parse_config
from lowres.memory import GIB, Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
# nominal GB of a card -> GiB that a run may use, without what CUDA itself and a desktop use
CARDS = {6: 4.8, 8: 6.5, 12: 10.5, 16: 14.0, 24: 20.0}
# of the table on tuning
TUNING_CARDS, BATCHES = (8, 12, 24), (("sft", 128), ("dpo", 64), ("dpo", 128))
TUNED: dict[str, dict[str, Any]] = {
    "SmolLM2-1.7B": tomllib.loads((ROOT / "configs/smoltulu_sft.toml").read_text("utf-8"))["model"],
    "LLaMA-7B": {"preset": "7b"},
}


def plan_of(preset: str, budget: float, host: float, batch_tokens: int, seq_len: int) -> Plan:
    config, _ = parse_config(
        {
            "model": {"preset": preset},
            "data": {"seq_len": seq_len},
            "train": {"batch_tokens": batch_tokens},
            "memory": {"moments": "int8", "budget_gib": budget, "host_budget_gib": host},
        }
    )
    return make_plan(config, torch.device("cuda"))


def tuning_plan(
    model: dict[str, Any], objective: str, examples: int, budget: float, host: float, seq_len: int
) -> Plan:
    config, _ = parse_config(
        {
            "model": model,
            "objective": {"name": objective},
            "data": {"seq_len": seq_len},
            "train": {"batch_tokens": examples * seq_len},
            "memory": {"moments": "int8", "budget_gib": budget, "host_budget_gib": host},
        }
    )
    return make_plan(config, torch.device("cuda"))


def needs(plan: Plan) -> str:
    return f"{plan.peak('gpu') / GIB:.1f} + {plan.peak('host') / GIB:.1f}"


def print_tuning(host: float, seq_len: int) -> None:
    """Rows: models and objectives; where a plan does not fit, what it needs at least is said."""
    print("| model | objective | " + " | ".join(f"{card} GB card" for card in TUNING_CARDS) + " |")
    print("|---|---|" + "---|" * len(TUNING_CARDS))
    for name, model in TUNED.items():
        for objective, examples in BATCHES:
            plans = [
                tuning_plan(model, objective, examples, CARDS[card], host, seq_len) for card in TUNING_CARDS
            ]
            cells = [f"no: {needs(plan)}" if plan.problems else needs(plan) for plan in plans]
            form = "chats" if objective == "sft" else "pairs"
            print(f"| {name} | {objective}, {examples} {form} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned memory of every preset and card, as a table.")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--host-gib", type=float, default=28.0)
    parser.add_argument("--tuning", action="store_true", help="the table of docs/tuning.md instead")
    parsed = parser.parse_args()
    if parsed.tuning:
        print_tuning(parsed.host_gib, parsed.seq_len)
        return
    print("| model | parameters | checkpoint | " + " | ".join(f"{card} GB card" for card in CARDS) + " |")
    print("|---|---|---|" + "---|" * len(CARDS))
    for preset in PRESETS:
        plans = [
            plan_of(preset, budget, parsed.host_gib, parsed.batch_tokens, parsed.seq_len)
            for budget in CARDS.values()
        ]
        cells = [
            "no" if plan.problems else f"{plan.peak('gpu') / GIB:.1f} + {plan.peak('host') / GIB:.1f}"
            for plan in plans
        ]
        checkpoint = plans[0].peak("disk") / GIB
        parameters = plans[0].parameters / 1e6
        print(f"| {preset} | {parameters:,.0f} M | {checkpoint:.2f} GiB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
