"""What only a CUDA device can show: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from lowres.engine import AutogradEngine, LayerwiseEngine, make_engine
from lowres.memory import make_plan
from lowres.model import empty_units, initialize
from tests.helpers import (
    CPU,
    SMALL,
    Recorder,
    dense_copy,
    lowres,
    make_batch,
    make_config,
    make_optimizer,
    make_units,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.03)]
)
def test_gradients_equal_the_cpu_reference(dtype: torch.dtype, tolerance: float) -> None:
    exact = Recorder()
    AutogradEngine(SMALL, make_units(SMALL, dtype=torch.float64), exact, 7, torch.float64, CPU).step(
        make_batch(), 0, 1.0
    )
    units = make_units(SMALL, dtype=torch.float64 if dtype == torch.float64 else None, device=CUDA)
    recorder = Recorder()
    engine = LayerwiseEngine(SMALL, units, recorder, 3, dtype, CUDA, loss_chunk=50)
    engine.step(make_batch(), 0, 1.0)
    for name, grad in recorder.grads.items():
        wanted = exact.grads[name]
        assert grad.dtype == torch.promote_types(dtype, torch.float32)
        assert float((grad.cpu().double() - wanted).norm() / wanted.norm()) < tolerance, name


@pytest.mark.parametrize(
    "weights, name, moments",
    [
        ("int8", "apollo-mini", "fp32"),
        ("bf16", "apollo-mini", "fp32"),
        ("fp32", "apollo-mini", "fp32"),
        ("fp32", "adamw", "bf16"),
        ("fp32", "adamw", "int8"),
        ("fp32", "adam-mini", "int8"),
    ],
)
def test_the_gpu_trains_like_the_cpu(weights: str, name: str, moments: str) -> None:
    """Same batches, same named rounding; products differ in their last bits."""
    config = make_config(
        memory={"weights": weights, "compute": "fp32"}, optim={"name": name, "lr": 2e-3, "eps": 1e-6}
    )
    losses = {}
    for device in (CPU, CUDA):
        units = make_units(config.model, weights, device=device)
        engine = make_engine(config, units, make_optimizer(config, units, device, moments), 3, device)
        losses[device.type] = [engine.step(make_batch(seed=s), s, 1.0).loss for s in range(20)]
    for here, there in zip(losses["cpu"], losses["cuda"], strict=True):
        assert abs(here - there) < 0.02


@pytest.mark.parametrize(
    "name, moments", [("apollo-mini", "fp32"), ("adamw", "bf16"), ("adamw", "int8"), ("adam-mini", "int8")]
)
def test_a_step_waits_for_the_device_only_at_its_end(name: str, moments: str) -> None:
    config = make_config(memory={"weights": "int8"}, optim={"name": name})
    units = make_units(config.model, "int8", device=CUDA)
    engine = make_engine(config, units, make_optimizer(config, units, CUDA, moments), 3, CUDA)
    engine.step(make_batch(), 0, 1.0)
    torch.cuda.synchronize()
    waits = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            engine.step(make_batch(), 1, 1.0)
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # two copies of the batch to the device from pageable memory, and the report
    assert len(waits) <= 3, waits


@pytest.mark.parametrize("weights, micro_batch", [("int8", 1), ("int8", 4), ("bf16", 2)])
def test_the_plan_is_what_the_allocator_reports(weights: str, micro_batch: int) -> None:
    config = make_config(
        model={"dim": 1024, "n_layers": 6, "n_heads": 16, "ffn_dim": 2736, "vocab_size": 32000},
        data={"seq_len": 1024},
        train={"batch_tokens": 8 * 1024, "micro_batch": micro_batch},
        memory={"weights": weights},
    )
    plan = make_plan(config, CUDA)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    units = empty_units(config.model, weights, config.memory.embeddings_kept_in, CUDA)
    initialize(units, 0, CUDA)
    engine = make_engine(config, units, make_optimizer(config, units, CUDA), micro_batch, CUDA)
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        engine.step(make_batch(8, 1024, 32000), step, 1.0)
    measured = torch.cuda.max_memory_allocated() - before
    assert abs(plan.peak("gpu") - measured) < 0.1 * measured, (plan.peak("gpu") / 2**20, measured / 2**20)


def test_train_and_resume_on_the_gpu(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--set", "run.device=cuda", "--run", run)
    lowres("train", config, *options, "--set", "train.steps=10")
    lowres("train", config, *options, "--set", "train.steps=20", "--resume")
    assert lowres("sample", run, "--prompt", "def ", "--tokens", 5).stdout.startswith("def ")


def test_equal_weights_on_both_devices() -> None:
    here, there = make_units(SMALL, "int8"), make_units(SMALL, "int8", device=CUDA)
    for name, value in dense_copy(here).items():
        assert torch.allclose(value, dense_copy(there)[name].cpu(), atol=1e-3), name
