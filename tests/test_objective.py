"""Losses of examples and pairs, against their formulas."""

import math

import pytest
import torch

from lowres.config import ObjectiveConfig
from lowres.objective import Examples, Preference, make_objective

SUMS = torch.tensor([-6.0, -20.0, -3.0, -8.0], dtype=torch.float64)
COUNTS = torch.tensor([3, 8, 2, 4])
REFERENCE = torch.tensor([-7.5, -18.0, -3.2, -6.0], dtype=torch.float64)
# the second pair comes first, and its rejected answer before its chosen one
ORDER = torch.tensor([3, 2, 0, 1])


def by_hand(kind: str, beta: float, gamma: float) -> float:
    change = [float(s - r) for s, r in zip(SUMS, REFERENCE, strict=True)]
    mean = [c / int(n) for c, n in zip(change, COUNTS, strict=True)]
    own = [float(s) / int(n) for s, n in zip(SUMS, COUNTS, strict=True)]
    losses = []
    for chosen, rejected in ((2, 3), (1, 0)):
        if kind == "ipo":
            losses.append((mean[chosen] - mean[rejected] - 1 / (2 * beta)) ** 2)
            continue
        values = {"sigmoid_norm": mean, "sigmoid": change, "simpo": own}[kind]
        x = beta * (values[chosen] - values[rejected]) - (gamma if kind == "simpo" else 0)
        losses.append(-math.log(1 / (1 + math.exp(-x))))
    return sum(losses) / 2


@pytest.mark.parametrize("kind", ["sigmoid_norm", "sigmoid", "ipo", "simpo"])
def test_the_losses_of_pairs(kind: str) -> None:
    config = ObjectiveConfig(name="dpo", loss=kind, beta=0.7, gamma=0.3)  # type: ignore[arg-type]
    objective = make_objective(config)
    assert isinstance(objective, Preference) and not objective.linear
    reference = REFERENCE if objective.has_reference else None
    loss, readings = objective(Examples(SUMS, COUNTS, reference, ORDER))
    assert float(loss) == pytest.approx(by_hand(kind, 0.7, 0.3), rel=1e-12)
    found = dict(zip(objective.names, map(float, readings), strict=True))
    assert found["length_chosen"] == 5 and found["length_rejected"] == 3.5
    assert found["logp_chosen"] == pytest.approx((-3 / 2 - 20 / 8) / 2)
    if kind == "sigmoid_norm":
        assert found["accuracy"] == 0.5
        drift = [float(s - r) / int(n) for s, r, n in zip(SUMS, REFERENCE, COUNTS, strict=True)]
        assert found["drift"] == pytest.approx(-sum(drift) / 4)


def test_the_mean_over_chats_weights_each_alike() -> None:
    objective = make_objective(ObjectiveConfig(name="sft", reduction="sequences"))
    assert objective is not None and objective.linear
    sums = SUMS.clone().requires_grad_()
    loss, _ = objective(Examples(sums, COUNTS))
    assert float(loss.detach()) == pytest.approx((6 / 3 + 20 / 8 + 3 / 2 + 8 / 4) / 4)
    (weights,) = torch.autograd.grad(loss, sums)
    assert weights.tolist() == pytest.approx([-1 / 12, -1 / 32, -1 / 8, -1 / 16])
    assert make_objective(ObjectiveConfig(name="sft")) is None
