"""Tensors in safetensors files, read and written in place.

Tensors in host memory pass without mapped pages or a second copy, so saving and resuming need no more memory
than training. Tensors on another device pass through a buffer of PIECE_BYTES in host memory. The safetensors
library is not used because it first collects everything that it saves, in older releases as a copy of the
whole file. Its format is simple: 8 bytes for the length of the header (little-endian), the header in JSON,
and the data without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import Field
from torch import Tensor

from lowres.errors import UserError
from lowres.sealed import Damaged, Record, checked, parse
from lowres.storage import Fields, all_finite

# size of the pieces that are hashed, written or moved between devices
PIECE_BYTES = 8 << 20
MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_Count = Annotated[int, Field(ge=0, le=1 << 62)]


class _Entry(Record):
    """What the header says about a tensor."""

    dtype: str
    shape: list[_Count]
    data_offsets: list[_Count]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: its format, its shape and its bytes from the start of the file."""

    dtype: str
    shape: list[int]
    start: int
    end: int


class NotFinite(ValueError):  # noqa: N818
    """A tensor that was to be written has a number that is not finite. The text names the tensor."""


def read_header(file: BinaryIO) -> dict[str, Place]:
    """The tensors of a file by name. Raises Damaged unless they fill the file exactly, as the format asks."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MOST_HEADER_BYTES):
        raise Damaged(f"is truncated at {size} bytes, or its header is damaged")
    header = parse(file.read(length))
    header.pop("__metadata__", None)
    found: dict[str, Place] = {}
    for name, values in header.items():
        entry = checked(values, _Entry)
        if entry.dtype not in _SIZES or len(entry.data_offsets) != 2:
            raise Damaged(f"says something unknown of the tensor {name!r:.100} ({entry.dtype!r:.20})")
        begin, end = entry.data_offsets
        if end - begin != math.prod(entry.shape) * _SIZES[entry.dtype]:
            raise Damaged(f"has bytes of the tensor {name!r} that do not match its shape")
        found[name] = Place(entry.dtype, entry.shape, 8 + length + begin, 8 + length + end)
    at = 8 + length
    for place in sorted(found.values(), key=lambda place: (place.start, place.end)):
        if place.start != at:
            raise Damaged("has tensors that overlap or leave gaps")
        at = place.end
    if at != size:
        raise Damaged(f"is truncated at {size} bytes" if size < at else f"has {size} bytes instead of {at}")
    return found


def read_into(file: BinaryIO, tensors: Mapping[str, Tensor], path: Path, all_used: bool, new: str) -> None:
    """Read tensors from a file into `tensors`, in place; see `lowres.checkpoint.load_unit`."""
    try:
        places = read_header(file)
    except Damaged as error:
        raise UserError(f"checkpoint {path}: {error}; delete its folder and use an older one") from None
    wanted = {n: t for n, t in tensors.items() if n in places or not (new and n.endswith(new))}
    unused = {name for name in places if not (new and name.endswith(new))} - wanted.keys()
    if all_used and unused:
        raise UserError(f"checkpoint {path}: has other tensors than the run, such as {min(unused)}")
    for name, tensor in wanted.items():
        place = places.get(name)
        if place is None or place.shape != list(tensor.shape) or place.dtype != DTYPES[tensor.dtype]:
            raise UserError(f"checkpoint {path}: {name} is missing or has another shape or type")
    bounce = _bounce()
    for name, tensor in wanted.items():
        file.seek(places[name].start)
        _fill(file, tensor, bounce, path)


def _fill(file: BinaryIO, tensor: Tensor, bounce: Tensor, path: Path) -> None:
    """Fill a tensor from the file's position. A tensor that is not contiguous needs a copy."""
    whole = tensor.detach().contiguous()
    for piece in whole.view(-1).view(torch.uint8).split(PIECE_BYTES):
        host = piece if _on_host(piece) else bounce[: len(piece)]
        if file.readinto(host.numpy().data) != len(piece):  # type: ignore[attr-defined]
            raise UserError(f"checkpoint {path}: ends too early; delete its folder and use an older one")
        if host is not piece:
            piece.copy_(host)
    if not tensor.is_contiguous():
        tensor.detach().copy_(whole)


def layout(fields: Fields) -> tuple[bytes, dict[str, Place]]:
    """The head of a file that has these tensors in this order, and where each of them will lie."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in fields.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    del header["__metadata__"]
    places = {
        name: Place(entry["dtype"], entry["shape"], *(len(head) + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }
    return head, places


def pieces_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of the tensors, piece by piece; a piece is valid until the next is requested. Raises
    NotFinite."""
    # widest elements first, so that every tensor is aligned, which some readers need
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    head, _ = layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()})
    yield head
    bounce = _bounce()
    for name, tensor in ordered.items():
        if not all_finite([tensor]):
            raise NotFinite(name)
        whole = tensor.detach().contiguous().view(-1)
        for piece in whole.view(torch.uint8).split(PIECE_BYTES):
            host = piece if _on_host(piece) else bounce[: len(piece)].copy_(piece)
            yield host.numpy().data


def _bounce() -> Tensor:
    """Host memory for pieces of tensors on another device."""
    return host_memory(PIECE_BYTES)


def host_memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] that takes memory page by page at first use, and gives it back; malloc would keep it."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
