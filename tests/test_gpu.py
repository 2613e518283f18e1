"""What only a CUDA device can show: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from lowres.config import Config
from lowres.engine import AutogradEngine, Choice, EngineSettings, LayerwiseEngine, make_engine
from lowres.memory import make_plan
from lowres.model import empty_units, initialize
from lowres.rooms import Rooms
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
    reference = EngineSettings(7, torch.float64)
    AutogradEngine(SMALL, make_units(SMALL, dtype=torch.float64), exact, Rooms(CPU), reference).step(
        make_batch(), 0, 1.0
    )
    units = make_units(SMALL, dtype=torch.float64 if dtype == torch.float64 else None, device=CUDA)
    recorder = Recorder()
    engine = LayerwiseEngine(SMALL, units, recorder, Rooms(CUDA), EngineSettings(3, dtype, loss_chunk=50))
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
        memory={"weights": weights, "compute": "fp32", "moments": moments},
        optim={"name": name, "lr": 2e-3, "eps": 1e-6},
    )
    losses = {}
    for device in (CPU, CUDA):
        units = make_units(config.model, weights, device=device)
        engine = make_engine(
            config, units, make_optimizer(config, units, Rooms(device)), Rooms(device), Choice(3)
        )
        losses[device.type] = [engine.step(make_batch(seed=s), s, 1.0).loss for s in range(20)]
    for here, there in zip(losses["cpu"], losses["cuda"], strict=True):
        assert abs(here - there) < 0.02


@pytest.mark.parametrize(
    "name, moments", [("apollo-mini", "fp32"), ("adamw", "bf16"), ("adamw", "int8"), ("adam-mini", "int8")]
)
def test_a_step_waits_for_the_device_only_at_its_end(name: str, moments: str) -> None:
    config = make_config(
        memory={"weights": "int8", "moments": moments}, optim={"name": name, "limiter": 1.01}
    )
    rooms = Rooms(CUDA)
    units = make_units(config.model, "int8", device=CUDA)
    engine = make_engine(config, units, make_optimizer(config, units, rooms), rooms, Choice(3))
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
    assert len(waits) <= 1, waits  # the report


MODEL = {"dim": 1024, "n_layers": 6, "n_heads": 16, "ffn_dim": 2736, "vocab_size": 32000}
ON_HOST: dict[str, object] = {
    "weights_on": "host",
    "state_on": "host",
    "stash_on": "host",
    "carry_on": "host",
}
MEMORY: dict[str, dict[str, object]] = {
    "int8": {},
    "bf16": {"weights": "bf16"},
    "on host": ON_HOST,
    "on host, band 2": ON_HOST | {"band": 2},
    "int8 stash": {"stash_dtype": "int8", "stash_on": "host"},
    "master": {"master": "host"},
}


def steps(config: Config, count: int = 3) -> tuple[list[float], int]:
    """Losses, and the allocator's peak after the first step."""
    rooms = Rooms(CUDA)
    choice, kept = make_plan(config, CUDA).choice, config.memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms, choice.homes.weights)
    optimizer = make_optimizer(config, units, rooms, choice.homes.state)
    initialize(units.values(), 0, CUDA)
    engine = make_engine(config, units, optimizer, rooms, choice)
    torch.cuda.reset_peak_memory_stats()
    length, vocab = config.data.seq_len, config.model.vocab
    losses = [
        engine.step(make_batch(config.batch_sequences, length, vocab, seed), seed, 1.0).loss
        for seed in range(count)
    ]
    return losses, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("memory", MEMORY)
def test_the_plan_is_what_the_allocator_reports(memory: str, micro_batch: int) -> None:
    config = make_config(
        model=MODEL,
        data={"seq_len": 1024},
        train={"batch_tokens": 8 * 1024, "micro_batch": micro_batch},
        memory=MEMORY[memory],
    )
    planned = make_plan(config, CUDA).peak("gpu")
    _, measured = steps(config, 2)
    assert abs(planned - measured) < max(0.05 * measured, 48 << 20), (planned / 2**20, measured / 2**20)


@pytest.mark.parametrize("memory", ["on host", "on host, band 2"])
@pytest.mark.parametrize("name", ["apollo-mini", "adamw", "adam-mini"])
def test_what_lives_on_the_host_trains_the_same(name: str, memory: str) -> None:
    """Copies beside the computation must neither come late nor overwrite what is in use. Not bit for
    bit: the sum over equal tokens in the embedding's gradient has no fixed order on a GPU."""
    sections: dict[str, dict[str, object]] = {
        "model": {**MODEL, "vocab_size": 2000},
        "data": {"seq_len": 256},
        "train": {"batch_tokens": 16 * 256, "micro_batch": 2},
        "optim": {"name": name, "lr": 1e-3, "eps": 1e-6},
    }
    wanted, _ = steps(make_config(**sections, memory={"compute": "fp32"}), 6)
    found, _ = steps(make_config(**sections, memory=MEMORY[memory] | {"compute": "fp32"}), 6)
    for here, there in zip(found, wanted, strict=True):
        assert abs(here - there) < 2e-3


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
