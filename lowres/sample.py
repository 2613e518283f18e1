"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from lowres import rng
from lowres.data import Tokenizer
from lowres.engine import Engine


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: up to `tokens` of them, with the last `seq_len` tokens as the context.
    temperature 0 always takes the likeliest token; top_k 0 chooses among all. The same seed gives the same
    tokens."""

    tokens: int
    seq_len: int
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


def sample(engine: Engine, tokenizer: Tokenizer, prompt: str, how: Sampling) -> str:
    """The prompt continued, to the end of a document at most."""
    ids = tokenizer.prompt(prompt)
    following = continued(engine, ids, tokenizer.vocab_size, {tokenizer.end_id}, how)
    return tokenizer.decode([*ids, *following])


def continued(
    engine: Engine, ids: list[int], vocab_size: int, ends: Collection[int], how: Sampling, drawn: int = 0
) -> Iterator[int]:
    """The tokens that follow, up to one of `ends`, which is not among them. vocab_size: the model may have
    more. drawn: how many were chosen with this seed before."""
    ids = list(ids)
    for i in range(how.tokens):
        logits = engine.logits(torch.tensor([ids[-how.seq_len :]]))[0].cpu()[:vocab_size]
        choice = _choose(logits, how, rng.make_key(how.seed, "sample", step=drawn + i))
        if choice in ends:
            return
        ids.append(choice)
        yield choice


def _choose(logits: torch.Tensor, how: Sampling, key: rng.Key) -> int:
    """One token by the Gumbel-max trick, which needs one uniform number per piece of the vocabulary."""
    if how.temperature == 0:
        return int(logits.argmax())
    if how.top_k:
        least = logits.topk(min(how.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    gumbel = -(-rng.uniform(key, 0, len(logits)).log()).log()
    return int((logits / how.temperature + gumbel).argmax())
