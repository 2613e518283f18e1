"""Every compiled kernel for CPUs against its plain form, and the plain forms against their definitions."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres import rng
from lowres.device import use_kernels, wants_kernels
from lowres.kernels import (
    blocks,
    forms,
    groups,
    loss,
    native,
    norm,
    product,
    quantise,
    rotary,
    rounding,
    swiglu,
    update,
)
from lowres.kernels.quantise import Quantised
from tests.helpers import CPU, make_config

KEY = rng.make_key(3, "test")
SHAPES = [(64, 256), (37, 5461), (1, 300), (300, 1), (5, 33), (70, 16)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def both(work: Callable[..., Any], *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The result of a kernel and the tensors that it changed, in the plain and in the compiled form."""
    found = []
    for compiled in (False, True):
        copies = [t.clone() for t in tensors]
        with forms.using("cpu", compiled):
            result = work(*copies)
        results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
        found.append([*results, *copies])
    return found[0], found[1]


def assert_equal(found: tuple[list[Tensor], list[Tensor]]) -> None:
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=0, equal_nan=True)


def assert_close(found: tuple[list[Tensor], list[Tensor]], tolerance: float) -> None:
    """Relative to the largest number; bf16 results may differ by a rounding."""
    for plain, compiled in zip(*found, strict=True):
        allowed = tolerance if plain.dtype != torch.bfloat16 else 2**-8
        assert (
            plain.double() - compiled.double()
        ).abs().max() <= allowed * plain.double().abs().max() + 1e-30


