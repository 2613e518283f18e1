"""The first pass over a source: choose text to train the tokenizer on, and documents to hold out for
validation.

Local files are read completely, a stream only up to LOOKAHEAD_CHARS. Memory is bounded for any amount of
text.

Whole documents are held out. From local files these are the documents with the lowest content hashes: a
random choice that stays the same when documents are added, moved or prepared again. From a stream these are
the first documents. Together they have at most 5 % of the text and at most VAL_CHARS characters. If no
document is that small, the end of the largest one is held out.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lowres.text import Source, is_stream, numbered_documents

VAL_CHARS = 4_000_000
VAL_PART = 0.05
LOOKAHEAD_CHARS = 20_000_000
SAMPLE_CHARS = 10_000_000
# with more text than this, VAL_CHARS limits the validation text, so more candidates are not needed
_CANDIDATE_CHARS = int(VAL_CHARS / VAL_PART)
_SAMPLE_BLOCK = 4096


def content_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class HeldOut:
    """What training must not see: documents by content hash, and the end of one document."""

    hashes: frozenset[str] = frozenset()
    tail_row: int | None = None
    tail_start: int = 0

    def training_part(self, row: int, text: str) -> str:
        """The part of a document to train on: all, nothing, or (for one document) the beginning. Copies of a
        document that is held out, even in part, are left out."""
        if row == self.tail_row:
            return text[: self.tail_start]
        return "" if self.hashes and content_hash(text) in self.hashes else text


@dataclass(frozen=True)
class Survey:
    """`complete`: the whole source was read. `characters`: how many were read."""

    characters: int
    complete: bool
    sample: list[str]
    held_out: HeldOut
    validation: list[str]
    notes: list[str]


def quiet_bar(progress: bool) -> dict[str, Any]:
    """Options of a progress bar that disappears at the end and is shown only on terminals."""
    return {"disable": None if progress else True, "leave": False}


class EvenSample:
    """Blocks of text, at most `limit` characters, spread evenly over all added text."""

    def __init__(self, limit: int) -> None:
        self.blocks: list[str] = []
        self._limit = limit
        self._size = 0
        self._seen = 0
        self._every = 1

    def add(self, text: str) -> None:
        for start in range(0, len(text), _SAMPLE_BLOCK):
            if self._seen % self._every == 0:
                self.blocks.append(text[start : start + _SAMPLE_BLOCK])
                self._size += len(self.blocks[-1])
            self._seen += 1
            while self._size > self._limit:
                self.blocks = self.blocks[::2]
                self._size = sum(map(len, self.blocks))
                self._every *= 2


class _Candidates:
    """Documents that may become validation data: those with the lowest keys."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str, str]] = []  # (-key, hash, text): the highest key on top
        self._hashes: set[str] = set()
        self._size = 0

    def add(self, key: int, digest: str, text: str) -> None:
        if len(text) > VAL_CHARS or digest in self._hashes:
            return
        heapq.heappush(self._heap, (-key, digest, text))
        self._hashes.add(digest)
        self._size += len(text)
        while self._size > _CANDIDATE_CHARS:
            _, digest, text = heapq.heappop(self._heap)
            self._hashes.remove(digest)
            self._size -= len(text)

    def choose(self, room: int) -> dict[str, str]:
        """hash -> text: in the order of the keys, every document that still fits into `room` characters."""
        chosen = {}
        for _, digest, text in sorted(self._heap, reverse=True):
            if len(text) <= room:
                chosen[digest] = text
                room -= len(text)
        return chosen


def sample(source: Source, limit: int, lookahead: int, progress: bool) -> tuple[list[str], int, bool]:
    """At most `limit` characters of a source, spread evenly over it, how many were read, and whether these
    are all. lookahead: how many characters to read of a stream."""
    found, characters = EvenSample(limit), 0
    with tqdm(desc="sampling", unit=" chars", unit_scale=True, **quiet_bar(progress)) as bar:
        for _, text in numbered_documents(source):
            found.add(text)
            characters += len(text)
            bar.update(len(text))
            if is_stream(source) and characters >= lookahead:
                return found.blocks, characters, False
    return found.blocks, characters, True


def survey(source: Source, hold_out: bool, progress: bool) -> Survey:
    """Read the source. With `hold_out` False, all text is for training."""
    stream = is_stream(source)
    sample, candidates = EvenSample(SAMPLE_CHARS), _Candidates()
    characters, complete = 0, True
    largest_row, largest = -1, ""
    with tqdm(desc="reading", unit=" chars", unit_scale=True, **quiet_bar(progress)) as bar:
        for row, text in numbered_documents(source):
            sample.add(text)
            characters += len(text)
            bar.update(len(text))
            if hold_out:
                digest = content_hash(text)
                candidates.add(row if stream else int(digest, 16), digest, text)
                if len(text) > len(largest):
                    largest_row, largest = row, text
            if stream and characters >= LOOKAHEAD_CHARS:
                complete = False
                break
    held_out, validation, notes = HeldOut(), [], []
    if hold_out:
        chosen = candidates.choose(min(VAL_CHARS, int(VAL_PART * characters)))
        held_out, validation = HeldOut(frozenset(chosen)), list(chosen.values())
        if not chosen:
            start = _tail_start(largest)
            held_out = HeldOut(frozenset([content_hash(largest)]), largest_row, start)
            validation = [largest[start:]]
            notes.append(
                f"no document is small enough to hold out as a whole (5 % of the text): the last "
                f"{len(largest) - start:,} characters of the largest one are the validation data"
            )
    return Survey(characters, complete, sample.blocks, held_out, validation, notes)


def _tail_start(text: str) -> int:
    """Where the held-out end of a document begins: after a newline if one is near."""
    start = max(int((1 - VAL_PART) * len(text)), len(text) - VAL_CHARS)
    return text.rfind("\n", start - len(text) // 20, start) + 1 or start
