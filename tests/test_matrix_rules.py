"""SCALE, Muon, SinkGD and RACS compared with restatements in fp64 and with PyTorch; the linear int8 momentum;
what a run with them keeps."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

from lowres import target
from lowres.config_file import parse_config
from lowres.meter import LiveTensors
from lowres.model import unit_specs
from lowres.optim import make_optimizer
from lowres.rules import Clock, Rule, muon
from lowres.rules.moments import Moment
from lowres.rules.muon import MuonRule, orthogonalise_
from lowres.rules.racs import RacsRule, rank_one
from lowres.rules.scale import ScaleRule
from lowres.rules.sgd import SgdRule
from lowres.rules.sinkgd import SinkGdRule
from lowres.storage import TensorSpec
from tests.helpers import lowres_here as lowres
from tests.helpers import make_batch, relora_config, with_adapters
from tests.rules import BETAS, new_state, random_grads, run_rule, spec_of, state_bytes

SHAPES = pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=["tall", "wide", "square"])
MOMENTUM = (0.95, 0.999)
YES, NO = torch.tensor(True), torch.tensor(False)


def uneven(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    """Gradients whose rows and columns have sizes over three decades; a row and a column are zero, and some
    are zero now and then."""
    rows, columns = torch.logspace(-2, 1, shape[0])[:, None], torch.logspace(0, -3, shape[1])
    grads = [grad * rows * columns for grad in random_grads(shape, steps)]
    for step, grad in enumerate(grads):
        grad[3], grad[:, 5] = 0, 0
        grad[step % shape[0]], grad[:, 2 * step % shape[1]] = 0, 0
    return grads


def error(found: Tensor, wanted: Tensor, start: Tensor) -> float:
    """Distance between two weights as a part of the way from the start."""
    return float((found - wanted).norm() / (wanted - start).norm())


def first_update(rule: Rule, grad: Tensor, role: str = "up") -> Tensor:
    """The first change of a weight at a rate of 1."""
    return -run_rule(rule, torch.zeros(grad.shape), [grad], 1.0, role=role)[0]


# ---- SCALE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("role", ["up", "embedding", "head"])
@SHAPES
def test_scale(shape: tuple[int, int], role: str, tied: bool) -> None:
    start, grads = torch.randn(shape), uneven(shape)
    for grad in grads:
        grad[7] *= 1e-9  # a mean square below eps does not grow to the size of the others
        grad[:, 7] *= 1e-9
    average, wanted = torch.zeros(shape, dtype=torch.float64), start.double()
    is_head = role == "head" or (tied and role == "embedding")
    for grad in grads:
        average = 0.9 * average + 0.1 * grad.double()
        direction = average if is_head else grad.double()
        along = 0 if role == "embedding" and not tied else 1
        size = direction.square().mean(along, keepdim=True).sqrt()
        wanted = wanted - 1e-2 * direction / size.clamp(min=1e-8)
    found, state, _ = run_rule(ScaleRule(BETAS, 1e-8, tied=tied), start, grads, 1e-2, role=role)
    assert error(found, wanted, start) < 1e-5
    assert set(state) == ({"momentum"} if is_head else set())
    if is_head:
        assert float((state["momentum"] - average).norm() / average.norm()) < 1e-6


# ---- Muon


@pytest.mark.parametrize("decay", [0.0, 0.1])
@SHAPES
def test_muon_is_that_of_torch_around_the_orthogonalisation(
    shape: tuple[int, int], decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "orthogonalise_", lambda *_: None)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda grad, *_: grad)
    found, wanted, start = beside_torch(shape, decay, steps=10)
    assert error(found, wanted, start) < 1e-6


@SHAPES
def test_muon_is_that_of_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as bf16 goes, in which torch multiplies: each rounds in its own order."""
    monkeypatch.setattr(muon, "orthogonalise_", partial(orthogonalise_, dtype=torch.bfloat16))
    found, wanted, start = beside_torch(shape, decay=0.1, steps=1)
    assert error(found, wanted, start) < 0.03


