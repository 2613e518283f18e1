"""A step on a GPU that is full: the same work in smaller pieces.

A piece is a range of a batch that is processed together: sequences (a micro-batch), or tokens whose loss is
computed together. The plan chooses their size so that everything fits, but another program may take memory
later. Then the piece that failed and all that follow are halved, and the run goes on.

Work that changes nothing before it ends is repeated as a whole (`Size.again`). Work on the gradients of a
layer goes on from the piece that failed (`Size.each`). This piece may have added its part to some of the
gradients before it failed; `Additions` knows to which.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lowres.rooms import is_out_of_memory, place
from lowres.target import chunks

R = TypeVar("R")


class Size:
    """How much of a batch a piece is. number: of sequences or tokens, at most. fixed: lack of memory is an
    error, as in a rehearsal. It also is if a piece is one sequence or token."""

    def __init__(self, number: int) -> None:
        self.number, self.fixed = number, False

    def again(self, total: int, work: Callable[[], R]) -> R:
        """The result of work on `total` items, which reads `number` and changes nothing if it fails."""
        while True:
            try:
                return work()
            except Exception as error:
                self._halve(min(self.number, total), error)
            # now that the error no longer holds what the work had in memory
            torch.cuda.empty_cache()

    def each(self, total: int, work: Callable[[slice], None]) -> None:
        """Call work for the pieces of `total` items, in order. If it fails, its piece must be as it was,
        except for `Additions`."""
        pieces = deque(chunks(total, self.number))
        while pieces:
            piece = pieces[0]
            try:
                work(piece)
            except Exception as error:
                self._halve(piece.stop - piece.start, error)
            else:
                pieces.popleft()
                continue
            torch.cuda.empty_cache()
            pieces = deque(part for piece in pieces for part in _cut(piece, self.number))

    def _halve(self, failed: int, error: Exception) -> None:
        """Raises the error if smaller pieces do not help against it. failed: items of the piece."""
        if self.fixed or failed == 1 or not is_out_of_memory(error):
            raise error
        self.number = failed // 2


def _cut(piece: slice, size: int) -> list[slice]:
    return [slice(i, min(i + size, piece.stop)) for i in range(piece.start, piece.stop, size)]


class Additions:
    """Which items of a batch each gradient buffer has the gradient of, so that nothing is added twice.

    Pieces come in order, so this is one number for every buffer: how many items it has. A piece whose end is
    not above it was added before another part of the same piece, or of a larger one around it, failed.

    end: of the piece at work. While it is None, nothing is repeated, and all is added.
    """

    def __init__(self) -> None:
        self.end: int | None = None
        self._added: dict[tuple[int, int], int] = {}

    def begin(self) -> None:
        """All buffers are zero."""
        self._added.clear()

    def lacks(self, buffer: Tensor) -> bool:
        """Whether the gradient of the piece must be added to a buffer."""
        return self.end is None or self._added.get(place(buffer), 0) < self.end

    def done(self, buffer: Tensor) -> None:
        """It was added, in one operation: if that runs out of memory, it has added nothing."""
        if self.lacks(buffer) and self.end is not None:
            self._added[place(buffer)] = self.end

    def collect(self, leaf: Tensor, buffer: Tensor) -> None:
        """Let autograd add the gradient of a leaf to a buffer."""
        leaf.requires_grad_().grad = buffer  # autograd adds to an existing .grad in place
        leaf.register_hook(lambda grad: None if self.lacks(buffer) else torch.zeros_like(grad))
        leaf.register_post_accumulate_grad_hook(lambda _: self.done(buffer))
