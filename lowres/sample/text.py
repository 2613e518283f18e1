"""The text that follows prompts, while it is written: no half characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowres.data import Tokenizer
from lowres.data.tokenizer import Stream
from lowres.engine import Engine
from lowres.sample.choice import Sampling
from lowres.sample.tokens import Generation, reader_for

# why a text ends: the model ended it, a stop string follows, or it has as many tokens as were asked for
END, STOP, LENGTH = "end", "stop", "length"


@dataclass(frozen=True)
class Part:
    """What a token adds to the text after a prompt. prompt: its number. token: None in the last part. text:
    what is certain now; it may be empty, and all parts of a prompt together are what follows it. end: why
    the text ends, in the last part: END, STOP or LENGTH."""

    prompt: int
    token: int | None
    text: str
    end: str = ""


def parts(generation: Generation, streams: Sequence[Stream], stops: Sequence[str] = ()) -> Iterator[Part]:
    """What is generated, as text. streams: of each prompt. stops: strings that end a text and are not part
    of it; the first one in the text counts."""
    found = [_Stopped(stops) for _ in streams]
    open_ = dict.fromkeys(generation.going)

    def last(prompt: int, end: str) -> Part:
        del open_[prompt]
        text, stopped = found[prompt].add(streams[prompt].end())
        rest = text if stopped else text + found[prompt].rest
        return Part(prompt, None, rest, STOP if stopped else end)

    for prompt, token in generation:
        for other in [one for one in open_ if one not in generation.going]:
            yield last(other, END)
        text, stopped = found[prompt].add(streams[prompt].add([token]))
        yield Part(prompt, token, text)
        if stopped:
            generation.stop(prompt)
            del open_[prompt]
            yield Part(prompt, None, "", STOP)
    for prompt in list(open_):
        yield last(prompt, LENGTH if prompt in generation.going else END)


class _Stopped:
    """A text up to a stop string. rest: its end, which may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self.rest = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """What is certain after some more text, and whether a stop string was found."""
        text = self.rest + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.rest = ""
            return text[: min(places)], True
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        kept = next((n for n in range(longest, 0, -1) if self._begins(text[-n:])), 0)
        self.rest = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def samples(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    how: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Each of the prompts continued, to the end of a document at most. seeds: see `Generation`."""
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    streams = [tokenizer.stream() for _ in prompts]
    texts = [stream.begin(own) for stream, own in zip(streams, ids, strict=True)]
    reader = reader_for(engine, ids, how)
    generation = Generation(reader, ids, how, tokenizer.vocab_size, {tokenizer.end_id}, seeds)
    for part in parts(generation, streams):
        texts[part.prompt] += part.text
    return texts


def sample(engine: Engine, tokenizer: Tokenizer, prompt: str, how: Sampling) -> str:
    """The prompt continued."""
    return samples(engine, tokenizer, [prompt], how)[0]
