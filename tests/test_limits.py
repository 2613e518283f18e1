"""Limits of a step: what is above them changes nothing, and what is below them changes no bit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.engine import AutogradEngine, EngineSettings, LayerwiseEngine, autograd, common, layerwise
from lowres.model import Units
from lowres.rooms import Homes, Rooms
from tests.helpers import CPU, Recorder, make_batch, make_config, make_optimizer, make_units, stored_tensors

NAMES = ("embed", "layers.0", "layers.1", "layers.2", "head")
EVERYTHING = Homes(frozenset(NAMES), frozenset(NAMES), 3, True)
Engine = LayerwiseEngine | AutogradEngine
CASES: dict[str, tuple[type[Engine], float, Homes]] = {
    "layerwise": (LayerwiseEngine, 0.0, Homes()),
    "layerwise, host": (LayerwiseEngine, 0.0, EVERYTHING),
    "layerwise, clipped": (LayerwiseEngine, 0.1, Homes()),
    "layerwise, clipped, host": (LayerwiseEngine, 0.1, EVERYTHING),
    "autograd": (AutogradEngine, 0.0, Homes()),
    "autograd, clipped": (AutogradEngine, 0.1, Homes()),
}


def made(case: str) -> tuple[Engine, Units]:
    """An engine that has taken one step."""
    engine_type, clip, homes = CASES[case]
    config, rooms = make_config(optim={"weight_decay": 0.1}, memory={"weights": "int8"}), Rooms(CPU)
    units = make_units(config.model, "int8")
    optimizer = make_optimizer(config, units, rooms)
    settings = EngineSettings(3, torch.float32, band=2, homes=homes, grad_clip=clip)
    engine = engine_type(config.model, units, optimizer, rooms, settings)
    engine.step(make_batch(), 0, 1.0)
    return engine, units


def changed(units: Units, before: dict[str, Tensor]) -> set[str]:
    """Units of which any bit is different."""
    return {
        name
        for name, unit in units.items()
        if any(not torch.equal(tensor, before[key]) for key, tensor in unit.tensors().items())
    }


@pytest.mark.parametrize("case", CASES)
def test_the_norms_are_those_of_the_gradients(case: str) -> None:
    engine_type, clip, homes = CASES[case]
    config = make_config().model
    units, recorder = make_units(config), Recorder()
    unclipped = LayerwiseEngine(config, units, recorder, Rooms(CPU), EngineSettings(3, torch.float32))
    unclipped.step(make_batch(), 0, 1.0)
    settings = EngineSettings(3, torch.float32, homes=homes, grad_clip=clip)
    report = engine_type(config, units, Recorder(), Rooms(CPU), settings).step(make_batch(), 0, 1.0)
    assert tuple(report.norms) == NAMES
    for name, unit in units.items():
        own = torch.cat([recorder.grads[spec.name].flatten() for spec in unit.spec.trained])
        assert report.norms[name] == pytest.approx(float(own.double().norm()), rel=1e-5)
    assert math.hypot(*report.norms.values()) == pytest.approx(report.grad_norm, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_a_million_times_larger_changes_nothing(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine, units), (other, others) = made(case), made(case)
    normal = other.step(make_batch(seed=1), 1, 1.0)
    limit = 100 * normal.grad_norm
    before = stored_tensors(units)
    with monkeypatch.context() as patch:
        real = common.split

        def fewer_targets(*arguments: Any) -> tuple[Any, Any, float]:
            inputs, targets, count = real(*arguments)
            return inputs, targets, count / 10**6

        for module in (autograd, layerwise):
            patch.setattr(module, "split", fewer_targets)
        report = engine.step(make_batch(seed=1), 1, 1.0, norm_limit=limit)
        assert report.skipped == len(NAMES)
    for name, norm in report.norms.items():
        assert norm == pytest.approx(10**6 * normal.norms[name], rel=1e-3)
    assert not changed(units, before)
    # the next step is what it is without the refused one
    assert engine.step(make_batch(seed=1), 1, 1.0, norm_limit=limit) == normal
    assert not changed(units, stored_tensors(others))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("above", NAMES)
def test_the_updates_end_at_the_unit_at_which_the_norm_exceeds_its_limit(case: str, above: str) -> None:
    """Or nothing is updated, if the norm is known before the first update."""
    (engine, units), (other, others) = made(case), made(case)
    normal = other.step(make_batch(seed=1), 1, 1.0)
    before = stored_tensors(units)
    so_far = math.hypot(*(normal.norms[name] for name in NAMES[NAMES.index(above) :]))
    report = engine.step(make_batch(seed=1), 1, 1.0, norm_limit=so_far * (1 - 1e-9))
    _, clip, _ = CASES[case]
    refused = NAMES if clip or isinstance(engine, AutogradEngine) else NAMES[: NAMES.index(above) + 1]
    assert report.skipped == len(refused)
    assert changed(units, before) == set(NAMES) - set(refused)
    assert changed(units, stored_tensors(others)) == set(refused)
    assert report.norms[above] == normal.norms[above]


@pytest.mark.parametrize("case", CASES)
def test_a_loss_above_its_limit_changes_nothing(case: str) -> None:
    engine, units = made(case)
    before = stored_tensors(units)
    report = engine.step(make_batch(seed=1), 1, 1.0, loss_limit=5.0)
    assert report.loss > 5 and report.skipped == len(NAMES) and not changed(units, before)
    assert not engine.step(make_batch(seed=1), 1, 1.0, loss_limit=report.loss).skipped
    assert changed(units, before) == set(NAMES)


@pytest.mark.parametrize("case", CASES)
def test_limits_that_are_not_reached_change_no_bit(case: str) -> None:
    (engine, units), (other, others) = made(case), made(case)
    normal = other.step(make_batch(seed=1), 1, 1.0)
    # the limit is the largest accepted norm, up to the rounding of its square
    limit = normal.grad_norm * (1 + 1e-12)
    assert engine.step(make_batch(seed=1), 1, 1.0, norm_limit=limit, loss_limit=normal.loss) == normal
    assert not changed(units, stored_tensors(others))


def test_the_engines_tell_their_micro_batch() -> None:
    assert {made(case)[0].micro_batch for case in CASES} == {3}
