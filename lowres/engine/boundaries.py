"""The residual stream between layers, for all micro-batches of a step: the stash and the carry.

The stash keeps the input of every band of layers until the backward pass. The carry is the boundary
that moves: the output of the last band, then the gradient on its way down. The home of each is the GPU
or host memory. From host memory it passes through the GPU one micro-batch at a time; the next one is
fetched ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowres.kernels import groups
from lowres.kernels.groups import GROUP
from lowres.marks import DEQUANTISE, QUANTISE, mark
from lowres.rooms import Event, Mover, Rooms, Slab, place
from lowres.storage import DENSE_DTYPES, aligned


class Plain:
    """A boundary in a floating-point format; without cost if it is the compute format."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def is_free(self, compute: torch.dtype) -> bool:
        """Whether reading needs no memory because the stored values are used directly."""
        return self.dtype == compute

    def nbytes(self, tokens: int, dim: int) -> int:
        return tokens * dim * self.dtype.itemsize

    def encode(self, x: Tensor, region: Tensor) -> None:
        kept = region.view(self.dtype).view(x.shape)
        if place(kept) != place(x):
            kept.copy_(x)

    def decode(self, region: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return region.view(self.dtype).view(shape).to(dtype)


class Grouped:
    """INT8 codes with a bf16 scale for every GROUP neighbours along the width, 1.06 bytes per value.

    The groups are small because some channels of the residual stream are far larger than the rest, and
    all values that share a scale with them lose precision. Rounded to nearest.
    """

    def is_free(self, compute: torch.dtype) -> bool:
        return False

    def nbytes(self, tokens: int, dim: int) -> int:
        return tokens * dim + 2 * tokens * dim // GROUP

    def encode(self, x: Tensor, region: Tensor) -> None:
        codes, scales = self._split(region, x.numel())
        with mark(QUANTISE, "stash"):
            groups.encode(x, codes, scales)

    def decode(self, region: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes, scales = self._split(region, torch.Size(shape).numel())
        out = torch.empty(shape, dtype=dtype, device=region.device)
        with mark(DEQUANTISE, "stash"):
            groups.decode(codes, scales, out)
        return out

    @staticmethod
    def _split(region: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        codes, scales = region[:numel], region[numel:]
        return codes.view(torch.int8).view(-1, GROUP), scales.view(torch.bfloat16).view(-1, 1)


Encoding = Plain | Grouped


def make_encoding(kind: str, compute: torch.dtype) -> Encoding:
    """The encoding for memory.stash_dtype: auto (the compute format), fp32, bf16 or int8."""
    if kind == "int8":
        return Grouped()
    return Plain(compute if kind == "auto" else DENSE_DTYPES[kind])


class Door:
    """Slots on the GPU through which the pieces of host boundaries pass: two in, two out."""

    def __init__(self, mover: Mover, slots: list[Tensor]) -> None:
        self._mover, self._in, self._out = mover, slots[:2], slots[2:]
        self._left: list[Event] = [None, None]  # when the last copy out of each slot is done
        self._written: dict[tuple[int, int], Event] = {}  # and the last copy to each piece's home
        self._coming: dict[
            int, tuple[tuple[int, int] | None, Event]
        ] = {}  # by slot: which piece, and when it is there

    def fetch(self, piece: Tensor, following: Tensor | None, index: int) -> Tensor:
        """A piece of a host boundary on the GPU, valid until two more are fetched; starts the next fetch."""
        slot = index % 2
        coming, event = self._coming.pop(slot, (None, None))
        if coming != place(piece):
            event = self._start(slot, piece)
        if following is not None:
            self._coming[1 - slot] = (place(following), self._start(1 - slot, following))
        self._mover.wait(event)
        return self._in[slot][: piece.numel()]

    def _start(self, slot: int, piece: Tensor) -> Event:
        copy = (self._in[slot][: piece.numel()], piece)
        return self._mover.fetch([copy], [self._written.get(place(piece))])

    def leave(self, index: int, nbytes: int) -> Tensor:
        """Memory for a piece that is to be stored."""
        self._mover.wait(self._left[index % 2])
        return self._out[index % 2][:nbytes]

    def store(self, index: int, piece: Tensor) -> None:
        """Copy what was put there to its home, `piece`."""
        copy = (piece, self._out[index % 2][: piece.numel()])
        self._left[index % 2] = self._written[place(piece)] = self._mover.store([copy])


class Boundary:
    """The residual stream at one place, [sequences, T, D], split into micro-batches."""

    def __init__(
        self, slab: Tensor, encoding: Encoding, dim: int, compute: torch.dtype, door: Door | None
    ) -> None:
        self._slab, self._encoding, self._dim, self._compute = slab, encoding, dim, compute
        self._door = door
        self._shapes: list[tuple[int, int]] = []

    def cut(self, shapes: list[tuple[int, int]]) -> None:
        """Set the micro-batches: sequences and length of each."""
        self._shapes = shapes
        sizes = [aligned(self._encoding.nbytes(b * t, self._dim)) for b, t in shapes]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def _region(self, i: int) -> Tensor:
        b, t = self._shapes[i]
        return self._slab[self._starts[i] :][: self._encoding.nbytes(b * t, self._dim)]

    def put(self, i: int, x: Tensor) -> None:
        """Store x [b, T, D] as micro-batch i."""
        region = self._region(i)
        if self._door is None:
            self._encoding.encode(x, region)
            return
        self._encoding.encode(x, self._door.leave(i, region.numel()))
        self._door.store(i, region)

    def get(self, i: int) -> Tensor:
        """Micro-batch i [b, T, D]. It may be the stored memory or a slot: use it before reading i + 2."""
        region = self._region(i)
        if self._door is not None:
            following = self._region(i + 1) if i + 1 < len(self._shapes) else None
            region = self._door.fetch(region, following, i)
        return self._encoding.decode(region, (*self._shapes[i], self._dim), self._compute)


def boundary_bytes(encoding: Encoding, dim: int, sequences: int, micro_batch: int, length: int) -> int:
    """Bytes of a boundary for a whole batch."""
    whole, rest = divmod(sequences, micro_batch)
    size = whole * aligned(encoding.nbytes(micro_batch * length, dim))
    return size + (aligned(encoding.nbytes(rest * length, dim)) if rest else 0)


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
        micro_batch: int,
        length: int,
    ) -> None:
        """slabs: for these sizes (`Layout.boundaries`). encoding: of the stash."""
        self.capacity = (sequences, length, sum(slab.count for slab in slabs.stash))
        self._micro_batch = micro_batch

        def made(slab: Slab, encoding: Encoding, door: Door | None) -> list[Boundary]:
            return [Boundary(memory, encoding, dim, compute, door) for memory in rooms.make(slab)]

        on_host, on_gpu = slabs.stash
        door = Door(mover, rooms.make(slabs.stash_door)) if slabs.stash_door.count else None
        self.stash = made(on_host, encoding, door) + made(on_gpu, encoding, None)
        slots, carries = rooms.make(slabs.carry_door), []
        for i, memory in enumerate(rooms.make(slabs.carry)):
            own = Door(mover, slots[4 * i : 4 * i + 4]) if slots else None
            carries.append(Boundary(memory, Plain(compute), dim, compute, own))
        # with two carries the last band's output has its own memory, as two backward passes begin with it
        self.carry, self.output = carries[0], carries[-1]

    def holds(self, sequences: int, length: int, bands: int) -> bool:
        """Whether a batch fits into the slabs."""
        most, longest, kept = self.capacity
        return sequences <= most and length == longest and bands <= kept

    def cut(self, sequences: int, length: int) -> None:
        """Split all boundaries into the micro-batches of a batch."""
        counts = [min(self._micro_batch, sequences - s) for s in range(0, sequences, self._micro_batch)]
        for boundary in (self.carry, self.output, *self.stash):
            boundary.cut([(count, length) for count in counts])
