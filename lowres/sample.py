"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowres import rng
from lowres.data import Tokenizer
from lowres.engine import Engine


def sample(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    seq_len: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The prompt continued by up to `tokens` tokens; the last seq_len tokens are the context.

    temperature 0 always takes the likeliest token; top_k 0 chooses among all. The same seed gives the
    same text.
    """
    ids = tokenizer.prompt(prompt)
    following = continuation(engine, tokenizer, ids, tokens, seq_len, temperature, top_k, seed)
    return tokenizer.decode([*ids, *following])


def continuation(
    engine: Engine,
    tokenizer: Tokenizer,
    ids: list[int],
    tokens: int,
    seq_len: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow ids, until the document is over; see `sample`."""
    ids = list(ids)
    for i in range(tokens):
        logits = engine.logits(torch.tensor([ids[-seq_len:]]))[0].cpu()[: tokenizer.vocab_size]
        choice = _choose(logits, temperature, top_k, rng.make_key(seed, "sample", step=i))
        if choice == tokenizer.end_id:
            break
        ids.append(choice)
        yield choice


def _choose(logits: torch.Tensor, temperature: float, top_k: int, key: rng.Key) -> int:
    """One token by the Gumbel-max trick, which needs one uniform number per piece of the vocabulary."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    gumbel = -(-rng.uniform(key, 0, len(logits)).log()).log()
    return int((logits / temperature + gumbel).argmax())
