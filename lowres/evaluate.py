"""Loss, perplexity and bits per byte of validation text, layer-major and without a stash."""

from __future__ import annotations

import math

from torch import Tensor

from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.engine import Engine


def evaluate(engine: Engine, windows: Tensor, token_bytes: Tensor, sequences: int) -> dict[str, float]:
    """val_loss (nats per token), val_ppl and, if tokens stand for text, val_bits_per_byte over all targets of
    windows.

    windows: int64 [n, seq_len + 1], targets that do not count are IGNORED. token_bytes: int64
    [vocabulary], UTF-8 bytes that each token stands for. sequences: windows evaluated at one time.
    """
    total, count = 0.0, 0
    for batch in windows.split(sequences):
        part, targets_in_it = engine.evaluate(batch)
        total, count = total + part, count + targets_in_it
    _, targets = inputs_and_targets(windows)
    size = int(token_bytes[targets[targets != IGNORED]].sum())
    loss = total / count
    scores = {"val_loss": loss, "val_ppl": math.exp(loss) if loss < 700 else math.inf}
    return scores | {"val_bits_per_byte": total / math.log(2) / size} if size else scores
