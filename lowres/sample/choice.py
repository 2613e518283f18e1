"""How the next token is chosen from the logits of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowres import rng


@dataclass(frozen=True)
class Sampling:
    """How texts go on: by up to `tokens` tokens, with at most `seq_len` tokens as the context. temperature 0
    always takes the likeliest token; top_k 0 chooses among all. The same seed gives the same tokens."""

    tokens: int
    seq_len: int
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


def choose(logits: torch.Tensor, how: Sampling, seed: int, number: int) -> int:
    """One token for logits [V], on the host. seed, number: name the random numbers.

    By the Gumbel-max trick, which needs one uniform number per piece of the vocabulary."""
    if how.temperature == 0:
        return int(logits.argmax())
    if how.top_k:
        least = logits.topk(min(how.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    uniform = rng.uniform(rng.make_key(seed, "sample", step=number), 0, len(logits))
    return int((logits / how.temperature - (-uniform.log()).log()).argmax())
