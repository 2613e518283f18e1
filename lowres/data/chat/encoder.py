"""Chats and pairs as the words of shards.

A word is 4 * id + 2 * only_read + begins. An example begins with its first token, which nothing predicts;
`only_read`: the token is no target. A pair is one document of two examples, the chosen one first. Examples
are cut at `seq_len` tokens. A chat without a token to train on teaches nothing, and is dropped; so is a pair
if one of its examples has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowres.data.chat.records import ASSISTANT, BadRow, Message, parse, shared
from lowres.data.encoders import Encoded, Places
from lowres.data.manifest import Chats, Dropped
from lowres.errors import UserError
from lowres.text.source import PAIRS

_FLAG_BITS = 2
_ONLY_READ, _BEGINS = 2, 1


def words_of(vocab_size: int) -> int:
    """How many words there are."""
    return vocab_size << _FLAG_BITS


def begins(words: np.ndarray) -> np.ndarray:
    """bool [words]: where examples begin."""
    return words & _BEGINS != 0


def targets(words: np.ndarray) -> np.ndarray:
    """bool [words]: what is trained on."""
    return words & (_ONLY_READ | _BEGINS) == 0


def only_read(words: np.ndarray) -> np.ndarray:
    """bool [words]: what is no target."""
    return words & _ONLY_READ != 0


def ids(words: np.ndarray) -> np.ndarray:
    """int64 [words]"""
    return words.astype(np.int64) >> _FLAG_BITS


class Example(Protocol):
    """ids: int32 [tokens]. trained: bool [tokens], whether each is a target. truncated: tokens cut off."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def trained(self) -> np.ndarray: ...
    @property
    def truncated(self) -> int: ...


@dataclass(frozen=True)
class ChatEncoder:
    """label: the tokens of a chat, at most `arguments.seq_len`, and which of them are trained; may raise
    BadRow. arguments: all that determines the words, besides the tokenizer."""

    label: Callable[[list[Message]], Example]
    arguments: Chats
    flag_bits: int = _FLAG_BITS

    def accepts(self, text: str, place: Callable[[], str]) -> bool:
        """Whether a document is a chat or a pair, before it is rendered. place: where it is, for messages.
        Raises UserError if it is none, unless these are left out."""
        try:
            parse(text, self.arguments.form)
        except BadRow as error:
            self._refuse(error, place())
            return False
        return True

    def encode_batch(self, texts: list[str], places: Places) -> Iterator[Encoded]:
        for number, text in enumerate(texts):
            try:
                yield self._encoded(parse(text, self.arguments.form))
            except BadRow as error:
                place = places(number)
                self._refuse(error, place)
                yield Encoded(_NONE, Dropped(bad=1, first_bad=f"{place}: {error}"))
        texts.clear()

    def _refuse(self, error: BadRow, place: str) -> None:
        if self.arguments.bad_rows == "refuse":
            raise UserError(
                f'{place}: {error}; correct that row, or set data.bad_rows = "skip" to leave such rows out'
            ) from None

    def _encoded(self, chats: list[list[Message]]) -> Encoded:
        context = shared(chats) if self.arguments.form == PAIRS else 0
        made = [self._words(chat, chat[:context]) for chat in chats]
        if not all(targets(words).any() for words, _ in made):
            return Encoded(_NONE, Dropped(untrained=1))
        cut = [truncated for _, truncated in made if truncated]
        return Encoded(
            np.concatenate([words for words, _ in made]), Dropped(shortened=len(cut), cut_off=sum(cut))
        )

    def _words(self, chat: list[Message], context: list[Message]) -> tuple[np.ndarray, int]:
        """uint32 [tokens]; how many were cut off. context: messages that a pair has in common, which are not
        trained."""
        example = self.label(chat)
        trained = example.trained.copy()
        if any(message["role"] == ASSISTANT for message in context):
            before, ids = self.label(context).ids, example.ids
            both = min(len(before), len(ids))
            differs = np.flatnonzero(before[:both] != ids[:both])
            trained[: differs[0] if len(differs) else both] = False
        words = example.ids.astype(np.uint32) << _FLAG_BITS
        words[~trained] |= _ONLY_READ
        words[:1] |= _BEGINS
        return words, example.truncated


_NONE = np.empty(0, np.uint32)