def beside_torch(shape: tuple[int, int], decay: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight after some steps of Muon, that of `torch.optim.Muon`, and the weight before."""
    start, grads = torch.randn(shape) * 0.1, random_grads(shape, steps)
    parameter = torch.nn.Parameter(start.clone())
    oracle = torch.optim.Muon(
        [parameter], lr=1e-2, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for grad in grads:
        parameter.grad = grad.clone()
        oracle.step()
    found, _, _ = run_rule(MuonRule(MOMENTUM), start, grads, 1e-2, decay)
    return found, parameter.detach(), start


def polynomial(values: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize(
    "dtype, most", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("steps", [1, 5])
@SHAPES
def test_the_iteration_moves_singular_values_alone(
    shape: tuple[int, int], steps: int, dtype: torch.dtype, most: float
) -> None:
    """By the polynomial; those above 0.5 % of the norm come to between 0.68 and 1.16."""
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-1.5, 0, min(shape), dtype=torch.float64)
    matrix = (u * values @ v).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    wanted = u * polynomial(values / values.norm(), steps) @ v
    orthogonalise_(matrix, steps, dtype)
    assert float((matrix - wanted).norm() / wanted.norm()) < most
    if steps == 5:
        assert 0.68 - most < float(torch.linalg.svdvals(matrix).min())
        assert float(torch.linalg.svdvals(matrix).max()) < 1.16 + most


@pytest.mark.parametrize("kind, most", [(target.CPU, 1e-4), (target.CUDA, 0.1)])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_a_gradient_of_low_rank_is_not_lost_in_rounding_errors(
    shape: tuple[int, int], kind: str, most: float
) -> None:
    """Products in bf16 are off by 0.5 here, because the iteration lifts the errors to new directions."""
    matrix = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = u * polynomial(values / values.norm(), 5) @ v
    with target.planned_for(kind):
        orthogonalise_(matrix)
    assert float((matrix - wanted).norm() / wanted.norm()) < most


def test_rows_of_small_numbers_keep_their_digits_in_fp16() -> None:
    """Also in a matrix so large that its elements are small beside its norm: fp16 has digits down to 6e-5."""
    matrix = torch.randn(128, 1024) * torch.logspace(0, -3.5, 128)[:, None]
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = (u * polynomial(values / values.norm(), 5) @ v)[-16:]
    orthogonalise_(matrix, dtype=torch.float16)
    assert float((matrix[-16:] - wanted).norm() / wanted.norm()) < 2e-3


def test_the_rms_of_an_update_is_that_of_adamw() -> None:
    """0.2 for a matrix of full rank, whatever its shape and its gradient's size."""
    for shape in ((64, 64), (32, 256), (256, 32)):
        update = first_update(MuonRule(MOMENTUM), random_grads(shape, 1)[0])
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 1000), (1000, 256), (300, 300)])
def test_the_memory_of_the_orthogonalisation(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape)
    with LiveTensors() as live:
        orthogonalise_(matrix, dtype=dtype)
    stated = (matrix.numel() + 3 * min(shape) ** 2) * dtype.itemsize
    assert 0.9 * stated < live.peak["gpu"] <= stated + 1024


def test_fused_matrices_are_orthogonalised_one_by_one() -> None:
    """Rows of a query, a key and a value of another size, each with a scale of its own."""
    rows = (40, 16, 16)
    start, grads = torch.randn(sum(rows), 24), random_grads((sum(rows), 24), 5)
    found, _, _ = run_rule(MuonRule(MOMENTUM, split=rows), start, grads, 1e-2, decay=0.1)
    for i, part in enumerate(start.split(rows)):
        own, _, _ = run_rule(MuonRule(MOMENTUM), part, [g.split(rows)[i] for g in grads], 1e-2, decay=0.1)
        assert error(found.split(rows)[i], own, part) < 1e-5
    whole, _, _ = run_rule(MuonRule(MOMENTUM), start, grads, 1e-2, decay=0.1)
    assert error(found, whole, start) > 0.1


# ---- SinkGD and RACS


