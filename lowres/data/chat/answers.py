"""Where the answers of the assistant are in a rendered chat, for any template.

A template is not asked. The chat up to an answer, with the prompt to generate it, is what a model reads
before it writes this answer; the chat up to and with the answer ends with what it writes. So where both are
beginnings of the whole chat, the answer is between them. It ends with a token such as <|im_end|>; what the
template writes behind, a newline perhaps, is not the model's.

Some templates write a turn in another way once others follow. Then the chat with another message in its place
shows where it begins: there the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowres.data.chat.pieces import Piece, unused
from lowres.data.chat.records import ASSISTANT, BadRow

if TYPE_CHECKING:
    from lowres.data.chat.template import Template

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A chat as its template writes it. answers: (start, end) in the text of each assistant's turn."""

    text: str
    pieces: list[Piece]
    answers: list[tuple[int, int]]


def find(template: Template, messages: Messages, mark: str) -> Rendered:
    """The chat and its answers. mark: see `pieces`; it is in front of every special string of the messages,
    and nowhere else. Raises BadRow."""
    chat = _Chat(template, messages, mark)
    found = [chat.answer(i) for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    edges = [edge for span in found for edge in span]
    if edges != sorted(edges):
        raise BadRow(f"{template.name} writes the turns in another order")
    return Rendered(chat.text, chat.pieces, found)


class _Chat:
    """A rendered chat, in which messages are looked for."""

    def __init__(self, template: Template, messages: Messages, mark: str) -> None:
        self._template, self._messages = template, messages
        self.text = template.render(messages)
        self.pieces = template.cutter.cut(self.text, mark)

    def answer(self, i: int) -> tuple[int, int]:
        """Where message i begins and ends, as a model writes it. Raises BadRow."""
        before = self._beginning(i, add_generation_prompt=True) if i else None
        start = self.place(i) if before is None else len(before)
        last = i + 1 == len(self._messages)
        whole = self.text if last else self._beginning(i + 1)
        if whole is None:
            return start, self._end(self.place(i), self.place(i + 1), first=True)
        return start, self._end(start, len(whole))

    def place(self, i: int) -> int:
        """Where the texts of message i begin to matter. Raises BadRow."""
        given, letter = self._messages[i], unused(self.text, self._template.source)
        texts = {key: letter for key, value in given.items() if isinstance(value, str) and key != "role"}
        messages = [*self._messages[:i], {**given, **texts}, *self._messages[i + 1 :]]
        other = self._template.render(messages)
        pairs = enumerate(zip(self.text, other, strict=False))
        same = next((at for at, (one, another) in pairs if one != another), len(other))
        if other[same : same + 1] != letter and same < len(self._beginning(i) or self.text):
            raise BadRow(f"{self._template.name} changes what stands before an answer; it is not found")
        return same

    def _end(self, start: int, limit: int, first: bool = False) -> int:
        """The end of the token that ends an answer: the last one that can be in [start, limit), or the
        first."""
        inside = [piece for piece in controls(self.pieces) if start <= piece.start and piece.end <= limit]
        ends = [piece for piece in inside if piece.token and piece.token.id in self._template.ends]
        if not ends and (first or not inside):
            raise BadRow(f"{self._template.name} writes no token after an answer")
        return ends[0].end if first else (ends or inside)[-1].end

    def _beginning(self, count: int, add_generation_prompt: bool = False) -> str | None:
        """The first messages as text, if the whole begins with it."""
        try:
            text = self._template.render(self._messages[:count], add_generation_prompt)
        except BadRow:  # some templates refuse a chat that is cut there
            return None
        return text if self.text.startswith(text) else None


def controls(pieces: list[Piece]) -> list[Piece]:
    """Those that are control tokens."""
    return [piece for piece in pieces if piece.token and not piece.token.is_text]
