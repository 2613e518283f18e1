"""The Triton kernels without a GPU: under Triton's interpreter against their plain forms (interpreted.py),
and compiled for the GPUs that they are for.

What compiles here is what a GPU would run: the wrappers choose tiles and pass tensors as they do there, and
only the launch is replaced.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.kernels.blocks import BLOCK
from lowres.kernels.groups import GROUP
from lowres.kernels.quantise import Quantised
from lowres.kernels.update import PER_COLUMN, PER_ROW, SCALAR

triton = pytest.importorskip("triton", reason="needs Triton (Linux)")

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
ROOT = Path(__file__).parent.parent
NAMES = ["blocks", "groups", "loss", "norm", "product", "quantise", "rotary", "rounding", "swiglu", "update"]
KIB = 1024
# compute capability -> shared memory of a block (CUDA's programming guide), and the instruction that
# multiplies INT8 matrices there
CARDS = {
    80: (163 * KIB, "mma.sync"),
    86: (99 * KIB, "mma.sync"),
    89: (99 * KIB, "mma.sync"),
    90: (227 * KIB, "wgmma.mma_async"),
    100: (227 * KIB, "tcgen05.mma"),
    120: (99 * KIB, "mma.sync"),
}
# operands in INT8, sums in int32
INT8_PRODUCT = r"(mma\.sync|wgmma\.mma_async)\S*\.s32\.s8\.s8|tcgen05\.mma\S*kind::i8"
BIG = (80, 90, 100)
PROCESSORS = 100
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.skipif(VERSION < (3, 9), reason="older interpreters do not work with NumPy 2.4")
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted.py"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@dataclass
class Compiled:
    name: str
    ptx: str
    shared: int
    spilled: int
    warps: int


class Driver:
    """Of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, _: int) -> int:
        return 0


Compiler = Callable[[int], list[Compiled]]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, ModuleType], Compiler]:
    """The modules, and a function that returns the list of kernels that will be compiled for an architecture
    from then on."""
    from importlib import import_module

    from triton.runtime import driver

    modules = {name: import_module(f"lowres.kernels.gpu.{name}") for name in NAMES}
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton interprets in this process")
    compiled: list[Compiled] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, **more: Any) -> None:
        assert all(size >= 1 for size in grid)
        options = {"grid": grid, "num_warps": warps, "enable_fp_fusion": False, **more}
        found = kernel.warmup(*arguments, **options)
        name, asm = kernel.fn.__name__, found.asm
        compiled.append(Compiled(name, asm["ptx"], found.metadata.shared, spills(asm["cubin"]), warps))

    for module in modules.values():
        monkeypatch.setattr(module, "launch", launch)

    def compiler(arch: int) -> list[Compiled]:
        monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", Driver(arch))
        monkeypatch.setattr(modules["product"], "card", lambda _: (arch in BIG, PROCESSORS))
        compiled.clear()
        return compiled

    return modules, compiler


