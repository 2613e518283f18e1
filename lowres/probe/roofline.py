"""Predicts the speed of a planned step on a graphics card from its data sheet. Nothing here is measured.

The time of a step is the sum of its products, attention, memory traffic and update; or that of the copies
between GPU and host or of the launches, which run beside them, if one is longer. Waits are left out, so these
are upper bounds at the assumed shares. `scripts/roofline.py --inputs` prints every number that goes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowres.catalogue import Card
from lowres.config import Config
from lowres.memory import Plan
from lowres.memory.trace import without_memory
from lowres.model import block_shapes, empty_units
from lowres.optim import make_optimizer
from lowres.probe.work import (
    backward_passes,
    dequantised_elements,
    flops_per_token,
    step_bytes,
    update_flops,
)
from lowres.rooms import Rooms
from lowres.storage import DENSE_DTYPES

# the same in bytes a token, by what happens in a block; D: width, F: inner width of the MLP
FORWARD_NUMBERS, BACKWARD_NUMBERS = (13, 3), (22, 8)  # numbers of 2 bytes, with fused kernels, counted below
QUANTISED_BYTES = (29, 11)  # more with INT8 products, in bytes
# without fused kernels so many times as much: 28.7 GB for 8,192 tokens in a block of LLaMA-7B, by counting
EAGER_TIMES = 28.7e9 / 8192 / (2 * (35 * 4096 + 11 * 11008))
LOSS_EAGER, LOSS_FUSED = 54, 6  # bytes a logit
# of an update, bytes a parameter that are not traced: the gradient is zeroed, and read for its norm; and the
# kernel that stores the weight reads the gradient, and reads and writes the code
GRADIENT_BYTES, KERNEL_BYTES = 8, 6
# kernels of a block for a micro-batch in all directions, and seconds to launch one from Python: assumed
KERNELS_FUSED, KERNELS_EAGER, LAUNCH_S = 90, 200, 8e-6
# terms that run beside all others
BESIDE = ("transfers", "launches")
# bytes for each dequantised element; without fused kernels by counting, 168 GB for 7B in two directions
DEQUANTISED_FUSED, DEQUANTISED_EAGER = 3, 168e9 / 6.476e9 / 2


@dataclass(frozen=True)
class Assumed:
    """Shares of the peaks that are reached."""

    bf16: float = 176 / 209.5
    int8: float = 479 / 838
    attention: float = 0.5
    bandwidth: float = 0.85


@dataclass(frozen=True)
class Version:
    """How a step is computed. The products of a token are forward, recomputation, and in equal parts the
    gradients of inputs and of weights."""

    name: str
    fused: bool
    products: str = "bf16"
    weight_gradients: str = "bf16"


PLAIN_BF16, BF16, MIXED, INT8 = VERSIONS = (
    Version("BF16, PyTorch's operations", False),
    Version("BF16, fused", True),
    Version("INT8, weight gradients BF16", True, "int8"),
    Version("INT8", True, "int8", "int8"),
)


@dataclass(frozen=True)
class Estimate:
    """A predicted step: its seconds by term, and the largest of them."""

    tokens_per_s: float
    limit: str
    share_of_limit: float
    seconds: dict[str, float]

    @property
    def step_s(self) -> float:
        return self.seconds[self.limit] / self.share_of_limit


def why_not(config: Config) -> str:
    """Why the speed of a config cannot be predicted for cards, or ""."""
    kept = config.memory
    if kept.engine != "layerwise":
        return f"memory.engine={kept.engine}: only the layer-major step is predicted"
    if kept.activations_in == "fp32":
        key = "activations" if kept.compute == "int8" else "compute"
        return f"memory.{key}=fp32: only BF16 and INT8 products are predicted"
    return ""


def version_of(config: Config) -> Version:
    """How a run would compute on a card from Ampere on; with memory.compute = "auto", in what is predicted to
    be fastest."""
    kept = config.memory
    if kept.kernels == "plain":
        return PLAIN_BF16
    if kept.weights != "int8" or kept.compute == "bf16":
        return BF16
    return MIXED if kept.compute_wgrad == "dense" else INT8


def estimate(config: Config, plan: Plan, card: Card, version: Version | None = None) -> Estimate:
    """A planned step on a card. version: default as the config says."""
    version = version or version_of(config)
    terms = seconds(card, version, config, plan, Assumed(), traced_update(config, version.fused))
    return predict(terms, config.most_windows * config.data.seq_len)


_aten = torch.ops.aten
PRODUCTS = (_aten.mm.default, _aten.addmm.default)
OVERWRITING = (_aten.copy_.default, _aten.zero_.default, _aten.fill_.Scalar)


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write. ignored: operations that are counted elsewhere."""

    def __init__(self, ignored: tuple[Any, ...]) -> None:
        super().__init__()
        self.ignored, self.bytes, self.operations = ignored, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func in self.ignored or any(word in str(func) for word in ("empty", "prim.")):
            return result
        self.operations += 1
        replaced = _tensors_in(args[0] if func in OVERWRITING else kwargs.get("out"))
        read = [t for t in _tensors_in((args, kwargs)) if all(t is not other for other in replaced)]
        self.bytes += sum(t.nbytes for t in (*read, *_tensors_in(result)))
        return result


