"""Which text is the validation data, decided in the first pass over a source.

1. The documents of the source's own validation split, if it has one: up to OWN_CHARS, so much of each of its
   files that none has much more than another.
2. Else whole documents are held out of training, at most 5 % of the text and at most VAL_CHARS. From local
   files these are the documents with the lowest content hashes: a random choice that stays the same when
   documents are added, moved or prepared again. From a stream these are the first documents.
3. If too few documents are small enough for that, the ends of the largest ones.

Every document is here by its content hash, so copies of it are known.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowres.data.hashes import content_hash
from lowres.errors import UserError
from lowres.text import VALIDATION, Source, without_surrogates
from lowres.text.documents import Skipped, files_of, rows_of

VAL_CHARS = 4_000_000
VAL_PART = 0.05
OWN_CHARS = 16_000_000
# the loss of so many tokens is known to about 0.01 nats (a token's varies by 2 to 3)
FEW_TOKENS = 50_000
# with more text than this, VAL_CHARS limits the validation text, so more candidates are not needed
_CANDIDATE_CHARS = int(VAL_CHARS / VAL_PART)
# whole documents that are fewer, or fill less of the room, say little of the others
_LEAST_DOCUMENTS = 4
_LEAST_FILLED = 0.5
_ENDS = 64
# an end that is shorter than so much of the longest one is not worth a document
_LEAST_END = 1 / 20


@dataclass(frozen=True)
class HeldOut:
    """What training must not see: documents by content hash. ends: row -> where its held-out end begins."""

    hashes: frozenset[int] = frozenset()
    ends: dict[int, int] = field(default_factory=dict)

    def training_part(self, row: int, hash: int, text: str) -> str:
        """The part of a document to train on: all, nothing, or the beginning. Copies of a document that is
        held out, even in part, are left out."""
        if row in self.ends:
            return text[: self.ends[row]]
        return "" if hash in self.hashes else text


@dataclass(frozen=True)
class Validation:
    """texts: the validation data. hashes: of the document that each is, or is a part of. ends: see `HeldOut`.
    what: for the user. own_split: whether they are from the source's own validation split."""

    texts: list[str]
    hashes: list[int]
    ends: dict[int, int]
    what: str
    own_split: bool = False

    @property
    def held_out(self) -> HeldOut:
        return HeldOut(frozenset(self.hashes), self.ends)


class Choice:
    """Chooses 2. or 3. while the documents go by."""

    def __init__(self, stream: bool) -> None:
        self._stream = stream
        self._heap: list[tuple[int, int, str]] = []  # (-key, hash, text): the highest key on top
        self._hashes: set[int] = set()
        self._size = 0
        self._ends = _Ends()

    def add(self, row: int, hash: int, text: str) -> None:
        self._ends.add(row, hash, text)
        if len(text) > VAL_CHARS or hash in self._hashes:
            return
        heapq.heappush(self._heap, (-(row if self._stream else hash), hash, text))
        self._hashes.add(hash)
        self._size += len(text)
        while self._size > _CANDIDATE_CHARS:
            _, hash, text = heapq.heappop(self._heap)
            self._hashes.remove(hash)
            self._size -= len(text)

    def made(self, characters: int) -> Validation:
        """characters: of all documents."""
        left = room = min(VAL_CHARS, int(VAL_PART * characters))
        chosen: dict[int, str] = {}
        for _, hash, text in sorted(self._heap, reverse=True):
            if len(text) <= left:
                chosen[hash] = text
                left -= len(text)
        if len(chosen) >= _LEAST_DOCUMENTS and room - left >= _LEAST_FILLED * room:
            return Validation([*chosen.values()], [*chosen], {}, f"{len(chosen):,} documents held out")
        return self._ends.made()


@dataclass
class _End:
    hash: int
    row: int
    length: int
    text: str


