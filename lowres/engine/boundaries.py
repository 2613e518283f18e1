"""The residual stream between layers, for all micro-batches of a step: the stash and the carry.

The stash keeps the input of every band of layers until the backward pass. The carry is the boundary
that moves: the output of the last band, then the gradient on its way down. The home of each is the GPU
or host memory. From host memory it passes through the GPU one micro-batch at a time; the next one is
fetched ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowres.kernels import groups
from lowres.kernels.groups import GROUP
from lowres.marks import DEQUANTISE, QUANTISE, mark
from lowres.rooms import Event, Mover, Rooms, Slab, place
from lowres.storage import DENSE_DTYPES

Fields = tuple[Tensor, ...]  # uint8, each with as many bytes for every token


class Plain:
    """A boundary in a floating-point format; without cost if it is the compute format."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def is_free(self, compute: torch.dtype) -> bool:
        """Whether reading needs no memory because the stored values are used directly."""
        return self.dtype == compute

    def sizes(self, numel: int) -> tuple[int, ...]:
        """Bytes of each field for so many numbers."""
        return (numel * self.dtype.itemsize,)

    def encode(self, x: Tensor, fields: Fields) -> None:
        kept = fields[0].view(self.dtype).view(x.shape)
        if place(kept) != place(x):
            kept.copy_(x)

    def decode(self, fields: Fields, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return fields[0].view(self.dtype).view(shape).to(dtype)


class Grouped:
    """INT8 codes with a bf16 scale for every GROUP neighbours along the width, 1.06 bytes per value.

    The groups are small because some channels of the residual stream are far larger than the rest, and
    all values that share a scale with them lose precision. Rounded to nearest.
    """

    def is_free(self, compute: torch.dtype) -> bool:
        return False

    def sizes(self, numel: int) -> tuple[int, ...]:
        return numel, 2 * numel // GROUP

    def encode(self, x: Tensor, fields: Fields) -> None:
        with mark(QUANTISE, "stash"):
            groups.encode(x, *self._typed(fields))

    def decode(self, fields: Fields, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=fields[0].device)
        with mark(DEQUANTISE, "stash"):
            groups.decode(*self._typed(fields), out)
        return out

    @staticmethod
    def _typed(fields: Fields) -> tuple[Tensor, Tensor]:
        codes, scales = fields
        return codes.view(torch.int8).view(-1, GROUP), scales.view(torch.bfloat16).view(-1, 1)


Encoding = Plain | Grouped


def make_encoding(kind: str, compute: torch.dtype) -> Encoding:
    """The encoding for memory.stash_dtype: auto (the compute format), fp32, bf16 or int8."""
    if kind == "int8":
        return Grouped()
    return Plain(compute if kind == "auto" else DENSE_DTYPES[kind])


def fields_in(memory: Tensor, encoding: Encoding, numel: int) -> Fields:
    """Memory for so many numbers, from the start of a slab or slot."""
    sizes = encoding.sizes(numel)
    return memory[: sum(sizes)].split(sizes)


def boundary_bytes(encoding: Encoding, numel: int) -> int:
    return sum(encoding.sizes(numel))


class Piece(NamedTuple):
    """Some sequences of a host boundary. fields: their memory. names: of each sequence."""

    fields: Fields
    names: tuple[tuple[tuple[int, int], int], ...]

    def inside(self, slot: Tensor) -> Fields:
        """The same fields in a slot."""
        sizes = [field.numel() for field in self.fields]
        return slot[: sum(sizes)].split(sizes)


class Door:
    """Slots on the GPU through which the pieces of host boundaries pass: two in, two out, used in turn."""

    def __init__(self, mover: Mover, slots: list[Tensor]) -> None:
        self._mover, self._in, self._out = mover, slots[:2], slots[2:]
        self._next_in = self._next_out = 0
        self._left: list[Event] = [None, None]  # when the last copy out of each slot is done
        self._written: dict[tuple[tuple[int, int], int], Event] = {}  # and the last to a sequence's home
        # by slot: which piece is coming, and when it is there
        self._coming: dict[int, tuple[tuple[tuple[tuple[int, int], int], ...], Event]] = {}

    def begin(self) -> None:
        """Forget what was fetched ahead, because its home may change."""
        self._coming.clear()

    def fetch(self, piece: Piece, following: Piece | None) -> Fields:
        """A piece on the GPU, valid until two more are fetched; starts the next fetch."""
        slot, self._next_in = self._next_in, 1 - self._next_in
        coming, event = self._coming.pop(slot, ((), None))
        if coming != piece.names:
            event = self._start(slot, piece)
        if following is not None:
            self._coming[1 - slot] = (following.names, self._start(1 - slot, following))
        self._mover.wait(event)
        return piece.inside(self._in[slot])

    def _start(self, slot: int, piece: Piece) -> Event:
        copies = zip(piece.inside(self._in[slot]), piece.fields, strict=True)
        return self._mover.fetch(copies, dict.fromkeys(self._written.get(name) for name in piece.names))

    def leave(self, piece: Piece) -> Fields:
        """Memory for a piece that is to be stored next."""
        self._mover.wait(self._left[self._next_out])
        return piece.inside(self._out[self._next_out])

    def store(self, piece: Piece) -> None:
        """Copy what was put there to its home."""
        slot, self._next_out = self._next_out, 1 - self._next_out
        done = self._mover.store(zip(piece.fields, piece.inside(self._out[slot]), strict=True))
        self._left[slot] = done
        self._written.update(dict.fromkeys(piece.names, done))


class Boundary:
    """The residual stream at one place, [sequences, T, D]. A micro-batch is a range of sequences."""

    def __init__(
        self,
        slab: Tensor,
        encoding: Encoding,
        shape: tuple[int, int, int],
        compute: torch.dtype,
        door: Door | None,
    ) -> None:
        """shape: of the largest batch."""
        self._encoding, self._compute, self._door = encoding, compute, door
        self._most, *self._each = shape
        self._fields, self._name = fields_in(slab, encoding, math.prod(shape)), place(slab)
        self._sequences = 0

    def begin(self, sequences: int) -> None:
        """Set the size of the batch, which is about to be written."""
        self._sequences = sequences
        if self._door is not None:
            self._door.begin()

    def _piece(self, part: slice) -> Piece:
        sizes = [len(field) // self._most for field in self._fields]
        fields = zip(self._fields, sizes, strict=True)
        return Piece(
            tuple(field[part.start * size : part.stop * size] for field, size in fields),
            tuple((self._name, i) for i in range(part.start, part.stop)),
        )

    def _following(self, part: slice) -> Piece | None:
        """What will most likely be read after this micro-batch: as many sequences."""
        stop = min(2 * part.stop - part.start, self._sequences)
        return self._piece(slice(part.stop, stop)) if part.stop < stop else None

    def _shape(self, part: slice) -> tuple[int, ...]:
        return part.stop - part.start, *self._each

    def blank(self, part: slice) -> Tensor:
        """Memory in which a micro-batch can be made that is to be `put` next, if it is not encoded."""
        piece = self._piece(part)
        fields = piece.fields if self._door is None else self._door.leave(piece)
        assert self._encoding.is_free(self._compute)
        return self._encoding.decode(fields, self._shape(part), self._compute)

    def put(self, part: slice, x: Tensor) -> None:
        """Store x [b, T, D]."""
        piece = self._piece(part)
        if self._door is None:
            self._encoding.encode(x, piece.fields)
            return
        self._encoding.encode(x, self._door.leave(piece))
        self._door.store(piece)

    def get(self, part: slice) -> Tensor:
        """A micro-batch [b, T, D]. It may be the stored memory or a slot: use it before reading two more."""
        piece = self._piece(part)
        fields = piece.fields if self._door is None else self._door.fetch(piece, self._following(part))
        return self._encoding.decode(fields, self._shape(part), self._compute)


@dataclass(frozen=True)
class BoundarySlabs:
    """The slabs of stash and carry. stash: on the host (the first bands), then on the GPU; one slab per band.
    All stash slabs on the host share a door of four slots; each carry on the host has its own."""

    stash: tuple[Slab, Slab]
    stash_door: Slab
    carry: Slab
    carry_door: Slab

    def all(self) -> tuple[Slab, ...]:
        on_host, on_gpu = self.stash
        return self.stash_door, self.carry_door, on_gpu, on_host, self.carry


class Boundaries:
    """The stash (by band) and the carry of a step."""

    def __init__(
        self,
        rooms: Rooms,
        mover: Mover,
        slabs: BoundarySlabs,
        *,
        encoding: Encoding,
        dim: int,
        compute: torch.dtype,
        sequences: int,
        length: int,
    ) -> None:
        """slabs: for these sizes (`Layout.boundaries`). encoding: of the stash."""
        self.capacity = (sequences, length, sum(slab.count for slab in slabs.stash))
        shape = sequences, length, dim

        def made(slab: Slab, encoding: Encoding, door: Door | None) -> list[Boundary]:
            return [Boundary(memory, encoding, shape, compute, door) for memory in rooms.make(slab)]

        on_host, on_gpu = slabs.stash
        door = Door(mover, rooms.make(slabs.stash_door)) if slabs.stash_door.count else None
        self.stash = made(on_host, encoding, door) + made(on_gpu, encoding, None)
        slots, carries = rooms.make(slabs.carry_door), []
        for i, memory in enumerate(rooms.make(slabs.carry)):
            own = Door(mover, slots[4 * i : 4 * i + 4]) if slots else None
            carries.append(Boundary(memory, Plain(compute), shape, compute, own))
        # with two carries the last band's output has its own memory, as two backward passes begin with it
        self.carry, self.output = carries[0], carries[-1]

    def holds(self, sequences: int, length: int, bands: int) -> bool:
        """Whether a batch fits into the slabs."""
        most, longest, kept = self.capacity
        return sequences <= most and length == longest and bands <= kept

    def begin(self, sequences: int) -> None:
        """Start the forward pass of a batch."""
        for boundary in (self.carry, self.output, *self.stash):
            boundary.begin(sequences)
