"""The first pass over a source: choose text to train the tokenizer on, and validation data (`validation`).

Local files are read completely; a stream, and files of which only some tokens are wanted, as far as that
takes. Memory is bounded for any amount of text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from lowres.data.hashes import content_hash
from lowres.data.validation import Accepts, Choice, Validation, own_split
from lowres.progress import Bar
from lowres.text import Marks, Source, is_stream, list_files, numbered_documents
from lowres.text.documents import Skipped, places
from lowres.text.source import TRAIN, VALIDATION
from lowres.wording import counted

LOOKAHEAD_CHARS = 20_000_000
# a token of ordinary text has 3 to 5
_MOST_CHARS_PER_TOKEN = 8
SAMPLE_CHARS = 10_000_000
_SAMPLE_BLOCK = 4096
_EXAMPLES = 3


@dataclass(frozen=True)
class Survey:
    """`complete`: the whole source was read. `characters`: how many were read. `validation`: None if nothing
    was to be held out. `overlap`: how many documents of the source's own validation split were met in the
    training text. `skipped`: damaged files. `notes`: what is left out of the source."""

    characters: int
    complete: bool
    sample: list[str]
    validation: Validation | None = None
    overlap: int = 0
    skipped: Skipped = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
                # a block alone must not be above the limit: there is no fewer than one
                self.blocks.append(text[start : start + min(_SAMPLE_BLOCK, self._limit)])
                self._size += len(self.blocks[-1])
            self._seen += 1
            while self._size > self._limit:
                self.blocks = self.blocks[::2]
                self._size = sum(map(len, self.blocks))
                self._every *= 2


def sample(source: Source, limit: int, lookahead: int, progress: bool) -> tuple[list[str], int, bool]:
    """At most `limit` characters of a source, spread evenly over it, how many were read, and whether these
    are all. lookahead: how many characters to read of a stream."""
    found, characters = EvenSample(limit), 0
    with Bar("sampling", "chars", shown=progress) as bar:
        for _, text in numbered_documents(source):
            found.add(text)
            characters += len(text)
            bar.update(len(text))
            if is_stream(source) and characters >= lookahead:
                return found.blocks, characters, False
    return found.blocks, characters, True


def survey(
    source: Source,
    hold_out: bool,
    progress: bool,
    part: str = TRAIN,
    max_tokens: int | None = None,
    accepts: Accepts | None = None,
) -> Survey:
    """Read a part of the source. With `hold_out` False, all text is for training. max_tokens: how many will
    be trained on; then not much more is read. accepts: of chats, whether a row is one."""
    stream = is_stream(source)
    limit = LOOKAHEAD_CHARS if stream else None
    if max_tokens is not None and not stream:
        limit = max(LOOKAHEAD_CHARS, _MOST_CHARS_PER_TOKEN * max_tokens)
    skipped, of_split = Skipped(), Skipped()
    own = own_split(source, of_split, accepts) if hold_out and not stream else None
    theirs = own.held_out.hashes if own else frozenset()
    choice = Choice(stream, source.form) if hold_out and not own else None
    sample, met, marks = EvenSample(SAMPLE_CHARS), set[int](), Marks()
    place = places(source, part, marks)
    characters, complete, found, last = 0, True, 0, 0
    with Bar("reading", "chars", shown=progress) as bar:
        for row, text in numbered_documents(source, 0, part, skipped, marks):
            characters += len(text)
            bar.update(len(text))
            found, last = found + 1, row + 1
            if accepts and not accepts(text, partial(place, row)):
                continue
            sample.add(text)
            hash = content_hash(text) if hold_out else 0
            if hash in theirs:
                met.add(hash)
            if choice:
                choice.add(row, hash, text)
            del text  # it may be large, and the next one too
            if limit is not None and characters >= limit:
                complete = False
                break
    validation = choice.made(characters, place) if choice else own
    listed = None if stream else list_files(source)
    notes = listed.warnings() if listed else []
    if listed and listed.part(VALIDATION) and part == TRAIN and not hold_out:
        notes.append("the source's own validation split is not used, as there is another validation text")
    notes += _damaged(skipped | of_split)
    if blank := (marks.rows or last) - found:
        notes.append(f"left out: {counted(blank, 'row')} without text")
    return Survey(characters, complete, sample.blocks, validation, len(met), skipped, notes)


def _damaged(skipped: Skipped) -> list[str]:
    """What data.damaged = "skip" left out, in a line."""
    if not skipped:
        return []
    files = counted(len(skipped), "file is", "files are")
    first = "; ".join([*skipped.values()][:_EXAMPLES])
    more = f"; and {len(skipped) - _EXAMPLES:,} more" if len(skipped) > _EXAMPLES else ""
    return [f"{files} damaged, and left out from there on: {first}{more}"]
