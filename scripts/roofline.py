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
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comparison
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowres.config import Config
from lowres.config_file import load_config
from lowres.device import prepare_cuda
from lowres.memory import Plan, make_plan
from lowres.memory.trace import without_memory
from lowres.model import block_shapes, empty_units
from lowres.optim import make_optimizer
from lowres.probe import flops_per_token, step_bytes, update_flops
from lowres.rooms import Rooms

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llama_7b_24gb.toml"


@dataclass(frozen=True)
class Card:
    """From its data sheet: dense 10^12 operations/s with fp32 (int32) sums, memory bandwidth in 10^9 bytes/s,
    usable PCIe rate a direction in 10^9 bytes/s; and the GiB that a run may use of its memory."""

    bf16: float
    int8: float
    bandwidth: float
    pcie: float
    budget_gib: float


# peaks and bandwidth: NVIDIA's data sheets and architecture white papers, without sparsity. PCIe: 25 of 31.5
# for version 4, 52 of 63 for version 5. Budgets: as in what_fits.py, or the card less 4 GiB
CARDS = {
    "RTX 3060": Card(25.5, 102, 360, 25, 10.5),
    "RTX 3090": Card(71, 284, 936, 25, 20.0),
    "RTX 4070": Card(58.3, 233, 504, 25, 10.5),
    "RTX 4090": Card(165, 661, 1008, 25, 20.0),
    "RTX 5090": Card(209.5, 838, 1792, 52, 28.0),
    "H100": Card(989, 1979, 3350, 52, 70.0),
    "H200": Card(989, 1979, 4800, 52, 120.0),
}

# the same in bytes a token, by what happens in a block; D: width, F: inner width of the MLP
FUSED_NUMBERS = (35, 11)  # numbers of 2 bytes: 35 D + 11 F, counted below
QUANTISED_BYTES = (29, 11)  # more with INT8 products, in bytes
EAGER_BYTES = 28.7e9 / 8192  # a block without fused kernels, by counting its operations
LOSS_EAGER, LOSS_FUSED = 54, 6  # bytes a logit
# of an update, bytes a parameter that are not traced: the gradient is zeroed, and read for its norm; and the
# kernel that stores the weight reads the gradient, and reads and writes the code
GRADIENT_BYTES, KERNEL_BYTES = 8, 6
DEQUANTISED_FUSED, DEQUANTISED_EAGER = 6, 168e9 / 6.476e9  # of a block, both directions

SOURCES = f"""
rates of cards: data sheets and architecture white papers of NVIDIA, without sparsity
usable PCIe: 25 of 31.5 GB/s (version 4), 52 of 63 (version 5): assumed
shares that are reached
  BF16 products 176 of 209.5 = 0.84, INT8 products 479 of 838 = 0.57: cuBLAS on an RTX 5090 at 400 W, 4096^3,
  second operand contiguous along the summed dimension, public benchmark; assumed for all cards
  attention 0.5 of the BF16 peak: FlashAttention-2 reaches 0.50 to 0.73 on an A100 (arXiv 2307.08691)
  memory bandwidth 0.85: assumed
operations: lowres.probe.flops_per_token
memory traffic of a block, bytes a token
  PyTorch's operations: 28.7 GB for 8,192 tokens, by counting
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
  dequantising blocks: PyTorch's operations 168 GB a step, by counting; fused {DEQUANTISED_FUSED}; none with
  INT8 products
transfers: lowres.probe.step_bytes of the plan for the memory of the card
left out: launches, waits, evaluation, checkpoints
""".strip()


@dataclass(frozen=True)
class Assumed:
    """Shares of the peaks that are reached."""

    bf16: float
    int8: float
    attention: float
    bandwidth: float


@dataclass(frozen=True)
class Version:
    """How a step is computed. The products of a token are forward, recomputation, and in equal parts the
    gradients of inputs and of weights."""

    name: str
    fused: bool
    products: str = "bf16"
    weight_gradients: str = "bf16"


VERSIONS = (
    Version("BF16, PyTorch's operations", False),
    Version("BF16, fused", True),
    Version("INT8, weight gradients BF16", True, "int8"),
    Version("INT8", True, "int8", "int8"),
)