def sinkhorn(grad: Tensor, steps: int = 5) -> Tensor:
    x = grad.double()
    for _ in range(steps):
        for along in (1, 0):
            norms = x.norm(dim=along, keepdim=True)
            x = torch.where(norms > 0, x * math.sqrt(x.shape[along]) / norms, 0)
    return x


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
@SHAPES
def test_sinkgd(shape: tuple[int, int], size: float, steps: int) -> None:
    start, grads = torch.randn(shape), uneven(shape, 4)
    wanted = start - 1e-2 * sum(sinkhorn(grad, steps) for grad in grads)
    found, state, _ = run_rule(SinkGdRule(steps), start, [grad * size for grad in grads], 1e-2)
    assert error(found, wanted, start) < 1e-5 and not state
    assert torch.equal(found[3], start[3]) and torch.equal(found[:, 5], start[:, 5])


@pytest.mark.parametrize("rule", [SinkGdRule(1), SinkGdRule(5), RacsRule(BETAS, 1e-8, 0)])
def test_what_is_hardly_a_number_does_not_push_the_rest_aside(rule: Rule) -> None:
    """A row whose squares are zero in fp32, which divided by nearly nothing would be the largest."""
    grad = random_grads((24, 16), 1)[0]
    grad[4] = 1e-28
    sizes = first_update(rule, grad).square().mean(1).sqrt()
    assert sizes[4] < 1.5
    assert all(0.5 < size < 1.5 for i, size in enumerate(sizes) if i != 4)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-20])
@pytest.mark.parametrize("name", ["scale", "muon", "sinkgd", "racs"])
def test_a_first_gradient_that_is_hardly_a_number_makes_no_large_update(name: str, size: float) -> None:
    """Its squares are about zero in fp32; the next gradient is updated as if it were the first."""
    tiny, grad = random_grads((24, 16), 2)
    zero = torch.zeros(24, 16)
    after, _, _ = run_rule(RULES[name](), zero, [tiny * size], 1.0)
    assert float(after.abs().max()) < 10
    if name == "racs":
        after, _, _ = run_rule(RULES[name](), zero, [tiny * size, grad], 1.0)
        torch.testing.assert_close(-after, first_update(RULES[name](), grad))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(200, 150), (150, 200), (180, 180)], ids=["tall", "wide", "square"])
def test_the_rank_one_matrix_is_the_nearest(shape: tuple[int, int], size: float) -> None:
    """Five steps of the fixed point come close, and closer if the rest is small."""
    for grad, most in ((random_grads(shape, 1)[0] * size, 1e-4), (uneven(shape, 1)[0] * size, 0.01)):
        squares = grad.double().square()
        u, values, v = torch.linalg.svd(squares, full_matrices=False)
        (rows, columns), mean_square = rank_one(grad)
        found, nearest = rows.double() @ columns.double(), values[0] * u[:, :1] @ v[:1]
        assert float((found - nearest).norm() / nearest.norm()) < most
        assert float((squares - found).norm()) < (1 + most / 100) * float((squares - nearest).norm())
        assert float(mean_square) == pytest.approx(float(squares.mean()), rel=1e-5)
        assert 0.5 < float(rows.mean()) < 2  # so the columns have the size, at every step


