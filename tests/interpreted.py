"""The Triton kernels against their plain forms, under Triton's interpreter on a CPU.

`test_kernels_gpu.py` runs this file in a process of its own, with TRITON_INTERPRET=1: Triton decides when it
is imported whether it interprets.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from lowres.kernels import (
    blocks,
    forms,
    groups,
    loss,
    norm,
    product,
    quantise,
    rotary,
    rounding,
    swiglu,
    update,
)
from lowres.kernels.gpu import product as gpu_product

DTYPES = [torch.float32, torch.bfloat16]
# one row, one column, less than a block, a ragged end, an odd width of an MLP
SHAPES = [(1, 1), (1, 40), (5, 1), (3, 33), (7, 128), (2, 5461)]
KEY = (0xFEDCBA98, 0x12345678)


def _convert(data: np.ndarray, source: Any, target: Any, _mode: Any) -> np.ndarray:
    """fp32 <-> bf16 as GPUs convert, to nearest and ties to even. The interpreter's own loses the carry of
    the rounding (Triton 3.9), and here all conversions are between these two."""
    if source.primitive_bitwidth == 16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    bits = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.int16)
    return bits.numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert triton.knobs.runtime.interpret
    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    with np.errstate(all="ignore"):
        yield


def both(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in its plain form and in Triton's; all its tensors must be equal afterwards."""
    for one, two in zip(*results(monkeypatch, function, *arguments), strict=True):
        assert one.dtype == two.dtype and torch.equal(one.isnan(), two.isnan())
        assert torch.equal(one.nan_to_num(), two.nan_to_num()), (one - two).abs().max()


def results(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *arguments: Any
) -> list[list[Tensor]]:
    """Arguments and results that are tensors, of the plain form and of Triton's."""
    found = []
    for form in forms.PLAIN, forms.TRITON:
        monkeypatch.setitem(forms._forms, "cpu", form)
        copies = [copied(a) for a in arguments]
        out = function(*copies)
        parts = [*copies, *out] if isinstance(out, tuple) else [*copies, *([] if out is None else [out])]
        found.append([t for part in parts for t in (part if isinstance(part, tuple) else (part,))
                      if isinstance(t, Tensor)])  # fmt: skip
    return found


def copied(argument: Any) -> Any:
    if isinstance(argument, quantise.Quantised):
        return quantise.Quantised(*(t.clone() for t in argument))
    return argument.clone() if isinstance(argument, Tensor) else argument


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return (x * torch.randn(*shape, generator=generator).exp() if spread else x).to(dtype)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def factors(mode: int, rows: int, columns: int) -> Tensor:
    shape = {update.SCALAR: (1,), update.PER_ROW: (rows, 1), update.PER_COLUMN: (1, columns)}[mode]
    found = random(*shape, seed=5).abs()
    return found[0] if mode == update.SCALAR else found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [None, torch.tensor(0.01)])
@pytest.mark.parametrize("mode", [update.SCALAR, update.PER_ROW, update.PER_COLUMN])
def test_int8_update(monkeypatch: Any, shape: tuple[int, int], decay: Tensor | None, mode: int) -> None:
    codes, scales = random_codes(*shape), random(shape[0], 1, seed=1).abs() + 1e-3
    # rows with small changes, changes that need a new scale, and none
    size = torch.tensor([1e-3, 30.0, 0.0, 0.1, 1.0, 3.0, 1e-2])[: shape[0], None]
    direction = random(*shape, seed=2) * size
    both(monkeypatch, update.int8_update, codes, scales, direction, factors(mode, *shape), decay, KEY)
    codes //= 3  # less than half of the range: a new scale unless nothing changes
    both(monkeypatch, update.int8_update, codes, scales, direction, factors(mode, *shape), decay, KEY)


def test_int8_update_of_what_is_not_finite(monkeypatch: Any) -> None:
    codes, scales, direction = random_codes(3, 70), random(3, 1).abs(), random(3, 70)
    direction[0, 3], direction[1, 4] = torch.nan, torch.inf
    arguments = codes, scales, direction, torch.tensor(0.1), None, KEY
    (_, plain, *_), (found, ours, *_) = results(monkeypatch, update.int8_update, *arguments)
    assert ours[0].isnan() and torch.equal(plain.nan_to_num(), ours.nan_to_num())
    assert (found[:2, :2] == 0).all()


@pytest.mark.parametrize("shape", [*SHAPES, (77,)])
@pytest.mark.parametrize("mode", [update.SCALAR, update.PER_ROW, update.PER_COLUMN])
def test_bf16_update(monkeypatch: Any, shape: tuple[int, ...], mode: int) -> None:
    if len(shape) == 1 and mode != update.SCALAR:
        return
    value, direction = random(*shape, dtype=torch.bfloat16), random(*shape, seed=1, spread=True)
    factor = factors(mode, shape[0], shape[-1])
    for decay in None, torch.tensor(0.1):
        both(monkeypatch, update.bf16_update, value, direction, factor, decay, KEY)


