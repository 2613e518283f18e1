"""Documents that share a sequence and do not see each other: where they are, and how a block computes.

Attention is causal inside a document and positions restart with it, so a packed sequence gives the same
numbers as its documents one by one. Whoever packs says where documents start (`Starts`); everything below
needs only their lengths, which are known on the host, so nothing waits for the device and no mask exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# tokens in each document of a sequence, in order
Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Starts:
    """where: bool [S, T] for tokens int64 [S, T], where a document starts. The first token of a sequence
    always starts one, or a part of one that was cut. predicted: whether the first token of a document is a
    target of the one before, which it ends."""

    where: Callable[[Tensor], Tensor]
    predicted: bool = False


def starting_with(token: int, predicted: bool = False) -> Starts:
    """Documents that begin with this token."""
    return Starts(lambda tokens: tokens == token, predicted)


def lengths_of(starts: Tensor) -> list[Lengths]:
    """Lengths of the documents of each sequence; starts: bool [S, T], on the host."""
    found = []
    for row in starts:
        borders = [0, *(row[1:].nonzero().flatten() + 1).tolist(), len(row)]
        found.append(tuple(end - start for start, end in itertools.pairwise(borders)))
    return found


class Positions(NamedTuple):
    """Where the tokens of x [B, T, D] are. cos, sin: of the rotary embedding, fp32 [T, E], the same for every
    sequence; or [B, 1, T, E]. lengths: of the documents of all sequences; None if each is one document."""

    cos: Tensor
    sin: Tensor
    lengths: Lengths | None = None

    def within(self, documents: Sequence[Lengths] | None) -> Positions:
        """Positions in these documents, those of each of B sequences; these here are the positions in one
        that is as long as a sequence."""
        if documents is None:
            return self
        lengths = tuple(itertools.chain(*documents))
        shape = len(documents), 1, -1, self.cos.shape[-1]
        cos, sin = (torch.cat([table[:n] for n in lengths]).view(shape) for table in self[:2])
        return Positions(cos, sin, lengths)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attend`."""
        return attend(q, k, v, self.lengths)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None) -> Tensor:
    """Causal attention [B, T, H * E] of q [B, H, T, E] to k and v [B, K, T, E], inside documents."""
    t, grouped = q.shape[2], k.shape[1] != q.shape[1]
    if lengths is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return y.transpose(1, 2).reshape(len(q), t, -1)
    # a document at a time: a mask costs the whole square of a sequence, and its memory
    rows = (_in_a_row(x).split(lengths, dim=2) for x in (q, k, v))
    found = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped).transpose(1, 2)
        for a, b, c in zip(*rows, strict=True)
    ]
    return torch.cat(found, dim=1).view(len(q), t, -1)


def _in_a_row(x: Tensor) -> Tensor:
    """x [B, H, T, E] as one sequence [1, H, B * T, E]; a view of what is [B, T, H, E] in memory."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)
