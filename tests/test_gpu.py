"""Tests that need a CUDA device: `pytest -m gpu tests/test_gpu.py`, the most valuable first.

They need only the packages of lowres and pytest; tests that need bitsandbytes are skipped without it.
`LOWRES_GPU_TESTS_ON=cpu` runs smaller versions of them on a CPU, to test the tests; only questions to CUDA
itself are left out.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres import checkpoint, metrics
from lowres.catalogue import RULES
from lowres.config import Config
from lowres.engine import AutogradEngine, EngineSettings, LayerwiseEngine
from lowres.kernels import blocks, forms, loss, norm, product, quantise, rounding, swiglu, update
from lowres.kernels.quantise import Quantised
from lowres.memory import make_plans
from lowres.meter import LiveTensors
from lowres.model import Starts, initialize
from lowres.rooms import GPU, Rooms
from lowres.runs import training_engine
from tests.helpers import (
    CPU,
    RELORA,
    SMALL,
    Recorder,
    dense_copy,
    lowres,
    make_batch,
    make_config,
    make_units,
    save_checkpoint,
    train_and_kill,
)

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("LOWRES_GPU_TESTS_ON", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
NO_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is None

Sections = dict[str, dict[str, object]]


class Run:
    """A run without data: plan, rooms, and engine with initial weights."""

    def __init__(self, config: Config, device: torch.device = DEVICE, adapted: bool = False) -> None:
        self.config = config
        self.plan = list(make_plans(config, device).values())[-1 if adapted else 0]
        self.rooms = Rooms(device)
        self.engine, self.relora = training_engine(config, self.plan, self.rooms, adapted)
        self.engine.reserve(config.batch_sequences, config.data.seq_len, training=True)
        initialize(self.engine.units(write=True), config.run.seed, device)

    def step(self, step: int) -> float:
        """Take a step on a new batch; returns its loss."""
        shape = self.config.batch_sequences, self.config.data.seq_len, self.config.model.vocab
        return self.engine.step(make_batch(*shape, seed=step), step, 1.0).loss

    def steps(self, count: int) -> list[float]:
        return [self.step(step) for step in range(count)]

    def stored(self) -> dict[str, Tensor]:
        return {
            name: t.to("cpu", copy=True) for unit in self.engine.units() for name, t in unit.tensors().items()
        }


def need_bitsandbytes(moments: object) -> None:
    if moments == "int8" and NO_BITSANDBYTES:
        pytest.skip("bitsandbytes is not installed")


def assert_near(found: list[float], wanted: list[float], distance: float) -> None:
    assert len(found) == len(wanted)
    for step, (here, there) in enumerate(zip(found, wanted, strict=True)):
        assert abs(here - there) < distance, (step, found, wanted)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> Iterator[None]:
    """Compiled kernels, as in a run; without Triton PyTorch's operations."""
    forms.enable(DEVICE.type)
    yield
    forms.disable(DEVICE.type)


# ---- the same numbers as on a CPU