class _Ends:
    """The ends of the largest documents, at most 5 % of each, together at most VAL_CHARS."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []  # (length, hash): the smallest on top
        self._of: dict[int, _End] = {}

    def add(self, row: int, hash: int, text: str) -> None:
        if hash in self._of:
            return
        if len(self._heap) == _ENDS and (len(text), hash) < self._heap[0]:
            return
        heapq.heappush(self._heap, (len(text), hash))
        size = max(1, min(int(VAL_PART * len(text)), VAL_CHARS))
        self._of[hash] = _End(hash, row, len(text), text[-size:])
        if len(self._heap) > _ENDS:
            del self._of[heapq.heappop(self._heap)[1]]
        while (excess := sum(len(end.text) for end in self._of.values()) - VAL_CHARS) > 0:
            sizes = sorted(len(end.text) for end in self._of.values())
            longest = [end for end in self._of.values() if len(end.text) == sizes[-1]]
            # down to the next size, or until it fits
            lower = max((size for size in sizes if size < sizes[-1]), default=0)
            less = min(sizes[-1] - lower, -(-excess // len(longest)))
            for end in longest:
                end.text = end.text[less:]

    def made(self) -> Validation:
        longest = max((len(end.text) for end in self._of.values()), default=0)
        kept = [
            self._of[hash] for hash in sorted(self._of) if len(self._of[hash].text) >= _LEAST_END * longest
        ]
        # from the beginning of a line, if one is near
        texts = [end.text[end.text.find("\n", 0, len(end.text) // 2) + 1 :] for end in kept]
        ends = {end.row: end.length - len(text) for end, text in zip(kept, texts, strict=True)}
        largest = "largest document" if len(texts) == 1 else f"{len(texts):,} largest documents"
        what = f"the last {sum(map(len, texts)):,} characters of the {largest}"
        return Validation(texts, [end.hash for end in kept], ends, what)


def own_split(source: Source, skipped: Skipped) -> Validation | None:
    """The documents of the source's own validation split; None if there is none with text."""
    files = files_of(source, VALIDATION)
    kept: list[list[tuple[int, str]]] = []
    sizes: list[int] = []
    cut = False
    for i, file in enumerate(files):
        kept.append([])
        sizes.append(0)
        for text in _texts(rows_of(file, source, skipped)):
            kept[i].append((content_hash(text), text))
            sizes[i] += len(text)
            while sum(sizes) > OWN_CHARS:
                cut = True
                largest = max(range(i + 1), key=lambda j: (sizes[j], j))
                sizes[largest] -= _shorten(kept[largest], sum(sizes) - OWN_CHARS)
            if cut and sizes[i] >= max(sizes):
                break  # what follows would be taken away again
    documents = [document for of_file in kept for document in of_file]
    if not documents:
        return None
    where = f"{len(files):,} file{'s' if len(files) > 1 else ''}"
    what = f"{len(documents):,} documents of the source's own validation split ({where})"
    if cut:
        what += f", which is longer: the first {sum(sizes):,} characters are taken, spread over its files"
    texts, hashes = [text for _, text in documents], [hash for hash, _ in documents]
    return Validation(texts, hashes, {}, what, own_split=True)


def _texts(rows: Iterator[str]) -> Iterator[str]:
    return (without_surrogates(text) for text in rows if text and not text.isspace())


def _shorten(documents: list[tuple[int, str]], excess: int) -> int:
    """Take away the last document, or the end of the only one; returns how many characters."""
    hash, text = documents.pop()
    if documents:
        return len(text)
    documents.append((hash, text[: max(1, len(text) - excess)]))
    return len(text) - len(documents[0][1])


def check_overlap(found: int, documents: int, allowed: float, what: str) -> list[str]:
    """A note on validation documents that are also in the training text. Raises UserError if they are more
    than the allowed share. what: names the two texts."""
    if not found:
        return []
    line = f"{what}: {found:,} of {documents:,} validation documents are also in the training text"
    if found > allowed * documents:
        raise UserError(
            f"{line}, a share of {found / documents:.3g}; give other validation text, or set "
            f"data.max_overlap = {min(1.0, (int(1000 * found / documents) + 1) / 1000):g} to allow it"
        )
    return [line]


def size_notes(tokens: int, what: str) -> list[str]:
    """How large the validation data are, and whether that is little."""
    line = f"validation: {tokens:,} tokens, {what}"
    if tokens >= FEW_TOKENS:
        return [line]
    noise = 3 / max(1, tokens) ** 0.5
    return [
        f"{line}; so few that its loss is known to about {noise:.2f} nats: give more text, or set "
        "data.val_source"
    ]
