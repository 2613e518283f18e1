"""Chats, or pairs of answers, as batches: a pure function of (seed, step) over prepared shards.

A sequence of a step is a document, a chat or a pair, and has the number g = step * sequences + i, plus an
offset if the batch size of the run has changed: in epoch g div n it is document permutation(epoch)[g mod n]
of all n. So each comes once per epoch, and a run has no position to save. The examples of a step (one for a
chat, two for a pair) are packed into as few windows as best fit gives; so their number varies from step to
step. They do not see each other, so the packing changes nothing of what is computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowres.data.base import Data
from lowres.data.batches import BEGINS, IGNORED, ONLY_READ
from lowres.data.chat import encoder
from lowres.data.chat.packing import pack
from lowres.data.folder import OF_TRAINING, OF_VALIDATION, left_out_notes
from lowres.data.manifest import Complete, Entry, hash_of, read_complete, recorded_tokenizer
from lowres.data.shards import AGAIN
from lowres.data.stored import Stored
from lowres.errors import UserError
from lowres.rng import make_key, permutation
from lowres.text.source import PAIRS

# steps of an epoch from which the share of padding is known well enough
_LOOKED_AT = 64


class Packed(NamedTuple):
    """windows: int64 [windows, seq_len + 1], see `batches`; what is left is IGNORED. The rest are of the
    examples in the order in which they stand there, by window and then by position. order: int64 [examples],
    the number of each among those of the documents that were packed: of a chat its place, and of the pair in
    place i 2 * i for the chosen and 2 * i + 1 for the rejected answer. examples: int64 [examples], the same
    number among all stored examples."""

    windows: Tensor
    order: Tensor
    examples: Tensor


class ChatData(Data):
    """Training and validation examples of a prepared folder. `pairs`: whether they are pairs.

    validation_folder: a prepared folder; all its chats replace the held-out ones.
    """

    def __init__(self, folder: Path, seq_len: int, seed: int, validation_folder: Path | None = None) -> None:
        manifest = read_complete(folder)
        assert manifest.arguments.chats is not None
        self.folder, self.seq_len = folder, seq_len
        self.pairs = manifest.arguments.chats.form == PAIRS
        self.tokenizer = recorded_tokenizer(folder, manifest)
        self.vocab_size = self.tokenizer.vocab_size
        self._train = _Examples(folder, manifest, manifest.train)
        if validation_folder is None:
            self._validation = _Examples(folder, manifest, manifest.val)
        else:
            self._validation = _all_of(validation_folder)
        form = manifest.arguments.chats.form
        if not self._train.documents:
            raise UserError(_nothing("data.source", f"no {form} are left to train on", manifest))
        if not self._validation.documents:
            where, of = manifest, OF_VALIDATION
            if validation_folder is not None:
                where, of = read_complete(validation_folder), OF_TRAINING
            raise UserError(_nothing("data.val_source", f"no {form} are left to validate on", where, of))
        chats = manifest.arguments.chats.model_dump()
        self.fingerprint = hash_of(manifest.fingerprint, chats)
        self.validation_fingerprint = hash_of(self._validation.fingerprint, chats)
        self.notes = [
            *manifest.notes,
            f"training: {self._train.documents:,} {form} of {self._train.tokens:,} tokens, "
            f"{self._train.targets:,} of them of answers",
        ]

        # a batch may cross from one epoch into the next
        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            return permutation(make_key(seed, "data order", step=epoch), self._train.documents)

        self._order = order

    @property
    def train_tokens(self) -> int:
        return self._train.tokens

    @property
    def epoch_examples(self) -> int:
        """Sequences in an epoch: chats, or pairs."""
        return self._train.documents

    def epoch(self, reached: int) -> int:
        return self.epoch_examples

    @property
    def validation_answers(self) -> int:
        """How many tokens the answers of the validation data have."""
        return self._validation.targets

    @property
    def validation_examples(self) -> int:
        """The same of the validation data."""
        return self._validation.documents

    def hashes(self, validation: bool = False) -> Iterator[np.ndarray]:
        return (self._validation if validation else self._train).stored.hashes()

    # ---- training

    def documents(self, step: int, sequences: int, offset: int = 0) -> list[int]:
        """The numbers of the chats or pairs of a step, in the order of the folder. See `Data.batch`."""
        first = offset + step * sequences
        places = (divmod(g, self.epoch_examples) for g in range(first, first + sequences))
        return [int(self._order(epoch)[place]) for epoch, place in places]

    def packed(self, step: int, sequences: int, offset: int = 0) -> Packed:
        """The batch of a step, and what is where in it."""
        return self.of_training(self.documents(step, sequences, offset))

    def batch(self, step: int, sequences: int, offset: int = 0) -> Tensor:
        """int64 [windows, seq_len + 1] with all examples of the step; see `Packed`."""
        return self.packed(step, sequences, offset).windows

    def order(self, step: int, sequences: int, offset: int = 0) -> Tensor:
        """int64 [examples]: which example of the step is where in its windows; see `Packed`. Nothing is
        read."""
        return self._train.placed(self.documents(step, sequences, offset), self.seq_len).order

    def of_training(self, documents: Sequence[int]) -> Packed:
        """Chats or pairs by their numbers in the folder, packed together."""
        return self._train.packed(documents, self.seq_len)

    # ---- validation

    def validation(self, max_tokens: int) -> Tensor:
        """int64 [windows, seq_len + 1]: so many of the first chats or pairs that they have at most
        `max_tokens` tokens (0: all), but at least one."""
        return self.of_validation(self.validation_documents(max_tokens)).windows

    def validation_documents(self, max_tokens: int) -> list[int]:
        """The numbers of the chats or pairs in `validation`."""
        return self._validation.first(max_tokens)

    def of_validation(self, documents: Sequence[int]) -> Packed:
        """As `of_training`, of the validation data."""
        return self._validation.packed(documents, self.seq_len)

    # ---- padding

    def padding(self, sequences: int) -> tuple[float, float]:
        """(windows in a step, share of padding in them), on average over the first steps of an epoch."""
        steps = range(min(_LOOKED_AT, -(-self.epoch_examples // sequences)))
        windows = tokens = 0
        for step in steps:
            placed = self._train.placed(self.documents(step, sequences), self.seq_len)
            windows += len(placed.windows)
            tokens += placed.tokens
        return windows / len(steps), 1 - tokens / (windows * self.seq_len)

    def close(self) -> None:
        pass


def all_packed(folder: Path, seq_len: int, max_tokens: int = 0) -> Packed:
    """The chats or pairs of a prepared folder: all, or the first of so many tokens. Raises UserError without
    any."""
    examples = _all_of(folder)
    if not examples.documents:
        manifest = read_complete(folder)
        raise UserError(_nothing(manifest.arguments.source, "nothing in it can be evaluated", manifest))
    return examples.packed(examples.first(max_tokens), seq_len)


def _nothing(what: str, problem: str, manifest: Complete, of: str = OF_TRAINING) -> str:
    """An error on data without an example, with what was left out of it."""
    because = "; ".join(left_out_notes(manifest, of))
    return f"{what}: {problem}{because and f' ({because})'}; give more of them, or a larger data.seq_len"


def padding_of(windows: Tensor) -> float:
    """The share of padding in windows of a batch."""
    return (windows[:, :-1] == IGNORED).double().mean().item()


def _all_of(folder: Path) -> _Examples:
    manifest = read_complete(folder)
    return _Examples(folder, manifest, manifest.train + manifest.val)


class _Placed(NamedTuple):
    """windows: for each, the numbers of its examples among all stored ones. order: see `Packed`. tokens: of
    all examples."""

    windows: list[list[int]]
    order: Tensor
    tokens: int


class _Examples:
    """The examples of a prepared folder, and where they begin: one of each chat, two of each pair."""

    def __init__(self, folder: Path, manifest: Complete, entries: list[Entry]) -> None:
        assert manifest.arguments.chats is not None
        self._each = each = 2 if manifest.arguments.chats.form == PAIRS else 1
        self.stored = Stored(folder, encoder.words_of(manifest.vocab_size), lambda: entries)
        self.fingerprint = self.stored.fingerprint()
        self._firsts = list(accumulate(self.stored.lengths(), initial=0))
        self.tokens, self.targets = self._firsts[-1], 0
        found = [np.empty(0, np.int64)]
        for shard, first in enumerate(self._firsts[:-1]):
            words = self.stored.shard(shard).read()
            found.append(np.flatnonzero(encoder.begins(words)) + first)
            self.targets += int(encoder.targets(words).sum())
        # int64 [examples + 1]: where each begins, counted from the first word, and at last the end
        self._begins = np.concatenate([*found, [self.tokens]])
        self.documents = (len(self._begins) - 1) // each
        if self._begins[0] != 0 or self.documents * each != len(self._begins) - 1:
            raise UserError(f"{folder}: damaged: its examples are not where they should be; {AGAIN}")

    def ends(self) -> np.ndarray:
        """int64 [documents]: how many tokens there are up to the end of each."""
        return self._begins[self._each :: self._each]

    def first(self, max_tokens: int) -> list[int]:
        """The numbers of the documents up to so many tokens (0: all), at least one."""
        ends = self.ends()
        count = int(np.searchsorted(ends, max_tokens, side="right")) if max_tokens else len(ends)
        return list(range(max(1, count)))

    def placed(self, documents: Sequence[int], seq_len: int) -> _Placed:
        numbers = [self._each * document + i for document in documents for i in range(self._each)]
        lengths = [int(self._begins[number + 1] - self._begins[number]) for number in numbers]
        windows = pack(lengths, seq_len)
        order = torch.tensor([i for window in windows for i in window], dtype=torch.int64)
        return _Placed([[numbers[i] for i in window] for window in windows], order, sum(lengths))

    def packed(self, documents: Sequence[int], seq_len: int) -> Packed:
        placed = self.placed(documents, seq_len)
        windows = np.full((len(placed.windows), seq_len + 1), IGNORED, np.int64)
        for row, numbers in zip(windows, placed.windows, strict=True):
            words = np.concatenate([self._words(number) for number in numbers])
            flags = np.where(encoder.only_read(words), ONLY_READ, 0) | np.where(
                encoder.begins(words), BEGINS, 0
            )
            row[: len(words)] = encoder.ids(words) | flags
        examples = torch.tensor([n for window in placed.windows for n in window], dtype=torch.int64)
        return Packed(torch.from_numpy(windows), placed.order, examples)

    def _words(self, number: int) -> np.ndarray:
        """The words of an example, which may go on in the next shard."""
        start, end = int(self._begins[number]), int(self._begins[number + 1])
        shard = bisect_right(self._firsts, start) - 1
        parts = []
        while start < end:
            words = self.stored.shard(shard).read(start - self._firsts[shard], end - start)
            parts.append(words)
            start += len(words)
            shard += 1
        return np.concatenate(parts)
