"""The size of the updates is that of the weights' real change, and measuring it changes no bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.engine import Choice, make_engine
from lowres.model import Units
from lowres.optim import Optimizer
from lowres.rooms import Rooms
from lowres.storage import UnitSpec
from tests.helpers import (
    CPU,
    RELORA,
    dense_copy,
    make_batch,
    make_config,
    make_optimizer,
    make_units,
    stored_tensors,
    with_adapters,
)

BATCH = make_batch(sequences=4)


def run(name: str, weights: str, every: int, engine: str = "layerwise") -> tuple[Units, Optimizer, Any]:
    config = make_config(
        optim={"name": name, "lr": 0.01, "weight_decay": 0.0},
        memory={"weights": weights, "engine": engine},
        log={"update_every": every},
    )
    units, rooms = make_units(config.model, weights), Rooms(CPU)
    optimizer = make_optimizer(config, units, rooms)
    return units, optimizer, make_engine(config, units, optimizer, rooms, Choice(2))


def ratio(spec: UnitSpec, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """RMS of the change divided by the RMS of the weights before it, of all tensors of a unit together."""
    names = [tensor.name for tensor in spec.trained]
    change = sum(float((after[name] - before[name]).square().sum()) for name in names)
    return math.sqrt(change / sum(float(before[name].square().sum()) for name in names))


@pytest.mark.parametrize("engine", ["layerwise", "autograd"])
@pytest.mark.parametrize("name", ["adamw", "apollo", "fira", "muon"])
def test_it_is_the_change_of_the_weights(name: str, engine: str) -> None:
    units, optimizer, taught = run(name, "fp32", 2, engine)
    for step in range(4):
        before = dense_copy(units)
        taught.step(BATCH, step, 1.0)
        found, after = optimizer.readings(step + 1), dense_copy(units)
        if step % 2 == 0:
            assert found == {}
            continue
        wanted = {f"update/{unit}": ratio(own.spec, before, after) for unit, own in units.items()}
        assert found == {key: pytest.approx(value, rel=1e-4) for key, value in wanted.items()}


@pytest.mark.parametrize("name", ["adamw", "apollo-mini", "galore"])
@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_measuring_changes_no_bit(name: str, weights: str) -> None:
    results = []
    for every in (0, 1):
        units, optimizer, engine = run(name, weights, every)
        losses = [engine.step(BATCH, step, 1.0).loss for step in range(3)]
        results.append((losses, stored_tensors(units)))
        assert len(optimizer.readings(3)) == (len(units) if every else 0)
    (losses, tensors), (other_losses, other_tensors) = results
    assert losses == other_losses and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())


def test_a_refused_update_has_no_size() -> None:
    _, optimizer, engine = run("adamw", "int8", 1)
    engine.step(BATCH, 0, 1.0)
    assert all(0 < value < 1 for value in optimizer.readings(1).values())
    assert engine.step(BATCH, 1, 1.0, loss_limit=0.0).skipped == 5
    assert set(optimizer.readings(2).values()) == {0.0}


def test_of_adapters_it_is_the_size_of_what_is_trained() -> None:
    config = make_config(
        relora=RELORA | {"cycle_steps": 0},
        optim={"name": "adamw", "lr": 0.01},
        memory={"weights": "fp32"},
        log={"update_every": 1},
    )
    units, relora, engine = with_adapters(config)
    before = dense_copy(units)
    engine.step(make_batch(), 0, 1.0)
    after = dense_copy(units)
    for unit, own in units.items():
        assert relora.optimizer.readings(1)[f"update/{unit}"] == pytest.approx(
            ratio(own.spec, before, after), rel=1e-4
        )
