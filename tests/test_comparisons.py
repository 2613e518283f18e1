"""The scripts that train several ways side by side, on a model that takes milliseconds a step."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowres.cli import main
from lowres.errors import UserError
from tests import forks

ROOT = Path(__file__).parent.parent
SMALL = """
[model]
dim = 32
n_layers = 1
n_heads = 2
ffn_dim = 64
[data]
vocab_size = 300
seq_len = 32
[optim]
name = "adamw"
[train]
steps = 4
batch_tokens = 64
eval_every = 2
eval_tokens = 256
[memory]
weights = "fp32"
[log]
sample_tokens = 0
"""


Script = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], points_here: None
) -> Script:
    """What a script prints and records. It and its sweeps run in this process, which saves the seconds to
    import torch for each of them."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    comparison = importlib.import_module("comparison")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "lowres"]
        return subprocess.CompletedProcess(command, main(command[3:]), "", capsys.readouterr().err)

    monkeypatch.setattr(comparison, "subprocess", SimpleNamespace(run=run))
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 400)

    def train(name: str, *arguments: object) -> tuple[str, dict[str, Any]]:
        out = tmp_path / "results" / "found.json"
        command = [name, *map(str, arguments), "--runs", str(tmp_path / "runs"), "--out", str(out)]
        command += ["--set", f"data.cache={tmp_path / 'cache'}"]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        importlib.import_module(name).main()
        return capsys.readouterr().out, json.loads(out.read_text())

    return train


def test_optimizers_are_compared_at_equal_tokens(script: Script, tmp_path: Path) -> None:
    arguments = [tmp_path / "text.txt", "--config", tmp_path / "small.toml", "--tokens", 256, "--jobs", 1]
    arguments += ["--seeds", 0, 1, "--timed-steps", 2, "--only", "adamw", "adamw, int8"]
    printed, record = script("compare_optimizers", *arguments)
    arms = record["arms"]
    assert list(arms) == ["adamw", "adamw, int8"]
    assert "| adamw, int8 |" in printed and record["tokens"] == 256
    assert len(arms["adamw"]["val_loss"]) == 2 and arms["adamw, int8"]["lr"] == arms["adamw"]["lr"]
    # the best run of all that was tried is the first seed, and beside the rates, other settings were
    tried = record["adamw"]["tried"]
    assert len(tried) == 6 and any("grad_clip" in settings for settings in tried)
    assert arms["adamw"]["val_loss"][0] == min(*record["rates"]["adamw"].values(), *tried.values())
    assert arms["adamw"]["state_bytes_per_parameter"] == pytest.approx(8)
    assert 0 < arms["adamw"]["update_share"] < 1
    # again: nothing is trained twice
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    script("compare_optimizers", *arguments)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}


def test_relora_is_compared_with_lora_and_full_training(script: Script, tmp_path: Path) -> None:
    arguments = [tmp_path / "text.txt", "--config", tmp_path / "small.toml", "--tokens", 512, "--seeds", 0]
    arguments += ["--factors", 2, "--rank", 2, "--cycle-steps", 2, "--rewarmup-steps", 1]
    printed, record = script("compare_relora", *arguments)
    arms, settings = record["arms"], record["settings"]
    kept = "ReLoRA, a tenth of the moments kept"
    assert list(arms) == ["full", "LoRA", "warm start + LoRA", "ReLoRA", "ReLoRA, int8", kept]
    assert all(f"| {name} |" in printed for name in arms)
    loss = {name: arm["mean_val_loss"] for name, arm in arms.items()}
    assert len(set(loss.values())) == 6  # no two of them are the same training
    assert loss["ReLoRA"] == record["rates"]["ReLoRA"]["2"]  # the sweep's run is the first seed's
    assert "relora.start_step=0" in settings["LoRA"] and "relora.start_step=2" in settings["ReLoRA"]
    for lora in ("LoRA", "warm start + LoRA"):
        part = (loss[lora] - loss["ReLoRA"]) / (loss[lora] - loss["full"])
        assert arms["ReLoRA"]["gap_recovered"][lora] == pytest.approx(part)
        assert arms["full"]["gap_recovered"][lora] == pytest.approx(1) and arms[lora]["merge_norm"] is None
    assert arms["ReLoRA"]["merge_cosine"] == pytest.approx(1, abs=1e-3)
    assert 0 < arms["ReLoRA, int8"]["merge_cosine"] < 1


