"""Merges and resets: nothing changes but where a change is kept, and no update after it is too large."""

from __future__ import annotations

import pytest
import torch

from lowres.optim import Clock
from lowres.optim.schedule import factor
from lowres.relora import effective_rank, forget, merge
from lowres.rules.moments import Moment
from lowres.storage import TensorSpec, Unit
from tests.helpers import RELORA, make_batch, make_config, relora_config, stored_tensors, with_adapters


@pytest.mark.parametrize("engine_name", ["layerwise", "autograd"])
def test_a_merge_leaves_the_function_unchanged_and_the_adapters_new(engine_name: str) -> None:
    config = relora_config(engine=engine_name)
    units, relora, engine = with_adapters(config)
    tokens = make_batch(2)[:, :-1]
    for step in range(2):
        engine.step(make_batch(seed=step), step, 1.0)
    before = engine.logits(tokens)
    frozen = {s.name for unit in units.values() for s in unit.spec.tensors if s.frozen}
    assert len(frozen) == 21
    moved = stored_tensors(units)
    for unit in units.values():
        relora._merge(unit, 3)
    torch.testing.assert_close(engine.logits(tokens), before, rtol=0, atol=1e-5)
    after = stored_tensors(units)
    assert all(not torch.equal(after[n], moved[n]) for n in frozen)
    assert all(not after[n].any() for n in after if n.endswith("lora_B.weight"))
    found = relora.readings(3)
    assert found["merge_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["merge_norm"] == pytest.approx(1, abs=1e-5)


def one_matrix(weights: str) -> tuple[Unit, str]:
    units, _, _ = with_adapters(relora_config(weights))
    unit = units["layers.0"]
    return unit, next(spec.name for spec in unit.spec.tensors if spec.role == "q")


def test_a_merge_into_int8_is_right_on_average() -> None:
    unit, name = one_matrix("int8")
    spec = next(s for s in unit.spec.tensors if s.name == name)
    b = unit.spec.adapters["q.lora_b"]
    unit.fill(b.name, iter([(0, torch.randn(b.shape, generator=torch.Generator().manual_seed(0)) * 1e-4)]))
    start = {key: t.clone() for key, t in unit.weights[name].tensors().items()}
    before = unit.weights[name].dense(torch.float64).clone()
    a64, b64 = (unit.weights[unit.spec.adapters[f"q.lora_{part}"].name].dense(torch.float64) for part in "ab")
    intended = 2.0 * b64 @ a64
    total, rounds = torch.zeros_like(before), 400
    for i in range(rounds):
        sums = merge(unit, spec, 2.0, seed=i, step=7)
        applied = unit.weights[name].dense(torch.float64) - before
        assert sums[1].item() == pytest.approx(applied.square().sum().item(), rel=1e-3)
        total += applied
        for key, tensor in unit.weights[name].tensors().items():
            tensor.copy_(start[key])
    code = start[".scales"].double()
    assert (intended.abs() / code).max() < 0.5  # far below a code, or the test says little
    # a rounded change has at most a quarter of a squared code as variance, over all elements together
    error = (total / rounds - intended) / code
    bound = (intended.abs() / code).sum().sqrt() / rounds**0.5
    assert error.sum().abs() < 5 * bound
    along = (total / rounds * intended).sum() / intended.square().sum()
    assert along == pytest.approx(1, abs=0.1)


def moments_of(unit: Unit, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    clock, state = Clock(3, torch.tensor(3), torch.tensor(True), 0), unit.state[spec.name]
    first = Moment(spec, "exp_avg", state, clock, signed=True)
    second = Moment(spec, "exp_avg_sq", state, clock, signed=False)
    return first.read(slice(0, spec.numel)), second.read(slice(0, spec.numel))


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_the_first_update_after_a_reset_is_bounded(reset: str, moments: str) -> None:
    if moments == "int8":
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    config = relora_config(
        relora__reset=reset, relora__reset_keep=0.1, optim__lr=1e-3, memory__moments=moments
    )
    assert config.optim.betas == (0.9, 0.999)
    units, _, engine = with_adapters(config)
    for step in range(3):
        engine.step(make_batch(seed=step), step, 1.0)
    for unit in units.values():
        for spec in unit.spec.adapters.values():
            m, v = moments_of(unit, spec)
            # on a CPU bitsandbytes puts 0 at 2e-5 of the largest of a block
            left = m.abs() > 1e-4 * m.abs().max()
            assert not left.any() if reset == "zero" else 0 < left.sum() <= 0.2 * spec.numel
            assert moments == "int8" or torch.equal(left, v != 0)
    before = stored_tensors(units)
    engine.step(make_batch(seed=3), 3, 1.0)
    after = stored_tensors(units)
    # by Cauchy and Schwarz an element of Adam moves by at most (1 - beta1) / sqrt(1 - beta2) /
    # sqrt(1 - beta1^2 / beta2) = 7.3 rates, whatever its gradients were
    for name in before:
        if "lora_" in name and name.endswith(".weight"):
            assert (after[name] - before[name]).abs().max() <= 7.3 * 1e-3


@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_a_first_moment_without_a_second_is_forgotten(reset: str) -> None:
    """In 8 bits the square of a small number may be lost where the number is not."""
    config = relora_config(relora__reset=reset, relora__reset_keep=0.9)
    unit = with_adapters(config)[0]["layers.0"]
    spec = unit.spec.adapters["q.lora_a"]
    m, v = moments_of(unit, spec)
    m.fill_(1.0)
    v[::2] = 1.0
    forget(unit, spec, {"exp_avg": True, "exp_avg_sq": False}, config.relora, seed=0, step=3)
    assert not m[1::2].any() and m[::2].sum() > 0 and torch.equal(m != 0, v != 0)


def test_the_sum_of_merges_has_the_rank_of_all_cycles() -> None:
    config = relora_config(relora__rank=2, relora__cycle_steps=4)
    units, _, engine = with_adapters(config)
    name = next(s.name for s in units["layers.0"].spec.tensors if s.role == "gate")
    start = units["layers.0"].weights[name].dense(torch.float64).clone()
    for step in range(12):
        engine.step(make_batch(seed=step), step, 1.0)
    values = torch.linalg.svdvals(units["layers.0"].weights[name].dense(torch.float64) - start)
    assert values[5] > 1e-3 * values[0] and values[6] < 1e-5 * values[0]


def test_effective_rank() -> None:
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(effective_rank(torch.ones(4, 7))) == pytest.approx(1, abs=1e-3)
    assert float(effective_rank(torch.zeros(4, 7))) == 0


def test_notches_fall_on_the_merges() -> None:
    config = make_config(
        relora={**RELORA, "start_step": 100, "cycle_steps": 50, "rewarmup_steps": 10}, train={"steps": 300}
    )
    assert config.schedule.name == "sawtooth" and config.schedule.cycle_steps == 50
    zeros = [step for step in range(1, 300) if factor(config, step) == 0]
    merges = [s for s in range(1, 301) if config.relora.merges_at(s) > config.relora.merges_at(s - 1)]
    assert zeros == [100, 150, 200, 250] and merges == [150, 200, 250, 300]
