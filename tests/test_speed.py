"""Where the time of a step goes, and how fast a config is: `lowres bench` and `lowres train --profile`."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from lowres import marks, metrics
from lowres.rooms import Rooms
from lowres.speed import Profiler
from lowres.speed.kinds import (
    ATTENTION,
    GEMM,
    OVERHEAD,
    POINTWISE,
    QUANTISATION,
    TRANSFER,
    UPDATE,
    WAITING,
    by_name,
    kind_on_device,
    kind_on_host,
)
from lowres.speed.peak import gemm_peak
from lowres.speed.phases import Clock, following
from lowres.speed.shares import Shares, shares_of
from lowres.speed.trace import Span, of_events, pieces
from tests.full import full
from tests.helpers import CPU, lowres_here

# ---- classification


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", GEMM),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_s161616gemm_bf16_16x16_128x2_tn_align8>", GEMM),
        ("aten::_int_mm", GEMM),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("Memcpy HtoD (Pinned -> Device)", TRANSFER),
        ("Memcpy DtoH (Device -> Pinned)", TRANSFER),
        ("Memcpy DtoD (Device -> Device)", POINTWISE),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", POINTWISE),
        ("aten::silu", POINTWISE),
        ("lowres::quantise: x of the down projection", QUANTISATION),
        ("lowres::dequantise: weights", QUANTISATION),
        ("lowres::gemm: q", GEMM),
        ("lowres::update: apollo-mini", UPDATE),
        ("lowres::norm: flash of inspiration", POINTWISE),
        ("lowres::swiglu: forward", POINTWISE),
        ("lowres::rope: q", POINTWISE),
        ("lowres::loss: chunk", POINTWISE),
        ("lowres::what comes later", POINTWISE),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert by_name(name) == kind


@pytest.mark.parametrize(
    "path, kind",
    [
        ("", OVERHEAD),
        ("step: 1 | phase: forward", OVERHEAD),
        ("phase: forward | aten::mul", POINTWISE),
        ("phase: forward | aten::matmul | aten::mm", GEMM),
        ("phase: forward | aten::matmul | aten::view", OVERHEAD),
        ("phase: forward | aten::scaled_dot_product_attention | aten::bmm", ATTENTION),
        ("phase: backward | _RMSNormBackward", OVERHEAD),
        ("phase: backward | _RMSNormBackward | aten::mul", POINTWISE),
        ("phase: backward | lowres::dequantise: weights | aten::mul", QUANTISATION),
        ("phase: backward | lowres::swiglu: backward | lowres::quantise: product", QUANTISATION),
        # a C function that is called through ctypes is only seen as its mark
        ("phase: backward | lowres::quantise: x", QUANTISATION),
        ("phase: update | aten::mm", UPDATE),
        ("phase: update | lowres::quantise: weights", UPDATE),
        ("phase: update | lowres::transfer: between the rooms | aten::copy_", TRANSFER),
        ("phase: update | aten::empty", OVERHEAD),
        ("aten::item | cudaStreamSynchronize", WAITING),
        ("aten::mm | cudaLaunchKernel", OVERHEAD),
    ],
)
def test_kinds_on_the_host(path: str, kind: str) -> None:
    assert kind_on_host(tuple(filter(None, path.split(" | ")))) == kind


def test_kinds_on_the_device() -> None:
    """What a kernel was launched for counts more than its name, except for copies."""
    assert kind_on_device("void splitKreduce_kernel", ("aten::mm",)) == GEMM
    assert kind_on_device("void at::native::vectorized_elementwise_kernel", ("aten::mul",)) == POINTWISE
    assert kind_on_device("elementwise", ("lowres::dequantise: w", "aten::mul")) == QUANTISATION
    assert kind_on_device("nvjet_x", ("phase: update", "aten::mm")) == UPDATE
    assert kind_on_device("Memcpy DtoH (Device -> Pinned)", ("phase: update",)) == TRANSFER


def test_marks_cost_nothing_without_a_profile() -> None:
    assert marks.mark(marks.NORM, "x") is marks.mark(marks.LOSS, "y")
    assert marks.kind_in("lowres::norm: x: y") == "norm" and marks.kind_in("aten::mm") is None


# ---- division of the time


def test_pieces_have_no_gaps_and_no_overlaps() -> None:
    spans = [Span("a", 1, 9), Span("b", 2, 4), Span("c", 4, 5), Span("d", 2, 3), Span("late", 20, 30)]
    found = [(p.start, p.end, "/".join(p.path)) for p in pieces(spans, 0, 10)]
    assert found == [
        (0, 1, ""),
        (1, 2, "a"),
        (2, 3, "a/b/d"),
        (3, 4, "a/b"),
        (4, 5, "a/c"),
        (5, 9, "a"),
        (9, 10, ""),
    ]
    assert [(p.start, p.end) for p in pieces(spans, 2.5, 4.5)] == [(2.5, 3), (3, 4), (4, 4.5)]


def event(kind: str, name: str, start: float, end: float, thread: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": kind,
        "name": name,
        "ts": start,
        "dur": end - start,
        "tid": thread,
        "args": more,
    }


def test_a_step_on_a_gpu() -> None:
    """The host is ahead: a kernel counts to the phase in which it was launched, though it runs later. A copy
    beside a kernel costs nothing; a thread of autograd launches too."""
    events = [
        event("user_annotation", "step: 1", 0, 100),
        event("user_annotation", "phase: forward", 1, 20),
        event("cpu_op", "aten::mm", 2, 6),
        event("cuda_runtime", "cudaLaunchKernel", 3, 4, correlation=1),
        event("cuda_runtime", "cudaMemcpyAsync", 7, 8, correlation=2),
        event("user_annotation", "phase: backward", 20, 30),
        event("user_annotation", "lowres::quantise: g", 22, 28, thread=2),
        event("cuda_runtime", "cudaLaunchKernel", 23, 24, thread=2, correlation=3),
        event("cuda_runtime", "cudaStreamSynchronize", 40, 99),
        event("kernel", "nvjet_x", 10, 50, thread=7, correlation=1),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 30, 60, thread=8, correlation=2),
        event("kernel", "elementwise", 70, 90, thread=7, correlation=3),
        event("gpu_user_annotation", "phase: forward", 10, 50, thread=7),
        {"ph": "M", "name": "process_name"},
    ]
    found = shares_of(of_events(events))
    assert found.steps == 1 and found.wall == 100 and found.hidden_transfers == 20
    assert {kind: time for kind, time in found.by_kind.items() if time} == {
        GEMM: 40,
        TRANSFER: 10,
        QUANTISATION: 20,
        OVERHEAD: 10 + 1,  # before the first kernel, and after the host was done with waiting
        WAITING: 10 + 9,
    }
    assert found.by_phase["backward"] == {QUANTISATION: 20}
    assert found.by_phase["forward"] == {OVERHEAD: 9, GEMM: 40, TRANSFER: 10}
    assert sum(found.by_kind.values()) == found.wall
    assert found.as_dict()["ms_of_hidden_transfers"] == 0.02
    lines = found.table().splitlines()
    assert len(lines) == 9 and lines[1].split()[:2] == ["GEMM", "40.0%"]


def profiled(folder: Path) -> Shares:
    rooms, profiler, x = Rooms(CPU), Profiler(CPU), torch.randn(64, 64)
    profiler.start()
    for step in (1, 2):
        with profiler.step(rooms, step):
            rooms.phase = "forward"
            y = x @ x
            with marks.mark(marks.QUANTISE, "y"), record_function("inside"):
                y.round_()
            rooms.phase = "update"
            x.add_(y, alpha=0.0)
            rooms.phase = ""
    return profiler.finish(folder / "trace.json.gz")


def test_the_times_of_a_real_profile_add_up_to_the_steps(tmp_path: Path) -> None:
    found = profiled(tmp_path)
    assert found.steps == 2
    assert sum(found.by_kind.values()) == pytest.approx(found.wall)
    assert found.by_phase["forward"][GEMM] > 0 and found.by_phase["forward"][QUANTISATION] > 0
    assert found.by_phase["update"][UPDATE] > 0
    assert found.by_kind[WAITING] == found.by_kind[ATTENTION] == 0
    assert not list(tmp_path.glob("unfinished*"))


def test_a_clock_follows_the_phases() -> None:
    rooms, clock = Rooms(CPU), Clock(cuda=False)
    with following(rooms, clock.enter):
        rooms.phase = "forward"
        rooms.phase = "update"
        rooms.phase = ""
    rooms.phase = "forward"
    assert clock.ms_by_phase().keys() == {"forward", "update", "between"}


def test_the_peak() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        rate = gemm_peak(dtype, CPU, 32)
        assert rate is None or rate > 0
    assert gemm_peak(torch.float32, CPU, 32) is not None


# ---- end to end


def losses(run: Path) -> list[Any]:
    records = metrics.read(run / "metrics.jsonl")
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


@pytest.mark.parametrize("changed", [[], ["memory.engine=autograd"]])
def test_a_profiled_run_is_the_same_run(config: Path, tmp_path: Path, changed: list[str]) -> None:
    run, other = tmp_path / "profiled", tmp_path / "other"
    keys = [
        "train.steps=6",
        "train.eval_every=0",
        "train.checkpoint_every=0",
        "log.sample_tokens=0",
        *changed,
    ]
    keys = [part for key in keys for part in ("--set", key)]
    printed = lowres_here("train", config, "--run", run, "--profile", 2, *keys).stderr
    lowres_here("train", config, "--run", other, *keys)
    assert losses(run) == losses(other) and len(losses(run)) == 6

    assert "profile of steps 3 to 4: " in printed and "https://ui.perfetto.dev" in printed
    shares = {
        line[:26].strip(): float(line[26:].split()[0].rstrip("%"))
        for line in printed.splitlines()
        if line.startswith((GEMM, ATTENTION, QUANTISATION, POINTWISE, UPDATE, TRANSFER, OVERHEAD, WAITING))
    }
    assert len(shares) == 8 and sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert all(shares[kind] > 0 for kind in (GEMM, ATTENTION, QUANTISATION, POINTWISE, UPDATE, OVERHEAD))

    (trace,) = run.glob("*.json.gz")
    assert str(trace) in printed
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step: 3", "step: 4", "phase: update", "lowres::dequantise: weights"} <= names
    assert "step: 2" not in names and "step: 5" not in names
    assert not list(other.glob("*.json.gz"))


def test_what_a_profile_refuses(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    found = lowres_here("train", config, "--run", run, "--profile", 29, code=2)
    assert found.stderr.startswith("lowres: --profile: 29 steps, after 2 without") and not run.exists()
    assert found.stderr.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        lowres_here("train", config, "--profile", "0")


def test_bench(config: Path) -> None:
    found = json.loads(lowres_here("bench", config, "--steps", 2, "--json").stdout)
    assert found["tokens_per_step"] == 1024 and len(found["seconds"]) == 2 and found["tokens_per_s"] > 0
    assert found["products_in"] == "fp32" and found["micro_batch"] == 5
    assert 0 < found["model_share_of_peak"] < found["hardware_share_of_peak"]
    assert {"forward", "loss", "backward", "update", "between"} == found["share_by_phase"].keys()
    assert sum(found["share_by_phase"].values()) == pytest.approx(1)
    assert 0 < found["peak_mem_gib"] < found["peak_rss_gib"]
    text = lowres_here("bench", config, "--steps", 1, "--set", "memory.compute=bf16").stdout
    assert "tokens/s, median of 1 step " in text and "of the fastest bf16 product" in text


def test_bench_measures_the_plan_or_nothing(config: Path) -> None:
    with full(99):
        printed = lowres_here("bench", config, "--steps", 1, code=3).stderr
    assert "bench: the GPU is full (CUDA out of memory in aten" in printed


@pytest.mark.parametrize(
    "changed, message",
    [
        (["memory.engine=deepspeed", "optim.name=adamw"], "lowres: bench: measures one process; set memory."),
        (
            ["relora.enabled=true", "relora.rank=4"],
            "lowres: bench: it measures no adapters; add --set relora.",
        ),
        (["memory.budget_gib=0.00001"], "memory.budget_gib"),
    ],
)
def test_what_bench_refuses(config: Path, changed: list[str], message: str) -> None:
    keys = [part for key in changed for part in ("--set", key)]
    printed = lowres_here("bench", config, *keys, code=3 if "budget" in changed[0] else 2).stderr
    assert message in printed