def rank_one_squares(shape: tuple[int, int], steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gradients whose squares are rows times columns, fp64, with rows of a mean of 1. Some are larger than
    those before by more than the limiter lets through."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for step in range(steps):
        rows, columns = (
            torch.rand(shape[i], generator=generator, dtype=torch.float64).add(0.1).square() for i in (0, 1)
        )
        rows, columns = (rows / rows.mean())[:, None], columns * (100 if step % 5 == 4 else 1)
        signs = torch.randn(shape, generator=generator).sign()
        found.append((signs * (rows * columns).sqrt(), rows, columns))
    return found


@pytest.mark.parametrize("limiter", [0.0, 1.01])
@pytest.mark.parametrize("size", [1e-17, 1e-12, 1.0, 1e6])
@SHAPES
def test_racs(shape: tuple[int, int], size: float, limiter: float) -> None:
    """Averages of the exact rows and columns; no size of gradients makes a difference."""
    known, start = rank_one_squares(shape, 12), torch.zeros(shape)
    rows, columns = known[0][1:]
    last, wanted, limited = 0.0, start.double(), 0
    for grad, own_rows, own_columns in known:
        rows, columns = 0.9 * rows + 0.1 * own_rows, 0.9 * columns + 0.1 * own_columns
        update = grad / (rows * columns).sqrt()
        norm = float(update.norm())
        if limiter and last and norm > 1.01 * last:
            update, limited = update * 1.01 * last / norm, limited + 1
        last = float(update.norm())
        wanted = wanted - 1e-2 * update
    assert limited == 0 if not limiter else limited > 2
    grads = [(grad * size).float() for grad, _, _ in known]
    found, state, _ = run_rule(RacsRule((0.0, 0.9), 1e-8, limiter), start, grads, 1e-2)
    assert error(found, wanted, start) < 1e-4
    assert {key: tuple(t.shape) for key, t in state.items() if key != "norm"} == {
        "rows": (shape[0], 1),
        "columns": (1, shape[1]),
    }
    assert ("norm" in state) == bool(limiter)


RULES: dict[str, Callable[[], Rule]] = {
    "scale": lambda: ScaleRule(BETAS, 1e-8),
    "muon": lambda: MuonRule(MOMENTUM),
    "sinkgd": SinkGdRule,
    "racs": lambda: RacsRule((0.0, 0.9), 1e-8),
}


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_of_zero_moves_nothing_and_is_no_size(name: str) -> None:
    zero, grad = torch.zeros(24, 16), random_grads((24, 16), 1)[0]
    for role in ("up", "embedding", "head"):
        after, _, changes = run_rule(RULES[name](), zero, [zero, zero, grad], 1.0, role=role)
        assert changes[:2] == [0, 0]
        torch.testing.assert_close(-after, first_update(RULES[name](), grad, role), rtol=1e-5, atol=1e-6)
        assert 0.1 < float(after.square().mean().sqrt()) < 2
    _, state, _ = run_rule(RULES[name](), zero, [grad], 1.0)
    _, again, changes = run_rule(RULES[name](), zero, [grad, zero], 1.0)
    if name != "muon":  # whose momentum goes on
        assert changes[1] == 0 and all(torch.equal(again[key], t) for key, t in state.items())


@pytest.mark.parametrize("name", ["scale", "sinkgd", "racs"])
def test_what_has_no_gradient_stays(name: str) -> None:
    grads = uneven((24, 16), 1)
    update = first_update(RULES[name](), grads[0])
    assert not update[3].any() and not update[:, 5].any() and update.isfinite().all()


# ---- linear int8


def linear(shape: tuple[int, int]) -> tuple[TensorSpec, dict[str, Tensor]]:
    spec = spec_of(shape)
    return spec, new_state(MuonRule(MOMENTUM, "int8"), spec)


def moment(spec: TensorSpec, state: dict[str, Tensor], step: int, accepted: Tensor = YES) -> Moment:
    return Moment(spec, "momentum", state, Clock(step, torch.tensor(1), accepted, 0), signed=True)


def test_bytes_of_linear_int8() -> None:
    for rule, role in ((MuonRule(MOMENTUM, "int8"), "up"), (ScaleRule(BETAS, 1e-8, "int8"), "head")):
        spec = spec_of((1024, 1024), role)
        assert state_bytes(rule, spec) / spec.numel == 1 + 4 / 256
        assert {dtype for dtype, _ in rule.state_fields(spec).values()} == {torch.int8, torch.float32}
    # a rule with a momentum of its own keeps the other form
    assert SgdRule(0.9, "int8").state_fields(spec_of((8, 8)))["momentum"][0] == torch.uint8


def test_linear_codes_are_unbiased_and_within_one() -> None:
    """In blocks of all sizes; the last is short. Over the steps, rounding is right on average."""
    spec, state = linear((3, 200))
    size = torch.logspace(-20, 6, 3).repeat_interleave(256)[:600]
    values = torch.randn(600, generator=torch.Generator().manual_seed(0)) * size
    whole, rounds, total = slice(0, 600), 400, torch.zeros(600, dtype=torch.float64)
    code = torch.cat([block.abs().amax().expand(len(block)) for block in values.split(256)]).double() / 127
    for step in range(rounds):
        opened = moment(spec, state, step)
        opened.write(values.clone(), whole)
        apart = (opened.read(whole).double() - values) / code
        assert apart.abs().max() < 1.001
        total += apart
    assert state["momentum"].abs().max() == 127 and state["momentum.absmax"].shape == (3,)
    # the variance of a rounding is at most a quarter of a squared code
    assert (total / rounds).abs().max() < 5 * 0.5 / rounds**0.5
    assert abs(float(total.sum())) < 5 * 0.5 * (600 * rounds) ** 0.5
    zero = new_state(MuonRule(MOMENTUM, "int8"), spec)
    assert not moment(spec, zero, 0).read(whole).any()


def test_a_small_momentum_decays() -> None:
    """Beside a large one, which holds the size of a code. To nearest, all codes below 10 would stay."""
    assert all(round(0.95 * code) == code for code in range(1, 10))
    rule, spec = MuonRule(MOMENTUM, "int8"), spec_of((16, 256))
    state, grad = new_state(rule, spec), torch.zeros(spec.shape)
    grad[:, 0] = 1
    state["momentum"].fill_(9)
    state["momentum"][:, 0], state["momentum.absmax"][:] = 127, 1.0
    for step in range(60):
        rule.directions([spec], [grad.clone()], [state], 1e-3, Clock(step, torch.tensor(1), YES, 0))
    left = state["momentum"][:, 1:].double()
    assert (state["momentum"][:, 0] == 127).all()
    assert float(left.mean()) == pytest.approx(9 * 0.95**60, abs=5 * float(left.std()) / left.numel() ** 0.5)
    assert float(left.mean()) < 1


@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["muon", "scale"])
def test_a_refused_update_keeps_the_momentum_bit_for_bit(name: str, kind: str) -> None:
    rule, spec = momentum_rule(name, kind)
    state = new_state(rule, spec)
    for step, grad in enumerate(random_grads(spec.shape, 5)):
        rule.directions([spec], [grad], [state], 1e-3, Clock(step, torch.tensor(step + 1), YES, 0))
    before = {key: t.clone() for key, t in state.items()}
    for step in range(5, 12):
        clock = Clock(step, torch.tensor(5), NO, 0)
        (factor,) = rule.directions([spec], [torch.zeros(spec.shape)], [state], 1e-3, clock)
        assert not factor.any()
    assert all(torch.equal(t.view(torch.uint8), before[k].view(torch.uint8)) for k, t in state.items())
    clock = Clock(12, torch.tensor(6), YES, 0)
    rule.directions([spec], [torch.zeros(spec.shape)], [state], 1e-3, clock)
    assert not all(torch.equal(t, before[key]) for key, t in state.items())


