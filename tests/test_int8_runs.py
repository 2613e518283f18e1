"""Runs with INT8 products from the command line: exact resuming, and the choice of memory.compute = auto."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowres import metrics
from lowres.config import Config
from lowres.config_file import load_config
from lowres.kernels import forms, product
from lowres.probe import fastest
from tests.helpers import CPU, lowres, lowres_here, make_config

BASE = (
    *("memory.weights=int8", "run.device=cpu", "train.eval_every=3"),
    *("train.checkpoint_every=3", "schedule.name=constant"),
)
KEYS = (*BASE, "train.steps=6")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Runs turn compiled kernels on; other tests have them off."""
    with forms.using("cpu", False):
        yield


def options(*keys: str) -> list[str]:
    return [part for key in (*KEYS, *keys) for part in ("--set", key)]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in metrics.read(run / "metrics.jsonl") if "loss" in r]


def test_a_run_resumes_exactly_and_its_model_is_used(config: Path, tmp_path: Path) -> None:
    keys = options("memory.compute=int8")
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    lowres_here("train", config, *keys, "--run", straight)
    lowres_here("train", config, *keys, "--set", "train.steps=3", "--run", halted)
    lowres_here("train", config, *keys, "--run", halted, "--resume")
    assert len(losses(straight)) == 6 and losses(straight) == losses(halted)
    assert "perplexity" in lowres_here("eval", straight).stdout
    assert lowres_here("sample", straight, "--tokens", "5", "--prompt", "7 times").stdout


def test_auto_measures_once_and_a_resumed_run_keeps_the_choice(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = options()
    measured: list[str] = []

    def measure(_: Config, device: torch.device) -> dict[str, float]:
        measured.append("")
        return {"fp32": 2.0, "int8, rest in bf16": 1.0}

    monkeypatch.setattr(fastest, "measure", measure)
    small, large, run = tmp_path / "small", tmp_path / "large", tmp_path / "run"
    lowres_here("train", config, *keys, "--run", small)
    assert not measured  # a short run takes fp32 without measuring
    assert load_config(small / "config.toml")[0].memory.compute == "auto"
    monkeypatch.setattr(fastest, "WORTH_MEASURING", 1.0)
    done = lowres_here("train", config, *keys, "--set", "train.steps=3", "--run", run)
    assert "memory.compute=auto takes int8, rest in bf16" in done.stderr + done.stdout
    kept = load_config(run / "config.toml")[0].memory
    assert (kept.compute, kept.activations, kept.kernels) == ("int8", "bf16", "fused")
    lowres_here("train", config, *keys, "--run", run, "--resume")
    assert len(measured) == 1
    lowres_here("train", config, *keys, "--run", large)
    assert losses(run) == losses(large)
    # and a run that began without a choice stays as it was
    lowres_here("train", config, *keys, "--set", "train.steps=8", "--run", small, "--resume")
    assert len(measured) == 2 and load_config(small / "config.toml")[0].memory.compute == "auto"


def test_all_runs_of_a_sweep_compute_alike(config: Path, tmp_path: Path, points_here: None) -> None:
    """The first one chooses; and a sweep that is repeated is not refused because of the choice."""
    folder = tmp_path / "sweep"
    sweep = ["sweep", config, "--grid", "optim.lr=0.001,0.002", "--tokens", "3072", "--run", folder]
    sweep += [part for key in BASE for part in ("--set", key)]
    lowres_here(*sweep)
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())
    text = (first / "config.toml").read_text("utf-8")
    for key, value in (("compute", "int8"), ("activations", "fp32")):  # as if it had measured
        assert f'\n{key} = "auto"' in text
        text = text.replace(f'\n{key} = "auto"', f'\n{key} = "{value}"')
    (first / "config.toml").write_text(text, "utf-8")
    shutil.rmtree(second)
    lowres_here(*sweep)
    kept = load_config(second / "config.toml")[0].memory
    assert (kept.compute, kept.activations) == ("int8", "fp32")


def test_measuring_finds_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "WORTH_MEASURING", 1.0)
    monkeypatch.setattr(fastest, "ENOUGH_SECONDS", 1e-9)
    small = make_config(memory={"weights": "int8"})
    with forms.using("cpu", False):
        chosen, (line,) = fastest.choose(small, CPU)
    assert chosen.memory.compute in ("int8", "bf16", "fp32") and chosen.memory.kernels == "fused"
    assert "relative speed: fp32" in line and ("int8" in line) == product.is_exact()
    for changes in ({"weights": "bf16"}, {"weights": "fp32"}):  # INT8 products are for INT8 weights only
        other = make_config(memory=changes)
        assert not any("int8" in name for name in fastest.measure(other, CPU))
    for changes in ({"kernels": "plain"}, {"engine": "autograd"}, {"compute": "fp32"}):
        other = make_config(memory=changes)
        assert fastest.choose(other, CPU) == (other, [])


def test_on_a_processor_without_exact_products_a_run_says_so(config: Path, tmp_path: Path) -> None:
    """And has the same losses. The environment limits oneDNN, so it needs a process of its own."""
    keys, as_is, limited = options("memory.compute=int8"), tmp_path / "as is", tmp_path / "limited"
    lowres_here("train", config, *keys, "--run", as_is)
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = lowres("train", config, *keys, "--run", limited, env=env)
    assert losses(as_is) == pytest.approx(losses(limited), rel=1e-6)
    said = "no exact INT8 product" in done.stderr + done.stdout
    assert said or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")


@pytest.mark.parametrize(
    "keys, text",
    [
        (["memory.weights=fp32"], "compute: int8 multiplies the codes of INT8 weights, and weights are fp32"),
        (["memory.engine=autograd"], "compute: the autograd engine does not multiply INT8"),
        (["memory.kernels=plain"], "kernels: INT8 products need fused kernels"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config: Path, keys: list[str], text: str) -> None:
    done = lowres_here("config", config, *options("memory.compute=int8", *keys), code=2)
    assert text in done.stderr and len(done.stderr.strip().splitlines()) == 1
