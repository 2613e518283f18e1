"""The token ids of a chat, and which of them are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowres.data.chat import answers
from lowres.data.chat.pieces import Piece, unused
from lowres.data.chat.records import BadRow
from lowres.data.chat.template import Template
from lowres.data.tokenizer import Special, Tokenizer

TrainOn = Literal["assistant", "all"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """ids: int32 [n]. trained: bool [n], which of them are targets. truncated: how many more there were."""

    ids: np.ndarray
    trained: np.ndarray
    truncated: int


def encode(
    tokenizer: Tokenizer, template: Template, messages: Messages, train_on: TrainOn, max_length: int
) -> Example:
    """A chat of at most max_length tokens; the others, at its end, are cut off.

    train_on: "assistant" is what a model writes, with the token that ends an answer; "all" is every token but
    the first. Raises BadRow.
    """
    found = encode_batch(tokenizer, template, [messages], train_on, max_length)[0]
    if isinstance(found, BadRow):
        raise found
    return found


def encode_batch(
    tokenizer: Tokenizer, template: Template, chats: Sequence[Messages], train_on: TrainOn, max_length: int
) -> list[Example | BadRow]:
    """`encode` for many chats, whose texts are encoded together; a BadRow in the place of what is none."""
    plans: list[list[_Part] | BadRow] = []
    for messages in chats:
        try:
            plans.append(_plan(template, messages))
        except BadRow as error:
            plans.append(error)
    table = _encoded(tokenizer, [part for plan in plans if not isinstance(plan, BadRow) for part in plan])
    return [
        plan if isinstance(plan, BadRow) else _example(tokenizer, table, plan, train_on, max_length)
        for plan in plans
    ]


def prompt(tokenizer: Tokenizer, template: Template, messages: Messages) -> list[int]:
    """The ids after which a model writes the next answer. Raises BadRow."""
    mark, marked = _marked(template, messages)
    chat = template.render(marked, add_generation_prompt=True)
    _check_same(template, chat.replace(mark, ""), template.render(messages, add_generation_prompt=True))
    parts = _parts(chat, template.cutter.cut(chat, mark), [], mark)
    ids: list[int] = _joined([part.ids(tokenizer, _encoded(tokenizer, parts))[0] for part in parts]).tolist()
    return ids


# of a text: whether it follows a special token, and what it is
_Key = tuple[bool, str]


@dataclass(frozen=True)
class _Part:
    """A text of a chat, or a special token. before: the beginning of the text that stands before an answer.
    trained: whether the rest is in an answer."""

    text: str
    token: Special | None
    after_token: bool
    before: str
    trained: bool

    def texts(self) -> list[_Key]:
        """What has to be encoded."""
        return [] if self.token else [(self.after_token, text) for text in (self.text, self.before) if text]

    def ids(self, tokenizer: Tokenizer, table: dict[_Key, np.ndarray]) -> tuple[np.ndarray, int]:
        """int32 [n], and how many of them are before the answer. table: what `texts` became."""
        if self.token:
            return np.array([self.token.id], np.int32), 0
        ids = table[self.after_token, self.text]
        if not self.before:
            return ids, 0
        # in bytes, as more text may change the tokens before it; one that goes across is not the answer's
        edge = tokenizer.sizes[table[self.after_token, self.before]].sum()
        sizes = tokenizer.sizes[ids]
        return ids, int((sizes.cumsum() - sizes < edge).sum())


def _plan(template: Template, messages: Messages) -> list[_Part]:
    """A chat in parts. Raises BadRow."""
    mark, marked = _marked(template, messages)
    chat = answers.find(template, marked, mark)
    if marked != list(messages):
        _check_same(template, chat.text.replace(mark, ""), template.render(messages))
    return _parts(chat.text, chat.pieces, chat.answers, mark)


def _marked(template: Template, messages: Messages) -> tuple[str, Messages]:
    """A mark, and the messages with it in front of special strings; see `pieces`."""
    mark = unused(json.dumps(messages, ensure_ascii=False), template.source)
    return mark, [template.cutter.marked(message, mark) for message in messages]


def _check_same(template: Template, marked: str, plain: str) -> None:
    if marked != plain:
        raise BadRow(f"a message has the spelling of a special token, for which {template.name} looks")


def _parts(chat: str, pieces: Sequence[Piece], spans: Sequence[tuple[int, int]], mark: str) -> list[_Part]:
    found = []
    after_token = False
    for piece in pieces:
        inside = [start for start, end in spans if start < piece.end and piece.start < end]
        start = inside[0] if inside and not piece.token else 0
        before = chat[piece.start : max(start, piece.start)].replace(mark, "")
        found.append(_Part(piece.text, piece.token, after_token, before, bool(inside)))
        after_token = piece.token is not None
    return found


def _encoded(tokenizer: Tokenizer, parts: Sequence[_Part]) -> dict[_Key, np.ndarray]:
    """int32 [n] of every text in the parts."""
    table: dict[_Key, np.ndarray] = {}
    keys = dict.fromkeys(key for part in parts for key in part.texts())
    for after_token in (False, True):
        of_kind = [key for key in keys if key[0] is after_token]
        ids = tokenizer.encode_batch([text for _, text in of_kind], after_token)
        table |= zip(of_kind, ids, strict=True)
    return table


def _example(
    tokenizer: Tokenizer, table: dict[_Key, np.ndarray], plan: list[_Part], train_on: TrainOn, max_length: int
) -> Example:
    found = [part.ids(tokenizer, table) for part in plan]
    ids = _joined([ids for ids, _ in found])
    trained = np.full(len(ids), train_on == "all")
    if train_on == "assistant":
        end = 0
        for part, (own, before) in zip(plan, found, strict=True):
            trained[end + before : end + len(own)] = part.trained
            end += len(own)
    trained[:1] = False  # nothing is read before it
    return Example(ids[:max_length], trained[:max_length], max(0, len(ids) - max_length))


def _joined(ids: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *ids])
