"""Element-wise moments (one number per element of the weight), kept in 4, 2 or about 1 byte each.

    fp32  the number itself
    bf16  rounded stochastically: with rounding to nearest, a second moment with beta2 = 0.999 never decays,
          because 0.1 % is less than half a bf16 step
    int8  bitsandbytes' blockwise dynamic quantisation (Dettmers et al., arXiv 2110.02861): an index into
          a map of 256 values, times the largest magnitude of its block of 256 elements. Or linear, for a
          rule that does not divide by the moment: codes from -127 to 127, times the largest magnitude of the
          block / 127, rounded stochastically: to nearest, a momentum of 0.95 would not decay below code 10

A rule works on flat ranges of elements: it reads a moment as fp32, updates it, uses it and writes it. Only
the stored value is rounded, not the value in use. A range starts at the start of a block, and random bits
are named by element, so the length of the ranges does not change any result.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowres import rng
from lowres.errors import UserError
from lowres.kernels import blocks
from lowres.kernels.blocks import BLOCK
from lowres.kernels.rounding import round_to_bf16
from lowres.rules.base import Betas, Clock, State
from lowres.storage import Fields, TensorSpec
from lowres.target import chunk_elements, chunks

KINDS = ("fp32", "bf16", "int8")


def moment_fields(key: str, shape: tuple[int, ...], kind: str, linear: bool = False) -> Fields:
    """The tensors that store the moment `key` of a weight; all bytes zero means a moment of zero.

    linear: whether int8 is the linear form. A 1-D weight (a norm) always has fp32 moments: they are small,
    and the weight is sensitive.
    """
    assert kind in KINDS, kind
    if kind == "fp32" or len(shape) == 1:
        return {key: (torch.float32, shape)}
    if kind == "bf16":
        return {key: (torch.bfloat16, shape)}
    count = -(-torch.Size(shape).numel() // BLOCK)
    codes = torch.int8 if linear else torch.uint8
    return {key: (codes, shape), f"{key}.absmax": (torch.float32, (count,))}


def flat_chunks(numel: int, device: torch.device) -> list[slice]:
    """Ranges that together cover a tensor, about one chunk long, each starting at the start of a block."""
    return chunks(numel, max(BLOCK, chunk_elements(device) // BLOCK * BLOCK))


class Moment:
    """Reads and writes one moment of a weight during one update, by flat ranges from `flat_chunks`."""

    def __init__(self, spec: TensorSpec, key: str, state: State, clock: Clock, signed: bool) -> None:
        """signed: whether the moment can be negative (the first moment can, the second cannot)."""
        self.value = state[key].view(-1)
        self.accepted = clock.accepted
        self.dtype = self.value.dtype
        if self.dtype in (torch.bfloat16, torch.int8):
            self.rounding = rng.make_key(clock.seed, "moment", f"{spec.name}.{key}", clock.step)
        if self.dtype in (torch.uint8, torch.int8):
            self.absmax = state[f"{key}.absmax"]
        if self.dtype == torch.uint8:
            self.functional = bitsandbytes_functional()
            self.map = _dynamic_map(signed, self.value.device)

    def read(self, part: slice) -> Tensor:
        """fp32 [elements]; a view of the stored numbers if they are fp32 (or fp64, in tests)."""
        if self.dtype == torch.bfloat16:
            return self.value[part].float()
        if self.dtype == torch.uint8:
            return self.functional.dequantize_blockwise(
                self.value[part], absmax=self.absmax[_blocks(part)], code=self.map, blocksize=BLOCK
            )
        if self.dtype == torch.int8:
            return blocks.expand(self.value[part], self.absmax[_blocks(part)])
        return self.value[part]

    def write(self, values: Tensor, part: slice) -> None:
        """Store `values`, which are the result of `read`, updated in place."""
        if self.dtype == torch.bfloat16:
            round_to_bf16(values, self.value[part], self.rounding, part.start)
        elif self.dtype == torch.uint8:
            codes, scale = self.functional.quantize_blockwise(values, code=self.map, blocksize=BLOCK)
            # the signed map ends at -0.993 and 1, so a negative absmax would shrink with every refused update
            for kept, new in ((self.value[part], codes), (self.absmax[_blocks(part)], scale.absmax)):
                torch.where(self.accepted, new, kept, out=kept)
        elif self.dtype == torch.int8:
            own = self.value[part], self.absmax[_blocks(part)]
            blocks.store(values, *own, self.accepted, self.rounding, part.start)


def average_(
    grad: Tensor, spec: TensorSpec, key: str, state: State, clock: Clock, betas: Betas, nesterov: bool = False
) -> None:
    """Move the first moment `key` of a weight towards its gradient, and put it in place of the gradient.

    nesterov: instead, put the mean of gradient and moment with weights 1 - beta1 and beta1.
    """
    weight, _ = clock.moment_weights(betas)
    moment, flat = Moment(spec, key, state, clock, signed=True), grad.view(-1)
    for part in flat_chunks(spec.numel, grad.device):
        m = moment.read(part).lerp_(flat[part], weight)
        moment.write(m, part)
        if nesterov:
            flat[part].lerp_(m, betas[0])
        else:
            flat[part] = m  # a copy, because the direction must not be the state itself


def bitsandbytes_functional() -> ModuleType:
    """The module `bitsandbytes.functional`. Only its public functions are used."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # on some CPUs it warns about a 4-bit kernel that nothing here needs
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError(
            "int8 moments need the package bitsandbytes: pip install bitsandbytes, or use memory.moments=bf16"
        ) from None
    finally:
        logger.setLevel(level)
    return bitsandbytes.functional


@cache
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """fp32 [256], ascending. Cached, because the copy to a device waits for the device."""
    with _disable_current_modes():  # it outlives the trace of a plan, whose tensors have no memory
        return bitsandbytes_functional().create_dynamic_map(signed=signed).to(device)


def _blocks(part: slice) -> slice:
    """The blocks of a range of elements; the last block may be short."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