def momentum_rule(name: str, kind: str) -> tuple[Rule, TensorSpec]:
    """A rule and a weight whose last block is short."""
    if name == "muon":
        return MuonRule(MOMENTUM, kind), spec_of((40, 53))
    return ScaleRule(BETAS, 1e-8, kind), spec_of((40, 53), "head")


@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["muon", "scale"])
def test_the_chunk_size_changes_no_momentum(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 17, 1000, 1):
        monkeypatch.setattr(target, "CHUNK_CPU", chunk)
        rule, spec = momentum_rule(name, kind)
        start, grads = torch.ones(spec.shape), random_grads(spec.shape, 5)
        weight, state, _ = run_rule(rule, start, grads, 1e-2, role=spec.role)
        results.append(state | {"weight": weight})
    for other in results[1:]:
        assert all(torch.equal(t, results[0][key]) for key, t in other.items())


@pytest.mark.parametrize("kind, most", [("bf16", 0.01), ("int8", 0.05)])
@pytest.mark.parametrize("name", ["muon", "scale"])
def test_a_momentum_in_low_precision_follows_fp32(name: str, kind: str, most: float) -> None:
    start, grads = torch.randn(40, 53) * 0.02, random_grads((40, 53), 30)
    found = []
    for each in ("fp32", kind):
        rule, spec = momentum_rule(name, each)
        found.append(run_rule(rule, start, grads, 1e-3, role=spec.role)[0])
    assert 0 < error(found[1], found[0], start) < most


# ---- in a run


def test_linear_int8_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    units, _, engine = with_adapters(relora_config(optim__name="scale", memory__moments="int8"))
    engine.step(make_batch(), 0, 1.0)
    assert units["head"].state["lm_head.weight"]["momentum"].dtype == torch.int8


