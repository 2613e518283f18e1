"""The norm-growth limiter of every optimizer: what it lets through, and what it remembers."""

import pytest
import torch
from torch import Tensor

from lowres.catalogue import GROWTH, RULES
from lowres.config import Config
from lowres.config_file import parse_config
from lowres.errors import UserError
from lowres.memory import make_plan
from lowres.model import empty_units
from lowres.rooms import Rooms
from lowres.rules.limiter import limited
from lowres.storage import BIAS, NORM, TensorSpec, Unit
from tests.helpers import CPU, make_config, make_optimizer, make_units

FACTOR = 1.05


def config_of(name: str, limiter: float, **more: object) -> Config:
    return make_config(optim={"name": name, "limiter": limiter, **more}, memory={"weights": "fp32"})


def changes(
    config: Config, gradient_sizes: list[float], schedule: float = 1.0, refused: tuple[int, ...] = ()
) -> tuple[dict[str, list[float]], Unit]:
    """Norm of the change of each weight of a block at a rate of 1, a step after the other, and the block.
    The block starts at zero, so that fp32 has the changes without loss."""
    units = make_units(config.model)
    optimizer = make_optimizer(config, units)
    unit, generator = units["layers.1"], torch.Generator().manual_seed(2)
    weights = {name: storage.dense(torch.float32).zero_() for name, storage in unit.weights.items()}
    found: dict[str, list[float]] = {name: [] for name in weights}
    assert config.optim.lr is not None
    for step, size in enumerate(gradient_sizes):
        before = {name: weight.double() for name, weight in weights.items()}
        grads = {n: 1e-2 * size * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
        optimizer.update(unit, grads, step, schedule, torch.tensor(step not in refused))
        for name, weight in weights.items():
            norm = float((weight.double() - before[name]).norm())
            found[name].append(norm / (config.optim.lr * schedule))
    return found, unit


def limits(name: str, spec: TensorSpec) -> bool:
    """Whether an optimizer updates a tensor itself, and not with AdamW."""
    return (NORM if spec.kind == BIAS else spec.kind) in RULES[name].kinds


SPIKE = [1.0] * 8 + [1000.0] + [1.0] * 3


@pytest.mark.parametrize("name", RULES)
def test_a_spike_grows_no_update_by_more_than_the_factor(name: str) -> None:
    found, unit = changes(config_of(name, FACTOR), SPIKE)
    for spec in unit.spec.tensors:
        limited_here = limits(name, spec)
        assert ("norm" in unit.state[spec.name]) == limited_here, spec.name
        if limited_here and name != "fira":  # whose projected part passes
            norms = found[spec.name]
            assert norms[0] > 0
            assert norms[8] <= FACTOR * norms[7] * (1 + 1e-5), (spec.name, norms)


def test_a_spike_grows_the_rest_of_fira_by_no_more() -> None:
    norms = []
    for steps in (8, 9):
        _, unit = changes(config_of("fira", FACTOR), SPIKE[:steps])
        norms.append({n: float(state["norm"]) for n, state in unit.state.items() if "norm" in state})
    assert len(norms[0]) == 7
    assert all(norms[1][n] <= FACTOR * norms[0][n] * (1 + 1e-5) for n in norms[0])


@pytest.mark.parametrize("name", RULES)
def test_without_it_nothing_is_kept(name: str) -> None:
    found, unit = changes(config_of(name, 0), SPIKE)
    assert not any("norm" in state for state in unit.state.values())
    if name == "sgd":
        assert all(norms[8] > 100 * norms[7] for norms in found.values())


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam-mini"])
def test_the_learning_rate_is_no_growth(name: str) -> None:
    """The same updates at any rate, of which a warm-up has many; a rate of zero is none to remember."""
    sizes = [1.0, 3.0, 0.5, 2.0]
    whole, _ = changes(config_of(name, FACTOR), sizes)
    tenth, unit = changes(config_of(name, FACTOR), sizes, schedule=0.1)
    for key, norms in whole.items():
        assert tenth[key] == pytest.approx(norms, rel=1e-4)
        assert float(unit.state[key]["norm"]) == pytest.approx(norms[-1], rel=1e-4)
    units = make_units(config_of(name, FACTOR).model)
    optimizer = make_optimizer(config_of(name, FACTOR), units)
    unit = units["layers.1"]
    grads = {key: torch.ones(weight.shape) for key, weight in unit.weights.items()}
    optimizer.update(unit, grads, 0, 0.0, torch.tensor(True))  # the first step of a warm-up
    assert all(float(state["norm"]) > 0 for state in unit.state.values())


@pytest.mark.parametrize("name", ["sgd", "adamw8bit", "galore", "scale", "racs"])
def test_a_refused_step_is_not_remembered(name: str) -> None:
    config = config_of(name, FACTOR, betas=(0.0, 0.9))
    _, wanted = changes(config, [1.0, 1.0])
    found, unit = changes(config, [1.0, 1.0, 1000.0], refused=(2,))
    for key, norms in found.items():
        assert norms[2] == 0
        if "norm" in unit.state[key]:
            assert torch.equal(unit.state[key]["norm"], wanted.state[key]["norm"])


def test_nothing_to_limit_changes_nothing() -> None:
    """A limit that is never met leaves the weights of the same optimizer without one."""
    for name in ("adamw", "adam-mini", "galore", "sgd", "scale", "muon", "sinkgd"):
        free, _ = changes(config_of(name, 0), SPIKE)
        wide, _ = changes(config_of(name, 1e6), SPIKE)
        assert all(wide[key] == pytest.approx(free[key], rel=1e-5) for key in free)


@pytest.mark.parametrize("shape", [(), (6, 1), (1, 4)], ids=["tensor", "rows", "columns"])
@pytest.mark.parametrize("matrix", [(6, 4), (1, 4), (6, 1)])
def test_factors_of_any_shape(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    shape = tuple(min(a, b) for a, b in zip(shape, matrix, strict=True)) if shape else ()
    direction, factor = torch.randn(matrix), torch.rand(shape) + 0.5
    norm = float((factor * direction).norm())
    state = {"norm": torch.tensor(norm / 3)}
    (found,) = limited([direction], [factor], [state], torch.tensor(True), 1.5)
    assert found.shape == factor.shape
    assert float((found * direction).norm()) == pytest.approx(norm / 2, rel=1e-5)
    assert float(state["norm"]) == pytest.approx(norm / 2, rel=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_its_memory_is_planned_and_saved(name: str) -> None:
    config = config_of(name, FACTOR)
    rooms = Rooms(CPU)
    units = empty_units(config.model, "fp32", "fp32", rooms)
    make_optimizer(config, units, rooms)
    tensors: dict[str, Tensor] = {}
    for unit in units.values():
        tensors |= unit.tensors()  # what a checkpoint has
    limited_tensors = [key for key in tensors if key.endswith(".norm")]
    specs = [spec for unit in units.values() for spec in unit.spec.tensors]
    assert len(limited_tensors) == sum(limits(name, spec) for spec in specs)
    slabs = sum(unit.state_slab.nbytes for unit in units.values() if unit.state_slab is not None)
    assert make_plan(config, CPU).size("optimizer state", "gpu") == slabs


def test_defaults_are_the_published_ones() -> None:
    for name in RULES:
        wanted = GROWTH if name in ("apollo", "apollo-mini", "fira", "racs") else 0
        assert parse_config({"optim": {"name": name}})[0].optim.limiter == wanted
    for value in (0.5, -1.0):
        with pytest.raises(UserError, match=r"^config: optim\.limiter: .* use a factor of at least 1"):
            parse_config({"optim": {"limiter": value}})
    assert parse_config({"optim": {"limiter": 1}})[0].optim.limiter == 1
