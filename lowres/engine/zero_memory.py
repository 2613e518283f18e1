"""The memory that a rank of the DeepSpeed engine allocates, from the source of DeepSpeed 0.19 and checked
against measurements.

ZeRO divides master weights and moments among the ranks; from stage 2 also gradients, in stage 3 also weights.
In addition there are copies: with gradient accumulation gradients are stored twice, an update on the CPU in
stages 1 and 2 needs a copy of the weights in host memory, and communication uses buckets.

`lowres.memory` adds the activations and the loss of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowres.config import Config
from lowres.engine.zero import settings
from lowres.model import unit_specs
from lowres.rooms import EXACT_LOCKING, GPU, HOST, Component

# DeepSpeed's defaults for values that `settings` does not set, in elements
SUB_GROUP = 1_000_000_000  # size of the part that an update in stage 3 processes at a time
PERSISTENT = 100_000  # in stage 3, weights up to this size stay complete on the GPU


@dataclass(frozen=True)
class _Sizes:
    """Sizes for one rank. whole, part, largest, unit: elements of the model, of a rank's share, of the
    largest weight and of the largest unit. width, kept: bytes per number in the computation, in an update.
    accumulates: whether a step has several micro-batches. chunks: chunks of the loss in a micro-batch."""

    whole: int
    part: int
    largest: int
    unit: int
    width: int
    kept: int
    accumulates: bool
    chunks: int


def components(config: Config, device: torch.device, ranks: int, micro_batch: int) -> Iterator[Component]:
    """Memory of one of `ranks`, without activations. micro_batch: sequences, at most its share of a step."""
    keys, units = settings(config, micro_batch, device), unit_specs(config.model)
    zero, asked = keys["zero_optimization"], config.deepspeed
    weights = [s.numel for unit in units for s in unit.tensors]
    size = _Sizes(
        whole=sum(weights),
        part=-(-sum(weights) // ranks),
        largest=max(weights),
        unit=max(sum(s.numel for s in unit.tensors) for unit in units),
        width=2 if keys["bf16"]["enabled"] else 4,
        kept=2 if config.memory.weights == "bf16" else 4,
        accumulates=-(-config.most_windows // ranks) > micro_batch,
        chunks=-(-micro_batch * config.data.seq_len // config.memory.loss_chunk),
    )
    offloaded = asked.offload_optimizer != "none"
    locks = device.type == "cuda" and offloaded and zero["offload_optimizer"]["pin_memory"]

    def locked(nbytes: int) -> int:
        return 1 << (nbytes - 1).bit_length() if locks and nbytes and not EXACT_LOCKING else nbytes

    # between steps
    flat, room = size.kept * size.part, HOST if offloaded else GPU
    shared = asked.stage == 3 and not offloaded and size.width == size.kept
    yield Component("master weights", room, 0 if shared else locked(flat))
    yield Component("optimizer state", room, 2 * flat)
    yield Component("gradients of the update", HOST, locked(flat) if offloaded else 0)
    yield from (_stage_3 if asked.stage == 3 else _stage_1_2)(config, zero, size, locked)
    if not offloaded:  # the update processes one group of weights at a time
        most = int(zero.get("sub_group_size", SUB_GROUP)) if asked.stage == 3 else size.part
        group = min(size.part, most)
        yield Component("gradients of the update", GPU, size.kept * group, "update")
    # weights and state are saved unit by unit, and one still exists while the next is assembled
    yield Component("assembled units", HOST, 2 * 3 * size.kept * size.unit, "saving")


def _stage_1_2(config: Config, zero: dict[str, Any], size: _Sizes, locked: Any) -> Iterator[Component]:
    """Stage 1 and 2: whole weights on the GPU."""
    offloaded, stage_1 = config.deepspeed.offload_optimizer != "none", config.deepspeed.stage == 1
    wide = size.width < size.kept  # bf16 gradients are accumulated in fp32, on the GPU
    copies = size.kept if wide and stage_1 else size.width
    bucket = int(zero["reduce_bucket_size"])
    buckets = copies * bucket * (2 if zero["overlap_comm"] else 1)
    flat, weight = size.width * size.part, size.width * size.largest
    gradients = copies * size.whole if stage_1 else 0
    if wide:
        gradients += size.kept * size.part
    elif not offloaded:
        gradients += flat * (2 if size.accumulates else 1)
    elif size.accumulates and config.memory.weights == "fp32":
        yield Component("accumulated gradients", HOST, locked(flat))
    yield Component("model in compute precision", GPU, size.width * size.whole)
    yield Component("communication", GPU, buckets)
    yield Component("accumulated gradients", GPU, gradients)
    # a new gradient, and a bucket divided into one piece per rank
    pieces = size.width * bucket if wide or size.part < size.whole else 0
    yield Component("reduction of gradients", GPU, weight + pieces, "backward")
    if offloaded:
        yield Component("copy of updated weights", HOST, locked(flat))
        yield Component("staging of gradients", GPU, weight)
        yield Component("staging of gradients", HOST, locked(weight))
    # at the start, before these buffers exist: a second copy of this rank's part of the model
    yield Component("copy of the weights", GPU, max(0, flat - buckets - gradients), "start")


def _stage_3(config: Config, zero: dict[str, Any], size: _Sizes, locked: Any) -> Iterator[Component]:
    """Stage 3: divided weights; weights in use are assembled on the GPU."""
    offloaded = config.deepspeed.offload_optimizer != "none"
    flat = size.width * size.part
    place = GPU if config.deepspeed.offload_param == "none" else HOST
    yield Component("model in compute precision", place, flat if place == GPU else locked(flat))
    yield Component("weights in use", GPU, size.width * _in_use(config, zero, size))
    bucket = int(zero["reduce_bucket_size"])
    yield Component("communication", GPU, size.width * bucket)
    yield Component("accumulated gradients", HOST if offloaded else GPU, locked(size.kept * size.part))
    # a bucket in rank order, this rank's part of it, and the previous value of one weight's gradient
    filled, ranks = max(bucket, size.largest), -(-size.whole // size.part)
    reduced = size.width * filled + size.kept * -(-(filled + size.largest) // ranks)
    yield Component("reduction of gradients", GPU, reduced + size.width * size.largest, "backward")


def _in_use(config: Config, zero: dict[str, Any], size: _Sizes) -> int:
    """Elements of complete weights on the GPU in stage 3: a block or the head, prefetched weights, and
    weights that stay between forward and backward pass because their next use is near."""
    model, units = config.model, unit_specs(config.model)
    head = model.vocab * model.dim
    # the distance counts every use: three of the head per chunk, then recomputation and backward
    near = max(0, int(zero["stage3_max_reuse_distance"]) - 3 * size.chunks * head) // 3
    ahead = int(zero["stage3_prefetch_bucket_size"]) + size.largest
    persistent = sum(s.numel for u in units for s in u.tensors if s.numel <= PERSISTENT)
    return min(size.whole, max(head + near, size.unit) + ahead + persistent)
