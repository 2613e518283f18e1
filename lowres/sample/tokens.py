"""The tokens that follow prompts.

A model is trained on sequences of `seq_len` tokens, so it sees no more. Where a text gets longer, the older
half of what it sees is left out at once. The rest is read again, which on average costs as much as one more
token for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from lowres.engine import Engine, Reader
from lowres.sample.choice import Sampling, choose


def reader_for(engine: Engine, prompts: Sequence[list[int]], how: Sampling) -> Reader:
    """A reader with room for these prompts and what follows them. Raises DoesNotFit."""
    return engine.reader(len(prompts), room_for(prompts, how))


def room_for(prompts: Sequence[list[int]], how: Sampling) -> int:
    """Tokens of each sequence that a reader has to hold."""
    return min(how.seq_len, max(map(len, prompts)) + how.tokens)


class Generation:
    """The tokens that follow some prompts. Each gets those that it would get alone: they share the passes
    through the model, and nothing else.

    going: the prompts, by their number, that have not ended.
    """

    def __init__(
        self,
        reader: Reader,
        prompts: Sequence[list[int]],
        how: Sampling,
        vocab_size: int,
        ends: Collection[int],
        seeds: Sequence[int] | None = None,
        drawn: int = 0,
    ) -> None:
        """vocab_size: the model may have more. ends: tokens that end a text and are not part of it. seeds: of
        each prompt, instead of that of `how` for all. drawn: how many tokens were drawn with these seeds
        before."""
        self._reader, self._how, self._vocab_size, self._ends = reader, how, vocab_size, ends
        self._seeds = [how.seed] * len(prompts) if seeds is None else seeds
        self._drawn = drawn
        self._ids = [list(ids) for ids in prompts]
        self._starts = [max(0, len(ids) - how.seq_len) for ids in prompts]
        self.going = set(range(len(prompts)))

    def stop(self, prompt: int) -> None:
        """Let a prompt end here."""
        self.going.discard(prompt)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(prompt, token), one of each prompt in turn. Those that are still going at the end have got all of
        their tokens."""
        for number in range(self._drawn, self._drawn + self._how.tokens):
            prompts = sorted(self.going)
            if not prompts:
                return
            logits = self._reader.logits({prompt: self._context(prompt) for prompt in prompts}).cpu()
            for prompt, of_prompt in zip(prompts, logits, strict=True):
                token = choose(of_prompt[: self._vocab_size], self._how, self._seeds[prompt], number)
                if token in self._ends:
                    self.stop(prompt)
                    continue
                self._ids[prompt].append(token)
                yield prompt, token

    def _context(self, prompt: int) -> list[int]:
        """What the model sees of a text."""
        ids, most = self._ids[prompt], self._how.seq_len
        if len(ids) - self._starts[prompt] > most:
            self._starts[prompt] = len(ids) - max(1, most // 2)
        return ids[self._starts[prompt] :]
