"""Documents by a hash of their text: copies are found without keeping any text.

A hash has 64 bits. Two different documents among 100 million share one with a probability of 1 in 3,700.
Beside each shard is a file with the hashes of the documents that begin in it, in their order, each as two
words of a token file (`shards`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lowres.data.manifest import Entry
from lowres.data.shards import Shard, write_shard

_PIECE = 1 << 20
_WORDS = 1 << 32  # the "vocabulary" of a half of a hash
# hashes in a Python set, which takes about 80 bytes for each
_RECENT = 1 << 17


def content_hash(text: str) -> int:
    """64 bits. Takes no copy of a large text."""
    found = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), _PIECE):
        found.update(text[start : start + _PIECE].encode())
    return int.from_bytes(found.digest()[:8], "big")


class Seen:
    """A set of hashes: 8 bytes each, 24 while it is sorted."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def __contains__(self, hash: int) -> bool:
        if hash in self._recent:
            return True
        at = int(self._sorted.searchsorted(np.uint64(hash)))
        return at < len(self._sorted) and int(self._sorted[at]) == hash

    def add(self, hash: int) -> bool:
        """Whether it was not there yet."""
        if hash in self:
            return False
        self._recent.add(hash)
        if len(self._recent) >= _RECENT:
            self.update(np.fromiter(self._recent, np.uint64, len(self._recent)))
            self._recent.clear()
        return True

    def update(self, hashes: np.ndarray) -> None:
        """Add many. hashes: uint64 [documents]"""
        self._sorted = np.concatenate([self._sorted, hashes])
        self._sorted.sort()


def common(hashes: np.ndarray, others: Iterable[np.ndarray]) -> int:
    """How many of the distinct hashes are also among the others."""
    ours = np.unique(hashes)
    found = np.zeros(len(ours), bool)
    for theirs in others:
        found |= np.isin(ours, theirs)
    return int(found.sum())


def write_hashes(out: Path, shard: str, hashes: Sequence[int]) -> int:
    """Write the file beside a shard; returns its CRC-32."""
    return write_shard(out / _name(shard), np.array(hashes, "<u8").view("<u4"), _WORDS)


def read_hashes(folder: Path, shards: Iterable[Entry]) -> Iterator[np.ndarray]:
    """uint64 [documents], for each shard that has hashes: of the documents that begin in it. Raises
    UserError."""
    for entry in shards:
        if entry.hashes is not None:
            file = folder / _name(entry.file)
            words = Shard(file, _WORDS, tokens=2 * entry.documents, crc32=entry.hashes).read()
            yield words.view("<u8")


def _name(shard: str) -> str:
    return str(Path(shard).with_suffix(".hashes"))