def spills(cubin: bytes) -> int:
    """Bytes that a thread keeps in memory because registers do not hold them."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]) + int(found[2])


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def codes(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int8)


def multiply(product: ModuleType, m: int, n: int, k: int, dtype: torch.dtype, folded: bool) -> None:
    """The output of a layer; or, folded, a gradient that is added up."""
    b_scales = None if folded else empty(n, 1)
    product.multiply(
        Quantised(codes(m, k), empty(m, 1)), codes(n, k), b_scales, empty(m, n, dtype=dtype), folded
    )


def products(modules: dict[str, ModuleType], dtype: torch.dtype) -> None:
    """Each tile, with and without a ragged end, and rows that are not whole words."""
    for size in 4096, 1300, 500:
        multiply(modules["product"], size, size, 4096, dtype, False)
        multiply(modules["product"], size, size, 4096 + 16, dtype, True)
    multiply(modules["product"], 100, 100, 333, dtype, True)
    modules["product"].transposed(codes(64, 4096), codes(4096, 64))


def updates(modules: dict[str, ModuleType], n: int) -> None:
    rows, key, decay = 4, (1 << 31, 5), empty(1)[0]
    for mode, factor in (SCALAR, empty(1)), (PER_ROW, empty(rows, 1)), (PER_COLUMN, empty(1, n)):
        stored = codes(rows, n), empty(rows, 1)
        modules["update"].int8_update(*stored, empty(rows, n), factor, mode, decay, key)
        value = empty(rows, n, dtype=torch.bfloat16)
        modules["update"].bf16_update(value, empty(rows, n), factor, mode, decay, key)
    modules["update"].int8_update(*stored, empty(rows, n), empty(1), SCALAR, None, key)
    modules["rounding"].round_to_bf16(empty(n), empty(n, dtype=torch.bfloat16), key, 7)
    moment = codes(n), empty(-(-n // BLOCK))
    modules["blocks"].expand(*moment, empty(n))
    modules["blocks"].store(empty(n), *moment, empty(1, dtype=torch.bool)[0], key, 7)


def rows_of(modules: dict[str, ModuleType], n: int, dtype: torch.dtype) -> None:
    """What works on rows of this width."""
    rows = 4
    x, y, z = (empty(rows, n, dtype=dtype) for _ in range(3))
    stored = codes(rows, n), empty(rows, 1)
    modules["rounding"].dequantise(*stored, x)
    modules["rounding"].int8_fill(x, *stored)
    modules["quantise"].quantise_rows(x, None, *stored)
    modules["quantise"].quantise_rows(x, empty(n, 1), *stored)
    modules["quantise"].quantise_columns(x, empty(rows, 1), codes(n, rows), empty(n, 1))
    if n <= 8192:  # residual streams are not as wide as MLPs
        modules["norm"].rms_norm(x, empty(n), 1e-5, y, None, None)
        modules["norm"].rms_norm(x, empty(n), 1e-5, None, *stored)
        modules["norm"].rms_norm_backward(x, y, empty(n), 1e-5, z, empty(n), empty(1, n))
    modules["swiglu"].swiglu(x, y, z, None, None)
    modules["swiglu"].swiglu(x, y, None, *stored)
    modules["swiglu"].swiglu_backward(x, y, z)


def others(modules: dict[str, ModuleType], dtype: torch.dtype) -> None:
    modules["rotary"].rotate(empty(2, 4, 32, 128, dtype=dtype), empty(4, 128), empty(4, 128), -1.0)
    targets, losses = empty(4, dtype=torch.int64), empty(4, dtype=torch.float64)
    for weights in None, empty(4):
        modules["loss"].cross_entropy(empty(4, 32003, dtype=dtype), targets, losses, weights)
    stored = codes(64, GROUP), empty(64, 1, dtype=torch.bfloat16)
    modules["groups"].encode(empty(64, GROUP, dtype=dtype), *stored)
    modules["groups"].decode(*stored, empty(64, GROUP, dtype=dtype))


def check(compiled: list[Compiled], arch: int) -> None:
    shared, instruction = CARDS[arch]
    for kernel in compiled:
        assert kernel.shared <= shared, kernel.name
        # Some words are frames of calls (for division), or give way to more programs at the same time.
        assert kernel.spilled <= 32, f"{kernel.name}: {kernel.spilled} bytes"
        if kernel.name == "_multiply":
            assert instruction in kernel.ptx and re.search(INT8_PRODUCT, kernel.ptx)
            assert "prmt" not in kernel.ptx  # no bytes are sorted in registers


def test_products_and_updates_compile(kernels: tuple[dict[str, ModuleType], Compiler]) -> None:
    modules, compiler = kernels
    for arch in 86, 90:
        compiled = compiler(arch)
        multiply(modules["product"], 4096, 4096, 4096, torch.float32, True)
        updates(modules, 4096)
        assert {k.name for k in compiled} >= {"_multiply", "_int8_update", "_bf16_update"}
        check(compiled, arch)
        update = next(k for k in compiled if k.name == "_int8_update")
        # divisions that round as PyTorch's, and the fused multiplication of the decay (Triton 3.4 also lets
        # numbers below 1e-38 count as zero)
        assert set(re.findall(r"\b(?:div|fma)\.\S+", update.ptx.replace(".ftz", ""))) == {
            "div.rn.f32",
            "fma.rn.f32",
        }


@pytest.mark.slow
@pytest.mark.parametrize("arch", CARDS)
def test_everything_compiles(kernels: tuple[dict[str, ModuleType], Compiler], arch: int) -> None:
    modules, compiler = kernels
    compiled = compiler(arch)
    for n in 512, 4096, 5461, 14336:
        updates(modules, n)
    for dtype in DTYPES:
        products(modules, dtype)
        others(modules, dtype)
        for n in 512, 4096, 5461, 14336:
            rows_of(modules, n, dtype)
    kernels_of = {n for m in modules.values() for n, f in vars(m).items() if hasattr(f, "warmup")}
    launched = {k.name for k in compiled}
    assert len(launched) >= 17 and launched <= kernels_of
    check(compiled, arch)
