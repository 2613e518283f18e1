"""scripts/bench_gpu.py without a GPU: everything except the calls to CUDA."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowres.kernels import forms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_gpu  # noqa: E402
import gpu_steps  # noqa: E402

Bench = Callable[..., str]
SMALL = (
    *("--device", "cpu", "--config", "configs/tiny.toml", "--commit", "abc"),
    *("--set", "data.seq_len=64", "--set", "train.batch_tokens=320", "--set", "train.micro_batch=1"),
    *("--set", "memory.stash_on=host", "--set", "model.n_layers=2"),
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """What the script prints. It and its benchmarks run in this process, which saves the seconds to import
    torch for each of them."""

    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *map(str, arguments)])
        return bench_gpu.main()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, str(ROOT / "scripts/bench_gpu.py")]
        return subprocess.CompletedProcess(command, main(*command[2:]), "", "")

    here = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(bench_gpu, "subprocess", here)
    monkeypatch.chdir(ROOT)

    def bench(*arguments: object, code: int) -> str:
        assert main(*arguments) == code
        return capsys.readouterr().out

    with forms.using("cpu", False):  # INT8 products turn compiled kernels on; other tests have them off
        yield bench


def record(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"gpu_{name}.json").read_text("utf-8"))
    return found


def test_every_benchmark_in_small(bench: Bench, tmp_path: Path) -> None:
    printed = bench(*SMALL, "--out", tmp_path, code=0)
    names = ("steps", "steps_int8", "rates", "profile", "uncapped")
    assert [line.split(":")[0] for line in printed.splitlines()] == list(names)
    records = {name: record(tmp_path, name) for name in names}
    for name, found in records.items():
        assert found["finished"] and "error" not in found, name
        assert found["commit"] == "abc" and found["machine"] and f"bench_gpu.py {name}" in found["command"]
        assert found["versions"]["torch"] == torch.__version__

    steps = records["steps"]
    assert len(steps["losses"]) == 4 and all(5 < loss < 9 for loss in steps["losses"])
    assert steps["whole"]["5"]["tokens"] == 320 and set(steps["short"]) == {"2", "4"}
    assert steps["extrapolated_seconds_per_step"] > 0 and steps["gemm_tflops"] > 0
    found = steps["memory"]
    assert found["gpu_plan_over_peak"] == pytest.approx(1, abs=0.1)
    assert found["host_plan_bytes"] == found["host_held_bytes"] > 0 and steps["on_host"]["stash"] == 2
    assert {"backward", "loss", "update"} <= found["gpu_plan_over_peak_by_phase"].keys()
    assert found["peak_rss_bytes"] > found["gpu_peak_bytes"] and steps["cap_bytes"] is None

    rates = records["rates"]
    assert rates["dequantise"]["elements_g_s"] > 0 and rates["copies_gb_s"]["both, each way"] > 0
    assert rates["products_tflops"]["128 x 64"]["torch.int8"]["dy w, second by rows"] > 0
    assert rates["attention"]["kernel"] and rates["update, adamw"]["share_of_copy"] > 0
    spent = records["profile"]
    kinds = spent["ms_by_kind"]
    assert all(kinds[kind] > 0 for kind in ("GEMM", "attention", "quantisation", "transfers"))
    assert sum(kinds.values()) == pytest.approx(spent["profiled_step_ms"], rel=1e-3)
    phases = {"forward", "loss", "backward", "update"}
    assert phases <= spent["ms_by_phase_and_kind"].keys() and phases <= spent["ms_by_phase"].keys()
    assert 0 < sum(spent["ms_by_phase"].values()) <= spent["step_ms"]


def test_what_fails_is_recorded_and_the_rest_is_run(bench: Bench, tmp_path: Path) -> None:
    arguments = ["steps", "rates", *SMALL, "--set", "memory.budget_gib=0.001", "--out", tmp_path]
    printed = bench(*arguments, code=1)
    assert "memory.budget_gib" in record(tmp_path, "steps")["error"] and "failed: " in printed
    assert record(tmp_path, "rates")["finished"]


def test_what_there_is_no_time_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later, shorter benchmark still runs."""
    monkeypatch.setattr(bench_gpu, "run_in_a_process", lambda own, seconds, parsed: {"seconds": seconds})
    arguments = [*SMALL, "profile", "rates", "--budget-seconds", "50", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    assert bench_gpu.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("rates: ") and "left out: profile (needs 60 s, 50 s are left)" in printed


def test_what_is_cut_off_keeps_what_was_found(tmp_path: Path) -> None:
    """Each benchmark is a process of its own."""
    command = [sys.executable, "scripts/bench_gpu.py", "rates", "steps", *SMALL, "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    second, deadline = tmp_path / "gpu_steps.json", time.monotonic() + 120
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert record(tmp_path, "rates")["finished"]
    assert not record(tmp_path, "steps")["finished"]


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--device", "cpu"])
    assert bench_gpu.main() == 2 and "give --config" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench_gpu.main() == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.main()
    assert "steps_24gb_int8" in capsys.readouterr().err


def test_a_whole_step_is_extrapolated_from_two_short_ones() -> None:
    assert gpu_steps.extrapolated({2: 5.0, 4: 9.0}, 16) == pytest.approx(33.0)
    assert gpu_steps.extrapolated({2: 5.0, 4: 4.9}, 16) == pytest.approx(4.9)  # noise does not go below
