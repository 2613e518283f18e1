"""The KV cache: what the model has read of some sequences, so that it reads only what is new.

A `Reader` answers as `Engine.logits` does. Which of the tokens it has read before is its own business: it
compares, and goes on from the longest common beginning. So whoever samples, talks or cuts a context gives
whole sequences, and the result does not depend on what was read before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowres.config import ModelConfig
from lowres.model import CachedPositions, Segment, Starts


class Reader(Protocol):
    def logits(self, sequences: Mapping[int, list[int]]) -> Tensor:
        """fp32 [S, V]: logits of the token after each of these sequences of tokens, in their order. Their
        keys are rows of the reader, from 0 on."""


class Rereading:
    """A reader that remembers nothing."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        """logits: see `Engine.logits`."""
        self._logits = logits

    def logits(self, sequences: Mapping[int, list[int]]) -> Tensor:
        return torch.cat([self._logits(torch.tensor([ids])) for ids in sequences.values()])


@dataclass(frozen=True)
class NewTokens:
    """What has to be read. ids: int64 [N], on the device. segments: whose they are, by row. last: of the
    tokens, the last one of each sequence, int64 [S], in the order in which they were asked for."""

    ids: Tensor
    segments: tuple[Segment, ...]
    last: Tensor


class KVCache:
    """Keys and values in all layers, for the first `length` positions of some sequences."""

    def __init__(
        self,
        slab: Tensor,
        model: ModelConfig,
        compute: torch.dtype,
        shape: tuple[int, int],
        tables: tuple[Tensor, Tensor],
    ) -> None:
        """slab: see `Layout.cache`. shape: sequences and length. tables: cos and sin, fp32 [length, E]."""
        sequences, self._length = shape
        sizes = model.n_layers, 2, sequences, model.kv_heads, self._length, model.head_width
        self._kept = slab.view(compute).view(sizes)
        self._tables = tables
        self._held: list[list[int]] = [[] for _ in range(sequences)]
        # of the tokens that are read now, by piece
        self._places: dict[tuple[int, int], CachedPositions] = {}
        self._segments: tuple[Segment, ...] = ()

    def take(self, sequences: Mapping[int, list[int]]) -> NewTokens:
        """What of the sequences is not here, at least the last token of each. It counts as read only after
        `done`."""
        found = {}
        for row, ids in sequences.items():
            assert 0 < len(ids) <= self._length, f"{len(ids)} tokens, and room for {self._length}"
            common = _common(self._held[row], ids)
            found[row] = Segment(row, common, len(ids) - common)
            del self._held[row][common:]
        self._places, self._segments = {}, tuple(found[row] for row in sorted(found))
        ids = [i for s in self._segments for i in sequences[s.row][s.first :]]
        ends, end = {}, 0
        for s in self._segments:
            end += s.size
            ends[s.row] = end - 1
        device = self._kept.device
        last = torch.tensor([ends[row] for row in sequences], device=device)
        return NewTokens(torch.tensor(ids, device=device), self._segments, last)

    def done(self, sequences: Mapping[int, list[int]]) -> None:
        """What was taken of them has been read."""
        for row, ids in sequences.items():
            self._held[row] += ids[len(self._held[row]) :]

    def positions(self, layer: int, piece: slice) -> CachedPositions:
        """For a layer, of some of the tokens that were taken."""
        keys, values = self._kept[layer]
        key = piece.start, piece.stop
        if key not in self._places:
            self._places[key] = CachedPositions.of(_cut(self._segments, piece), self._tables, keys, values)
        return self._places[key]._replace(keys=keys, values=values)


class CachedReader:
    """A reader with a KV cache. extend: reads new tokens; returns the logits after the last of each sequence.
    starts: see `EngineSettings`."""

    def __init__(
        self, cache: KVCache, extend: Callable[[KVCache, NewTokens], Tensor], starts: Starts | None
    ) -> None:
        self._cache, self._extend, self._starts = cache, extend, starts

    def logits(self, sequences: Mapping[int, list[int]]) -> Tensor:
        seen = {row: self._last_document(ids) for row, ids in sequences.items()}
        found = self._extend(self._cache, self._cache.take(seen))
        self._cache.done(seen)
        return found

    def _last_document(self, ids: list[int]) -> list[int]:
        """What the last token sees."""
        if self._starts is None:
            return ids
        starts = self._starts.where(torch.tensor([ids]))[0].nonzero()
        return ids[int(starts[-1]) :] if len(starts) else ids


def _common(held: list[int], ids: list[int]) -> int:
    """How many tokens at the beginning are the same; not all of `ids`."""
    most = min(len(held), len(ids) - 1)
    if held[:most] == ids[:most]:
        return most
    return next(i for i in range(most) if held[i] != ids[i])


def _cut(segments: Iterable[Segment], piece: slice) -> list[Segment]:
    """The parts of segments that are in a piece of all their tokens."""
    found, start = [], 0
    for row, first, size in segments:
        begin, end = max(piece.start - start, 0), min(piece.stop - start, size)
        if begin < end:
            found.append(Segment(row, first + begin, end - begin))
        start += size
    return found
