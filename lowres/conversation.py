"""A conversation with a model: the template makes one text of all that was said, and the model goes on."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from lowres.data import Tokenizer
from lowres.data.chat import BadRow, Message, Template, prompt
from lowres.engine import Engine
from lowres.errors import UserError
from lowres.sample import Generation, Sampling, parts


class Conversation:
    """What was said so far. system: what the model is told first. stops: strings that end an answer.
    `cut_off`: whether the model no longer sees the beginning, as there is more than its context."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        how: Sampling,
        system: str | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        """Raises DoesNotFit if there is no memory for a context."""
        self._tokenizer, self._template, self._how, self._stops = tokenizer, template, how, stops
        self._reader = engine.reader(1, how.seq_len)
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._drawn = 0
        self.cut_off = False

    def answer(self, text: str) -> str:
        """What the model says to that. Raises UserError if the template refuses it."""
        return "".join(self.answering(text))

    def answering(self, text: str) -> Generator[str]:
        """The same, while it is written. If nobody waits for the end, what was written is the answer."""
        self._messages.append({"role": "user", "content": text})
        try:
            ids = prompt(self._tokenizer, self._template, self._messages)
        except BadRow as error:
            self._messages.pop()
            raise UserError(str(error)) from None
        tokenizer, said, count = self._tokenizer, "", 0
        ends = self._template.ends | {tokenizer.end_id}
        written = Generation(self._reader, [ids], self._how, tokenizer.vocab_size, ends, drawn=self._drawn)
        try:
            for part in parts(written, [tokenizer.stream()], self._stops):
                count += part.token is not None
                said += part.text
                yield part.text
        finally:
            self._drawn += count + 1
            self.cut_off |= len(ids) + count > self._how.seq_len
            self._messages.append({"role": "assistant", "content": said})
