"""Chats and pairs as the words of shards.

A word is 4 * id + 2 * only_read + begins. An example begins with its first token, which nothing predicts;
`only_read`: the token is no target. A pair is one document of two examples, the chosen one first. Examples
are cut at `seq_len` tokens. What is trained of a pair are the answers after the messages that both chats have
in common. A chat without a token to train on teaches nothing, and is dropped; so is a pair if one of its
examples has none, or if they are equal where they were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lowres.data.chat.labels import Example, TrainOn, encode_batch
from lowres.data.chat.records import ASSISTANT, BadRow, Message, parse, shared
from lowres.data.chat.template import Template
from lowres.data.encoders import Encoded, Places
from lowres.data.manifest import Chats, Dropped
from lowres.data.tokenizer import Tokenizer
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


class ChatEncoder:
    """Encodes the chats of a source. arguments: all that determines the words, besides the tokenizer. notes:
    on the template, for the user."""

    flag_bits = _FLAG_BITS

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        form: str,
        seq_len: int,
        train_on: TrainOn,
        bad_rows: str,
    ) -> None:
        self._tokenizer, self._template, self._train_on = tokenizer, template, train_on
        self.notes = template.notes
        self.arguments = Chats(
            form=form,
            template=template.fingerprint,
            train_on=train_on,
            seq_len=seq_len,
            bad_rows=bad_rows,
        )

    def accepts(self, text: str, place: Callable[[], str]) -> bool:
        """Whether a document is a chat or a pair, before it is rendered. place: where it is, for messages.
        Raises UserError if it is none, unless these are left out."""
        found = self._parsed(text)
        if isinstance(found, BadRow):
            self._refuse(found, place())
        return not isinstance(found, BadRow)

    def encode_batch(self, texts: list[str], places: Places) -> Iterator[Encoded]:
        rows = [self._parsed(text) for text in texts]
        texts.clear()
        chats = [chat for row in rows if not isinstance(row, BadRow) for chat in row]
        made = iter(
            encode_batch(self._tokenizer, self._template, chats, self._train_on, self.arguments.seq_len)
        )
        for number, row in enumerate(rows):
            examples = [row] if isinstance(row, BadRow) else [next(made) for _ in row]
            error = next((one for one in examples if isinstance(one, BadRow)), None)
            if error is None:
                yield _encoded([one for one in examples if not isinstance(one, BadRow)])
            else:
                place = places(number)
                self._refuse(error, place)
                yield Encoded(_NONE, Dropped(bad=1, first_bad=f"{place}: {error}"))

    def _parsed(self, text: str) -> list[list[Message]] | BadRow:
        """The chats of a row; of a pair also what both begin with, if there are answers in it."""
        try:
            chats = parse(text, self.arguments.form)
        except BadRow as error:
            return error
        context = chats[0][: shared(chats)] if self.arguments.form == PAIRS else []
        answered = any(message["role"] == ASSISTANT for message in context)
        return [*chats, context] if answered else chats

    def _refuse(self, error: BadRow, place: str) -> None:
        if self.arguments.bad_rows == "refuse":
            raise UserError(
                f'{place}: {error}; correct that row, or set data.bad_rows = "skip" to leave such rows out'
            )


def _encoded(examples: list[Example]) -> Encoded:
    """A document of one example, or two; a third is what both begin with."""
    own, context = examples[:2], examples[2:]
    words = [_words(example, context[0].ids if context else _NONE) for example in own]
    # they differ only in what was cut
    same = len(words) == 2 and np.array_equal(words[0], words[1])
    if same or not all(targets(of_example).any() for of_example in words):
        return Encoded(_NONE, Dropped(untrained=1))
    cut = [example.truncated for example in own if example.truncated]
    return Encoded(np.concatenate(words), Dropped(shortened=len(cut), cut_off=sum(cut)))


def _words(example: Example, context: np.ndarray) -> np.ndarray:
    """uint32 [tokens]. context: ids of turns before the answer that counts, which are not trained, as far as
    the example begins with them."""
    both = min(len(context), len(example.ids))
    differs = np.flatnonzero(context[:both] != example.ids[:both])
    words = example.ids.astype(np.uint32) << _FLAG_BITS
    words[~example.trained] |= _ONLY_READ
    words[: differs[0] if len(differs) else both] |= _ONLY_READ
    words[:1] |= _BEGINS
    return words


_NONE = np.empty(0, np.uint32)
