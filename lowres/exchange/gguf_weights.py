"""Tensors in the number formats of GGUF: their bytes, and what the format costs.

The cost is the relative RMS error against the stored weight, over the whole tensor. A format that would cost
more than LARGEST_LOSS gives way to a wider one: Q8_0 and F16 have fp16 numbers, whose smallest is 6e-8 and
whose largest is 65,504, and lose what lies beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowres.errors import UserError
from lowres.exchange.stored import StoredWeight

# above what Q8_0 costs where its scales are ordinary: 0.5 % for normally distributed weights, 1.3 % at most
LARGEST_LOSS = 0.02
BLOCK = 32  # numbers that share a scale in Q8_0
# the relative error of an fp16 number that is not too small; codes with such scales lose less than any new
# ones would
_FP16_ERROR = 2.0**-11
_PIECE = 1 << 22  # elements


@dataclass(frozen=True)
class Encoded:
    """Some rows of a tensor. data: uint8 [rows, bytes]. error, norm: sums of squares, of what is lost and of
    what was there."""

    first: int
    data: np.ndarray
    error: float
    norm: float


@dataclass(frozen=True)
class Form:
    """A way to write a tensor. type: its name in GGUF."""

    type: str
    encode: Callable[[StoredWeight], Iterator[Encoded]]


def library() -> Any:
    """The package gguf. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("--format: gguf needs the package gguf: pip install gguf") from None
    return gguf


def row_bytes(type_: str, length: int) -> int:
    """Bytes of a row of this many numbers."""
    gguf = library()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return length // block * size


def forms(dtype: str, kind: str, shape: tuple[int, ...]) -> list[list[Form]]:
    """How a tensor that is stored as `kind` can be written if the user asks for `dtype`, the first choice
    first. Of the forms of one list, the better one is taken."""
    if len(shape) == 1 or dtype == "fp32":
        return [[F32]]  # norms and biases are never narrower: llama.cpp has no kernels for that
    if dtype == "bf16":
        return [[BF16]]
    found = [[F16], [BF16]]
    if dtype == "q8_0" and shape[-1] % BLOCK == 0:
        found.insert(0, [CODES, Q8_0] if kind == "int8" else [Q8_0])
    return found


def choose(name: str, weight: StoredWeight, choices: list[list[Form]]) -> Form:
    """The first choice whose loss is small enough, or the last one."""
    for among in choices[:-1]:
        losses: dict[float, Form] = {}
        for form in among:
            loss = relative(*sums(name, form.encode(weight)))
            losses.setdefault(loss, form)
            if form is CODES and loss <= _FP16_ERROR:
                break
        least = min(losses)
        if least <= LARGEST_LOSS:
            return losses[least]
    return choices[-1][0]


def sums(name: str, pieces: Iterator[Encoded], into: np.ndarray | None = None) -> tuple[float, float]:
    """Squared error and squared norm of a tensor. into: uint8 [rows, bytes], for its bytes. Raises UserError
    if a number is not finite."""
    error = norm = 0.0
    for piece in pieces:
        if not math.isfinite(piece.norm):
            raise UserError(f"{name} has numbers that are not finite; export an older checkpoint")
        if into is not None:
            into[piece.first : piece.first + len(piece.data)] = piece.data
        error, norm = error + piece.error, norm + piece.norm
    return error, norm


def relative(error: float, norm: float) -> float:
    """The relative RMS error; infinite if it is no number, as of scales that overflow."""
    if error == 0:
        return 0.0
    found = math.sqrt(error / norm) if norm > 0 else math.inf
    return math.inf if math.isnan(found) else found


def _dense(dtype: torch.dtype) -> Callable[[StoredWeight], Iterator[Encoded]]:
    def encode(weight: StoredWeight) -> Iterator[Encoded]:
        for first, rows in weight.rows():
            cast = rows.to(dtype).contiguous()
            data = cast.view(len(rows), -1).view(torch.uint8).numpy()
            yield Encoded(first, data, _square(cast.float() - rows), _square(rows))

    return encode


def _quantised(weight: StoredWeight) -> Iterator[Encoded]:
    """New codes and scales for each block, by gguf's own quantiser."""
    gguf = library()
    kind = gguf.GGMLQuantizationType.Q8_0
    for first, rows in weight.rows():
        with np.errstate(all="ignore"):  # what overflows shows in the error
            data = gguf.quantize(rows.contiguous().numpy(), kind)
            kept = torch.from_numpy(gguf.dequantize(data, kind))
        yield Encoded(first, data, _square(kept - rows), _square(rows))


def _of_codes(weight: StoredWeight) -> Iterator[Encoded]:
    """The codes of an INT8 weight as they are. All blocks of a row have its scale, as fp16."""
    stored = weight.tensors()
    for first in range(0, len(stored[""]), step := max(1, _PIECE // stored[""].shape[1])):
        codes, scales = stored[""][first : first + step], stored[".scales"][first : first + step]
        kept = scales.half()
        blocks = codes.view(len(codes), -1, BLOCK)
        data = np.empty((*blocks.shape[:2], 2 + BLOCK), np.uint8)
        data[..., :2] = kept.view(torch.uint8).numpy()[:, None]
        data[..., 2:] = blocks.view(torch.uint8).numpy()
        of_codes = torch.linalg.vector_norm(codes.float(), dim=1, keepdim=True).double()
        yield Encoded(
            first,
            data.reshape(len(codes), -1),
            _square((kept.double() - scales.double()) * of_codes),
            _square(scales.double() * of_codes),
        )


def _square(x: Tensor) -> float:
    """The sum of the squares."""
    # by rows in fp32: 40 times as fast as in fp64, and good to 1e-7
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1).double()))
    if norm == 0 or not math.isfinite(norm):  # a square may have no fp32 number
        norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return norm**2


F32, F16 = Form("F32", _dense(torch.float32)), Form("F16", _dense(torch.float16))
BF16 = Form("BF16", _dense(torch.bfloat16))
Q8_0, CODES = Form("Q8_0", _quantised), Form("Q8_0", _of_codes)