def test_round_to_bf16(monkeypatch: Any) -> None:
    x = random(5000, spread=True) * 1e-3
    x[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.3e38])
    for start in 0, 123, 2**32 - 7, 2**33 + 5:
        both(monkeypatch, rounding.round_to_bf16, x, torch.empty(5000, dtype=torch.bfloat16), KEY, start)


@pytest.mark.parametrize("numel", [1, 256, 257, 9000])
def test_blocks_that_share_a_scale(monkeypatch: Any, numel: int) -> None:
    count = -(-numel // blocks.BLOCK)
    size = torch.tensor([1.0, 0.0, 1e-38, 1e30, 1e-3]).repeat(count)[:count].repeat_interleave(blocks.BLOCK)
    stored = random_codes(numel), random(count).abs()
    both(monkeypatch, blocks.expand, *stored)
    for accepted, start in (True, 0), (True, 2**32 - 7), (False, 5):
        values = random(numel) * size[:numel]
        both(monkeypatch, blocks.store, values, *stored, torch.tensor(accepted), KEY, start)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_as_codes_and_back(monkeypatch: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], 1)
    values = random(*shape, dtype=dtype, spread=True)
    values[-1] = 0
    both(monkeypatch, rounding.int8_fill, values, codes, scales)
    codes, scales = random_codes(*shape), random(shape[0], 1)
    both(monkeypatch, rounding.dequantise, codes, scales, torch.empty(shape, dtype=dtype))
    wide = torch.empty(shape[0], shape[1] + 16, dtype=dtype)
    part = results(monkeypatch, lambda: rounding.dequantise(codes, scales, wide[:, : shape[1]]).clone())
    assert torch.equal(*(t[0] for t in part))


