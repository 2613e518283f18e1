"""Loss, perplexity and bits per byte of validation text, layer-major and without a stash."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.data.chat.chat_data import Packed
from lowres.engine import Engine
from lowres.engine.common import Grouping
from lowres.objective import Examples, Preference


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


def evaluate_pairs(
    engine: Engine, packed: Packed, objective: Preference, reference: Tensor | None, sequences: int
) -> dict[str, float]:
    """val_loss of the objective over pairs, and its readings, val_accuracy and so on. reference: fp64
    [examples], if the objective has one; see `Examples`."""
    sums = sums_of_examples(engine, packed.windows, sequences)
    counts = Grouping.of(packed.windows, None).counts
    loss, readings = objective(Examples(sums, counts, reference, packed.order))
    return {"val_loss": float(loss)} | {
        f"val_{name}": float(value) for name, value in zip(objective.names, readings, strict=True)
    }


def sums_of_examples(engine: Engine, windows: Tensor, sequences: int) -> Tensor:
    """fp64 [examples]: the log-probability of the targets of each example of windows, nats. sequences:
    windows computed at one time."""
    parts = [engine.log_probabilities(part)[0] for part in windows.split(sequences)]
    grouping = Grouping.of(windows, None)
    sums = torch.zeros(len(grouping.counts), dtype=torch.float64)
    return sums.index_add_(0, grouping.owner.flatten(), torch.cat(parts).flatten().double())