def test_scale_has_embedding_and_head_and_norms_a_rate_of_their_own() -> None:
    for tied in (False, True):
        config, notes = parse_config(
            {"optim": {"name": "scale", "lr": 0.5}, "model": {"tie_embeddings": tied}}
        )
        optimizer = make_optimizer(config)
        groups = {kind: group for group in optimizer.groups for kind in group.kinds}
        assert not notes and {kind: (group.name, group.lr) for kind, group in groups.items()} == {
            "matrix": ("scale", 0.5),
            "adapter": ("scale", 0.5),
            "embedding": ("scale", 0.5),
            "norm": ("adamw", 1e-3),
            "bias": ("adamw", 1e-3),
        }
        specs = [
            spec for unit in unit_specs(config.model) for spec in unit.tensors if spec.kind == "embedding"
        ]
        kept = {spec.role: set(optimizer.state_fields(spec)) for spec in specs}
        assert kept == ({"embedding": {"momentum"}} if tied else {"embedding": set(), "head": {"momentum"}})
    config, _ = parse_config({"optim": {"name": "scale", "norm_lr": 0.25, "embed_lr": 0.125}})
    assert [group.lr for group in make_optimizer(config).groups] == [1e-3, 1e-3, 0.125, 0.25]


def adapters_after(steps: int, name: str, **relora: Any) -> tuple[Any, Any, list[TensorSpec]]:
    keys = {f"relora__{key}": value for key, value in relora.items()}
    units, _, engine = with_adapters(relora_config(optim__name=name, optim__lr=1e-3, **keys))
    for step in range(steps):
        engine.step(make_batch(seed=step), step, 1.0)
    return units, engine, [spec for unit in units.values() for spec in unit.spec.adapters.values()]


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_a_merge_resets_the_momentum_of_adapters(reset: str) -> None:
    units, _, specs = adapters_after(3, "muon", reset=reset, reset_keep=0.1)
    state = {name: own for unit in units.values() for name, own in unit.state.items()}
    for spec in specs:
        left = state[spec.name]["momentum"] != 0
        assert not left.any() if reset == "zero" else 0 < left.sum() <= 0.2 * spec.numel, spec.name
    assert state["lm_head.weight"]["exp_avg"].any()  # which is no adapter


@pytest.mark.parametrize("reset", ["zero", "magnitude"])
def test_sizes_of_the_last_adapters_do_not_hold_back_the_next(reset: str) -> None:
    """The limiter would let the updates grow by 1 % a step from a first one that is tiny."""
    units, engine, specs = adapters_after(3, "racs", reset=reset, reset_keep=0.5, cycle_steps=3)
    state = {name: own for unit in units.values() for name, own in unit.state.items()}
    assert not any(tensor.any() for spec in specs for tensor in state[spec.name].values())
    for step in (3, 4):
        engine.step(make_batch(seed=step), step, 1.0)
    for spec in specs:  # the norm of a matrix whose numbers are about 1
        assert float(state[spec.name]["norm"]) > 0.5 * spec.numel**0.5, spec.name


@pytest.mark.parametrize("name, moments", [("muon", "int8"), ("scale", "bf16")])
def test_a_run_resumes_bit_for_bit(name: str, moments: str, config: Path, tmp_path: Path) -> None:
    if name == "muon":  # AdamW's moments of embedding and head
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    run, again = tmp_path / "run", tmp_path / "again"
    keys = [f"optim.name={name}", f"memory.moments={moments}", "train.steps=4", "train.checkpoint_every=2"]
    keys += ["data.seq_len=16", "train.batch_tokens=64", "train.eval_every=0", "log.sample_tokens=0"]
    command = ["train", config, *(part for key in keys for part in ("--set", key))]
    lowres(*command, "--run", run)
    shutil.copytree(run, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    lowres(*command, "--run", again, "--resume")
    last = [folder / "checkpoints" / "step_00000004" for folder in (run, again)]
    names = sorted(path.name for path in last[0].glob("*.safetensors"))
    assert len(names) == 4
    assert all((last[0] / file).read_bytes() == (last[1] / file).read_bytes() for file in names)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, again)
    ]
    assert losses[0] == losses[1]
