"""Laws of the storage formats: rounding is unbiased, small updates survive, nothing changes for nothing."""

import math

import pytest
import torch

from lowres import rng, target
from lowres.kernels.update import RESCALED_CODE
from lowres.meter import LiveTensors
from lowres.storage import Dense, Int8, Storage, Unit, all_finite
from tests.helpers import make_config, make_optimizer, make_units, new_storage

CPU = torch.device("cpu")
M, N = 96, 256


def filled(kind: str, values: torch.Tensor) -> Storage:
    made = new_storage(kind, tuple(values.shape))
    made.fill(iter([(0, values)]))
    return made


def weights(seed: int = 0, rows: int = M) -> torch.Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(seed)) * 0.02


def key(step: int) -> rng.Key:
    return rng.make_key(0, "rounding", "w", step)


ONE = torch.tensor(1.0)


def test_int8_quantises_to_half_a_code() -> None:
    w = weights()
    kept = filled("int8", w)
    assert isinstance(kept, Int8)
    assert ((kept.dense(torch.float32) - w).abs() <= kept.scales * 0.5001).all()
    assert kept.codes.abs().amax(1).eq(RESCALED_CODE).all()


@pytest.mark.parametrize("dim, ffn", [(512, 1376), (768, 2048), (4096, 11008)])
def test_int8_takes_at_most_1_02_bytes_a_parameter(dim: int, ffn: int) -> None:
    meta = torch.device("meta")
    shapes = [(dim, dim)] * 4 + [(ffn, dim)] * 2 + [(dim, ffn)]
    sizes = [sum(t.nbytes for t in new_storage("int8", s, meta).tensors().values()) for s in shapes]
    assert sum(sizes) / sum(math.prod(s) for s in shapes) <= 1.02


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 8), torch.full((2, 8), 0.3), torch.tensor([[1.0, 1.1], [-5.0, -5.1]])]
)
def test_int8_constant_and_same_sign_rows(values: torch.Tensor) -> None:
    kept = filled("int8", values)
    assert torch.allclose(kept.dense(torch.float32), values, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("zero", ["direction", "factor"])
def test_a_zero_update_changes_nothing(kind: str, zero: str) -> None:
    kept = filled(kind, weights())
    # codes that use little of the range too: not even a rescale
    if isinstance(kept, Int8):
        kept.codes[: M // 2] //= 4
    before = {k: t.clone() for k, t in kept.tensors().items()}
    direction = torch.zeros(M, N) if zero == "direction" else torch.randn(M, N)
    for step in range(20):
        kept.apply(direction, ONE * (zero == "direction"), torch.tensor(0.0), key(step))
    for k, t in kept.tensors().items():
        assert torch.equal(t, before[k])


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2])
def test_updates_survive_on_average(kind: str, relative: float) -> None:
    """The mean change over many writes is the update, also far below the spacing of the format."""
    w = weights(rows=512)
    kept = filled(kind, w)
    start = kept.dense(torch.float32).double()
    original = {name: t.clone() for name, t in kept.tensors().items()}
    steps = 64
    direction = start.float() * relative
    gained = torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        kept.apply(direction, -ONE, None, key(step))
        gained += ((kept.dense(torch.float32).double() - start) * start).sum()
        for name, t in kept.tensors().items():
            t.copy_(original[name])
    wanted = relative * float((start * start).sum()) * steps
    # one stochastic rounding of u in units of s has variance at most |u| s
    spacing = kept.scales.double() if isinstance(kept, Int8) else start.abs() * 2**-7
    deviation = float((direction.double().abs() * spacing * start**2).sum() * steps) ** 0.5
    assert deviation < wanted, "the test would not notice a lost update"
    assert abs(float(gained) - wanted) < 5 * deviation


def test_int8_rounding_of_a_rescaled_row_is_unbiased() -> None:
    w = weights()
    update = torch.zeros(M, N)
    update[:, 0] = w.abs().amax(1) * 3  # every row outgrows its codes
    total = torch.zeros(M, N, dtype=torch.float64)
    trials = 400
    for trial in range(trials):
        kept = filled("int8", w)
        exact = kept.dense(torch.float32).double() + update
        kept.apply(update, -ONE, None, key(trial))
        total += kept.dense(torch.float32).double() - exact
    assert isinstance(kept, Int8)
    assert kept.codes.abs().amax(1).float().sub(RESCALED_CODE).abs().max() <= 1
    error = total / trials / kept.scales
    assert abs(float(error.mean())) < 5 * 0.5 / (trials * M * N) ** 0.5
    assert float(error.abs().max()) < 6 * 0.5 / trials**0.5


def test_int8_rows_that_shrink_are_rescaled() -> None:
    kept = filled("int8", weights())
    assert isinstance(kept, Int8)
    target = kept.dense(torch.float32) * 0.3
    kept.apply(kept.dense(torch.float32) * 0.7, ONE, None, key(0))
    assert kept.codes.abs().amax(1).min() >= RESCALED_CODE - 1
    assert (kept.dense(torch.float32) - target).abs().le(kept.scales * 1.001).all()


