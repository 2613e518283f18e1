"""What a source holds, before anything is written: documents, tokens and an example of every kind of file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any, Self

from lowres.config import Config, DataConfig
from lowres.data.chat.records import BadRow, Message, parse, shared
from lowres.data.opening import given_tokenizer, source_as_asked
from lowres.data.tokenised import count_ids
from lowres.data.tokenizer import Tokenizer
from lowres.errors import UserError
from lowres.text import Listing, documents, is_stream, list_files
from lowres.text.columns import CHOSEN, REJECTED
from lowres.text.documents import Skipped, no_text, rows_of
from lowres.text.opening import position
from lowres.text.source import CHATS, TEST, TEXT, TRAIN, File, Source
from lowres.text.words import Group, groups, left_out, size
from lowres.wording import counted

# what is read completely, so that its numbers are exact
EXACT_BYTES = 64 << 20
# otherwise so much of so many files, spread over the group
SAMPLE_CHARS = 4_000_000
SAMPLE_FILES = 8
STREAM_DOCUMENTS = 1000
# of English text with a vocabulary of 32,000 pieces
CHARS_PER_TOKEN = 4.0
_EXAMPLE_CHARS = 70
_EXAMPLE_MESSAGES = 4


@dataclass
class Count:
    """What a group, or the beginning of a stream, holds. exact: whether it was read to its end."""

    documents: float = 0
    characters: float = 0
    tokens: float = 0
    exact: bool = True
    example: str | None = None

    def add(self, text: str, tokenizer: Tokenizer | None) -> None:
        if text and not text.isspace():
            self.example = self.example or text
            self._count(text, tokenizer)

    def _count(self, text: str, tokenizer: Tokenizer | None) -> None:
        self.documents += 1
        self.characters += len(text)
        self.tokens += 2 + (len(tokenizer.encode(text)) if tokenizer else len(text) / CHARS_PER_TOKEN)

    @property
    def shown(self) -> str:
        """The example in a line."""
        return f'"{_shortened(self.example or "")}"'

    def of_more(self, factor: float) -> Self:
        """The same of so many times as much."""
        counts = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.type == "float"}
        return replace(self, exact=False, **counts)


@dataclass
class ChatCount(Count):
    """The same of chats or pairs. messages: in all of them. bad: rows that are none; first_bad: why the first
    is none."""

    form: str = CHATS
    messages: float = 0
    bad: float = 0
    first_bad: str | None = None

    def add(self, text: str, tokenizer: Tokenizer | None) -> None:
        if not text or text.isspace():
            return
        try:
            chats = parse(text, self.form)
        except BadRow as error:
            self.bad += 1
            self.first_bad = self.first_bad or str(error)
            return
        self.example = self.example or _in_words(chats)
        self.messages += sum(map(len, chats))
        self._count("\n".join(message["content"] for chat in chats for message in chat), tokenizer)

    @property
    def shown(self) -> str:
        return self.example or ""

    def lines(self) -> list[str]:
        """What there is to say about chats."""
        about = "" if self.exact else "~"
        each = self.messages / max(1, self.documents)
        made = [f"{about}{counted(self.messages, 'message')}, {each:.3g} in one of the {self.form}"]
        if self.bad:
            rows = (
                f"{self.bad:,} rows are no {self.form}" if self.bad > 1 else f"a row is no {self.form[:-1]}"
            )
            made.append(f"{about}{rows}; the first: {self.first_bad}")
        return made


def _in_words(chats: list[list[Message]]) -> str:
    """The beginning of a chat; of a pair what both begin with, and both answers."""
    common = shared(chats) if len(chats) > 1 else len(chats[0])
    first = chats[0][: min(common, _EXAMPLE_MESSAGES)]
    parts = [f"{message['role']}: {_shortened(message['content'])}" for message in first]
    parts += ["..."] * (common > _EXAMPLE_MESSAGES)
    if len(chats) > 1:
        for name, chat in zip((CHOSEN, REJECTED), chats, strict=True):
            answer = " ".join(message["content"] for message in chat[common:])
            parts.append(f"{name}: {_shortened(answer)}")
    return " | ".join(parts)


def _shortened(text: str) -> str:
    first = " ".join(text[: 4 * _EXAMPLE_CHARS].split())
    return first[:_EXAMPLE_CHARS] + ("..." if len(first) > _EXAMPLE_CHARS else "")


@dataclass(frozen=True)
class Inspection:
    """groups: of a local source. stream: of the first documents of another one. form: see `text.Source`."""

    source: str
    groups: list[tuple[Group, Count]]
    stream: Count | None
    left_out: list[str]
    notes: list[str]
    tokens_are_estimated: bool
    form: str = TEXT

    def to_json(self) -> dict[str, Any]:
        found = [
            {
                "kind": g.kind,
                "part": g.part,
                "column": g.column,
                "fields": g.fields,
                "separator": g.separator,
                "files": len(g.files),
            }
            | {"bytes": g.size}
            | asdict(count)
            for g, count in self.groups
        ]
        stream = asdict(self.stream) if self.stream else None
        return {"source": self.source, "form": self.form, "groups": found, "stream": stream} | {
            "left_out": self.left_out,
            "notes": self.notes,
            "tokens_are_estimated": self.tokens_are_estimated,
        }

    def lines(self) -> list[str]:
        what = "documents" if self.form == TEXT else self.form
        made = [f"{'part':<11} {'kind':<14} {'files':>7} {'size':>11} {what:>14} {'tokens':>16}  text"]
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
        for g, count in self.groups:
            if isinstance(count, ChatCount) and (count.documents or count.bad):
                made += [f"{g.files[0].name}: {line}" for line in count.lines()]
        made += [f"example ({g.files[0].name}): {c.shown}" for g, c in self.groups if c.example]
        if self.stream:
            made = [
                f"the first {self.stream.documents:,.0f} {what}: "
                f"{self.stream.characters:,.0f} characters, ~{self.stream.tokens:,.0f} tokens",
                *(self.stream.lines() if isinstance(self.stream, ChatCount) else []),
                f"example: {self.stream.shown}",
            ]
        if self.form != TEXT:
            name = "sft" if self.form == CHATS else "dpo"
            made.append(
                f'to train on {self.form}: objective.name = "{name}", and the model\'s data.tokenizer'
            )
        if self.left_out:
            made += ["left out:", *(f"  {line}" for line in self.left_out)]
        if self.tokens_are_estimated:
            made.append(f"tokens at {CHARS_PER_TOKEN:g} characters each; data.tokenizer gives exact numbers")
        return made + [f"note: {note}" for note in self.notes]


def inspect(config: Config) -> Inspection:
    """Look at the config's source. Reads everything up to EXACT_BYTES of a kind of file, and samples above.
    What its rows are follows from objective.name, or else from what they can be. Raises UserError for what
    `train` would refuse."""
    source = source_as_asked(config)
    tokenizer = given_tokenizer(config.data)
    estimated = tokenizer is None
    if is_stream(source):
        count = _new_count(source, exact=False)
        for text in islice(documents(source), STREAM_DOCUMENTS):
            count.add(text, tokenizer)
        return Inspection(source.name, [], count, [], [], estimated, source.form)
    listed = list_files(source)
    listed.check()
    if listed.tokens:
        return _of_ids(config.data, listed, tokenizer)
    skipped: Skipped = {}
    found = [(group, _counted(group, source, tokenizer, skipped)) for group in groups(listed)]
    if all(count.exact and not count.documents for group, count in found if group.part == TRAIN):
        bad = [count.first_bad for _, count in found if isinstance(count, ChatCount) and count.first_bad]
        raise UserError(no_text(source) + (f"; the first row is none: {bad[0]}" if bad else ""))
    out = left_out(listed) + [f"the rest of {error}" for error in skipped.values()]
    return Inspection(source.name, found, None, out, list(listed.notes), estimated, source.form)


def _new_count(source: Source, exact: bool = True) -> Count:
    return Count(exact=exact) if source.form == TEXT else ChatCount(exact=exact, form=source.form)


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
    count = _new_count(source)
    if group.part == TEST:
        return count
    if group.size <= EXACT_BYTES:
        for file in group.files:
            for text in rows_of(file, source, skipped):
                count.add(text, tokenizer)
        return count
    step = -(-len(group.files) // SAMPLE_FILES)
    read = 0
    for file in group.files[::step]:
        read += _sample(file, source, tokenizer, count)
    return count.of_more(group.size / max(1, read))


def _sample(file: File, source: Source, tokenizer: Tokenizer | None, count: Count) -> int:
    """Add the beginning of a file to the count; returns how many of its bytes that was."""
    end = count.characters + SAMPLE_CHARS
    for text in rows_of(file, source):
        count.add(text, tokenizer)
        if count.characters >= end:
            return position(file) or file.size
    return file.size