def _tensors_in(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Update:
    """The update of a block: bytes a parameter that it reads and writes, and its operations."""

    bytes: float
    operations: int


def traced_update(config: Config, fused: bool) -> Update:
    """The update of a block, without running it."""
    model = config.model.model_copy(update={"n_layers": 1, "vocab_size": 2})
    one, rooms = config.model_copy(update={"model": model}), Rooms(torch.device("cpu"))
    optimizer, kept = make_optimizer(one), config.memory
    with without_memory("cuda", compiled=fused):
        unit = empty_units(model, kept.weights, kept.embeddings_kept_in, rooms)["layers.0"]
        optimizer.attach([unit], rooms)
        grads = {spec.name: torch.empty(spec.shape) for spec in unit.spec.tensors}
        accepted = torch.ones((), dtype=torch.bool)
        with _Traffic(PRODUCTS if update_flops(one) else ()) as traffic:
            optimizer.update(unit, grads, 0, 1.0, accepted)
    numel = sum(spec.numel for spec in unit.spec.tensors)
    moved = traffic.bytes / numel + GRADIENT_BYTES + (KERNEL_BYTES if fused else 0)
    return Update(moved, traffic.operations)


def seconds(
    card: Card, version: Version, config: Config, plan: Plan, assumed: Assumed, update: Update
) -> dict[str, float]:
    """Seconds of a step by term."""
    model, tokens, passes = config.model, config.most_windows * config.data.seq_len, backward_passes(config)
    flops = flops_per_token(model, config.data.seq_len, plan.choice.band, passes=passes)
    rate = {"bf16": card.bf16 * assumed.bf16 * 1e12, "int8": card.int8 * assumed.int8 * 1e12}
    ahead = flops["forward"] + flops["recomputation"] + flops["backward"] / 2
    products = ahead / rate[version.products] + flops["backward"] / 2 / rate[version.weight_gradients]

    d, f, layers = model.dim, model.ffn_dim, model.n_layers
    block = sum(math.prod(shape) for shape in block_shapes(model).values())
    numbers = zip(FORWARD_NUMBERS, BACKWARD_NUMBERS, (d, f), strict=True)
    passing = 2.0 * sum((ahead_of + passes * back) * width for ahead_of, back, width in numbers)
    if not version.fused:
        passing *= EAGER_TIMES
    if version.products == "int8":
        passing += QUANTISED_BYTES[0] * d + QUANTISED_BYTES[1] * f
    gradients = passes * 8 * block / (plan.micro_batch * config.data.seq_len)
    logits = passes * model.vocab * (LOSS_FUSED if version.fused else LOSS_EAGER)
    dequantised = 0.0
    if version.products != "int8" and DENSE_DTYPES.get(config.memory.weights) != torch.bfloat16:
        elements = dequantised_elements(_in_bf16(config), torch.bfloat16)
        dequantised = elements * (DEQUANTISED_FUSED if version.fused else DEQUANTISED_EAGER)
    bandwidth = card.bandwidth * assumed.bandwidth * 1e9
    fetched, stored = step_bytes(config, plan, torch.bfloat16)
    kernels = KERNELS_FUSED if version.fused else KERNELS_EAGER
    pieces = math.ceil(config.most_windows / plan.micro_batch)
    return {
        "products": tokens * products,
        "head": tokens * flops["head"] / rate["bf16"],
        "attention": tokens * flops["attention"] / (card.bf16 * assumed.attention * 1e12),
        "memory traffic": (tokens * (layers * (passing + gradients) + logits) + dequantised) / bandwidth,
        "update": plan.parameters * update.bytes / bandwidth,
        "products of the update": update_flops(config) / rate["bf16"],
        "transfers": max(fetched, stored) / (card.pcie * 1e9),
        "launches": layers * (pieces * kernels + update.operations) * LAUNCH_S,
    }


def _in_bf16(config: Config) -> Config:
    return config.model_copy(update={"memory": config.memory.model_copy(update={"compute": "bf16"})})


def predict(terms: dict[str, float], tokens: int) -> Estimate:
    """Tokens per second, and the largest term."""
    compute = sum(time for name, time in terms.items() if name not in BESIDE)
    limit = max((name for name in BESIDE if name in terms), key=lambda name: terms[name])
    step = max(compute, terms[limit])
    if compute >= terms[limit]:
        limit = max((name for name in terms if name not in BESIDE), key=lambda name: terms[name])
    return Estimate(tokens / step, limit, terms[limit] / step, terms)
