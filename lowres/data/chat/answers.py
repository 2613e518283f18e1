"""Where the answers of the assistant are in a rendered chat, for any template.

A template is not asked. The chat up to an answer, with the prompt to generate it, is what a model reads
before it writes this answer; the chat up to and with the answer ends with what it writes. So where both are
beginnings of the whole chat, the answer is between them. It ends with its last control token, <|im_end|> say;
what the template writes behind, a newline perhaps, is not the model's.

Some templates write a turn in another way once others follow. Then something else in the place of a message's
text shows where that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowres.data.chat.pieces import Piece, unused
from lowres.data.chat.records import BadRow
from lowres.errors import UserError

if TYPE_CHECKING:
    from lowres.data.chat.template import Template

Messages = Sequence[Mapping[str, Any]]
ASSISTANT = "assistant"
_ONLY_TEXT = {"role", "content"}


@dataclass(frozen=True)
class Rendered:
    """A chat as its template writes it. answers: (start, end) in the text of each assistant's turn."""

    text: str
    pieces: list[Piece]
    answers: list[tuple[int, int]]


def find(template: Template, messages: Messages, mark: str) -> Rendered:
    """The chat and its answers. mark: see `pieces`; it is in front of every special string of the messages,
    and nowhere else. Raises BadRow."""
    text = template.render(messages)
    pieces = template.cutter.cut(text, mark)
    chat = _Chat(template, messages, mark, text, pieces)
    found = [chat.answer(i) for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    edges = [edge for span in found for edge in span]
    if edges != sorted(edges):
        raise BadRow(f"{template.name} writes the turns in another order")
    return Rendered(text, pieces, found)


class _Chat:
    """A rendered chat, in which messages are looked for."""

    def __init__(
        self, template: Template, messages: Messages, mark: str, text: str, pieces: list[Piece]
    ) -> None:
        self._template, self._messages, self._mark = template, messages, mark
        self._text = text
        self._controls = [piece for piece in pieces if piece.token and not piece.token.is_text]

    def answer(self, i: int) -> tuple[int, int]:
        """Where message i begins and ends, as a model writes it. Raises BadRow."""
        start = self._start(i)
        return start, self._end(i, start)

    def _start(self, i: int) -> int:
        before = self._beginning(i, add_generation_prompt=True) if i else None
        if before is not None:
            return len(before)
        if self._messages[i].keys() - _ONLY_TEXT:
            raise BadRow(f"{self._template.name} changes the turns before an answer, so its start is unknown")
        return self._place(i)

    def _end(self, i: int, start: int) -> int:
        last = i + 1 == len(self._messages)
        whole = self._text if last else self._beginning(i + 1)
        if whole is not None:
            inside = self._between(start, len(whole))[-1:]
        else:
            inside = self._between(self._place(i), self._place(i + 1))[:1]
            ends = self._template.ends
            inside = [piece for piece in inside if piece.token and (not ends or piece.token.id in ends)]
        if not inside:
            raise BadRow(f"{self._template.name} writes no token after an answer")
        return inside[0].end

    def _between(self, start: int, end: int) -> list[Piece]:
        return [piece for piece in self._controls if start <= piece.start and piece.end <= end]

    def _beginning(self, count: int, add_generation_prompt: bool = False) -> str | None:
        """The first messages as text, if the whole begins with it."""
        try:
            text = self._template.render(self._messages[:count], add_generation_prompt)
        except BadRow:  # some templates refuse a chat that is cut there
            return None
        return text if self._text.startswith(text) else None

    def _place(self, i: int) -> int:
        """Where the text of message i is written. Raises BadRow."""
        other = f"{self._mark}other{self._mark}"
        messages = [*self._messages[:i], {**self._messages[i], "content": other}, *self._messages[i + 1 :]]
        before, found, after = self._template.render(messages).partition(other)
        if not found or other in after or not self._text.startswith(before):
            raise BadRow(f"{self._template.name} does not write a message as it is, so answers are not found")
        return len(before)


@dataclass
class Examined:
    """ends: ids of the tokens that end an answer. notes: for the user."""

    ends: frozenset[int]
    notes: list[str] = field(default_factory=list)


def examine(template: Template) -> Examined:
    """What a template does to a small chat. Raises UserError if it cannot be trained on: answers without an
    end, two bos, marks of its own that say something else."""
    letter = unused(template.source)
    mark = unused(template.source, letter)
    messages = _small_chat(template, letter)
    try:
        chat = find(template, messages, mark)
    except BadRow as error:
        raise UserError(f"{error}; {_REMEDY}") from None
    places = [chat.text.find(message["content"]) for message in messages]
    said = [place for place, message in zip(places, messages, strict=True) if message["role"] == ASSISTANT]
    last = [next(p for p in reversed(chat.pieces) if p.token and p.end <= end) for _, end in chat.answers]
    for place, (start, _), end in zip(said, chat.answers, last, strict=True):
        if not start <= place < end.start:
            raise UserError(
                f"{template.name}: no token ends an answer, so a model would not learn to stop; {_REMEDY}"
            )
    found = Examined(frozenset(piece.token.id for piece in last if piece.token))
    _check_start(template, chat.pieces, found.notes)
    _check_prompt(template, messages, chat, said, found.notes)
    _check_marks(template, messages, chat, found.notes)
    return found


_REMEDY = "give a template that writes eos_token, or another token of the tokenizer, after each answer"


def _small_chat(template: Template, letter: str) -> Messages:
    """The first chat that the template accepts, with texts that occur nowhere else."""
    problem = None
    for roles in ("uaua", "suaua", "ua", "sua"):
        names = {"s": "system", "u": "user", "a": ASSISTANT}
        messages = [{"role": names[role], "content": f"{letter}{i}"} for i, role in enumerate(roles)]
        try:
            text = template.render(messages)
        except BadRow as error:
            problem = problem or error
            continue
        missing = [m["role"] for m in messages if text.count(m["content"]) != 1]
        if not missing:
            return messages
        problem = problem or BadRow(f"{template.name}: a message of role {missing[0]} is not written once")
    raise UserError(f"{problem}; give another template")


def _check_start(template: Template, pieces: list[Piece], notes: list[str]) -> None:
    bos = template.variables.get("bos_token")
    first = [piece.text for piece in pieces[:2] if piece.token]
    if bos and first == [bos, bos]:
        raise UserError(f"{template.name}: it begins a chat with {bos} twice; take one out")
    if bos and first[:1] != [bos]:
        notes.append(f"{template.name}: chats do not begin with {bos}, as documents do")


def _check_prompt(
    template: Template, messages: Messages, chat: Rendered, said: list[int], notes: list[str]
) -> None:
    header = chat.text[chat.answers[-1][0] : said[-1]].strip()
    before = template.render(messages[:-1])
    prompted = template.render(messages[:-1], add_generation_prompt=True)
    if not chat.text.startswith(prompted):
        asked = prompted.removeprefix(before)
        notes.append(
            f"{template.name}: it asks for an answer with {asked!r}, but no answer in a chat follows that"
        )
    elif header and before == prompted:
        notes.append(
            f"{template.name}: it ignores add_generation_prompt, so {header!r} is trained too, and a model "
            "writes it"
        )


def _check_marks(template: Template, messages: Messages, chat: Rendered, notes: list[str]) -> None:
    """Compare answers with what the template marks by {% generation %}."""
    mark = unused(template.source, chat.text)
    parts = template.render(messages, around=mark).split(mark)
    if len(parts) == 1:
        return
    marked, unmarked = "".join(parts[1::2]), "".join(parts[0::2])
    for message in messages:
        if message["content"] not in (marked if message["role"] == ASSISTANT else unmarked):
            raise UserError(
                f"{template.name}: its generation marks are not around what the assistant says, and nothing "
                "else; correct them, or take them out"
            )
    ours = [chat.text[start:end] for start, end in chat.answers]
    if ours != parts[1::2]:
        notes.append(f"{template.name}: its generation marks have {parts[1]!r} where {ours[0]!r} is trained")
