"""scripts/bench_speed.py in small: its arms, its record, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowres.kernels import forms
from tests.forks import Fork

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_speed  # noqa: E402
import speed_linear  # noqa: E402
import speed_update  # noqa: E402

SMALL = ("--preset", "9m", "--seq-len", "16", "--batch-tokens", "64", "--micro-batch", "2", "--rounds", "1")


def test_arms_take_turns_and_one_that_refuses_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    assert transformers.Trainer and transformers.LlamaForCausalLM  # imported here, and not in every arm
    monkeypatch.setattr(bench_speed, "subprocess", SimpleNamespace(Popen=Fork, PIPE=subprocess.PIPE))
    monkeypatch.chdir(ROOT)
    out = tmp_path / "speed.json"
    command = [
        "bench_speed.py",
        "fp32",
        "bad",
        "plain-bf16",
        "hf-trainer",
        "--threads",
        "1",
        "--clock",
        "cpu",
    ]
    command += ["--ours", "bad:memory.stash_on=host,memory.engine=autograd", "--against", "fp32"]
    monkeypatch.setattr(sys, "argv", [*command, *SMALL, "--out", str(out)])
    bench_speed.main()
    record = json.loads(out.read_text())
    (found,) = record["presets"]
    arms = found["arms"]
    assert arms["bad"]["refused"].startswith("memory.stash_on: the autograd engine")
    assert "refused: memory.stash_on" in capsys.readouterr().out
    assert found["ratios_against"] == "fp32" and arms["fp32"]["speed_ratio"] == 1
    for name, compute in (("fp32", "fp32"), ("plain-bf16", "bf16"), ("hf-trainer", "fp32")):
        arm = arms[name]
        assert arm["compute"] == compute and len(arm["seconds"]) == 1 and arm["tokens_per_s"] > 0
        assert 0 < arm["model_share_of_peak"] < arm["hardware_share_of_peak"]
    assert arms["hf-trainer"]["micro_batch"] == 4  # the whole step
    assert arms["fp32"]["parameters"] == arms["plain-bf16"]["parameters"] == arms["hf-trainer"]["parameters"]
    assert record["cpu"]["cores"] and "amx" in record["cpu"]["instruction_sets"] and record["commit"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "there is no arm nothing; there are fp32, "),
        (["--ours", "fast"], "write it as NAME:section.key=value"),
        (["--clock", "cpu", "--threads", "2"], "add --threads 1"),
        (["--batch-tokens", "100"], "must be a multiple of --seq-len"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_speed.options(arguments)
    assert message in capsys.readouterr().err


def test_speed_over_sizes(tmp_path: Path) -> None:
    record: dict[str, Any] = speed_linear.measure(["9m"], [1, 2], 16, [], 1)
    assert [point["micro_batches"] for point in record["points"]] == [1, 2]
    assert "GFLOP/s" in record["table"]
    assert speed_linear.draw(record, tmp_path / "x.png") == "x.png"


def test_the_update_of_a_layer() -> None:
    with forms.using("cpu", False):  # it turns compiled kernels on
        found = speed_update.measure(1, "9m")["updates"]
    ours = {"optimizer.update", "storage.apply"}
    assert found.keys() == {*ours, *(f"PyTorch's operations: {name}" for name in ours), "torch AdamW"}
    assert found["torch AdamW"]["time_over_adamw"] == 1
