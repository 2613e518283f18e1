"""Element-wise moments in fp32, bf16 and int8."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lowres import target
from lowres.errors import UserError
from lowres.meter import LiveTensors
from lowres.optim import Clock
from lowres.rules.adam_mini import AdamMiniRule
from lowres.rules.adamw import AdamWRule
from lowres.rules.base import Rule
from lowres.rules.moments import KINDS, Moment, flat_chunks, moment_fields
from tests.helpers import CPU, ROOMS, SMALL, make_batch, make_config, make_optimizer, make_units
from tests.rules import BETAS, new_state, random_grads, run_rule, spec_of, state_bytes

YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture(autouse=True)
def _bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")


def rule_of(name: str, kind: str) -> Rule:
    return AdamWRule(BETAS, 1e-8, kind) if name == "adamw" else AdamMiniRule(BETAS, 1e-8, 8, kind)


def clock(step: int, accepted: Tensor = YES) -> Clock:
    return Clock(step, torch.tensor(step + 1), accepted, 0)


def test_bytes_per_element() -> None:
    big = spec_of((1024, 1024))
    sizes = {kind: state_bytes(rule_of("adamw", kind), big) / big.numel / 2 for kind in KINDS}
    assert sizes == {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}
    for kind in KINDS:
        norm = spec_of((1024,), "norm")
        assert moment_fields("exp_avg", norm.shape, kind) == {"exp_avg": (torch.float32, (1024,))}
        # and as it is held: nothing else is kept
        state = new_state(rule_of("adamw", kind), big)
        assert sum(t.untyped_storage().nbytes() for t in state.values()) == 2 * sizes[kind] * big.numel
    assert moment_fields("m", (5, 100), "int8")["m.absmax"] == (torch.float32, (2,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_zero_bytes_are_a_moment_of_zero(kind: str, signed: bool) -> None:
    spec = spec_of((3, 200))
    state = new_state(rule_of("adamw", kind), spec)
    kept = Moment(spec, "exp_avg", state, clock(0), signed)
    for part in flat_chunks(600, CPU):
        assert torch.equal(kept.read(part), torch.zeros(600))
    if kind == "int8":
        state["exp_avg"].fill_(255)
        assert not kept.read(slice(512, 600)).any()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_reads_back_what_was_written(kind: str, signed: bool) -> None:
    """To within the rounding of its format; the last of the blocks is a short one."""
    spec = spec_of((3, 200))
    values = torch.randn(600, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 600)
    values = values if signed else values.abs()
    state = new_state(rule_of("adamw", kind), spec)
    kept = Moment(spec, "exp_avg", state, clock(0), signed)
    for part in (slice(0, 256), slice(256, 600)):
        kept.write(kept.read(part).copy_(values[part]), part)
    error = (kept.read(slice(0, 600)) - values).abs()
    top = torch.cat([block.abs().amax().expand(len(block)) for block in values.split(256)])
    # the dynamic map has 64 values of each sign, or 128, in the decade below a block's largest value;
    # bitsandbytes finds the nearest to within 3e-5 of the largest
    gap = 0.9 / 64 if signed else 0.9 / 128
    allowed = {"fp32": 0 * top, "bf16": values.abs() * 2**-7, "int8": top * gap * 0.52}[kind]
    assert (error <= allowed).all()
    # and is finer further down: 32 or 64 values in the next decade
    if kind == "int8":
        assert (error <= top * gap / 5 * 0.52)[values.abs() < top / 11].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_a_refused_update_keeps_the_state_bit_for_bit(name: str, kind: str) -> None:
    rule, spec = rule_of(name, kind), spec_of((24, 50))
    state = new_state(rule, spec)
    grads = random_grads(spec.shape, 6)
    grads[5][3] = -10 * grads[5][3].abs()  # in int8, blocks whose largest value is negative
    for step, grad in enumerate(grads):
        rule.directions([spec], [grad], [state], 1e-3, clock(step))
    before = {key: t.clone() for key, t in state.items()}
    for step in range(6, 12):
        (factor,) = rule.directions([spec], [torch.zeros(spec.shape)], [state], 1e-3, clock(step, NO))
        assert not factor.any()
    assert all(torch.equal(t.view(torch.uint8), before[k].view(torch.uint8)) for k, t in state.items())
    rule.directions([spec], [torch.zeros(spec.shape)], [state], 1e-3, clock(12))
    assert not all(torch.equal(t, before[key]) for key, t in state.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_the_chunk_size_changes_nothing(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, grads = torch.randn(40, 53), random_grads((40, 53), 5)
    results = []
    for chunk in (1 << 17, 1000, 1):
        monkeypatch.setattr(target, "CHUNK_CPU", chunk)
        weight, state, _ = run_rule(rule_of(name, kind), start, grads, 1e-2, role="q")
        results.append(state | {"weight": weight})
    assert len(flat_chunks(40 * 53, CPU)) == 9 and flat_chunks(40 * 53, CPU)[-1] == slice(2048, 2120)
    for other in results[1:]:
        assert all(torch.equal(t, results[0][key]) for key, t in other.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_no_temporary_is_as_large_as_the_gradient(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "CHUNK_CPU", 1 << 13)
    rule, spec = rule_of(name, kind), spec_of((512, 1024))
    state, grad = new_state(rule, spec), torch.randn(spec.shape)
    rule.directions([spec], [grad], [state], 1e-3, clock(0))
    with LiveTensors() as live:
        rule.directions([spec], [grad], [state], 1e-3, clock(1))
    assert 0 < live.peak["gpu"] < 8 * 4 * (1 << 13)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_a_second_moment_decays(kind: str) -> None:
    """Rounded to nearest, a bf16 moment of 1 stays 1 for ever under beta2 = 0.999."""
    assert float(torch.tensor(1.0).bfloat16() * torch.tensor(0.999)) > 0.998
    assert float((torch.tensor(1.0) * 0.999).bfloat16()) == 1.0
    rule, spec = AdamWRule(BETAS, 1e-8, kind), spec_of((64, 64))
    state = new_state(rule, spec)
    state["exp_avg_sq"].fill_(1.0)
    for step in range(1000):
        rule.directions([spec], [torch.zeros(spec.shape)], [state], 1e-3, clock(step))
    # one element ends within a few percent, the mean of 4096 far closer
    value = state["exp_avg_sq"].double()
    wanted = 0.999**1000
    assert abs(float(value.mean()) - wanted) < 0.004 * wanted
    assert (value - wanted).abs().max() < 0.4 * wanted


def test_bf16_moments_are_unbiased() -> None:
    """The mean over many weights that see the same gradients is the fp32 moment."""
    spec = spec_of((128, 128))
    states = {}
    for kind in ("fp32", "bf16"):
        rule = AdamWRule(BETAS, 1e-8, kind)
        states[kind] = new_state(rule, spec)
        generator = torch.Generator().manual_seed(1)
        for step in range(200):
            grad = torch.randn((), generator=generator).expand(spec.shape).clone()
            rule.directions([spec], [grad], [states[kind]], 1e-3, clock(step))
    for key in ("exp_avg", "exp_avg_sq"):
        value, wanted = states["bf16"][key].double(), float(states["fp32"][key][0, 0])
        assert value.std() > 0  # each element has random bits of its own
        assert abs(float(value.mean()) - wanted) < 4 * float(value.std()) / 128
        assert float(value.std()) < 0.03 * abs(wanted)


@pytest.mark.parametrize("kind, tolerance", [("bf16", 0.01), ("int8", 0.04)])
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_low_precision_follows_fp32(name: str, kind: str, tolerance: float) -> None:
    start, grads = torch.randn(64, 80) * 0.02, random_grads((64, 80), 50)
    wanted, _, _ = run_rule(rule_of(name, "fp32"), start, grads, 1e-3)
    value, _, _ = run_rule(rule_of(name, kind), start, grads, 1e-3)
    assert 0 < float((value - wanted).norm() / (wanted - start).norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_every_kind_minimises_a_quadratic(name: str, kind: str) -> None:
    """f(W) = sum of c (W - 1)^2 / 2 with curvatures c over two decades, from noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-1, 1, 600).view(24, 25)[torch.randperm(24, generator=generator)]
    rule, spec = rule_of(name, kind), spec_of((24, 25))
    weight, state = torch.zeros(spec.shape), new_state(rule, spec)
    for step in range(600):
        grad = curvature * (weight - 1) + 0.1 * torch.randn(spec.shape, generator=generator)
        lr = 0.02 * (1 - step / 600)
        (factor,) = rule.directions([spec], [grad], [state], lr, clock(step))
        weight -= factor * grad
    assert float((curvature * (weight - 1).square()).sum() / curvature.sum()) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp32"])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_adamw_equals_bitsandbytes(spread: float, kind: str) -> None:
    """Same map, blocks and order of operations; only the last fp32 bits, and with them now and then a
    code, differ. With gradients of unlike size (log-normal) both are equally far from fp32."""
    from bitsandbytes.optim import AdamW

    size = torch.exp(spread * torch.randn(64, 80, generator=torch.Generator().manual_seed(0)))
    start, *grads = (g * size for g in random_grads((64, 80), 21))
    parameter = torch.nn.Parameter(start.clone())
    bits = {"int8": 8, "fp32": 32}[kind]
    oracle = AdamW(
        [parameter], lr=1e-3, betas=BETAS, eps=1e-8, weight_decay=0.1, optim_bits=bits, min_8bit_size=16
    )
    for grad in grads:
        parameter.grad = grad.clone()
        oracle.step()
    assert oracle.state[parameter]["state1"].dtype == {"int8": torch.uint8, "fp32": torch.float32}[kind]
    value, state, _ = run_rule(AdamWRule(BETAS, 1e-8, kind), start, grads, 1e-3, decay=0.1)
    moved = float((parameter.detach() - start).norm())
    assert float((value - parameter.detach()).norm()) < 1e-5 * moved
    if kind == "int8":
        assert float((state["exp_avg"] != oracle.state[parameter]["state1"]).float().mean()) < 1e-3
        assert torch.allclose(state["exp_avg_sq.absmax"], oracle.state[parameter]["absmax2"], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_every_kind_learns_a_batch(name: str, kind: str) -> None:
    from lowres.engine import Choice, make_engine

    config = make_config(optim={"name": name, "lr": 3e-3}, memory={"moments": kind})
    units = make_units(config.model, "int8")
    engine = make_engine(config, units, make_optimizer(config, units), ROOMS, Choice(3))
    losses = [engine.step(make_batch(), step, 1.0).loss for step in range(30)]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 1
    dtypes = {t.dtype for t in units["layers.0"].state["model.layers.0.mlp.up_proj.weight"].values()}
    assert {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[kind] in dtypes


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    units = make_units(SMALL)
    with pytest.raises(UserError) as caught:
        make_optimizer(make_config(optim={"name": "adamw"}, memory={"moments": "int8"}), units)
    message = str(caught.value)
    assert "\n" not in message
    assert "pip install bitsandbytes" in message and "memory.moments=bf16" in message
    make_optimizer(make_config(optim={"name": "adamw"}, memory={"moments": "bf16"}), units)


def test_importing_bitsandbytes_prints_nothing() -> None:
    code = "from lowres.rules.moments import bitsandbytes_functional as f; f()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
