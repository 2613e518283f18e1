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
    return evaluate_parts(engine, {"": windows}, token_bytes, sequences)


def evaluate_parts(
    engine: Engine, windows: dict[str, Tensor], token_bytes: Tensor, sequences: int
) -> dict[str, float]:
    """The same over the windows of all parts of a mixture together; if there are several, also
    val_loss/<name> of each."""
    total, count, size, losses = 0.0, 0, 0, {}
    for name, of_part in windows.items():
        nats, targets = 0.0, 0
        for batch in of_part.split(sequences):
            in_batch, targets_in_it = engine.evaluate(batch)
            nats, targets = nats + in_batch, targets + targets_in_it
        total, count, losses[f"val_loss/{name}"] = total + nats, count + targets, nats / targets
        counted = inputs_and_targets(of_part)[1]
        size += int(token_bytes[counted[counted != IGNORED]].sum())
    loss = total / count
    scores = {"val_loss": loss, "val_ppl": math.exp(loss) if loss < 700 else math.inf}
    if size:
        scores["val_bits_per_byte"] = total / math.log(2) / size
    return scores | (losses if len(losses) > 1 else {})