_aten = torch.ops.aten
PRODUCTS = (_aten.mm.default, _aten.addmm.default)
OVERWRITING = (_aten.copy_.default, _aten.zero_.default, _aten.fill_.Scalar)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write. ignored: operations that are counted elsewhere."""

    def __init__(self, ignored: tuple[Any, ...]) -> None:
        super().__init__()
        self.ignored, self.bytes = ignored, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func in self.ignored or any(word in str(func) for word in ("empty", "prim.")):
            return result
        replaced = tensors_in(args[0] if func in OVERWRITING else kwargs.get("out"))
        read = [t for t in tensors_in((args, kwargs)) if all(t is not other for other in replaced)]
        self.bytes += sum(t.nbytes for t in (*read, *tensors_in(result)))
        return result


def tensors_in(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def update_bytes(config: Config, fused: bool) -> float:
    """Bytes a parameter that the update of a block reads and writes."""
    model = config.model.model_copy(update={"n_layers": 1, "vocab_size": 2})
    one, rooms = config.model_copy(update={"model": model}), Rooms(torch.device("cpu"))
    optimizer, kept = make_optimizer(one), config.memory
    with without_memory("cuda", compiled=fused):
        unit = empty_units(model, kept.weights, kept.embeddings_kept_in, rooms)["layers.0"]
        optimizer.attach([unit], rooms)
        grads = {spec.name: torch.empty(spec.shape) for spec in unit.spec.tensors}
        accepted = torch.ones((), dtype=torch.bool)
        with Traffic(PRODUCTS if update_flops(one) else ()) as traffic:
            optimizer.update(unit, grads, 0, 1.0, accepted)
    numel = sum(spec.numel for spec in unit.spec.tensors)
    return traffic.bytes / numel + GRADIENT_BYTES + (KERNEL_BYTES if fused else 0)


def seconds(
    card: Card, version: Version, config: Config, plan: Plan, assumed: Assumed, update: float
) -> dict[str, float]:
    """Seconds of a step by term. update: bytes a parameter that it reads and writes."""
    model, tokens = config.model, config.train.batch_tokens
    flops = flops_per_token(model, config.data.seq_len, plan.choice.band)
    rate = {"bf16": card.bf16 * assumed.bf16 * 1e12, "int8": card.int8 * assumed.int8 * 1e12}
    ahead = flops["forward"] + flops["recomputation"] + flops["backward"] / 2
    products = ahead / rate[version.products] + flops["backward"] / 2 / rate[version.weight_gradients]

    d, f, layers = model.dim, model.ffn_dim, model.n_layers
    block = sum(math.prod(shape) for shape in block_shapes(model).values())
    passing = EAGER_BYTES
    if version.fused:
        passing = 2.0 * (FUSED_NUMBERS[0] * d + FUSED_NUMBERS[1] * f)
    if version.products == "int8":
        passing += QUANTISED_BYTES[0] * d + QUANTISED_BYTES[1] * f
    gradients = 8 * block / (plan.micro_batch * config.data.seq_len)
    logits = model.vocab * (LOSS_FUSED if version.fused else LOSS_EAGER)
    dequantised = layers * block * (DEQUANTISED_FUSED if version.fused else DEQUANTISED_EAGER)
    if version.products == "int8":
        dequantised = 0.0
    bandwidth = card.bandwidth * assumed.bandwidth * 1e9
    fetched, stored = step_bytes(config, plan, torch.bfloat16)
    return {
        "products": tokens * products,
        "head": tokens * flops["head"] / rate["bf16"],
        "attention": tokens * flops["attention"] / (card.bf16 * assumed.attention * 1e12),
        "memory traffic": (tokens * (layers * (passing + gradients) + logits) + dequantised) / bandwidth,
        "update": plan.parameters * update / bandwidth,
        "products of the update": update_flops(config) / rate["bf16"],
        "transfers": max(fetched, stored) / (card.pcie * 1e9),
    }


def predict(terms: dict[str, float], tokens: int) -> dict[str, Any]:
    """Tokens per second, and the largest term."""
    compute = sum(time for name, time in terms.items() if name != "transfers")
    step = max(compute, terms["transfers"])
    limit = "transfers"
    if compute >= terms["transfers"]:
        limit = max((name for name in terms if name != "transfers"), key=lambda name: terms[name])
    share = terms[limit] / step
    return {"tokens_per_s": tokens / step, "limit": limit, "share_of_limit": share, "seconds": terms}


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
    rows = [[name, *(f"{value:,g}" for value in asdict(card).values())] for name, card in CARDS.items()]
    return comparison.markdown(head, rows)


def main() -> None:
    prepare_cuda()
    parser = argparse.ArgumentParser(description="Predicted speed of LLaMA-7B on graphics cards.")
    parser.add_argument(
        "--bf16-share", type=float, default=176 / 209.5, help="of the peak; default 176 / 209.5"
    )
    parser.add_argument("--int8-share", type=float, default=479 / 838, help="of the peak; default 479 / 838")
    parser.add_argument("--attention-share", type=float, default=0.5, help="of the BF16 peak; default 0.5")
    parser.add_argument("--bandwidth-share", type=float, default=0.85, help="default 0.85")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--inputs", action="store_true", help="print every input and its source")
    parser.add_argument("--json", action="store_true", help="print JSON, with the seconds of every term")
    parsed = parser.parse_args()
    assumed = Assumed(parsed.bf16_share, parsed.int8_share, parsed.attention_share, parsed.bandwidth_share)
    any_card = config_of(CARDS[parsed.cards[0]], parsed.overrides)
    moved = {fused: update_bytes(any_card, fused) for fused in (True, False)}
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
            version.name: predict(
                seconds(card, version, config, plan, assumed, moved[version.fused]), config.train.batch_tokens
            )
            for version in VERSIONS
        }
    if parsed.json:
        cards = {name: asdict(CARDS[name]) for name in parsed.cards}
        record = {"assumed": asdict(assumed), "cards": cards, "set": parsed.overrides}
        record |= {"update_bytes_a_parameter": {"fused": moved[True], "PyTorch's operations": moved[False]}}
        print(json.dumps(record | {"predicted": found, "does_not_fit": too_large}, indent=1))
        return
    print(table(found, too_large))
    if parsed.inputs:
        print(f"\n{cards_table()}\n\n{SOURCES}")


if __name__ == "__main__":
    main()
