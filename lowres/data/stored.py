"""The shards of one kind in a prepared folder, each opened and verified when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lowres.data.hashes import read_hashes
from lowres.data.manifest import Entry, hash_of
from lowres.data.shards import Shard

# data larger than this is not checked before the first step, as the user would wait too long
VERIFY_AT_ONCE_BYTES = 4 << 30


class Stored:
    """entries: from the manifest; those of a stream become more. vocab_size: of the words of the shards."""

    def __init__(self, folder: Path, vocab_size: int, entries: Callable[[], list[Entry]]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._entries = entries
        self._open: dict[int, Shard] = {}

    def fingerprint(self) -> str:
        """Changes with the tokens."""
        return hash_of([entry.crc32 for entry in self._entries()])

    def hashes(self) -> Iterator[np.ndarray]:
        return read_hashes(self._folder, self._entries())

    def lengths(self) -> list[int]:
        return [entry.tokens for entry in self._entries()]

    def tokens(self, i: int) -> int:
        return self._entries()[i].tokens

    def verify_if_small(self) -> None:
        if sum(self.lengths()) * 4 < VERIFY_AT_ONCE_BYTES:
            for i in range(len(self._entries())):
                self.shard(i)

    def shard(self, i: int) -> Shard:
        if i not in self._open:
            entry = self._entries()[i]
            self._open[i] = Shard(
                self._folder / entry.file, self._vocab_size, tokens=entry.tokens, crc32=entry.crc32
            )
        return self._open[i]

    def head(self, count: int | None) -> np.ndarray:
        """int64: the first `count` tokens of the shards in order (None: all)."""
        parts: list[np.ndarray] = [np.empty(0, np.int64)]
        for i in range(len(self._entries())):
            left = None if count is None else count - sum(map(len, parts))
            if left == 0:
                break
            parts.append(self.shard(i).read(0, left).astype(np.int64))
        return np.concatenate(parts)
