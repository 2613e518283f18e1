"""The start of a run: what it decides, and its rehearsal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from lowres import relora
from lowres.cli import main
from lowres.config_file import load_config
from lowres.engine import LayerwiseEngine
from lowres.errors import UserError
from lowres.rules import lowrank, muon
from lowres.start import decide
from tests.helpers import lowres_here


def options(*keys: str) -> list[str]:
    return [part for key in keys for part in ("--set", key)]


def test_decisions_write_nothing(config: Path, tmp_path: Path) -> None:
    fresh = decide(load_config(config)[0], tmp_path / "run", resume=False)
    assert fresh.found is fresh.origin is None and fresh.step == fresh.offset == 0
    [of_data] = fresh.lines
    assert of_data.startswith("note: validation: ")
    assert fresh.config.model.vocab_size == 500 and list(fresh.plans) == [False]
    assert fresh.started_with == {"batch_tokens": 1024, "lr": 0.01, "embed_lr": None, "norm_lr": None}
    assert not (tmp_path / "run").exists()

    run = tmp_path / "run"
    lowres_here("train", config, "--run", run, *options("train.steps=12", "train.eval_every=0"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run.seed: the run in"):
        decide(load_config(config, ["run.seed=4"])[0], run, resume=True)
    changed, _ = load_config(config, ["train.batch_tokens=2048"])
    resumed = decide(changed, run, resume=True)
    assert resumed.found == run / "checkpoints" / "step_00000012" and resumed.step == 12
    # it did 12 steps of 16 sequences; 12 steps of the present batch would have 32 each
    assert resumed.offset == 12 * 16 - 12 * 32
    assert resumed.started_with == fresh.started_with
    assert resumed.lines[0] == of_data and len(resumed.lines) == 3
    assert "from 16 to 32 sequences" in resumed.lines[1] and "longer than it was" in resumed.lines[2]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    other = decide(load_config(config, [f"run.init_from={json.dumps(str(run))}"])[0], tmp_path / "b", False)
    assert other.origin is not None and other.origin.path == run and other.found is None and other.step == 0
    assert other.config.data.tokenizer == str(run / "tokenizer.model")


@pytest.mark.parametrize(
    "error, code",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), 3),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 3),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
)
def test_a_rehearsal_that_runs_out_of_memory_is_one_line(
    error: RuntimeError,
    code: int | None,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LayerwiseEngine, "step", full)
    arguments = ["train", str(config), "--run", str(tmp_path / "run"), *options("memory.rehearse=true")]
    if code is None:
        with pytest.raises(RuntimeError, match="shapes cannot"):
            main(arguments)
        return
    assert main(arguments) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lowres: the rehearsal of a step ran out of GPU memory (CUDA ")
    assert "train.micro_batch" in line and "more" not in line


SMALL = [
    "data.seq_len=16",
    "train.batch_tokens=64",
    "train.micro_batch=1",
    "model.dim=64",
    "model.ffn_dim=512",
]
SMALL += ["train.steps=1", "train.eval_every=0", "memory.rehearse=true"]
SHAPES = {(64, 64), (512, 64), (64, 512)}


@pytest.mark.parametrize(
    "name, engine",
    [
        *((name, engine) for name in ("galore", "fira") for engine in ("layerwise", "autograd")),
        ("muon", "layerwise"),
    ],
)
def test_decompositions_are_rehearsed_once_for_each_shape(
    name: str, engine: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    module: Any = muon if name == "muon" else lowrank
    function = "orthogonalise_" if name == "muon" else "singular_vectors"
    decompose = getattr(module, function)

    def watched(grad: torch.Tensor, number: int) -> Any:
        if not isinstance(grad, FakeTensor):  # of the plan
            shapes.append(tuple(grad.shape))
        return decompose(grad, number)

    monkeypatch.setattr(module, function, watched)
    keys = options(*SMALL, f"optim.name={name}", f"memory.engine={engine}")
    lowres_here("train", config, "--run", tmp_path / "run", *keys)
    # the rehearsal's, and then those of the first step
    assert len(shapes) == 3 + 2 * 7 and set(shapes[:3]) == SHAPES


def test_the_decomposition_of_a_merge_is_rehearsed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def watched(change: torch.Tensor) -> torch.Tensor:
        if not isinstance(change, FakeTensor):
            shapes.append(tuple(change.shape))
        return torch.zeros(())

    monkeypatch.setattr(relora, "effective_rank", watched)
    keys = [*SMALL, "relora.enabled=true", "relora.rank=4", "relora.start_step=0"]
    keys += ["relora.cycle_steps=3", "relora.rewarmup_steps=1", "relora.log_rank=true", "optim.name=adamw"]
    lowres_here("train", config, "--run", tmp_path / "run", *options(*keys))
    assert len(shapes) == 3 and set(shapes) == SHAPES
