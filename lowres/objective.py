"""What a step minimises when that is not the mean loss of its tokens: a function of the log-probabilities of
its examples.

An engine adds up the log-probability of each example, asks for the loss, and gives each token of an example
the derivative of the loss by that sum as its weight. A *linear* loss has the same derivative everywhere, so
it is known before any log-probability is.

Sources: DPO, Rafailov et al. (arXiv 2305.18290); length-normalised, as Tulu 3 (arXiv 2411.15124) and SmolTulu
(arXiv 2412.08347) use it; IPO, Azar et al. (arXiv 2310.12036); SimPO, Meng et al. (arXiv 2405.14734).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lowres.config import ObjectiveConfig


class Examples(NamedTuple):
    """The examples of a step, in the order of its windows, all [E]. sums: log-probability of the trained
    tokens, nats, fp64; counts: how many these are. reference: the same sums under the model before tuning;
    order: 2 * pair + (1 if it is the rejected one); both only with pairs."""

    sums: Tensor
    counts: Tensor
    reference: Tensor | None = None
    order: Tensor | None = None


class Pairs(NamedTuple):
    """See `Examples`, on the host. reference: None for an objective without one."""

    order: Tensor
    reference: Tensor | None


class Objective(Protocol):
    """linear: whether the derivatives do not depend on the sums. names: of the readings."""

    @property
    def linear(self) -> bool: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, examples: Examples) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, fp64 scalar, and readings for the metrics, by `names`."""


def make_objective(config: ObjectiveConfig) -> Objective | None:
    """None if the mean over all trained tokens of the step is minimised."""
    if config.name == "dpo":
        return Preference(config.loss, config.beta, config.gamma)
    return MeanOfExamples() if config.name == "sft" and config.reduction == "sequences" else None


def has_reference(config: ObjectiveConfig) -> bool:
    """Whether the loss compares with the model before tuning."""
    objective = make_objective(config)
    return isinstance(objective, Preference) and objective.has_reference


class MeanOfExamples:
    """The mean over examples of the mean loss of their tokens."""

    linear = True
    names: tuple[str, ...] = ()

    def __call__(self, examples: Examples) -> tuple[Tensor, tuple[Tensor, ...]]:
        sums, counts, *_ = examples
        return -(sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1), ()


# from beta * (how much more likely the chosen example has become than the rejected one), and beta, gamma
_LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid_norm": lambda margin, beta, gamma: -F.logsigmoid(margin),
    "sigmoid": lambda margin, beta, gamma: -F.logsigmoid(margin),
    "ipo": lambda margin, beta, gamma: (margin / beta - 1 / (2 * beta)).square(),
    "simpo": lambda margin, beta, gamma: -F.logsigmoid(margin - gamma),
}


@dataclass(frozen=True)
class Preference:
    """Losses of pairs, as the mean over pairs. kind: a key of _LOSSES; all but sigmoid take the mean over the
    tokens of an example, and simpo has no reference."""

    kind: str
    beta: float
    gamma: float

    linear = False
    names = (
        *("accuracy", "margin", "reward_chosen", "reward_rejected"),
        *("logp_chosen", "logp_rejected", "length_chosen", "length_rejected", "drift"),
    )

    @property
    def has_reference(self) -> bool:
        return self.kind != "simpo"

    def __call__(self, examples: Examples) -> tuple[Tensor, tuple[Tensor, ...]]:
        sums, counts, reference, order = examples
        assert order is not None and (reference is not None or not self.has_reference)
        lengths = counts.clamp(min=1).to(sums.dtype)
        change = sums - reference.to(sums.dtype) if self.has_reference and reference is not None else sums
        means, of_tokens = change / lengths, sums / lengths
        reward = self.beta * (change if self.kind == "sigmoid" else means)
        # row 0: chosen, row 1: rejected, by pair
        by_pair = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        chosen, rejected = by_pair.view(-1, 2).T
        margin = reward[chosen] - reward[rejected]
        loss = _LOSSES[self.kind](margin, self.beta, self.gamma).mean()
        with torch.no_grad():
            readings = [(margin > 0).to(sums.dtype).mean(), margin.mean()]
            for values in (reward, of_tokens, lengths):
                readings += [values[chosen].mean(), values[rejected].mean()]
            readings.append(-means.mean() if self.has_reference else torch.zeros_like(loss))
        return loss, tuple(readings)
