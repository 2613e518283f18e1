"""Bits per byte, loss and perplexity of validation text, layer-major and without a stash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.data.chat.chat_data import Packed
from lowres.engine import Engine
from lowres.engine.common import Grouping
from lowres.objective import Examples, Preference
from lowres.scores import BITS, LOSS, OF, PERPLEXITY


def evaluate(engine: Engine, windows: Tensor, token_bytes: Tensor, sequences: int) -> dict[str, float]:
    """val_bits_per_byte, if tokens stand for text, val_loss (nats per token) and val_ppl over all targets of
    windows.

    windows: int64 [n, seq_len + 1], targets that do not count are IGNORED. token_bytes: int64
    [vocabulary], UTF-8 bytes that each token stands for. sequences: windows evaluated at one time.
    """
    return evaluate_parts(engine, {"": windows}, token_bytes, sequences)


def evaluate_parts(
    engine: Engine,
    windows: Mapping[str, Tensor],
    token_bytes: Tensor,
    sequences: int,
    beside: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The same over the windows of all parts of a mixture together; if there are several, also
    val_bits_per_byte/<name> and val_loss/<name> of each. beside: windows of texts with names, which have the
    same of their own and do not count in the scores of the whole."""
    sums = {name: _summed(engine, of_part, token_bytes, sequences) for name, of_part in windows.items()}
    whole = _Sums(*(sum(column) for column in zip(*sums.values(), strict=True)))
    named = sums if len(sums) > 1 else {}
    for name, of_text in (beside or {}).items():
        named = named | {name: _summed(engine, of_text, token_bytes, sequences)}
    scores = whole.scores()
    for name, found in named.items():
        scores |= {f"{key}{OF}{name}": value for key, value in found.scores().items() if key != PERPLEXITY}
    return scores


class _Sums(NamedTuple):
    """Of some windows. nats: of all targets. bytes: of the text that these stand for."""

    nats: float
    targets: int
    bytes: int

    def scores(self) -> dict[str, float]:
        loss = self.nats / self.targets
        bits = {BITS: self.nats / math.log(2) / self.bytes} if self.bytes else {}
        return bits | {LOSS: loss, PERPLEXITY: math.exp(loss) if loss < 700 else math.inf}


def _summed(engine: Engine, windows: Tensor, token_bytes: Tensor, sequences: int) -> _Sums:
    nats, targets = 0.0, 0
    for batch in windows.split(sequences):
        in_batch, targets_in_it = engine.evaluate(batch)
        nats, targets = nats + in_batch, targets + targets_in_it
    counted = inputs_and_targets(windows)[1]
    return _Sums(nats, targets, int(token_bytes[counted[counted != IGNORED]].sum()))


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