def test_optimizers_are_compared_over_batches(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """beta2 averages over as many tokens at every batch, also where AdamW has betas of its own. An arm that
    diverged at every rate is in the table."""
    comparison, found = importlib.import_module("comparison"), {}

    def best_rate(_: Path, overrides: list[str], lr: float, tokens: int, folder: Path) -> dict[str, Any]:
        found[folder.name] = [setting for setting in overrides if "betas" in setting]
        return {"lr": lr, "val_loss": None if folder.name == "racs-64" else 2.0, "rates": {}}

    monkeypatch.setattr(comparison, "best_rate", best_rate)
    arguments = ["--config", tmp_path / "small.toml", "--tokens", 130, "--optimizers", "adamw", "racs"]
    printed, record = script("compare_batches", *arguments, "--batches", 32, 64)
    assert "| 64 | 3 |" in printed and "nan" in printed
    assert record["perplexity_change"]["racs"]["32"] == 0
    assert found["adamw-64"] == ["optim.betas=[0.9, 0.998001]"]
    assert found["racs-64"] == ["optim.betas=[0.0, 0.81]", "optim.adamw_betas=[0.9, 0.998001]"]


@pytest.mark.parametrize(
    "name, option",
    [
        *((f"compare_{what}", "--jobs") for what in ("batches", "memory", "optimizers", "relora")),
        ("compare_optimizers", "--timed-steps"),
        ("compare_batches", "--batches"),
        ("compare_relora", "--tokens"),
    ],
)
def test_a_count_of_zero_is_refused_before_anything_is_trained(
    name: str, option: str, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script(name, option, 0)
    assert f"argument {option}: '0' is not a whole number above 0" in capsys.readouterr().err


def test_curves_of_runs_that_diverged_are_drawn(script: Script, tmp_path: Path) -> None:
    """One stopped early, with losses that are no numbers."""
    comparison = importlib.import_module("comparison")
    runs = []
    for name, losses in (("good", [3.0, 2.0, 1.5, 1.4]), ("dead", [3.0, None])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "tokens": i * 64, "loss": loss}) for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        runs.append({"run": str(tmp_path / name), "val_loss": 1.4 if name == "good" else None})
    for arms in ({"both": runs}, {"good": runs[:1], "dead": runs[1:]}, {"dead": runs[1:]}):
        pytest.importorskip("matplotlib")
        assert comparison.draw_curves(tmp_path / "curves.png", arms, "").exists()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/compare_relora.py"), "stdlib", "--config", "none.toml"]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "found.json"), "--factors", "2"]
    with (tmp_path / "errors").open("w+") as errors:
        assert forks.run(command, stderr=errors).returncode == 1
        errors.seek(0)
        (line,) = errors.read().strip().splitlines()
    assert "config none.toml: no such file" in line and not (tmp_path / "found.json").exists()


def test_a_run_that_cannot_start_is_no_arm_that_diverged(script: Script) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file or folder"):
        script("compare_relora", "none.txt", "--factors", 2)


def test_memory_formats_are_compared(script: Script, tmp_path: Path) -> None:
    source = ["--set", f"data.source={tmp_path / 'text.txt'}", "--seeds", 0]
    printed, record = script("compare_memory", "stash", tmp_path / "small.toml", *source)
    assert "| int8, exact forward |" in printed and record["tokens"] == 256


def test_deepspeed_is_compared_with_layerwise(tmp_path: Path) -> None:
    """All engines take the same steps; each in a copy of a process in which DeepSpeed has compiled."""
    pytest.importorskip("deepspeed")
    program = """
import sys
sys.path.insert(0, "scripts")
import compare_deepspeed, torch._dynamo
from tests import forks
compare_deepspeed.subprocess = forks
forks.PIPE = forks.subprocess.PIPE
sys.argv[0] = "scripts/compare_deepspeed.py"
compare_deepspeed.main()
"""
    out = tmp_path / "found.json"
    sizes = ["--preset", "9m", "--seq-len", "32", "--batch-tokens", "128", "--micro-batch", "2"]
    command = [sys.executable, "-c", program, *sizes, "--set", "model.vocab_size=300"]
    command += ["--device", "cpu", "--steps", "1", "--rounds", "1", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    arms = json.loads(out.read_text())["arms"]
    assert list(arms) == ["layerwise", "deepspeed, stage 2", "deepspeed, stage 3"]
    losses = [arm["loss"] for arm in arms.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert all(arm["tokens_per_s"] > 0 and arm["resident_bytes"] > 0 for arm in arms.values())
    assert "| deepspeed, stage 3 |" in done.stdout
