"""A model of `lm_eval` that is an engine and a tokenizer.

The tokens of a request are those that lm_eval's own model for folders of transformers (`hf`) makes with the
exported tokenizer, so both give the same scores. If that puts bos in front of a text, a text whose whole
log-likelihood is wanted has two: its first token is bos, predicted from bos.

Requests are packed into windows as chats are in tuning: as documents that do not see each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lowres.data import Tokenizer
from lowres.data.batches import BEGINS, IGNORED
from lowres.data.chat.packing import pack
from lowres.engine import Engine
from lowres.errors import UserError
from lowres.progress import Bar
from lowres.sample import Generation, Part, Sampling, parts, reader_for

# what does not fit a window has one of its own, whose length is a multiple of this
LENGTHS = 32
# what a task may say about its continuations, and what changes nothing with these values
_UNDERSTOOD = {"do_sample", "temperature", "top_k", "until", "max_gen_toks"}
_OFF = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}

# the key of a request, its context and its answer
Request = tuple[Any, list[int], list[int]]


class RunModel(TemplateLM):
    """at_work: whether it answers, or failed to. shortened: see `Scores`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        context: int,
        batch_tokens: int,
        sequences: int = 1,
        window: int | None = None,
        shown: bool = True,
    ) -> None:
        """context: tokens that the model may see. batch_tokens: that are processed together, at most, but one
        window at least. sequences: that are continued together. window: tokens of a window into which
        requests are packed; default: context. shown: whether to say how far it is, on the present stderr."""
        super().__init__()
        self._engine, self._tokenizer, self._sequences = engine, tokenizer, sequences
        self._context, self._batch_tokens, self._window = context, batch_tokens, window or context
        self._shown, self._stderr = shown, sys.stderr
        self.at_work, self.shortened = False, 0

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._tokenizer.encode(string)
        puts_bos = add_special_tokens is not False and self._tokenizer.bos_id in self._tokenizer.around
        return [self._tokenizer.bos_id, *ids] if puts_bos else ids

    # log-likelihoods of answers and of texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._at_work():
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows = [[*self._windows(*request.args)] for request in requests]
        with self._at_work():
            found = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> Iterator[Request]:
        """The text cut so that every token is in one answer, with as much context as there is room for."""
        tokens = self.tok_encode(text)
        for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self._context, 1):
            yield None, *make_disjoint_window(pair)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        rows = [self._row(context, answer) for _, context, answer in requests]
        found = [(0.0, True)] * len(rows)
        with self._bar("scoring", len(rows)) as bar, self._engine.marked():
            for windows, length in self._windows_of(rows):
                each, likeliest = self._engine.log_probabilities(_packed(rows, windows, length + 1))
                for number, window in enumerate(windows):
                    end = -1
                    for i in window:
                        end += len(rows[i])
                        answer = slice(end - len(requests[i][2]), end)
                        numbers = each[number, answer].double().sum(), likeliest[number, answer].all()
                        found[i] = float(numbers[0]), bool(numbers[1])
                bar.update(sum(map(len, windows)))
        return found

    def _windows_of(self, rows: list[list[int]]) -> Iterator[tuple[list[list[int]], int]]:
        """Batches: the numbers of the rows in each window, and the length of these windows. The longest come
        first, so that a lack of memory shows at once."""
        long = [i for i, row in enumerate(rows) if len(row) > self._window + 1]
        for i in sorted(long, key=lambda i: -len(rows[i])):
            yield [[i]], min(self._context, -(-len(rows[i]) // LENGTHS) * LENGTHS)
        short = [i for i, row in enumerate(rows) if len(row) <= self._window + 1]
        windows = [[short[i] for i in one] for one in pack([len(rows[i]) for i in short], self._window + 1)]
        size = max(1, self._batch_tokens // self._window)
        for start in range(0, len(windows), size):
            yield windows[start : start + size], self._window

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self.at_work = True
        yield
        self.at_work = False

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Bar]:
        with (
            redirect_stderr(self._stderr),
            Bar(what, "answers", total, shown=self._shown, leave=self._shown) as bar,
        ):
            yield bar

    def _row(self, context: list[int], answer: list[int]) -> list[int]:
        """The tokens of a request: its last ones, if there are too many."""
        if len(answer) > self._context:
            raise UserError(
                f"--tasks: a task has an answer of {len(answer)} tokens, but the context of the model is "
                f"{self._context} (model.max_positions, or else data.seq_len); leave it out"
            )
        # a token is predicted from one at least
        whole = (context or [self.prefix_token_id]) + answer
        self.shortened += len(whole) > self._context + 1
        return whole[-(self._context + 1) :]

    # continuations

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        with self._at_work():
            return self._written(requests)

    def _written(self, requests: Sequence[Any]) -> list[str]:
        # those that go on in the same way, and of them the longest first
        groups: dict[tuple[Sampling, tuple[str, ...]], list[tuple[int, list[int]]]] = {}
        for i, request in enumerate(requests):
            ids, how, stops = self._continuation(*request.args)
            groups.setdefault((how, stops), []).append((i, ids))
        texts = [""] * len(requests)
        with self._bar("generating", len(requests)) as bar, self._engine.marked():
            for (how, stops), group in groups.items():
                group.sort(key=lambda one: -len(one[1]))
                for start in range(0, len(group), self._sequences):
                    numbers, prompts = zip(*group[start : start + self._sequences], strict=True)
                    for part in self._generated(prompts, how, stops, numbers):
                        texts[numbers[part.prompt]] += part.text
                        bar.update(bool(part.end))
        return texts

    def _continuation(
        self, text: str, options: dict[str, Any]
    ) -> tuple[list[int], Sampling, tuple[str, ...]]:
        """The tokens that a request goes on from, and how. Raises UserError if it cannot be done."""
        options = normalize_gen_kwargs(options)
        greedy = not options["do_sample"]
        for key in sorted(options.keys() - _UNDERSTOOD):
            if options[key] != _OFF.get(key) and not (greedy and key == "top_p"):
                raise UserError(
                    f"--tasks: a task asks for generation_kwargs.{key} = {options[key]!r}, which is not "
                    "supported; leave it out"
                )
        most = options["max_gen_toks"]
        if most >= self._context:
            raise UserError(
                f"--tasks: a task asks for {most} tokens (generation_kwargs.max_gen_toks), but the context "
                f"of the model is {self._context} (model.max_positions, or else data.seq_len); leave it out"
            )
        context = self.tok_encode(text) or [self.prefix_token_id]
        self.shortened += len(context) > self._context - most
        temperature = 0.0 if greedy else options.get("temperature", 1.0)
        how = Sampling(most, self._context, temperature, options.get("top_k", 50))
        return context[most - self._context :], how, tuple(filter(None, options["until"]))

    def _generated(
        self,
        prompts: Sequence[list[int]],
        how: Sampling,
        stops: Sequence[str],
        seeds: Sequence[int],
    ) -> Iterator[Part]:
        tokenizer, ends = self._tokenizer, {self._tokenizer.end_id}
        reader = reader_for(self._engine, prompts, how)
        generation = Generation(reader, prompts, how, tokenizer.vocab_size, ends, seeds)
        return parts(generation, [tokenizer.stream() for _ in prompts], stops)


def _packed(rows: list[list[int]], windows: list[list[int]], length: int) -> Tensor:
    """int64 [windows, length]: rows behind each other, their first tokens marked, and IGNORED behind them."""
    batch = torch.full((len(windows), length), IGNORED)
    for words, window in zip(batch, windows, strict=True):
        start = 0
        for tokens in (rows[i] for i in window):
            words[start : start + len(tokens)] = torch.tensor(tokens)
            words[start] |= BEGINS
            start += len(tokens)
    return batch
