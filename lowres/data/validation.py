"""Which text is the validation data, decided in the first pass over a source.

1. The documents of the source's own validation split, if it has one: up to OWN_CHARS, so much of each of its
   files that none has much more than another.
2. Else whole documents are held out of training, at most 5 % of the text and at most VAL_CHARS. From local
   files these are the documents with the lowest content hashes: a random choice that stays the same when
   documents are added, moved or prepared again. From a stream these are the first documents.
3. If too few documents are small enough for that, the ends of the largest ones.

A chat is whole or not there: then it is 2., with at least one where there are two.

Every document is here by its content hash, so copies of it are known.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from lowres.data.hashes import content_hash
from lowres.errors import UserError
from lowres.text import VALIDATION, Source, without_surrogates
from lowres.text.documents import Skipped, files_of, rows_of
from lowres.text.source import TEXT
from lowres.wording import counted

# whether a document is what it should be; its place, for messages
Accepts = Callable[[str, Callable[[], str]], bool]
VAL_CHARS = 4_000_000
VAL_PART = 0.05
OWN_CHARS = 16_000_000
VAL_SOURCE = "data.val_source"
# the loss of so many tokens is known to about 0.01 nats (a token's varies by 2 to 3)
FEW_TOKENS = 50_000
# ... and of so many to about 0.1 nats, which hides what most settings change
TOO_FEW_TOKENS = 1000
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
    what: for the user. own_split: whether they are from the source's own validation split. places: where the
    texts are, for messages."""

    texts: list[str]
    hashes: list[int]
    ends: dict[int, int]
    what: str
    own_split: bool = False
    places: list[str] = field(default_factory=list)

    @property
    def held_out(self) -> HeldOut:
        return HeldOut(frozenset(self.hashes), self.ends)


class _Document(NamedTuple):
    """place: for messages."""

    hash: int
    text: str
    place: str


class Choice:
    """Chooses 2. or 3. while the documents go by. form: see `Source`."""

    def __init__(self, stream: bool, form: str = TEXT) -> None:
        self._stream, self._form, self._whole = stream, form, form != TEXT
        # (-key, hash, text, row): the highest key on top
        self._heap: list[tuple[int, int, str, int]] = []
        self._hashes: set[int] = set()
        self._size = 0
        self._ends = _Ends()

    def add(self, row: int, hash: int, text: str) -> None:
        if not self._whole:
            self._ends.add(row, hash, text)
        if len(text) > VAL_CHARS or hash in self._hashes:
            return
        heapq.heappush(self._heap, (-(row if self._stream else hash), hash, text, row))
        self._hashes.add(hash)
        self._size += len(text)
        while self._size > _CANDIDATE_CHARS:
            _, hash, text, _ = heapq.heappop(self._heap)
            self._hashes.remove(hash)
            self._size -= len(text)

    def made(self, characters: int, place: Callable[[int], str]) -> Validation:
        """characters: of all documents. place: of a row, for messages."""
        left = room = min(VAL_CHARS, int(VAL_PART * characters))
        chosen: dict[int, str] = {}
        places: list[str] = []
        for _, hash, text, row in sorted(self._heap, reverse=True):
            if len(text) <= left or (self._whole and not chosen and len(self._heap) > 1):
                chosen[hash] = text
                left -= len(text)
                if self._whole:
                    places.append(place(row))
        if self._whole:
            what = f"{len(chosen):,} {self._form} held out"
            return Validation([*chosen.values()], [*chosen], {}, what, places=places)
        if len(chosen) >= _LEAST_DOCUMENTS and room - left >= _LEAST_FILLED * room:
            return Validation(
                [*chosen.values()], [*chosen], {}, f"{counted(len(chosen), 'document')} held out"
            )
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


def own_split(source: Source, skipped: Skipped, accepts: Accepts | None = None) -> Validation | None:
    """The documents of the source's own validation split; None if there is none with text. accepts: of chats,
    which are taken whole."""
    files = files_of(source, VALIDATION)
    kept: list[list[_Document]] = []
    sizes: list[int] = []
    cut, bad = False, 0
    for i, file in enumerate(files):
        kept.append([])
        sizes.append(0)
        for number, row in enumerate(rows_of(file, source, skipped), 1):
            if not row or row.isspace():
                continue
            text, place = without_surrogates(row), f"{file.path} row {number:,}"
            if accepts and not accepts(text, partial(str, place)):
                bad += 1
                continue
            kept[i].append(_Document(content_hash(text), text, place))
            sizes[i] += len(text)
            while sum(sizes) > OWN_CHARS:
                cut = True
                largest = max(range(i + 1), key=lambda j: (sizes[j], j))
                excess = sum(sizes) - OWN_CHARS
                sizes[largest] -= _shorten(kept[largest], excess, whole=accepts is not None)
            if cut and sizes[i] >= max(sizes):
                break  # what follows would be taken away again
    documents = [document for of_file in kept for document in of_file]
    if not documents:
        return None
    where = counted(len(files), "file")
    what = f"{len(documents):,} {'documents' if source.form == TEXT else source.form} of the source's own "
    what += f"validation split ({where})" + (f" without {counted(bad, 'bad row')}" if bad else "")
    if cut:
        what += f", which is longer: the first {sum(sizes):,} characters are taken, spread over its files"
    hashes, texts, places = (list(column) for column in zip(*documents, strict=True))
    return Validation(texts, hashes, {}, what, own_split=True, places=places)


def _shorten(documents: list[_Document], excess: int, whole: bool) -> int:
    """Take away the last document, or the end of the only one unless it is whole; returns how many
    characters."""
    last = documents.pop()
    if documents or whole:
        return len(last.text)
    documents.append(last._replace(text=last.text[: max(1, len(last.text) - excess)]))
    return len(last.text) - len(documents[0].text)


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


def noise(tokens: int) -> float:
    """To about how many nats the loss of so many tokens is known."""
    return 3 / max(1, tokens) ** 0.5


def too_few(tokens: int) -> str | None:
    """A warning, if the loss of so many validation tokens says next to nothing."""
    if tokens >= TOO_FEW_TOKENS:
        return None
    return (
        f"warning: only {counted(tokens, 'validation token')}, whose loss is known to about "
        f"{noise(tokens):.2f} nats: judge nothing by it; give more text, or set {VAL_SOURCE}"
    )


def size_notes(tokens: int, what: str, kind: str = "tokens") -> list[str]:
    """How large the validation data are, and whether that is little."""
    line = f"validation: {tokens:,} {kind}, {what}"
    if tokens >= FEW_TOKENS:
        return [line]
    return [
        f"{line}; so few that its loss is known to about {noise(tokens):.2f} nats: give more text"
        + ("" if what.startswith("data.") else f", or set {VAL_SOURCE}")
    ]
