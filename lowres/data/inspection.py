"""What a source holds, before anything is written: documents, tokens and an example of every kind of file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from lowres.config import DataConfig
from lowres.data.opening import given_tokenizer, source_of
from lowres.data.tokenised import count_ids
from lowres.data.tokenizer import Tokenizer
from lowres.errors import UserError
from lowres.text import Listing, documents, is_stream, list_files
from lowres.text.documents import Skipped, no_text, rows_of
from lowres.text.opening import position
from lowres.text.source import TEST, TRAIN, File, Source
from lowres.text.words import Group, groups, left_out, size

# what is read completely, so that its numbers are exact
EXACT_BYTES = 64 << 20
# otherwise so much of so many files, spread over the group
SAMPLE_CHARS = 4_000_000
SAMPLE_FILES = 8
STREAM_DOCUMENTS = 1000
# of English text with a vocabulary of 32,000 pieces
CHARS_PER_TOKEN = 4.0
_EXAMPLE_CHARS = 70


@dataclass
class Count:
    """What a group, or the beginning of a stream, holds. exact: whether it was read to its end."""

    documents: float = 0
    characters: float = 0
    tokens: float = 0
    exact: bool = True
    example: str | None = None

    def add(self, text: str, tokenizer: Tokenizer | None) -> None:
        if not text or text.isspace():
            return
        self.example = self.example or text
        self.documents += 1
        self.characters += len(text)
        self.tokens += 2 + (len(tokenizer.encode(text)) if tokenizer else len(text) / CHARS_PER_TOKEN)


@dataclass(frozen=True)
class Inspection:
    """groups: of a local source. stream: of the first documents of another one."""

    source: str
    groups: list[tuple[Group, Count]]
    stream: Count | None
    left_out: list[str]
    notes: list[str]
    tokens_are_estimated: bool

    def to_json(self) -> dict[str, Any]:
        found = [
            {
                "kind": g.kind,
                "part": g.part,
                "column": g.column,
                "separator": g.separator,
                "files": len(g.files),
            }
            | {"bytes": g.size}
            | asdict(count)
            for g, count in self.groups
        ]
        stream = asdict(self.stream) if self.stream else None
        return {"source": self.source, "groups": found, "stream": stream} | {
            "left_out": self.left_out,
            "notes": self.notes,
            "tokens_are_estimated": self.tokens_are_estimated,
        }

    def lines(self) -> list[str]:
        made = [f"{'part':<11} {'kind':<14} {'files':>7} {'size':>11} {'documents':>14} {'tokens':>16}  text"]
        for g, count in self.groups:
            read = g.part != TEST
            about = "" if count.exact else "~"
            known = count.documents or not count.tokens
            rough = "~" if self.tokens_are_estimated else about
            numbers = (
                (f"{about}{count.documents:,.0f}" if known else "?", f"{rough}{count.tokens:,.0f}")
                if read
                else ("", "")
            )
            made.append(
                f"{g.part:<11} {g.kind:<14} {len(g.files):>7,} {size(g.size):>11} "
                f"{numbers[0]:>14} {numbers[1]:>16}  {g.how if read else 'never read'}"
            )
        made += [f"example ({g.files[0].name}): {_shown(c.example)}" for g, c in self.groups if c.example]
        if self.stream:
            made = [
                f"the first {self.stream.documents:,.0f} documents: "
                f"{self.stream.characters:,.0f} characters, ~{self.stream.tokens:,.0f} tokens",
                f"example: {_shown(self.stream.example)}",
            ]
        if self.left_out:
            made += ["left out:", *(f"  {line}" for line in self.left_out)]
        if self.tokens_are_estimated:
            made.append(f"tokens at {CHARS_PER_TOKEN:g} characters each; data.tokenizer gives exact numbers")
        return made + [f"note: {note}" for note in self.notes]


def inspect(config: DataConfig) -> Inspection:
    """Look at the config's source. Reads everything up to EXACT_BYTES of a kind of file, and samples above.
    Raises UserError for what `train` would refuse."""
    source = source_of(config)
    tokenizer = given_tokenizer(config)
    estimated = tokenizer is None
    if is_stream(source):
        count = Count(exact=False)
        for text in islice(documents(source), STREAM_DOCUMENTS):
            count.add(text, tokenizer)
        return Inspection(source.name, [], count, [], [], estimated)
    listed = list_files(source)
    listed.check()
    if listed.tokens:
        return _of_ids(config, listed, tokenizer)
    skipped: Skipped = {}
    found = [(group, _counted(group, source, tokenizer, skipped)) for group in groups(listed)]
    if all(count.exact and not count.documents for group, count in found if group.part == TRAIN):
        raise UserError(no_text(source))
    out = left_out(listed) + [f"the rest of {error}" for error in skipped.values()]
    return Inspection(source.name, found, None, out, list(listed.notes), estimated)


def _of_ids(config: DataConfig, listed: Listing, tokenizer: Tokenizer | None) -> Inspection:
    """Of a source that is tokenised already: nothing is read but what says how many ids there are."""
    found = list[tuple[Group, Count]]()
    for group in groups(listed):
        count = Count()
        for file in group.files if group.part != TEST else ():
            documents, tokens, first = count_ids(file, config.token_dtype)
            count.documents += documents
            count.tokens += tokens
            count.example = count.example or (tokenizer.decode(first) if tokenizer else str(first)[1:-1])
        found.append((group, count))
    return Inspection(listed.source.name, found, None, left_out(listed), list(listed.notes), False)


def _counted(group: Group, source: Source, tokenizer: Tokenizer | None, skipped: Skipped) -> Count:
    if group.part == TEST:
        return Count()
    if group.size <= EXACT_BYTES:
        count = Count()
        for file in group.files:
            for text in rows_of(file, source, skipped):
                count.add(text, tokenizer)
        return count
    step = -(-len(group.files) // SAMPLE_FILES)
    count, read = Count(exact=False), 0
    for file in group.files[::step]:
        read += _sample(file, source, tokenizer, count)
    whole = group.size / max(1, read)
    return Count(
        count.documents * whole, count.characters * whole, count.tokens * whole, False, count.example
    )


def _sample(file: File, source: Source, tokenizer: Tokenizer | None, count: Count) -> int:
    """Add the beginning of a file to the count; returns how many of its bytes that was."""
    end = count.characters + SAMPLE_CHARS
    for text in rows_of(file, source):
        count.add(text, tokenizer)
        if count.characters >= end:
            return position(file) or file.size
    return file.size


def _shown(text: str | None) -> str:
    first = " ".join((text or "")[: 4 * _EXAMPLE_CHARS].split())
    return f'"{first[:_EXAMPLE_CHARS]}{"..." if len(first) > _EXAMPLE_CHARS else ""}"'