def stored(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes with scales; the first row uses less than half of its range, so its scale changes."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    codes[0] //= 3
    return codes, torch.rand(shape[0], 1) * 1e-3 + 1e-5


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("spread", ["scalar", "row", "column"])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_give_the_same_bits(shape: tuple[int, int], spread: str, decayed: bool) -> None:
    m, n = shape
    codes, scales = stored(shape)
    direction = torch.randn(shape) * torch.rand(m, 1) * 3  # with some rows that outgrow their codes
    direction[m // 2] = 0
    factor = {"scalar": torch.tensor(0.01), "row": torch.rand(m, 1) * 0.01, "column": torch.rand(1, n) * 0.01}
    decay = torch.tensor(1e-3) if decayed else None
    assert_equal(
        both(lambda c, s: update.int8_update(c, s, direction, factor[spread], decay, KEY), codes, scales)
    )
    value = torch.randn(shape).bfloat16()
    assert_equal(both(lambda v: update.bf16_update(v, direction, factor[spread], decay, KEY), value))


def test_an_update_of_a_vector_and_one_of_zero() -> None:
    direction = torch.randn(37)
    assert_equal(
        both(
            lambda v: update.bf16_update(v, direction, torch.tensor(0.1), None, KEY),
            torch.randn(37).bfloat16(),
        )
    )
    codes, scales = stored((9, 50))
    with forms.using("cpu", True):
        before = codes.clone(), scales.clone()
        update.int8_update(codes, scales, torch.zeros(9, 50), torch.tensor(1.0), None, KEY)
    assert torch.equal(codes, before[0]) and torch.equal(scales, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_number_formats_give_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = stored(shape)
    values = torch.randn(shape).to(dtype)
    values[0] = 0
    assert_equal(both(lambda c, s: rounding.int8_fill(values, c, s), codes, scales))
    assert_equal(both(lambda o: rounding.dequantise(codes, scales, o), values))
    wider = torch.randn(shape[0], shape[1] + 3).to(dtype)
    assert_equal(both(lambda o: rounding.dequantise(codes, scales, o[:, : shape[1]]) is None, wider)[:2])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38])
    wide = torch.cat((torch.randn(500) * 1e3, special))
    assert_equal(
        both(lambda o: rounding.round_to_bf16(wide, o, KEY, 11), torch.zeros(len(wide), dtype=torch.bfloat16))
    )


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5 * 256, 9000])
def test_blocks_that_share_a_scale_give_the_same_bits(numel: int) -> None:
    """Blocks of ordinary numbers, of zeros, of numbers too small for an inverse, and of very large ones."""
    count = -(-numel // blocks.BLOCK)
    size = torch.tensor([1.0, 0.0, 1e-38, 1e30, 1e-3]).repeat(count)[:count].repeat_interleave(blocks.BLOCK)
    values = torch.randn(numel) * size[:numel]
    codes, absmax = torch.randint(-127, 128, (numel,), dtype=torch.int8), torch.rand(count)
    assert_equal(both(blocks.expand, codes, absmax))
    for accepted in (True, False):
        stored = both(
            lambda c, a, v, on: blocks.store(v, c, a, on, KEY, 2**32 - 7),
            *(codes, absmax, values, torch.tensor(accepted)),
        )
        assert_equal(stored)
        assert torch.equal(stored[0][0], codes) is not accepted or numel == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    x = (torch.randn(shape) * torch.logspace(-8, 3, m).unsqueeze(1)).to(dtype)
    x[m // 2] = 0
    along, across = torch.rand(n), torch.rand(m)
    assert_equal(both(lambda: quantise.quantise_rows(x)))
    rows = both(lambda: quantise.quantise_rows(x, along))
    assert_equal(rows)
    assert_equal(both(lambda: quantise.quantise_columns(x, across)))
    codes, scales = rows[1]
    assert codes.abs().int().max() <= 127 and (codes[m // 2] == 0).all() and scales[m // 2] == 0
    error = (codes.double() * scales.double() - x.double() * along.double()).abs()
    assert (error <= scales.double() * 0.5001).all()  # half a code


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_finite_stays_visible(bad: float, compiled: bool) -> None:
    """INT8 cannot hold NaN. Its row gets a scale of NaN, so every product with it is NaN and the step is
    skipped; other rows are not affected."""
    x = torch.randn(8, 40)
    x[3, 7] = bad
    weight = Quantised(torch.ones(6, 40, dtype=torch.int8), torch.ones(6, 1))
    with forms.using("cpu", compiled):
        y = product.multiply(quantise.quantise_rows(x), *weight, torch.zeros(8, 6))
        columns = quantise.quantise_columns(x, torch.ones(8))
        normed = norm.rms_norm_quantised(x, torch.ones(40), 1e-5)
        gated = swiglu.swiglu_quantised(x, x)
        logits = x.clone()
        losses = loss.cross_entropy(logits, torch.zeros(8, dtype=torch.int64), 1.0)
    assert y[3].isnan().all() and y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    assert columns.scales[7].isnan() and columns.scales.isnan().sum() == 1
    assert normed.scales[3].isnan() and gated.scales[3].isnan()
    assert losses[3].isnan() or bad == -torch.inf  # a logit of -inf is a probability of 0


def test_codes_have_no_bias() -> None:
    """The mean error over many numbers is far below a code, also for one sign."""
    x = torch.rand(64, 4096) + 0.1
    codes, scales = quantise.quantise_rows(x)
    error = (codes * scales - x).mean() / scales.mean()
    assert abs(error) < 5 / (12 * x.numel()) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n = shape[1]
    x, dy, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(n) + 0.5
    assert_close(both(lambda: norm.rms_norm(x, weight, 1e-5)), 1e-6)
    d_weight = torch.randn(n)
    assert_close(both(lambda d: norm.rms_norm_backward(dy, x, weight, 1e-5, d), d_weight), 3e-5)
    assert_close(both(lambda: swiglu.swiglu(x, dy)), 1e-6)
    assert_close(both(lambda g, u: swiglu.swiglu_backward(dy, g, u), x, dy), 1e-5)
    quantised = both(lambda: norm.rms_norm_quantised(x, weight, 1e-5))
    quantised2 = both(lambda: swiglu.swiglu_quantised(x, dy))
    for plain, compiled in (quantised, quantised2):
        assert (plain[0].int() - compiled[0].int()).abs().max() <= 1
        torch.testing.assert_close(plain[1], compiled[1], rtol=1e-5, atol=0)


def test_norm_swiglu_and_rotation_against_autograd() -> None:
    """In fp64 arithmetic, by the gradients of the formulas."""
    x, dy, weight = torch.randn(40, 64), torch.randn(40, 64), torch.rand(64) + 0.5
    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    torch.autograd.backward(torch.nn.functional.rms_norm(leaf, (64,), w, 1e-5), dy.double())
    g, u = x.double().requires_grad_(), (dy * 2).double().requires_grad_()
    torch.autograd.backward(torch.nn.functional.silu(g) * u, dy.double())
    for compiled in (False, True):
        with forms.using("cpu", compiled):
            d_weight = torch.zeros(64)
            dx = norm.rms_norm_backward(dy, x, weight, 1e-5, d_weight)
            gate, up = x.clone(), dy * 2
            swiglu.swiglu_backward(dy, gate, up)
        for found, wanted in ((dx, leaf), (d_weight, w), (gate, g), (up, u)):
            assert wanted.grad is not None
            torch.testing.assert_close(found.double(), wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 3, 32).to(dtype)
    cos, sin = (torch.cat((t, t), 1) for t in (torch.randn(7, 16), torch.randn(7, 16)))
    for inverse in (False, True):
        assert_close(both(lambda x, i=inverse: rotary.rotate(x, cos, sin, i), x), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 33, 3203])
def test_loss(vocabulary: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(9, vocabulary) * 5).to(dtype)
    targets = torch.randint(0, vocabulary, (9,))
    targets[2] = -100
    leaf = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    wanted.sum().backward()
    assert leaf.grad is not None
    for weight in 0.25, torch.linspace(-0.5, 1, 9):
        scaled = leaf.grad * (weight if isinstance(weight, float) else weight.double().unsqueeze(1))
        for found in both(lambda x, w=weight: loss.cross_entropy(x, targets, w), logits):
            torch.testing.assert_close(found[0], wanted, rtol=0, atol=2e-6)
            allowed = 1e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(found[1].double(), scaled, rtol=0, atol=allowed)
    for found in both(lambda x: loss.cross_entropy(x, targets, None), logits):
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_give_the_same_bits(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 64) * torch.logspace(-35, 5, 40).unsqueeze(1)).to(dtype)
    codes, scales = torch.zeros(80, 32, dtype=torch.int8), torch.zeros(80, 1, dtype=torch.bfloat16)
    found = both(lambda c, s: groups.encode(x, c, s), codes, scales)
    assert_equal(found)
    encoded, scale = found[0]
    assert_equal(both(lambda o: groups.decode(encoded, scale, o), x))


PRODUCTS = [(17, 50, 9), (1, 40, 9), (5, 1, 7), (6, 33, 1), (64, 5461, 33), (3, 20000, 4)]


@pytest.mark.parametrize("m, k, n", PRODUCTS)
def test_products_are_exact_in_every_layout(m: int, k: int, n: int) -> None:
    a, b = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((m, k), (n, k)))
    a[0], b[0] = 127, -127
    wanted = a.long() @ b.long().t()
    for one in (a, a.t().contiguous().t()):
        for other in (b, b.t().contiguous().t()):
            assert torch.equal(product.int32_product(one, other).long(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_scales_of_products(folded: bool, add: bool, dtype: torch.dtype) -> None:
    a, scales = quantise.quantise_rows(torch.randn(17, 50)), torch.rand(9, 1)
    b, out = torch.randint(-127, 128, (9, 50), dtype=torch.int8), torch.randn(17, 9).to(dtype)
    own = None if folded else scales
    found = both(lambda o: product.multiply(a, b, own, o, add), out)
    assert_equal(found)
    wanted = a.dense(torch.float32).double() @ b.double().t() * (1 if folded else scales.double().t())
    wanted += out.double() if add else 0
    assert (found[0][0].double() - wanted).norm() <= (
        1e-6 if dtype == torch.float32 else 4e-3
    ) * wanted.norm()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sum_that_int32_cannot_hold_is_split(compiled: bool, add: bool) -> None:
    """The gradient of a weight from more than 131,072 tokens; also with equal signs, where it would wrap."""
    k = 2 * product.LONGEST_SUM + 7
    a = Quantised(torch.full((2, k), 127, dtype=torch.int8), torch.ones(2, 1))
    with forms.using("cpu", compiled):
        found = product.multiply(a, a.codes, None, torch.ones(2, 2), add)
    assert found.double().allclose(torch.tensor(127.0 * 127.0 * k + add, dtype=torch.float64), rtol=1e-6)


def test_a_processor_without_exact_products_is_found() -> None:
    """oneDNN limited to AVX2 adds pairs of INT8 products in 16 bits. On an ARM CPU there is no such limit."""
    code = (
        "import torch\nfrom lowres.kernels import product\n"
        "a = torch.full((20, 3000), 127, dtype=torch.int8); b = -a[:7]\n"
        "print(product.is_exact(), bool((product.int32_product(a, b) == -127 * 127 * 3000).all()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found[1] == "True"
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert found[0] == "False"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder for compiled kernels; no compiler but what a test puts into `bin`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.load.cache_clear()
    yield tmp_path / "lowres"
    monkeypatch.undo()
    native.load.cache_clear()
    with forms.using("cpu", False):
        assert not forms.enable("cpu") and forms.possible("cpu")


BROKEN = {
    "an error": ("echo 'x.cpp:1: error: no' >&2; exit 1", r"cannot be built with \S+: x\.cpp:1: error: no$"),
    "no word": ("exit 3", r"cannot be built with \S+: it ended with 3$"),
    "killed": ("kill -9 $$", r"cannot be built with \S+: it ended with -9$"),
    "several lines": ("printf 'a\\nb\\n' >&2; exit 1", r"cannot be built with \S+: b$"),
    "no object files": ("exit 0", r"cannot be built with \S+: .*$"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_compiler_is_one_line(
    how: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, message = BROKEN[how]
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "c++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(native.UnavailableError, match=message) as found:
        native.load()
    assert "\n" not in str(found.value)
    assert not list(cache.iterdir())  # nothing is left over


def test_without_a_compiler_there_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    with forms.using("cpu", False):
        assert "no C++ compiler" in forms.enable("cpu")
        assert not forms.compiled("cpu") and not forms.possible("cpu")
        config = make_config(memory={"compute": "int8"})
        assert not wants_kernels(config, "cpu") and "no C++ compiler" in use_kernels(config, CPU)[0]


def test_a_compiler_that_works_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false --with an=argument")
    native.load()
    assert [path.suffix for path in sorted(cache.iterdir())] == [".sha256", ".so"]
    native.load.cache_clear()
    monkeypatch.setenv("PATH", str(cache))  # and later no compiler is needed
    native.load()


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that takes no time: it writes a copy of a library that works. Ask for it before `cache`."""
    native.load()
    library = native._cache() / f"kernels-{native._fingerprint()}.so"
    shutil.copy(library, tmp_path / "works.so")
    script = tmp_path / "fast"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\nexec cp "{tmp_path / "works.so"}" "$last"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("damage", ["cut", "empty", "folder", "no sum"])
def test_a_damaged_library_is_built_again(
    damage: str, compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To load one that was cut short would end the process with a bus error."""
    monkeypatch.setenv("CXX", compiler)
    native.load()
    (library,) = cache.glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # it is still mapped, so it must not be changed in place
    if damage == "folder":
        library.mkdir()
    else:
        library.write_bytes({"cut": whole[:60000], "empty": b"", "no sum": whole}[damage])
    if damage == "no sum":
        library.with_suffix(".sha256").unlink()
    native.load.cache_clear()
    native.load()
    assert native._is_whole(library)


def test_without_a_cache_folder_there_is_a_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / f"lowres-{os.getuid()}").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(native.UnavailableError, match="there is no folder for compiled kernels: "):
        native.load()


def test_a_profile_shows_the_kernels() -> None:
    with torch.profiler.profile() as found, forms.using("cpu", True):
        quantise.quantise_rows(torch.randn(4, 8))
    assert any(event.key.startswith("lowres::quantise") for event in found.key_averages())