def test_int8_never_wraps_around() -> None:
    """Values at the top of the range with tiny updates outwards stay there."""
    kept = filled("int8", torch.full((8, N), 0.02))
    for step in range(200):
        kept.apply(torch.full((8, N), -2e-10), ONE, None, key(step))
    assert (kept.dense(torch.float32) > 0.019).all()


@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("factor_shape", [(), (M, 1), (1, N)])
def test_apply_follows_its_formula(kind: str, factor_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    kept = filled(kind, weights())
    direction = torch.randn(M, N, generator=generator)
    factor = torch.rand(factor_shape, generator=generator) * 1e-2
    decay = torch.tensor(0.05)
    exact = kept.dense(torch.float32) * 0.95 - factor * direction
    kept.apply(direction, factor, decay, key(0))
    spacing = {
        "int8": kept.scales * 1.001 if isinstance(kept, Int8) else 0.0,
        "bf16": exact.abs() * 2**-7,
        "fp32": exact.abs() * 1e-6 + 1e-8,
    }[kind]
    assert ((kept.dense(torch.float32) - exact).abs() <= spacing).all()


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_chunks_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1, 1000, 1 << 17):
        monkeypatch.setattr(target, "CHUNK_CPU", chunk)
        kept = filled(kind, weights())
        kept.apply(torch.ones(M, N) * 1e-3, ONE, torch.tensor(0.01), key(0))
        results.append(kept.tensors())
    for other in results[1:]:
        assert all(torch.equal(t, other[k]) for k, t in results[0].items())


def test_dense_rows_and_reading() -> None:
    w = weights()
    index = torch.tensor([[3, 5], [0, 3]])
    for kind in ("int8", "bf16", "fp32"):
        kept = filled(kind, w)
        assert torch.equal(kept.rows(index, torch.float32), kept.dense(torch.float32)[index])
        assert kept.dense(torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(filled("fp32", w), Dense)


NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
def test_a_unit_knows_if_any_of_its_numbers_is_not_finite(kind: str, value: str) -> None:
    """In every floating-point tensor of its weights and state; at the first and at the last number."""
    unit = trained_unit(kind)
    floats = {name: t for name, t in unit.tensors().items() if t.is_floating_point()}
    assert {".scales" in name for name in floats} == {False, True} if kind == "int8" else {False}
    assert len(floats) > len(unit.weights)
    for tensor in floats.values():
        for place in (0, -1):
            assert all_finite(unit.tensors().values())
            kept = tensor.view(-1)[place].clone()
            tensor.view(-1)[place] = NOT_FINITE[value]
            assert not all_finite(unit.tensors().values())
            tensor.view(-1)[place] = kept
    assert all_finite(unit.tensors().values())


def test_looking_for_numbers_that_are_not_finite_takes_no_memory() -> None:
    unit = trained_unit("bf16")
    assert max(tensor.nbytes for tensor in unit.tensors().values()) > 20_000
    with LiveTensors() as live:
        assert all_finite(unit.tensors().values())
        assert live.peak["gpu"] - live.current["gpu"] < 2_000


def trained_unit(kind: str) -> Unit:
    config = make_config(memory={"weights": kind}, optim={"name": "adamw"})
    units = make_units(config.model, kind)
    optimizer = make_optimizer(config, units)
    unit = units["layers.1"]
    grads = {spec.name: torch.ones(spec.shape) for spec in unit.spec.trained}
    optimizer.update(unit, grads, 0, 1.0, torch.tensor(True))
    return unit


FP8 = [
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),
]


@pytest.mark.parametrize("dtype", [*FP8, torch.float16, torch.float64])
def test_numbers_of_every_format_can_be_checked(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "CHUNK_CPU", 100)
    largest = torch.tensor([torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
    values = torch.ones(10, 33).to(dtype)
    values.view(-1)[5:6] = largest
    codes = torch.full((1000,), 127, dtype=torch.int8)
    assert all_finite([values, codes]) and all_finite([codes]) and all_finite([])
    values.view(-1)[250:251] = torch.tensor([math.nan]).to(dtype)
    assert not all_finite([codes, values])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
def test_the_gpu_writes_the_same_values(kind: str) -> None:
    cuda = torch.device("cuda")
    here, there = filled(kind, weights()), new_storage(kind, (M, N), cuda)
    there.fill(iter([(0, weights().to(cuda))]))
    direction = torch.randn(M, N)
    for step in range(5):
        here.apply(direction, ONE * 1e-3, None, key(step))
        there.apply(direction.to(cuda), (ONE * 1e-3).to(cuda), None, key(step))
    for name, t in here.tensors().items():
        assert torch.equal(t, there.tensors()[name].cpu())
