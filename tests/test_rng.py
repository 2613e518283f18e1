"""Named randomness: reproducible by name and element, uniform, independent, unbiased in rounding."""

import pytest
import torch

from lowres import rng

KEY = rng.make_key(1, "test", "tensor", 2)
N = 1 << 20


def test_golden_bits() -> None:
    # the bits are part of the format of a run: a resumed run must draw the same ones for ever
    assert KEY == (3349447509, 1244774330)
    assert rng.random_bits(KEY, 0, 4).tolist() == GOLDEN


GOLDEN = [1045631899, -101213352, 1017934046, 643469706]


@pytest.mark.parametrize("start", [0, 1, 1000, 2**31 - 3, 2**32 - 2])
def test_any_chunking_gives_the_same_bits(start: int) -> None:
    whole = rng.random_bits(KEY, start, 100)
    parts = [rng.random_bits(KEY, start + i, n) for i, n in ((0, 1), (1, 60), (61, 39))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    "other",
    [
        rng.make_key(2, "test", "tensor", 2),
        rng.make_key(1, "other", "tensor", 2),
        rng.make_key(1, "test", "tensor2", 2),
        rng.make_key(1, "test", "tensor", 3),
    ],
)
def test_every_part_of_the_name_counts(other: rng.Key) -> None:
    here, there = rng.uniform(KEY, 0, N) - 0.5, rng.uniform(other, 0, N) - 0.5
    correlation = float((here * there).mean()) * 12
    assert abs(correlation) < 5 / N**0.5


def chi_squared(counts: torch.Tensor) -> float:
    """Deviation from uniform in standard deviations."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_bits_are_uniform_and_neighbours_independent() -> None:
    bits = rng.random_bits(KEY, 0, 1 << 22)
    for shift in (20, 8, 0):
        counts = torch.bincount((bits >> shift).bitwise_and(0xFFF).long(), minlength=4096).double()
        assert abs(chi_squared(counts)) < 5
    top = (bits >> 26).bitwise_and(63).long()
    for lag in (1, 2, 128, 4096):
        pairs = torch.bincount(top[lag:] * 64 + top[:-lag], minlength=4096).double()
        assert abs(chi_squared(pairs)) < 5


def test_normal() -> None:
    x = rng.normal(KEY, 0, N).double()
    assert abs(float(x.mean())) < 5 / N**0.5
    assert abs(float(x.std()) - 1) < 0.005
    assert abs(float((x**4).mean()) - 3) < 0.05
    assert 4.5 < float(x.abs().max()) < 6


def test_permutation() -> None:
    order = rng.permutation(KEY, 1000)
    assert order.sort().values.tolist() == list(range(1000))
    assert order.tolist() != list(range(1000))
    assert torch.equal(order, rng.permutation(KEY, 1000))


@pytest.mark.parametrize("value", [0.3, -0.3, 2.75, -17.5, 1e-4, -1e-4])
def test_rounding_to_integers_is_unbiased(value: float) -> None:
    rounded = rng.round_to_integer(torch.full((1 << 22,), value), KEY, 0)
    assert set(rounded.unique().tolist()) <= {float(int(value)), float(int(value) + (1 if value > 0 else -1))}
    part = abs(value) - int(abs(value))
    deviation = (part * (1 - part) / (1 << 22)) ** 0.5
    assert abs(float(rounded.double().mean()) - value) < 5 * deviation


def test_rounding_keeps_integers() -> None:
    x = torch.arange(-127.0, 128.0).repeat(1000)
    assert torch.equal(rng.round_to_integer(x, KEY, 0), x)


@pytest.mark.parametrize("value", [1.001, -0.0200003, 3.3e-5])
def test_rounding_to_bf16_is_unbiased_and_between_neighbours(value: float) -> None:
    x = torch.full((1 << 20,), value)
    rounded = rng.round_to_bf16(x, KEY, 0).double()
    low, high = float(rounded.min()), float(rounded.max())
    exact = float(x[0])
    assert low <= exact <= high and high - low <= abs(exact) * 2**-7
    part = (exact - low) / (high - low)
    deviation = (high - low) * (part * (1 - part) / (1 << 20)) ** 0.5
    assert abs(float(rounded.mean()) - exact) < 5 * deviation


def test_rounding_to_bf16_keeps_what_bf16_holds() -> None:
    x = torch.randn(N).bfloat16()
    x[:3] = torch.tensor([0.0, float("inf"), -float("inf")])
    assert torch.equal(rng.round_to_bf16(x.float(), KEY, 0), x)
    assert rng.round_to_bf16(torch.tensor([float("nan")]), KEY, 0).isnan().all()


def test_rounding_by_chunks_is_the_same() -> None:
    x = torch.randn(1000) * 50
    for function in (rng.round_to_integer, rng.round_to_bf16):
        parts = [function(x[:300], KEY, 0), function(x[300:], KEY, 300)]
        assert torch.equal(function(x, KEY, 0), torch.cat(parts))


@pytest.mark.gpu
def test_bits_are_the_same_on_the_gpu() -> None:
    assert torch.equal(rng.random_bits(KEY, 5, N), rng.random_bits(KEY, 5, N, "cuda").cpu())
    x = torch.randn(N) * 30
    for function in (rng.round_to_integer, rng.round_to_bf16):
        assert torch.equal(function(x, KEY, 9), function(x.cuda(), KEY, 9).cpu())