def on_both(work: Callable[..., Any], *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Tensors that a kernel returns or changes: on the device, and in the plain form on a CPU."""
    found = []
    for device in (DEVICE, CPU):
        copies = [t.to(device, copy=True) for t in tensors]
        with forms.using(device.type, device != CPU or not ON_CUDA):
            result = work(*copies)
        results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
        found.append([t.cpu() for t in (*results, *copies)])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (37, 5461), (1, 300), (130, 11008)])
def test_kernels_give_the_results_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What stores weights and what adds integers has the same bits; norms, SwiGLU and the loss round
    differently."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    scales, direction = torch.rand(shape[0], 1, generator=generator) * 1e-3 + 1e-5, dy.float() * 3
    weight, fold, key = torch.rand(shape[1], generator=generator) + 0.5, x[:, 0].float().abs(), (7, 11)
    row = torch.rand(shape[0], 1, generator=generator)
    same = on_both(
        lambda c, s, d, f: update.int8_update(c, s, d, f, None, key), codes, scales, direction, row
    )
    same += on_both(lambda v, d, f: update.bf16_update(v, d, f, None, key), x.bfloat16(), direction, row)
    momentum = codes.view(-1), torch.rand(-(-codes.numel() // blocks.BLOCK), generator=generator)
    same += on_both(blocks.expand, *momentum)
    arguments = direction.view(-1), *momentum, torch.tensor(True)
    same += on_both(lambda v, c, a, on: blocks.store(v, c, a, on, key, 9), *arguments)
    same += on_both(rounding.int8_fill, x, codes, scales)
    same += on_both(rounding.dequantise, codes, scales, x)
    same += on_both(quantise.quantise_rows, x, weight)
    same += on_both(quantise.quantise_columns, x, fold)
    for add in (False, True):
        y = torch.zeros(shape[0], shape[0]).to(dtype)
        same += on_both(
            lambda a, s, b, y, add=add: product.multiply(Quantised(a, s), b, s, y, add),
            codes,
            scales,
            codes,
            y,
        )
    for here, there in same:
        torch.testing.assert_close(here, there, rtol=0, atol=0)
    near = on_both(lambda x, w: norm.rms_norm(x, w, 1e-5), x, weight)
    near += on_both(lambda d, x, w, g: norm.rms_norm_backward(d, x, w, 1e-5, g), dy, x, weight, weight)
    near += on_both(swiglu.swiglu, x, dy)
    near += on_both(swiglu.swiglu_backward, dy, x, dy)
    targets = torch.arange(shape[0]) % shape[1]
    near += on_both(lambda x, t: loss.cross_entropy(x, t, 0.5), x * 3, targets)
    for here, there in near:
        allowed = 2**-7 if there.dtype == torch.bfloat16 else 3e-5
        assert (here.double() - there.double()).abs().max() <= allowed * there.double().abs().max()


@pytest.mark.parametrize("wgrad", ["int8", "dense"])
@pytest.mark.parametrize("activations, distance", [("fp32", 0.01), ("bf16", 0.03)])
def test_int8_products_train_like_the_cpu(activations: str, distance: float, wgrad: str) -> None:
    """The MLP is 173 wide, so that copies are padded."""
    config = make_config(
        model={"ffn_dim": 173},
        train={"micro_batch": 3},
        memory={"compute": "int8", "activations": activations, "compute_wgrad": wgrad},
        optim={"lr": 2e-3},
    )
    assert_near(Run(config).steps(20), Run(config, CPU).steps(20), distance)


@pytest.mark.parametrize(
    "weights, name, moments",
    [
        ("int8", "apollo-mini", "fp32"),
        ("bf16", "apollo-mini", "fp32"),
        ("fp32", "apollo-mini", "fp32"),
        ("fp32", "adamw", "bf16"),
        ("int8", "adam-mini", "fp32"),
        ("fp32", "fira", "fp32"),
        ("fp32", "adamw", "int8"),
        ("fp32", "adam-mini", "int8"),
        ("int8", "muon", "int8"),
        ("int8", "scale", "int8"),
        ("int8", "racs", "fp32"),
        ("int8", "sinkgd", "fp32"),
    ],
)
def test_it_trains_like_the_cpu(weights: str, name: str, moments: str) -> None:
    """Batches and random bits for rounding are the same; products differ in their last bits."""
    need_bitsandbytes(moments)
    config = make_config(
        train={"micro_batch": 3},
        memory={"weights": weights, "compute": "fp32", "moments": moments},
        optim={"name": name, "lr": 2e-3, "eps": 1e-6},
    )
    run = Run(config)
    before = run.stored()
    losses = run.steps(20)
    after = run.stored()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith(".weight"))
    assert_near(losses, Run(config, CPU).steps(20), 0.02)


def gradients(
    engine: Any, dtype: torch.dtype, device: torch.device, starts: Starts | None = None, fused: bool = False
) -> dict[str, Tensor]:
    """The gradient of every weight, from an engine that computes in dtype."""
    recorder = Recorder()
    units = make_units(SMALL, dtype=dtype if dtype == torch.float64 else None, device=device)
    settings = EngineSettings(3, dtype, loss_chunk=50, starts=starts, fused=fused)
    engine(SMALL, units, recorder, Rooms(device), settings).step(make_batch(), 0, 1.0)
    return recorder.grads


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.03)]
)
def test_gradients_equal_the_cpu_reference(dtype: torch.dtype, tolerance: float) -> None:
    exact = gradients(AutogradEngine, torch.float64, CPU)
    for name, grad in gradients(LayerwiseEngine, dtype, DEVICE).items():
        wanted = exact[name]
        assert grad.dtype == torch.promote_types(dtype, torch.float32)
        assert float((grad.cpu().double() - wanted).norm() / wanted.norm()) < tolerance, name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_documents_apart_equal_the_cpu_reference(dtype: torch.dtype, tolerance: float, fused: bool) -> None:
    """data.document_mask. Some documents have one token, and some a whole sequence."""

    starts = Starts(lambda tokens: tokens < 20)
    exact = gradients(AutogradEngine, torch.float64, CPU, starts)
    with forms.using(DEVICE.type, fused):
        found = gradients(LayerwiseEngine, dtype, DEVICE, starts, fused)
    for name, grad in found.items():
        assert float((grad.cpu().double() - exact[name]).norm() / exact[name].norm()) < tolerance, name


@pytest.mark.parametrize("weights", ["int8", "fp32"])
def test_first_weights_are_those_of_the_cpu(weights: str) -> None:
    here, there = make_units(SMALL, weights), make_units(SMALL, weights, device=DEVICE)
    for name, value in dense_copy(here).items():
        assert torch.allclose(value, dense_copy(there)[name].cpu(), atol=1e-3), name


# ---- what lives on the host

ON_HOST: dict[str, object] = {
    "weights_on": "host",
    "state_on": "host",
    "stash_on": "host",
    "carry_on": "host",
}
HOSTED = {"on host": ON_HOST, "on host, band 2": ON_HOST | {"band": 2}}
# on a CPU as small as possible, only to show that the tests run
WIDE = {"dim": 1024, "n_layers": 6, "n_heads": 16, "ffn_dim": 2736, "vocab_size": 32000}
MODEL = WIDE if ON_CUDA else {"dim": 64, "n_layers": 4, "n_heads": 2, "ffn_dim": 172, "vocab_size": 1000}
LENGTH = 1024 if ON_CUDA else 64


@pytest.mark.parametrize("memory", HOSTED)
@pytest.mark.parametrize("name", ["apollo-mini", "adamw", "adam-mini"])
def test_what_lives_on_the_host_trains_the_same(name: str, memory: str) -> None:
    """Copies in parallel with computation must not come late or overwrite memory in use. Results are not
    equal bit for bit: in the embedding's gradient, the sum over equal tokens has no fixed order on a GPU."""
    sections: Sections = {
        "model": {**MODEL, "vocab_size": 2000},
        "data": {"seq_len": LENGTH // 4},
        "train": {"batch_tokens": 4 * LENGTH, "micro_batch": 2},
        "optim": {"name": name, "lr": 1e-3, "eps": 1e-6},
    }
    wanted = Run(make_config(**sections, memory={"compute": "fp32"})).steps(6)
    hosted = Run(make_config(**sections, memory=HOSTED[memory] | {"compute": "fp32"}))
    assert hosted.plan.choice.homes.weights and hosted.plan.choice.homes.carry
    assert_near(hosted.steps(6), wanted, 2e-3)


# ---- the device never waits for the host inside a step


@contextmanager
def no_wait_before_the_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """In the block, everything that waits for the device raises, except reading a list of results. Yields
    the number of values of each such reading."""
    read: list[int] = []
    tolist = Tensor.tolist

    def allowed(tensor: Tensor) -> Any:
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("default")
        read.append(tensor.numel())
        return tolist(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", allowed)
        if ON_CUDA:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield read
        finally:
            if ON_CUDA:
                torch.cuda.set_sync_debug_mode("default")


UPDATES: list[tuple[str, str, Mapping[str, object]]] = [
    *((name, "fp32", {}) for name in RULES if name != "adamw8bit"),
    ("apollo", "fp32", {"projection": "svd"}),
    ("apollo-mini", "fp32", {"grad_clip": 1.0}),
    ("adamw", "bf16", {"limiter": 1.01}),
    ("adamw", "int8", {}),
    ("adam-mini", "int8", {}),
    ("adamw8bit", "int8", {}),
    ("muon", "int8", {"limiter": 1.01}),
    ("scale", "int8", {}),
]


@pytest.mark.parametrize("memory", [{}, ON_HOST, {"stash_dtype": "int8"}], ids=["gpu", "host", "int8 stash"])
@pytest.mark.parametrize(
    "name, moments, keys", UPDATES, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_a_step_waits_once_at_its_end(
    name: str, moments: str, keys: Mapping[str, object], memory: Mapping[str, object], monkeypatch: Any
) -> None:
    """The first step is not counted: it computes singular vectors, and that waits by itself."""
    need_bitsandbytes(moments)
    config = make_config(
        train={"micro_batch": 3},
        memory={"weights": "int8", "moments": moments, **memory},
        optim={"name": name, **keys},
    )
    run = Run(config)
    run.steps(2)
    with no_wait_before_the_results(monkeypatch) as read:
        run.step(2)
    assert read == [3 + len(list(run.engine.units()))]


# ---- ReLoRA


@pytest.mark.parametrize("weights", ["int8", "fp32"])
@pytest.mark.parametrize("reset", ["zero", "random", "magnitude"])
def test_adapters_are_merged_as_on_the_cpu(weights: str, reset: str) -> None:
    relora = {**RELORA, "start_step": 0, "reset": reset, "dropout": 0.1}
    config = make_config(
        relora=relora,
        train={"micro_batch": 3},
        memory={"weights": weights, "compute": "fp32"},
        optim={"name": "adamw", "lr": 0.01},
    )
    losses, frozen = {}, {}
    for device in (DEVICE, CPU):
        run = Run(config, device, adapted=True)
        before = run.stored()
        losses[device.type] = run.steps(7)
        after = run.stored()
        frozen[device.type] = {
            n: (before[n].float(), after[n].float()) for n in before if n.endswith("q_proj.weight")
        }
        assert run.relora.readings(6)["merge_norm"] == pytest.approx(1.0, abs=0.2)
    assert_near(losses[DEVICE.type], losses["cpu"], 0.05)
    assert len(frozen[DEVICE.type]) == SMALL.n_layers
    assert all(not torch.equal(*pair) for pair in frozen[DEVICE.type].values())  # it was merged


# ---- memory

MEMORY: dict[str, dict[str, object]] = {
    "int8": {},
    "bf16": {"weights": "bf16"},
    **HOSTED,
    "stash on host": {"stash_on": "host"},
    "state on host": {"state_on": "host"},
    "int8 stash": {"stash_dtype": "int8", "stash_on": "host"},
    "master": {"master": "host"},
}


def memory_config(memory: str, micro_batch: int) -> Config:
    return make_config(
        model=MODEL,
        data={"seq_len": LENGTH},
        train={"batch_tokens": 8 * LENGTH, "micro_batch": micro_batch},
        memory=MEMORY[memory],
    )


def clean() -> int:
    """Free the memory of earlier tests; returns the bytes that are still reserved."""
    gc.collect()
    if not ON_CUDA:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("memory", MEMORY)
def test_the_plan_is_what_is_allocated(memory: str, micro_batch: int) -> None:
    config = memory_config(memory, micro_batch)
    clean()
    before = torch.cuda.memory_allocated() if ON_CUDA else 0
    run = Run(config)
    if ON_CUDA:
        run.steps(2)
        measured = torch.cuda.max_memory_allocated() - before
    else:
        with LiveTensors(run.rooms) as live:
            run.steps(2)
        measured = live.peak[GPU]
    planned = run.plan.peak(GPU)
    allowed = max(0.05 * measured, 48 << 20) if ON_CUDA else 0.05 * measured
    assert abs(planned - measured) < allowed, (planned / 2**20, measured / 2**20)


@pytest.mark.skipif(not ON_CUDA, reason="caps CUDA's allocator")
@pytest.mark.parametrize("memory", MEMORY)
def test_a_step_fits_a_hard_cap_of_the_plan_and_a_tenth(memory: str) -> None:
    """The gaps between the allocator's blocks must fit too."""
    config = memory_config(memory, 4)
    reserved = clean()
    cap = reserved + int(1.1 * next(iter(make_plans(config, DEVICE).values())).peak(GPU))
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        losses = Run(config).steps(2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(0 < loss < 20 for loss in losses)


# ---- files


def test_a_checkpoint_is_read_into_place(tmp_path: Path) -> None:
    config = make_config(memory={"weights": "int8"} | ON_HOST | {"state_on": "gpu"})
    run = Run(config)
    run.steps(2)
    units = ((unit.spec.name, unit.tensors()) for unit in run.engine.units())
    saved = save_checkpoint(tmp_path, 2, units)
    assert checkpoint.verify(saved) == []
    other = Run(config)
    for unit in other.engine.units(write=True):
        checkpoint.load_unit(saved, unit.spec.name, unit.tensors())
    wanted, found = run.stored(), other.stored()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert_near([other.step(2)], [run.step(2)], 1e-3)


def logged(run: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(run / "metrics.jsonl") if "loss" in record]


def test_a_killed_run_goes_on_as_if_nothing_had_been(config: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = [config, "--set", f"run.device={DEVICE.type}", "--set", "memory.compute=fp32"]
    lowres("train", *options, "--run", straight)
    train_and_kill([*options, "--run", killed], after=15)
    lowres("train", *options, "--run", killed, "--resume")
    assert_near(logged(killed), logged(straight), 5e-3)
    assert len(logged(killed)) == 30
    text = lowres("sample", killed, "--prompt", "def ", "--tokens", 5).stdout
    assert text.startswith("def ")
