"""Batches: a pure function of (seed, step) over prepared shards. So a run sees each sequence exactly once per
epoch, and has no data position to save or restore.

Training data are windows of seq_len + 1 tokens at a stride of seq_len inside each shard: the last token of a
window, which is only a target there, is the first input of the next window. The batch of a step has the
sequences g = step * sequences + i, plus an offset if the batch size of the run has changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lowres.data.base import Data
from lowres.data.manifest import Complete, hash_of, read_complete, recorded_tokenizer
from lowres.data.stored import Stored
from lowres.data.stream import BlockStream
from lowres.errors import UserError
from lowres.rng import make_key, permutation

if TYPE_CHECKING:
    from lowres.data.tokenised import Corpus, Part

IGNORED = -100  # the default ignore_index of cross entropy in torch
# flags of a token in a window: it is input only; an example begins with it, and sees nothing before
ONLY_READ, BEGINS = 1 << 40, 1 << 41
_IDS = (1 << 40) - 1


class TokenData(Data):
    """Training and validation tokens of a prepared folder, or of a stream.

    `validation_folder`: a prepared folder; all its tokens replace the held-out ones.
    `corpus`: takes the place of a prepared folder. `shuffle_blocks`: of a stream, see the key of [data].
    """

    _train: Stored | Part
    _validation: Stored | Part
    _order: _GlobalOrder | _BlockOrder

    def __init__(
        self,
        folder: Path,
        seq_len: int,
        seed: int,
        validation_folder: Path | None = None,
        stream: BlockStream | None = None,
        corpus: Corpus | None = None,
        shuffle_blocks: int = 1,
    ) -> None:
        self.folder = folder
        self.seq_len = seq_len
        self._stream = stream
        if corpus is not None:
            self._open_corpus(corpus, seed, validation_folder)
            return
        manifest = stream.state if stream else read_complete(folder)
        self.tokenizer = recorded_tokenizer(folder, manifest)
        self.vocab_size = self.tokenizer.vocab_size
        self.notes = list(manifest.notes)
        self._train = Stored(folder, self.vocab_size, lambda: stream.entries if stream else manifest.train)
        if stream:
            # later blocks are unknown, but the arguments and the commit determine them; and their order
            arguments = manifest.arguments.determining() | {"source": None}
            more: dict[str, str | int] = {"commit": manifest.commit} if manifest.commit else {}
            more |= {"shuffle_blocks": shuffle_blocks} if shuffle_blocks > 1 else {}
            self.fingerprint = hash_of(arguments, manifest.tokenizer, *([more] if more else []))
            self._check_length([len(self._train.shard(0))] if stream.has(0) else [])
            self._order = _BlockOrder(stream, self._train, seq_len, seed, shuffle_blocks)
        else:
            assert isinstance(manifest, Complete)
            self.fingerprint = manifest.fingerprint
            self._check_length(self._train.lengths())
            self._order = _GlobalOrder([_windows(n, seq_len) for n in self._train.lengths()], seed)
            self._train.verify_if_small()
        if validation_folder is None:
            self._validation = Stored(folder, self.vocab_size, lambda: manifest.val)
        else:
            self._validation = self._all_of(validation_folder)
        self._validation.verify_if_small()
        self.validation_fingerprint = self._validation.fingerprint()

    def _open_corpus(self, corpus: Corpus, seed: int, validation_folder: Path | None) -> None:
        self.tokenizer, self.notes = corpus.tokenizer, list(corpus.notes)
        self.vocab_size = self.tokenizer.vocab_size
        self.fingerprint = corpus.fingerprint()
        self._train, self._validation = corpus.train, corpus.validation
        if validation_folder is not None:
            self._validation = self._all_of(validation_folder)
            self._validation.verify_if_small()
        self.validation_fingerprint = self._validation.fingerprint()
        self._check_length(self._train.lengths())
        self._order = _GlobalOrder([_windows(n, self.seq_len) for n in self._train.lengths()], seed)

    def _all_of(self, folder: Path) -> Stored:
        """All tokens of a prepared folder."""
        manifest = read_complete(folder)
        return Stored(folder, self.vocab_size, lambda: manifest.train + manifest.val)

    def _check_length(self, shards: list[int]) -> None:
        longest = max(shards, default=0)
        if longest < 3:
            raise UserError(f"data.source: {longest} training tokens are not enough; give it more text")
        if not _windows(longest, self.seq_len):
            raise UserError(
                f"data.seq_len: {self.seq_len} is longer than the data; "
                f"the largest that works is {longest - 1}"
            )

    @property
    def train_tokens(self) -> int | None:
        if self._stream is None:
            return sum(self._train.lengths())
        blocks = self._stream.length()
        return None if blocks is None else sum(len(self._train.shard(i)) for i in range(blocks))

    def epoch(self, reached: int) -> int | None:
        """Sequences in an epoch. Of a stream: waits until it has given so many as `reached`, and is None if
        that is not beyond its end."""
        return self._order.epoch(reached)

    @property
    def is_stream(self) -> bool:
        """Whether its length is not known yet."""
        return self._stream is not None and self._stream.length() is None

    def hashes(self, validation: bool = False) -> Iterator[np.ndarray]:
        """None of token ids."""
        kept = self._validation if validation else self._train
        return kept.hashes() if isinstance(kept, Stored) else iter(())  # ids have no text

    def batch(self, step: int, sequences: int, offset: int = 0) -> Tensor:
        batch = np.empty((sequences, self.seq_len + 1), np.int64)
        for i in range(sequences):
            shard, window = self._order.locate(offset + step * sequences + i)
            batch[i] = self._train.shard(shard).read(window * self.seq_len, self.seq_len + 1)
        return torch.from_numpy(batch)

    def validation(self, max_tokens: int) -> Tensor:
        tokens = torch.from_numpy(self._validation.head(max_tokens + 1 if max_tokens else None))
        return consecutive_windows(tokens, self.seq_len)

    def close(self) -> None:
        if self._stream:
            self._stream.close()


def consecutive_windows(tokens: Tensor, seq_len: int) -> Tensor:
    """int64 [windows, seq_len + 1] of tokens int64 [n], at a stride of seq_len; see `validation`."""
    windows = -(-(len(tokens) - 1) // seq_len) if len(tokens) else 0
    if not windows:
        return torch.empty(0, seq_len + 1, dtype=torch.int64)
    padded = torch.full((windows * seq_len + 1,), IGNORED)
    padded[: len(tokens)] = tokens
    return padded.unfold(0, seq_len + 1, seq_len).contiguous()


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [n, seq_len] twice, from int64 [n, seq_len + 1]: ids, and what each should be followed by.

    Where a target is IGNORED, the input may be padding too. It becomes 0, which is a valid id. No counted
    target depends on it, because padding is only at the end. A token with a flag is no target.
    """
    targets = windows[:, 1:]
    return ids_in(windows[:, :-1]), targets.masked_fill(targets > _IDS, IGNORED)


