"""Decontamination: which documents of an evaluation share n words in a row with the training text.

Words are compared in lower case and without punctuation; a Chinese or Japanese character is a word. Of chats
and pairs, it is the text of the messages that is compared, whatever the role. The training text goes by once;
what is kept is 8 bytes for each different n-gram of the evaluation, and its words. N-grams are compared by a
hash of 64 bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lowres.data.chat.records import BadRow, parse, shared
from lowres.progress import Bar
from lowres.text import TRAIN, Marks, Source, numbered_documents
from lowres.text.documents import places
from lowres.text.listing import part_to_evaluate
from lowres.text.source import TEXT
from lowres.wording import counted

_SINGLE = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
_SPACE = re.compile(r"\s")
_PIECE = 1 << 20  # characters of a text whose words are in memory
_EXAMPLES = 5
# of a document's words; Tulu 3 takes a document with more in shared n-grams for contaminated
_MUCH = 0.5


@dataclass
class Overlap:
    """documents: of the evaluation. short: those of fewer than n words, which can share nothing. shared:
    those with a shared n-gram. mostly: those with more than half of their words in shared n-grams. bad_rows:
    that are no chats or pairs, of both sources. examples: place and n-gram of the first that are shared."""

    ngram: int
    train_documents: int = 0
    documents: int = 0
    short: int = 0
    shared: int = 0
    mostly: int = 0
    bad_rows: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.shared / max(1, self.documents)}

    def lines(self) -> list[str]:
        def share(count: int) -> str:
            return f"{count:,} ({count / max(1, self.documents):.2%})"

        made = [
            f"{share(self.shared)} of {self.documents:,} evaluation documents share {self.ngram} words in a "
            f"row with one of {self.train_documents:,} training documents",
            f"{share(self.mostly)} have more than half of their words in such n-grams",
        ]
        if self.short:
            made.append(f"{share(self.short)} have fewer than {self.ngram} words, so they cannot share any")
        if self.bad_rows:
            made.append(f"{counted(self.bad_rows, 'row')} without chats or pairs, which were not compared")
        return made + [f'example: {place}: "{text}"' for place, text in self.examples]


def overlap(train: Source, evaluation: Source, ngram: int, progress: bool) -> Overlap:
    """Compare two sources of text, chats or pairs. Of the evaluation: its own validation split, or all.
    Raises UserError."""
    found = Overlap(ngram)
    part = TRAIN if evaluation.on_hub else part_to_evaluate(evaluation)
    grams = _Grams((_words(text) for _, text in _documents(evaluation, part, Marks(), found)), ngram)
    found.bad_rows = 0  # they are read again
    with Bar("comparing", "chars", shown=progress) as bar:
        for _, text in _documents(train, TRAIN, Marks(), found):
            found.train_documents += 1
            bar.update(len(text))
            for words in _pieces(text, ngram):
                grams.meet(words)
    marks = Marks()
    place = places(evaluation, part, marks)
    for row, text in _documents(evaluation, part, marks, found):
        words = _words(text)
        found.documents += 1
        found.short += len(words) < ngram
        at = grams.met_in(words)
        if not len(at):
            continue
        found.shared += 1
        covered = np.zeros(len(words), bool)
        for i in range(ngram):
            covered[at + i] = True
        found.mostly += bool(covered.mean() > _MUCH)
        if len(found.examples) < _EXAMPLES:
            first = int(at[0])
            found.examples.append((place(row), " ".join(words[first : first + ngram])))
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _pieces(text: str, ngram: int) -> Iterator[list[str]]:
    """The words of a text, which may be large, in pieces that share n - 1 words."""
    start, before = 0, list[str]()
    while start < len(text):
        space = _SPACE.search(text, start + _PIECE)
        end = space.end() if space else len(text)
        words = before + _words(text[start:end])
        yield words
        start, before = end, words[max(0, len(words) - ngram + 1) :]


def _documents(source: Source, part: str, marks: Marks, found: Overlap) -> Iterator[tuple[int, str]]:
    """(row, text that is compared) of every document."""
    for row, text in numbered_documents(source, part=part, marks=marks):
        try:
            yield row, _text_of(text, source.form)
        except BadRow:
            found.bad_rows += 1


def _text_of(document: str, form: str) -> str:
    """The text that is compared. Raises BadRow."""
    if form == TEXT:
        return document
    first, *other = parse(document, form)
    messages = first + (other[0][shared([first, other[0]]) :] if other else [])
    return "\n".join(message["content"] for message in messages)


class _Grams:
    """The n-grams of some documents, and which of them were met elsewhere."""

    def __init__(self, documents: Iterator[list[str]], ngram: int) -> None:
        self._ngram, self._number = ngram, dict[str, int]()
        factors = _mixed(np.arange(ngram, dtype=np.uint64)) | np.uint64(1)
        self._factors = list(factors)
        hashes = [np.empty(0, np.uint64)]
        for words in documents:
            if len(words) >= ngram:
                for word in words:
                    self._number.setdefault(word, len(self._number))
                hashes.append(self._hashes(words)[1])
        self._sorted = np.unique(np.concatenate(hashes))
        self._met = np.zeros(len(self._sorted), bool)

    def meet(self, words: list[str]) -> None:
        """Note which of the n-grams are in another document."""
        _, hashes = self._hashes(words)
        at, there = self._find(hashes)
        self._met[at[there]] = True

    def met_in(self, words: list[str]) -> np.ndarray:
        """int64: where in one of the documents the n-grams begin that were met."""
        begin, hashes = self._hashes(words)
        at, there = self._find(hashes)
        begin, at = begin[there], at[there]
        return begin[self._met[at]]

    def _find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each would be among the n-grams, and whether it is there."""
        at = np.searchsorted(self._sorted, hashes)
        there = np.zeros(len(at), bool)
        inside = at < len(self._sorted)
        there[inside] = self._sorted[at[inside]] == hashes[inside]
        return at, there

    def _hashes(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(where they begin, uint64 hash) of the n-grams of which all words are known."""
        numbers = np.array([self._number.get(word, -1) for word in words], np.int64)
        if len(numbers) < self._ngram:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        unknown = np.concatenate(([0], np.cumsum(numbers < 0)))
        begin = np.flatnonzero(unknown[self._ngram :] == unknown[: -self._ngram])
        values = _mixed(numbers.astype(np.uint64))
        hashes = np.zeros(len(begin), np.uint64)
        for i, factor in enumerate(self._factors):
            hashes += values[begin + i] * factor
        return begin, hashes


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64: numbers that look random (the finaliser of splitmix64)."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
