"""Predicts the speed of LLaMA-7B on graphics cards from their data sheets. Nothing here is measured.

    python scripts/roofline.py [--bf16-share 0.84] [--int8-share 0.57] [--attention-share 0.5]
        [--bandwidth-share 0.85] [--cards ...] [--set section.key=value ...] [--inputs] [--json]

Sequences of 2,048 tokens, 131,072 tokens a step, INT8 weights, and APOLLO-Mini, or what --set says, such as
optim.name=muon. Every block is recomputed up to its down projection; attention and head in bf16. Four
versions of the same step: BF16 with PyTorch's operations, as it is without fused kernels; BF16 with fused
kernels; INT8 products forward and for the gradients of inputs, with weight gradients in BF16; and all
products of the blocks in INT8.

The time of a step is the sum of its products, attention, memory traffic and update; or that of the copies
between GPU and host, which run beside them, if that is longer. Launches and waits are left out, so these are
upper bounds at the assumed shares. --inputs prints every number that goes in, and its source.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comparison
import torch

from lowres.catalogue import CARDS, Card
from lowres.config import Config
from lowres.config_file import load_config
from lowres.device import prepare_cuda
from lowres.memory import make_plan
from lowres.probe.roofline import (
    GRADIENT_BYTES,
    KERNEL_BYTES,
    KERNELS_EAGER,
    KERNELS_FUSED,
    LAUNCH_S,
    LOSS_EAGER,
    LOSS_FUSED,
    VERSIONS,
    Assumed,
    predict,
    seconds,
    traced_update,
)

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llama_7b_24gb.toml"

SOURCES = f"""
rates of cards: data sheets and architecture white papers of NVIDIA, without sparsity (lowres/catalogue)
usable PCIe: 25 of 31.5 GB/s (version 4), 12.5 (8 lanes of it), 52 of 63 (version 5): assumed
shares that are reached
  BF16 products 176 of 209.5 = 0.84, INT8 products 479 of 838 = 0.57: cuBLAS on an RTX 5090 at 400 W, 4096^3,
  second operand contiguous along the summed dimension, public benchmark; assumed for all cards
  attention 0.5 of the BF16 peak: FlashAttention-2 reaches 0.50 to 0.73 on an A100 (arXiv 2307.08691)
  memory bandwidth 0.85: assumed
operations: lowres.probe.flops_per_token
memory traffic of a block, bytes a token
  PyTorch's operations: 28.7 GB for 8,192 tokens of 7B, by counting; as many times the fused ones elsewhere
  fused, 2 bytes each: forward 13 D + 3 F (norm 2 D, RoPE 4 D, residual and norm 4 D, SwiGLU 3 F, residual
  3 D), again 10 D + 3 F, backward 12 D + 5 F (two norms with residual 8 D, RoPE 4 D, SwiGLU 5 F)
  INT8 products, more: 29 D + 11 F (gradients read as bf16 and written by rows and by columns, 4 bytes for
  5 D + 2 F; inputs written by columns, 3 bytes for 3 D + F)
  weight gradients: read and written in fp32 with every micro-batch
  loss: {LOSS_EAGER} bytes a logit with PyTorch's operations, {LOSS_FUSED} fused
memory traffic of a step, bytes a parameter
  update: what the rule's operations read and write, and without fused kernels those that store weights,
  traced on a block; {GRADIENT_BYTES} more (gradient zeroed, read for its norm), and {KERNEL_BYTES} for the
  kernel that stores weights (gradient read, code read and written)
products of an update (Muon): lowres.probe.update_flops, at the rate of BF16 products
  dequantising blocks: PyTorch's operations 168 GB a step, by counting; fused 6; none with INT8 products
transfers: lowres.probe.step_bytes of the plan for the memory of the card
launches, {LAUNCH_S * 1e6:g} microseconds each, assumed; a limit of small models only
  {KERNELS_FUSED} kernels of a block for a micro-batch in all directions, or {KERNELS_EAGER} operations of
  PyTorch, and those of an update
left out: waits, evaluation, checkpoints
""".strip()


def config_of(card: Card, overrides: Sequence[str] = ()) -> Config:
    keys = [f"memory.budget_gib={card.budget_gib}", "model.vocab_size=32000", "train.micro_batch=auto"]
    return load_config(CONFIG, [*keys, *overrides])[0]


def table(found: dict[str, dict[str, dict[str, Any]]], too_large: dict[str, str]) -> str:
    rows = [[card, f"does not fit: {why}", *[""] * (len(VERSIONS) - 1)] for card, why in too_large.items()]
    for card, versions in found.items():
        cells = [
            f"{own['tokens_per_s']:,.0f} ({own['limit']} {own['share_of_limit']:.0%})"
            for own in versions.values()
        ]
        rows.append([card, *cells])
    return comparison.markdown(["tokens/s (largest term)", *(v.name for v in VERSIONS)], rows)


def cards_table() -> str:
    head = ["card", "BF16, 10^12/s", "INT8, 10^12/s", "memory, GB/s", "PCIe, GB/s", "a run may use, GiB"]
    rows = [
        [name, *(f"{value:,g}" for value in (c.bf16, c.int8, c.bandwidth, c.pcie, c.budget_gib))]
        for name, c in CARDS.items()
    ]
    return comparison.markdown(head, rows)


def main() -> None:
    prepare_cuda()
    parser = argparse.ArgumentParser(description="Predicted speed of LLaMA-7B on graphics cards.")
    for name, default, text in (
        ("bf16", Assumed.bf16, "of the peak; default 176 / 209.5"),
        ("int8", Assumed.int8, "of the peak; default 479 / 838"),
        ("attention", Assumed.attention, "of the BF16 peak; default 0.5"),
        ("bandwidth", Assumed.bandwidth, "default 0.85"),
    ):
        parser.add_argument(f"--{name}-share", type=float, default=default, help=text)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--inputs", action="store_true", help="print every input and its source")
    parser.add_argument("--json", action="store_true", help="print JSON, with the seconds of every term")
    parsed = parser.parse_args()
    assumed = Assumed(parsed.bf16_share, parsed.int8_share, parsed.attention_share, parsed.bandwidth_share)
    any_card = config_of(CARDS[parsed.cards[0]], parsed.overrides)
    moved = {fused: traced_update(any_card, fused) for fused in (True, False)}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    too_large: dict[str, str] = {}
    for name in parsed.cards:
        card = CARDS[name]
        config = config_of(card, parsed.overrides)
        plan = make_plan(config, torch.device("cuda"))
        if plan.problems:
            too_large[name] = plan.problems[0]
            continue
        found[name] = {
            version.name: asdict(
                predict(
                    seconds(card, version, config, plan, assumed, moved[version.fused]),
                    config.train.batch_tokens,
                )
            )
            for version in VERSIONS
        }
    if parsed.json:
        cards = {name: asdict(CARDS[name]) for name in parsed.cards}
        record = {"assumed": asdict(assumed), "cards": cards, "set": parsed.overrides}
        record |= {
            "update_bytes_a_parameter": {
                "fused": moved[True].bytes,
                "PyTorch's operations": moved[False].bytes,
            }
        }
        print(json.dumps(record | {"predicted": found, "does_not_fit": too_large}, indent=1))
        return
    print(table(found, too_large))
    if parsed.inputs:
        print(f"\n{cards_table()}\n\n{SOURCES}")


if __name__ == "__main__":
    main()
