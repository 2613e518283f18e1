"""Numbers kept as linear INT8 codes in blocks that share a scale: a momentum. Every form gives the same bits.

x = code * (absmax / 127),  code in [-127, 127]; absmax: the largest magnitude of the block
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres import rng
from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of

BLOCK = 256  # numbers that share a scale; the last block may be short
LARGEST = 127
SMALLEST = 1e-36  # a block below is stored as zeros, or nearly: fp32 has no inverse of its absmax


def expand(codes: Tensor, absmax: Tensor) -> Tensor:
    """fp32 [n] of int8 codes [n] and absmax [blocks]."""
    form = form_of(codes)
    if form == PLAIN:
        return _per_block(codes.float(), absmax / LARGEST)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if form == NATIVE:
        native.call("blocks_expand", codes, absmax, out, codes.numel())
    elif form == TRITON:
        from lowres.kernels.gpu import blocks

        blocks.expand(codes, absmax, out)
    return out


def store(values: Tensor, codes: Tensor, absmax: Tensor, accepted: Tensor, key: rng.Key, start: int) -> None:
    """Set codes [n] and absmax [blocks] to fp32 values [n], rounded stochastically, if accepted.

    accepted: bool scalar on the device. key, start: name the bits of values[0] and what follows.
    """
    form = form_of(codes)
    if form == NATIVE:
        native.call("blocks_store", values, codes, absmax, accepted, *key, start, values.numel())
    elif form == TRITON:
        from lowres.kernels.gpu import blocks

        blocks.store(values, codes, absmax, accepted, key, start)
    elif form == PLAIN:
        largest = _absmax(values)
        inverse = torch.full_like(largest, LARGEST).div_(largest.clamp(min=SMALLEST))
        scaled = _per_block(values.clone(), inverse)
        rounded = rng.round_to_integer(scaled, key, start).clamp_(-LARGEST, LARGEST)
        for kept, new in ((codes, rounded.to(torch.int8)), (absmax, largest)):
            torch.where(accepted, new, kept, out=kept)


def _absmax(values: Tensor) -> Tensor:
    """The largest magnitude of each block."""
    whole = values.numel() // BLOCK * BLOCK
    found = torch.linalg.vector_norm(values[:whole].view(-1, BLOCK), float("inf"), dim=1)
    if whole == values.numel():
        return found
    return torch.cat([found, torch.linalg.vector_norm(values[whole:], float("inf")).view(1)])


def _per_block(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply each block by its factor, in place."""
    whole = values.numel() // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(factors[: whole // BLOCK, None])
    values[whole:].mul_(factors[-1])
    return values
