"""The residual stream between layers, for all micro-batches of a step: the stash and the carry.

The stash keeps the input of every band of layers until the backward pass. The carry is the boundary
that moves: the output of the last band, then the gradient on its way down. Each has its home on the
GPU or in host memory; from there it passes through the GPU a micro-batch at a time, one ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.rooms import GPU, HOST, Event, Homes, Mover, Rooms
from lowres.storage import DENSE_DTYPES, aligned

GROUP = 32  # values along the width that share a scale in the INT8 stash


class Plain:
    """A boundary in a floating-point format; free if it is that of the computation."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def is_free(self, compute: torch.dtype) -> bool:
        """Whether reading needs no memory: what is stored is used as it is."""
        return self.dtype == compute

    def nbytes(self, tokens: int, dim: int) -> int:
        return tokens * dim * self.dtype.itemsize

    def encode(self, x: Tensor, region: Tensor) -> None:
        kept = region.view(self.dtype).view(x.shape)
        if kept.data_ptr() != x.data_ptr():
            kept.copy_(x)

    def decode(self, region: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return region.view(self.dtype).view(shape).to(dtype)


class Grouped:
    """INT8 codes with a bf16 scale for every GROUP neighbours along the width, 1.06 bytes a value.

    The groups are small because some channels of the residual stream are far larger than the rest and
    would take the precision of all that share their scale. Rounded to nearest.
    """

    def is_free(self, compute: torch.dtype) -> bool:
        return False

    def nbytes(self, tokens: int, dim: int) -> int:
        return tokens * dim + 2 * tokens * dim // GROUP

    def encode(self, x: Tensor, region: Tensor) -> None:
        codes, scales = self._split(region, x.numel())
        for part, kept, scale in zip(
            *(t.split(_ROWS) for t in (x.reshape(-1, GROUP), codes, scales)), strict=True
        ):
            wide = part.float()
            # the scale may be rounded down, and 127.4 is still 127
            scale.copy_(wide.abs().amax(1, keepdim=True).div_(127))
            kept.copy_((wide / scale.float().clamp_(min=1e-30)).round_().clamp_(-127, 127))

    def decode(self, region: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes, scales = self._split(region, torch.Size(shape).numel())
        out = torch.empty(shape, dtype=dtype, device=region.device)
        torch.mul(codes, scales, out=out.view(-1, GROUP))
        return out

    @staticmethod
    def _split(region: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        codes, scales = region[:numel], region[numel:]
        return codes.view(torch.int8).view(-1, GROUP), scales.view(torch.bfloat16).view(-1, 1)


_ROWS = 1 << 15  # groups that are encoded at one time


Encoding = Plain | Grouped


def make_encoding(kind: str, compute: torch.dtype) -> Encoding:
    """What memory.stash_dtype means: auto (that of the computation), fp32, bf16 or int8."""
    if kind == "int8":
        return Grouped()
    return Plain(compute if kind == "auto" else DENSE_DTYPES[kind])


class Door:
    """Slots on the GPU through which the pieces of host boundaries pass: two in, two out."""

    def __init__(self, rooms: Rooms, mover: Mover, nbytes: int) -> None:
        self._mover = mover
        self._in = [rooms.slab("transfer of boundaries", GPU, nbytes) for _ in range(2)]
        self._out = [rooms.slab("transfer of boundaries", GPU, nbytes) for _ in range(2)]
        self._left: list[Event] = [None, None]  # when the last copy out of a slot is done
        self._written: dict[int, Event] = {}  # and into the piece at an address
        self._coming: dict[int, tuple[int, Event]] = {}  # by slot: address of the piece and its arrival

    def fetch(self, piece: Tensor, following: Tensor | None, index: int) -> Tensor:
        """A piece of a host boundary on the GPU, until two more were fetched; starts on the next."""
        slot = index % 2
        address, event = self._coming.pop(slot, (0, None))
        if address != piece.data_ptr():
            event = self._start(slot, piece)
        if following is not None:
            self._coming[1 - slot] = (following.data_ptr(), self._start(1 - slot, following))
        self._mover.wait(event)
        return self._in[slot][: piece.numel()]

    def _start(self, slot: int, piece: Tensor) -> Event:
        copy = (self._in[slot][: piece.numel()], piece)
        return self._mover.fetch([copy], [self._written.get(piece.data_ptr())])

    def leave(self, index: int, nbytes: int) -> Tensor:
        """Where to put a piece that is to leave."""
        self._mover.wait(self._left[index % 2])
        return self._out[index % 2][:nbytes]

    def store(self, index: int, piece: Tensor) -> None:
        """Send what was put there to its home."""
        copy = (piece, self._out[index % 2][: piece.numel()])
        self._left[index % 2] = self._written[piece.data_ptr()] = self._mover.store([copy])


class Boundary:
    """The residual stream at one place, [sequences, T, D], cut into micro-batches."""

    def __init__(
        self, slab: Tensor, encoding: Encoding, dim: int, compute: torch.dtype, door: Door | None
    ) -> None:
        self._slab, self._encoding, self._dim, self._compute = slab, encoding, dim, compute
        self._door = door
        self._shapes: list[tuple[int, int]] = []

    def cut(self, shapes: list[tuple[int, int]]) -> None:
        """Sequences and length of each micro-batch that follows."""
        self._shapes = shapes
        sizes = [aligned(self._encoding.nbytes(b * t, self._dim)) for b, t in shapes]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def _region(self, i: int) -> Tensor:
        b, t = self._shapes[i]
        return self._slab[self._starts[i] :][: self._encoding.nbytes(b * t, self._dim)]

    def put(self, i: int, x: Tensor) -> None:
        """Keep x [b, T, D] as micro-batch i."""
        region = self._region(i)
        if self._door is None:
            self._encoding.encode(x, region)
            return
        self._encoding.encode(x, self._door.leave(i, region.numel()))
        self._door.store(i, region)

    def get(self, i: int) -> Tensor:
        """Micro-batch i [b, T, D]. It may be the stored memory, or a slot: use it before getting i + 2."""
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


class Boundaries:
    """The stash (by band) and the carry of a step."""

    def __init__(
        self,
        rooms: Rooms,
        mover: Mover,
        homes: Homes,
        stash_encoding: Encoding,
        bands: int,
        dim: int,
        compute: torch.dtype,
        sequences: int,
        micro_batch: int,
        length: int,
        keep_output: bool = False,
    ) -> None:
        """bands: how many boundaries the stash has; 0 for evaluation. keep_output: the output of the last
        band has a place of its own, so that two backward passes can begin there."""
        self.capacity = (sequences, length, bands)
        self._micro_batch = micro_batch
        carried = Plain(compute)

        def door(encoding: Encoding, needed: bool) -> Door | None:
            piece = encoding.nbytes(min(micro_batch, sequences) * length, dim)
            return Door(rooms, mover, piece) if needed else None

        def boundary(name: str, encoding: Encoding, through: Door | None) -> Boundary:
            size = boundary_bytes(encoding, dim, sequences, micro_batch, length)
            slab = rooms.slab(name, GPU if through is None else HOST, size)
            return Boundary(slab, encoding, dim, compute, through)

        stash_door = door(stash_encoding, bands > 0 and homes.stash > 0)
        self.carry = boundary("carry", carried, door(carried, homes.carry))
        self.output = boundary("carry", carried, door(carried, homes.carry)) if keep_output else self.carry
        self.stash = [
            boundary("stash", stash_encoding, stash_door if band < homes.stash else None)
            for band in range(bands)
        ]

    def holds(self, sequences: int, length: int, bands: int) -> bool:
        """Whether a batch fits into what there is."""
        most, longest, kept = self.capacity
        return sequences <= most and length == longest and bands <= kept

    def cut(self, sequences: int, length: int) -> None:
        """Cut all boundaries into micro-batches of a batch."""
        counts = [min(self._micro_batch, sequences - s) for s in range(0, sequences, self._micro_batch)]
        for boundary in (self.carry, self.output, *self.stash):
            boundary.cut([(count, length) for count in counts])
