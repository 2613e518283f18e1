"""The device: which one is taken or refused, how CUDA is set up, and which errors say that it is full."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowres import probe, runs
from lowres.cli import main
from lowres.device import SETTINGS, pick_device, prepare_cuda
from lowres.errors import UserError
from lowres.rooms import EXACT_LOCKING, is_out_of_memory
from tests.helpers import make_config

SUMS = torch.backends.cuda.matmul


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings of the allocator, and PyTorch's default for sums."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = SUMS.allow_bf16_reduced_precision_reduction
    SUMS.allow_bf16_reduced_precision_reduction = True
    yield
    SUMS.allow_bf16_reduced_precision_reduction = before


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def test_cuda_is_prepared_alike_for_the_program_and_for_who_opens_a_run(
    untouched: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> None:
        with pytest.raises(UserError, match="is not a run"):
            runs.open_run(tmp_path)

    found = []
    for entry in (prepare_cuda, opened, lambda: main(["config"])):
        monkeypatch.delenv(SETTINGS[0], raising=False)
        SUMS.allow_bf16_reduced_precision_reduction = True
        entry()
        assert not SUMS.allow_bf16_reduced_precision_reduction
        found.append(settings())
    exact = ",pinned_max_cached_size_mb:4" if EXACT_LOCKING else ""
    assert found == [{"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:True{exact}"}] * 3


@pytest.mark.parametrize("name", SETTINGS)
def test_allocator_settings_of_the_users_own_stay(
    name: str, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:100")
    prepare_cuda()
    assert settings() == {name: "max_split_size_mb:100"}


OURS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
]
OTHERS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    ValueError("CUDA out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OURS, ids=lambda error: str(error)[:40])
def test_errors_that_say_the_gpu_is_full(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_errors_that_do_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", [OURS[1], OTHERS[0]])
def test_a_probe_on_a_full_gpu_is_one_line(
    error: Exception, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(probe.rates, "_products", full)
    arguments = ["plan", str(config), "--probe"]
    if error in OTHERS:
        with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
            main(arguments)
        return
    assert main(arguments) == 3
    line = capsys.readouterr().err
    assert "--probe: the GPU is full (CUDA error: CUBLAS" in line and line.count("\n") == 1


def card(monkeypatch: pytest.MonkeyPatch, name: str, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_card_that_is_too_old_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Tesla V100", 7, 0)
    with pytest.raises(UserError) as caught:
        pick_device(make_config(run={"device": device}, memory={"compute": "fp32"}))
    assert str(caught.value) == (
        "run.device: Tesla V100 (compute capability 7.0) is too old, the minimum is 7.5; "
        "use --set run.device=cpu"
    )
    assert pick_device(make_config(run={"device": "cpu"})).type == "cpu"


@pytest.mark.parametrize(
    "kept, remedy",
    [
        ({}, "--set memory.compute=fp32,"),
        ({"compute": "bf16"}, "--set memory.compute=fp32,"),
        ({"weights": "bf16"}, "--set memory.compute=fp32 --set memory.weights=int8,"),
        (
            {"weights": "bf16", "moments": "bf16", "engine": "deepspeed"},
            "--set memory.compute=fp32 --set memory.weights=fp32,",
        ),
    ],
)
def test_a_card_without_bf16_computes_in_fp32_or_not_at_all(
    kept: dict[str, object], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, "Tesla T4", 7, 5)
    name = {"name": "adamw"} if "engine" in kept else {}
    with pytest.raises(UserError) as caught:
        pick_device(make_config(memory=kept, optim=name))
    line = str(caught.value)
    assert line.startswith("memory.compute: Tesla T4 (compute capability 7.5) has no bf16, which needs 8.0;")
    assert remedy in line and "\n" not in line
    assert pick_device(make_config(memory={"compute": "fp32"})).type == "cuda"
    # a trained run has no --set
    assert pick_device(runs.as_used(make_config(memory=kept, optim=name))).type == "cuda"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (12, 0)])
def test_a_card_with_bf16_takes_every_config(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, "RTX", *capability)
    for compute in ("auto", "bf16", "fp32"):
        config = make_config(memory={"compute": compute})
        assert pick_device(config).type == "cuda" and runs.as_used(config) == config
