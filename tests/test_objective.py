"""Losses of examples and pairs, against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.config import ObjectiveConfig
from lowres.data.batches import BEGINS, IGNORED, ONLY_READ
from lowres.engine import AutogradEngine, EngineSettings, LayerwiseEngine
from lowres.engine.common import MARKED
from lowres.model import Llama
from lowres.objective import Examples, Pairs, Preference, make_objective
from tests.helpers import ROOMS, Recorder, make_config, make_units

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


# examples of uneven lengths: ids, and which are trained
LENGTHS = (9, 3, 14, 6, 5, 11)
TRAINED = (4, 1, 13, 2, 3, 0)  # the last ones of each; nothing of the last example
PLACES = ((2, 3), (0, 4, 1), (5,))  # the examples of each window, in order
WINDOW = 20


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 300, (n,), generator=generator) for n in LENGTHS]


def windows() -> Tensor:
    made = torch.full((len(PLACES) + 1, WINDOW + 1), IGNORED)
    for row, places in zip(made, PLACES, strict=False):
        at = 0
        for i in places:
            ids = examples()[i].clone()
            ids[: len(ids) - TRAINED[i]] |= ONLY_READ
            ids[0] |= BEGINS
            row[at : at + len(ids)] = ids
            at += len(ids)
    made[-1, 0] = BEGINS | 5  # an example of one token, which is all padding
    return made


def of_each(model: Llama) -> list[Tensor]:
    """The log-probabilities of the trained tokens of every example alone, in the order of the windows."""
    found = []
    for i in (i for places in PLACES for i in places):
        ids = examples()[i]
        logs = model(ids[None, :-1])[0].log_softmax(-1)
        each = logs.gather(1, ids[1:, None])[:, 0]
        found.append(each[len(each) - TRAINED[i] :])
    return found


ORDER_OF_WINDOWS = torch.tensor([2, 1, 5, 0, 3, 4])  # 2 * pair + rejected
OBJECTIVES: dict[str, dict[str, Any]] = {
    "tokens": {"name": "sft"},
    "sequences": {"name": "sft", "reduction": "sequences"},
    "dpo": {"name": "dpo", "beta": 2.0},
    "sums": {"name": "dpo", "loss": "sigmoid", "beta": 0.5},
    "simpo": {"name": "dpo", "loss": "simpo", "gamma": 0.5},
}


def pairs_of(name: str) -> Pairs | None:
    if OBJECTIVES[name]["name"] != "dpo":
        return None
    reference = -torch.arange(6, dtype=torch.float64)
    return Pairs(ORDER_OF_WINDOWS, None if name == "simpo" else reference)


def wanted_loss(name: str, each: list[Tensor]) -> Tensor:
    if name == "tokens":
        return -torch.cat(each).mean()
    if name == "sequences":
        return -torch.stack([one.mean() for one in each if len(one)]).mean()
    losses = []
    for pair in range(3):
        chosen, rejected = ([*ORDER_OF_WINDOWS].index(2 * pair + k) for k in (0, 1))
        value = []
        for i in (chosen, rejected):
            change = each[i].sum() - (0 if name == "simpo" else -float(i))
            value.append(change if name == "sums" else change / max(1, len(each[i])))
        beta = OBJECTIVES[name].get("beta", 5.0)
        x = beta * (value[0] - value[1]) - (0.5 if name == "simpo" else 0)
        losses.append(-torch.nn.functional.logsigmoid(x))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("made", ["layerwise", "layerwise, clipped", "fused", "tied", "autograd"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_examples_have_the_gradients_of_each_alone(name: str, made: str) -> None:
    config = make_config(
        model={"tie_embeddings": made == "tied", "vocab_size": 300}, objective=OBJECTIVES[name]
    )
    fused = made == "fused"
    dtype, tolerance = (torch.float32, 2e-5) if fused else (torch.float64, 1e-6)
    units = make_units(config.model, dtype=dtype)
    engine_type = AutogradEngine if made == "autograd" else LayerwiseEngine
    settings = EngineSettings(
        *(3, dtype, 7),
        grad_clip=1e9 if made.endswith("clipped") else 0.0,
        fused=fused,
        starts=MARKED,
        objective=make_objective(config.objective),
    )
    recorder = Recorder()
    engine = engine_type(config.model, units, recorder, ROOMS, settings)
    batch = windows()[:3] if pairs_of(name) else windows()
    report = engine.step(batch, 0, 1.0, pairs=pairs_of(name))

    model = Llama(config.model).double()
    for unit in units.values():
        for tensor, storage in unit.weights.items():
            model.get_parameter(tensor).data = storage.dense(torch.float64)
    each = of_each(model)
    loss = wanted_loss(name, each)
    loss.backward()
    assert report.loss == pytest.approx(float(loss.detach()), rel=tolerance)
    for tensor, grad in recorder.grads.items():
        wanted = model.get_parameter(tensor).grad
        assert wanted is not None
        assert float((grad - wanted).norm() / wanted.norm()) < tolerance, tensor
    if pairs_of(name):
        assert report.readings.keys() == set(Preference.names)
        lengths = [len(each[i]) for i in range(6)]
        chosen = [lengths[[*ORDER_OF_WINDOWS].index(2 * pair)] for pair in range(3)]
        assert report.readings["length_chosen"] == pytest.approx(sum(max(1, n) for n in chosen) / 3)
