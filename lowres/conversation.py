"""A conversation with a model: the template makes one text of all that was said, and the model goes on."""

from __future__ import annotations

from lowres.data import Tokenizer
from lowres.data.chat import BadRow, Message, Template, prompt
from lowres.engine import Engine
from lowres.errors import UserError
from lowres.sample import Sampling, continued


class Conversation:
    """What was said so far. system: what the model is told first. `cut_off`: whether the model no longer sees
    the beginning, as there is more than its context."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        how: Sampling,
        system: str | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._template, self._how = engine, tokenizer, template, how
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._drawn = 0
        self.cut_off = False

    def answer(self, text: str) -> str:
        """What the model says to that. Raises UserError if the template refuses it."""
        self._messages.append({"role": "user", "content": text})
        try:
            ids = prompt(self._tokenizer, self._template, self._messages)
        except BadRow as error:
            raise UserError(str(error)) from None
        ends = self._template.ends | {self._tokenizer.end_id}
        found = list(continued(self._engine, ids, self._tokenizer.vocab_size, ends, self._how, self._drawn))
        self._drawn += len(found) + 1
        self.cut_off |= len(ids) + len(found) > self._how.seq_len
        said = self._tokenizer.decode(found)
        self._messages.append({"role": "assistant", "content": said})
        return said
