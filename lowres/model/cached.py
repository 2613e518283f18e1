"""Attention of new tokens to those of before, whose keys and values are kept: the KV cache of a layer.

New tokens of several sequences stand one after another in one row. Each is computed as it would be in a whole
sequence: only what a token attends to is read from the cache instead of being computed again.

Shape letters: N new tokens, S sequences of the cache, L positions in it; the others as in `block`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Segment(NamedTuple):
    """New tokens of the sequence in a row of the cache: `size` of them, from position `first` on."""

    row: int
    first: int
    size: int

    @property
    def end(self) -> int:
        return self.first + self.size


class CachedPositions(NamedTuple):
    """Where the tokens of x [1, N, D] are: those of the segments, one after another.

    cos, sin: of the rotary embedding, fp32 [1, 1, N, E]. rows, at: row of the cache and position of each
    token, int64 [N]. seen: what each row from that of the first segment to that of the last attends to, bool
    [rows, 1, L]; None unless segments of one token each attend to unequally many. keys, values: of a layer,
    [S, K, L, E]; `attend` adds those of the new tokens.
    """

    cos: Tensor
    sin: Tensor
    segments: tuple[Segment, ...]
    rows: Tensor
    at: Tensor
    seen: Tensor | None
    keys: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, segments: Sequence[Segment], tables: tuple[Tensor, Tensor], keys: Tensor, values: Tensor
    ) -> CachedPositions:
        """tables: cos and sin of the first L positions, fp32 [L, E]."""
        device = keys.device
        rows = [s.row for s in segments for _ in range(s.size)]
        places = [i for s in segments for i in range(s.first, s.end)]
        at = torch.tensor(places, device=device)
        cos, sin = (table[at].view(1, 1, len(places), -1) for table in tables)
        seen = None
        if _are_single(segments) and len({s.end for s in segments}) > 1:
            longest = max(s.end for s in segments)
            # rows in between that have no new token attend to something too, as nothing would give NaN
            ends = [1] * (segments[-1].row - segments[0].row + 1)
            for s in segments:
                ends[s.row - segments[0].row] = s.end
            counted = torch.tensor(ends, device=device).view(-1, 1, 1)
            seen = torch.arange(longest, device=device) < counted
        return cls(cos, sin, tuple(segments), torch.tensor(rows, device=device), at, seen, keys, values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention [1, N, H * E] of q [1, H, N, E] to what was before, and to k, v [1, K, N, E]."""
        for kept, new in ((self.keys, k), (self.values, v)):
            kept[self.rows, :, self.at] = new[0].transpose(0, 1)
        if _are_single(self.segments):
            return self._attend_singly(q).flatten(2)
        found, start = [], 0
        for segment in self.segments:
            part = slice(start, start + segment.size)
            start += segment.size
            found.append(self._attend_in(segment, q[:, :, part], k[:, :, part], v[:, :, part]))
        return torch.cat(found, dim=2).transpose(1, 2).flatten(2)

    def _attend_in(self, segment: Segment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, H, n, E] of the n tokens of one segment."""
        if not segment.first:
            grouped = k.shape[1] != q.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        row, end = slice(segment.row, segment.row + 1), segment.end
        seen = None
        if segment.size > 1:
            places = torch.arange(end, device=q.device)
            seen = (places <= places[segment.first :].unsqueeze(1)).unsqueeze(0)
        return _masked(q, self.keys[row, :, :end], self.values[row, :, :end], seen)

    def _attend_singly(self, q: Tensor) -> Tensor:
        """[1, N, H, E] of one token in each segment: all rows at once, in the memory where they are."""
        first, longest = self.segments[0].row, max(s.end for s in self.segments)
        between = self.segments[-1].row - first + 1
        queries, own = q[0].transpose(0, 1).unsqueeze(2), None  # [N, H, 1, E]
        if between > len(self.segments):
            own = self.rows - first
            queries = queries.new_zeros(between, *queries.shape[1:]).index_copy_(0, own, queries)
        rows = slice(first, first + between)
        found = _masked(queries, self.keys[rows, :, :longest], self.values[rows, :, :longest], self.seen)
        return (found if own is None else found[own]).squeeze(2).unsqueeze(0)


def _are_single(segments: Sequence[Segment]) -> bool:
    """Whether each has one token."""
    return all(s.size == 1 for s in segments)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention [B, H, T, E] of q [B, H, T, E] to those of k, v [B, K, L, E] that are seen, bool [B or 1, T,
    L], or all. Heads that share keys are further rows of queries, so that no key is copied for each."""
    groups = q.shape[1] // k.shape[1]
    rows = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    mask = None if seen is None else seen.repeat(1, groups, 1).unsqueeze(1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)