def count_targets(windows: Tensor) -> int:
    """How many tokens of windows are predicted."""
    return int((inputs_and_targets(windows)[1] != IGNORED).sum())


def ids_in(windows: Tensor) -> Tensor:
    """The ids of the words of windows, without flags; 0 for padding."""
    return windows.clamp(min=0) & _IDS


def _windows(tokens: int, seq_len: int) -> int:
    return max(0, tokens - 1) // seq_len


class _GlobalOrder:
    """Finite data: sequence g is window permutation(epoch)[g mod n] of all n, epoch = g div n."""

    def __init__(self, windows: list[int], seed: int) -> None:
        self._starts = list(accumulate(windows, initial=0))
        count = self._starts[-1]

        # a batch may cross from one epoch into the next
        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            return permutation(make_key(seed, "data order", step=epoch), count)

        self._order = order

    def epoch(self, reached: int) -> int:
        return self._starts[-1]

    def locate(self, sequence: int) -> tuple[int, int]:
        """(shard, window in it)"""
        epoch, place = divmod(sequence, self._starts[-1])
        window = int(self._order(epoch)[place])
        shard = bisect_right(self._starts, window) - 1
        return shard, window - self._starts[shard]


class _BlockOrder:
    """A stream: the windows of each block are dealt at random into `spread` parts. Slot s, a stretch of the
    run, has part k of block s - k for all k < spread, in a random order.

    So a block is mixed with its neighbours on both sides, no window waits for a later block, and the first
    slots are shorter instead of waiting for `spread` blocks. When the stream has ended, the last slots are
    what is left; then all blocks are one finite set of data.
    """

    def __init__(self, stream: BlockStream, blocks: Stored, seq_len: int, seed: int, spread: int) -> None:
        self._stream = stream
        self._blocks = blocks
        self._seq_len = seq_len
        self._seed = seed
        self._spread = spread
        # windows in every block except the last, which may be shorter
        self._full = _windows(stream.block_tokens, seq_len)
        self._growing = list(accumulate(((s + 1) * self._full // spread for s in range(spread)), initial=0))

        @lru_cache(maxsize=spread + 1)
        def dealt(block: int) -> Tensor:
            key = make_key(seed, "data order", f"block {block}")
            return permutation(key, self._windows_of(block))

        @lru_cache(maxsize=2)
        def slot(number: int, blocks: int) -> tuple[Tensor, Tensor]:
            return self._slot(number, [b for b in range(number - spread + 1, number + 1) if 0 <= b < blocks])

        self._dealt, self._order = dealt, slot
        self._ended: tuple[list[int], _GlobalOrder] | None = None

    def epoch(self, reached: int) -> int | None:
        slot, _ = self._if_full(max(0, reached - 1))
        if self._is_full(slot):
            return None
        count = self._end()[0][-1]
        return count if reached > count else None

    def locate(self, sequence: int) -> tuple[int, int]:
        """(block, window in it)"""
        slot, place = self._if_full(sequence)
        blocks = slot + 1
        if not self._is_full(slot):
            starts, repeated = self._end()
            if sequence >= starts[-1]:
                return repeated.locate(sequence)
            slot = bisect_right(starts, sequence) - 1
            place = sequence - starts[slot]
            blocks = self._stream.length() or 0
        of_block, of_window = self._order(slot, blocks)
        return int(of_block[place]), int(of_window[place])

    def _if_full(self, sequence: int) -> tuple[int, int]:
        """(slot, place in it), if all blocks up to that slot are full."""
        if sequence < self._growing[-1]:
            slot = bisect_right(self._growing, sequence) - 1
            return slot, sequence - self._growing[slot]
        later, place = divmod(sequence - self._growing[-1], self._full)
        return self._spread + later, place

    def _is_full(self, block: int) -> bool:
        """Wait for the block; if it is short or missing, until the length of the stream is known."""
        if self._stream.has(block) and self._windows_of(block) == self._full:
            return True
        assert not self._stream.has(block + 1)
        return False

    def _slot(self, number: int, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """int64 [windows of the slot] twice: block and window."""
        parts = [self._dealt(block)[slice(*self._part(block, number - block))] for block in blocks]
        windows = torch.cat(parts)
        owners = torch.cat([torch.full_like(part, b) for b, part in zip(blocks, parts, strict=True)])
        if self._spread == 1:
            return owners, windows
        order = permutation(make_key(self._seed, "data order", f"slot {number}"), len(windows))
        return owners[order], windows[order]

    def _part(self, block: int, k: int) -> tuple[int, int]:
        """Where part k of a block begins and ends among its dealt windows."""
        count = self._windows_of(block)
        return k * count // self._spread, (k + 1) * count // self._spread

    def _end(self) -> tuple[list[int], _GlobalOrder]:
        """The first sequence of every slot, and at last how many there are; and the order of what follows."""
        if self._ended is None:
            blocks = self._stream.length()
            assert blocks is not None
            sizes = [0] * (blocks + self._spread - 1)
            for block in range(blocks):
                for k in range(self._spread):
                    first, end = self._part(block, k)
                    sizes[block + k] += end - first
            counts = [self._windows_of(block) for block in range(blocks)]
            self._ended = list(accumulate(sizes, initial=0)), _GlobalOrder(counts, self._seed)
        return self._ended

    def _windows_of(self, block: int) -> int:
        return _windows(self._blocks.tokens(block), self._seq_len)