@pytest.mark.parametrize("shape", [*SHAPES, (150, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise(monkeypatch: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, spread=True)
    by_row, by_column = random(shape[0], 1, seed=3), random(shape[1], 1, seed=4)
    for _ in range(2):
        both(monkeypatch, quantise.quantise_rows, x)
        both(monkeypatch, quantise.quantise_rows, x, by_column)
        both(monkeypatch, quantise.quantise_columns, x, by_row)
        # the second time with a row or column that is not finite, another that is zero or too small
        x[0, 0], x[-1, -1] = torch.inf, torch.nan
        if shape[0] > 2 and shape[1] > 2:
            x[1], x[:, 1] = 0, 1e-37
    monkeypatch.setitem(forms._forms, "cpu", forms.TRITON)
    found = quantise.quantise_columns(x, by_row)
    assert found.codes.is_contiguous() and found.scales[0].isnan() and (found.codes[0] == 0).all()


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 70, 33), (65, 3, 128), (70, 130, 200), (9, 64, 256)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_product(monkeypatch: Any, m: int, n: int, k: int, dtype: torch.dtype, add: bool) -> None:
    a, b = quantise.Quantised(random_codes(m, k), random(m, 1)), random_codes(n, k, seed=1)
    a.codes[0], b[0] = 127, 127
    out = random(m, n, dtype=dtype, seed=2)
    for b_scales in None, random(n, 1, seed=3):
        both(monkeypatch, product.multiply, a, b, b_scales, out, add)
    # rows of a wider matrix, and codes in another layout
    wide = random_codes(n, k + 16, seed=1)
    padded = random(m, n + 3, dtype=dtype)

    def strided() -> Tensor:
        out = padded.clone()
        product.multiply(a, wide[:, :k], None, out[:, :n], add)
        product.multiply(a, b.t().contiguous().t(), None, out[:, :n], True)
        return out

    (plain,), (found,) = results(monkeypatch, strided)
    assert torch.equal(plain, found)


@pytest.mark.parametrize("config", gpu_product._CONFIGS[False])
def test_every_tile(monkeypatch: Any, config: gpu_product.Config) -> None:
    monkeypatch.setattr(gpu_product, "config_for", lambda *_: config)
    a, b = quantise.Quantised(random_codes(130, 160), random(130, 1)), random_codes(300, 160)
    both(monkeypatch, product.multiply, a, b, random(300, 1), random(130, 300), True)


@pytest.mark.parametrize("shape", SHAPES)
def test_transposed(shape: tuple[int, int]) -> None:
    codes = random_codes(shape[0], shape[1] + 5)[:, : shape[1]]
    found = torch.empty(shape[::-1], dtype=torch.int8)
    gpu_product.transposed(codes, found)
    assert torch.equal(found, codes.t())


def near(one: Tensor, two: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the order of sums and the last places of a function."""
    torch.testing.assert_close(one, two, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=2e-6)


def same_codes(one: quantise.Quantised, two: quantise.Quantised) -> None:
    torch.testing.assert_close(one.scales, two.scales, rtol=1e-5, atol=0, equal_nan=True)
    assert (one.codes.int() - two.codes.int()).abs().max() <= 1
    assert (one.codes != two.codes).float().mean() < 1e-2


@pytest.mark.parametrize("shape", [*SHAPES, (130, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(monkeypatch: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], seed=1)
    dy, d_weight = random(*shape, dtype=dtype, seed=2), random(shape[1], seed=3)
    plain, found = results(monkeypatch, norm.rms_norm, x, weight, 1e-5)
    near(plain[-1], found[-1], dtype)
    plain, found = results(monkeypatch, norm.rms_norm_quantised, x, weight, 1e-5)
    same_codes(quantise.Quantised(*plain[-2:]), quantise.Quantised(*found[-2:]))
    plain, found = results(monkeypatch, norm.rms_norm_backward, dy, x, weight, 1e-5, d_weight)
    near(plain[-1], found[-1], dtype)
    torch.testing.assert_close(plain[-2], found[-2], rtol=1e-4, atol=1e-4)
    again = results(monkeypatch, norm.rms_norm_backward, dy, x, weight, 1e-5, d_weight)[1]
    assert torch.equal(again[-2], found[-2])


def test_norm_of_what_is_not_finite(monkeypatch: Any) -> None:
    x = random(3, 40)
    x[1, 2] = torch.nan
    _, (*_, codes, scales) = results(monkeypatch, norm.rms_norm_quantised, x, torch.ones(40), 1e-5)
    assert scales.isnan().flatten().tolist() == [False, True, False] and (codes[1] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(monkeypatch: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, dy = (random(*shape, dtype=dtype, seed=s) * 3 for s in range(3))
    gate[0, 0] = -100.0
    plain, found = results(monkeypatch, swiglu.swiglu, gate, up)
    near(plain[-1], found[-1], dtype)
    plain, found = results(monkeypatch, swiglu.swiglu_quantised, gate, up)
    same_codes(quantise.Quantised(*plain[-2:]), quantise.Quantised(*found[-2:]))
    for one, two in zip(*results(monkeypatch, swiglu.swiglu_backward, dy, gate, up), strict=True):
        near(one, two, dtype)


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (5, 96), (70, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(monkeypatch: Any, heads: int, width: int, dtype: torch.dtype) -> None:
    angles = random(9, width // 2).repeat(1, 2)
    x = random(2, 7, heads, width, dtype=dtype)
    for inverse in False, True:
        both(monkeypatch, rotary.rotate, x, angles.cos(), angles.sin(), inverse)


@pytest.mark.parametrize("vocabulary", [1, 33, 32003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [None, 0.25, torch.linspace(-0.5, 1, 6)])
def test_loss(monkeypatch: Any, vocabulary: int, dtype: torch.dtype, weight: loss.Weight) -> None:
    logits = random(6, vocabulary, dtype=dtype) * 4
    targets = torch.tensor([0, vocabulary - 1, -1, vocabulary // 2, -100, 0])
    (plain, *_, want), (found, *_, losses) = results(monkeypatch, loss.cross_entropy, logits, targets, weight)
    torch.testing.assert_close(want, losses, rtol=1e-6, atol=1e-6)
    if weight is None:
        assert torch.equal(found, logits)
    else:
        near(plain, found, dtype)
        assert (found[2] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all"])
def test_loss_of_what_is_not_finite(monkeypatch: Any, bad: Any) -> None:
    logits, targets = random(3, 5000), torch.tensor([4, 4999, 5])
    logits[1, :] = -torch.inf if bad == "all" else logits[1, :]
    logits[1, 4500] = logits[1, 4500] if bad == "all" else bad
    (plain, *_), (found, _, losses) = results(monkeypatch, loss.cross_entropy, logits, targets, 1.0)
    assert losses[1].isnan() and losses[[0, 2]].isfinite().all()
    assert plain[1].isnan().all() and found[1].isnan().all()
    near(plain[[0, 2]], found[[0, 2]], torch.float32)
    # a row that does not count does not matter
    losses = loss.cross_entropy(logits.clone(), torch.tensor([4, -1, 5]), 1.0)
    assert losses.isfinite().all()


def test_loss_beyond_the_vocabulary(monkeypatch: Any) -> None:
    monkeypatch.setitem(forms._forms, "cpu", forms.TRITON)
    assert loss.cross_entropy(random(2, 10), torch.tensor([3, 10]), None)[1].isnan()


@pytest.mark.parametrize("count", [1, 64, 131])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(monkeypatch: Any, count: int, dtype: torch.dtype) -> None:
    x = random(count, groups.GROUP, dtype=dtype, spread=True)
    x[-1] = 0
    codes = torch.empty(count, groups.GROUP, dtype=torch.int8)
    scales = torch.empty(count, 1, dtype=torch.bfloat16)
    plain, _ = results(monkeypatch, groups.encode, x, codes, scales)
    both(monkeypatch, groups.encode, x, codes, scales)
    both(monkeypatch, groups.decode, plain[1], plain[2], torch.empty_like(x))
