"""scripts/bench_gpu.py without a GPU: everything but the calls to CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def bench(*arguments: object, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/bench_gpu.py", *map(str, arguments)]
    here = os.environ | {"PYTHONPATH": str(ROOT)}  # as on a machine where lowres is not installed
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env=here
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_memory_is_measured_and_what_fails_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("[model]\ndim = 64\nn_heads = 2\nffn_dim = 128\nvocab_size = 500\n")
    # whose budget allows neither of its layers
    (tmp_path / "failing.toml").write_text("[memory]\nbudget_gib = 0.001\n")
    options = ["--device", "cpu", "--out", tmp_path, "--steps", 1, "--commit", "abc"]
    options += [
        "--set",
        "data.seq_len=128",
        "--set",
        "train.batch_tokens=1024",
        "--set",
        "memory.stash_on=host",
    ]
    for name in ("failing", "small"):
        options += ["--config", tmp_path / f"{name}.toml"]
    printed = bench("memory", *options, code=1)
    assert "failing" in printed.stdout and "small" in printed.stdout

    record = json.loads((tmp_path / "gpu_memory.json").read_text())
    assert record["commit"] == "abc" and record["machine"] and "memory" in record["command"]
    assert record["versions"]["torch"] == torch.__version__
    assert "memory.budget_gib" in record["presets"]["failing"]["error"]
    found = record["presets"]["small"]
    assert "error" not in found
    assert len(found["losses"]) == 3 and all(5 < loss < 8 for loss in found["losses"])
    assert found["seconds_per_step"] > 0 and found["tokens_per_s"] > 0
    assert found["gpu_plan_over_peak"] == pytest.approx(1, abs=0.1)
    assert found["host_plan_over_held"] == 1 and found["on_host"]["stash"] == 4
    assert {"backward", "loss", "update"} <= found["gpu_plan_over_peak_by_phase"].keys()
    assert found["peak_rss_bytes"] > found["gpu_peak_bytes"] and found["cap_bytes"] is None


def test_refusals() -> None:
    assert "--config" in bench("--device", "cpu", code=2).stderr
    assert "memory" in bench("nothing", code=2).stderr
    if not torch.cuda.is_available():
        assert bench(code=2).stderr.count("\n") == 1
