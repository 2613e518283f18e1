"""The plan of the DeepSpeed engine: its arithmetic, what it advises, and what real steps take."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowres.config import Config
from lowres.config_file import load_config, parse_config
from lowres.engine import zero, zero_memory
from lowres.errors import DoesNotFit
from lowres.memory import GIB, Crew, Plan, make_plan, require_fit, require_machine
from lowres.memory import plan as record
from lowres.meter import rss_gib
from lowres.model import initialize
from lowres.rooms import GPU, HOST, Rooms
from lowres.runs import training_engine
from tests.helpers import CPU, make_batch

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")  # planning needs no device
MIB = 1 << 20
BF16 = {"weights": "bf16", "moments": "bf16"}
OFFLOADED = {"stage": 3, "offload_param": "cpu"}
Sections = Mapping[str, Mapping[str, object]]


def deepspeed_config(**sections: Mapping[str, object]) -> Config:
    base: dict[str, dict[str, object]] = {
        "model": {"preset": "7b"},
        "data": {"seq_len": 2048},
        "train": {"batch_tokens": 131072, "micro_batch": 1},
        "memory": {"engine": "deepspeed"},
    }
    return parse_config({key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}})[
        0
    ]


def always(plan: Plan, room: str) -> float:
    """Bytes a parameter of what is there all the time."""
    return sum(c.bytes for c in plan.components if c.room == room and not c.phase) / plan.parameters


# stage and homes, formats, ranks -> bytes a parameter on GPU and host; docs/scaling.md has their sums
TABLE = [
    ({}, {}, 1, 2 + 4, 4 + 8 + 4 + 2),
    ({}, BF16, 1, 2, 2 + 4 + 2 + 2),
    ({}, {}, 8, 2 + 4 / 8, 18 / 8),
    (OFFLOADED, {}, 1, 0, 4 + 8 + 4 + 4 + 2),
    (OFFLOADED, BF16, 1, 0, 2 + 4 + 2 + 2 + 2),
    (OFFLOADED, {}, 8, 0, 22 / 8),
    ({"stage": 3}, BF16, 4, 2 / 4, 10 / 4),
    ({"stage": 3, "offload_optimizer": "none"}, {}, 8, (2 + 4 + 8 + 4) / 8, 0),
    ({"stage": 2, "offload_optimizer": "none"}, {}, 8, 2 + (4 + 8 + 4) / 8, 0),
    ({"stage": 1}, {}, 8, 2 + 4 + 4 / 8, 18 / 8),
]


@pytest.mark.parametrize("asked, formats, ranks, gpu, host", TABLE)
def test_bytes_a_parameter(
    asked: dict[str, object], formats: dict[str, object], ranks: int, gpu: float, host: float
) -> None:
    plan = make_plan(deepspeed_config(deepspeed=asked, memory=formats), CUDA, crew=Crew(ranks, ranks))
    buffers = ("communication", "weights in use", "staging of gradients", "cuBLAS workspace")
    extra = {room: sum(plan.size(name, room) for name in buffers) for room in (GPU, HOST)}
    assert always(plan, GPU) - extra[GPU] / plan.parameters == pytest.approx(gpu, abs=0.001)
    assert always(plan, HOST) - extra[HOST] / plan.parameters == pytest.approx(host, abs=0.001)
    assert extra[GPU] < 1.5 * GIB and extra[HOST] < 0.6 * GIB
    assert plan.peak(GPU) > always(plan, GPU) * plan.parameters
    assert plan.peak("disk") == pytest.approx(plan.parameters * (6 if formats else 12), rel=1e-4)
    assert f"each of {ranks} ranks" in plan.table() or ranks == 1


def test_a_file_of_ones_own_changes_the_buckets(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    config = deepspeed_config(deepspeed={"config_file": str(file), "overlap": False})
    assert make_plan(config, CUDA).size("communication") == 2 * 1000
    twice = deepspeed_config(deepspeed={"config_file": str(file)})
    assert make_plan(twice, CUDA).size("communication") == 2 * 2 * 1000


def test_locked_memory_is_rounded_up_where_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepspeed_config(deepspeed=OFFLOADED, memory=BF16)
    monkeypatch.setattr(zero_memory, "EXACT_LOCKING", True)
    exact = make_plan(config, CUDA).size("accumulated gradients", HOST)
    monkeypatch.setattr(zero_memory, "EXACT_LOCKING", False)
    rounded = make_plan(config, CUDA).size("accumulated gradients", HOST)
    assert exact == 2 * 6738415616 and rounded == 1 << 34
    unlocked = deepspeed_config(deepspeed=OFFLOADED | {"pin_memory": False}, memory=BF16)
    assert make_plan(unlocked, CUDA).size("accumulated gradients", HOST) == exact


def test_auto_takes_the_largest_micro_batch_of_a_rank() -> None:
    def micro_batch(ranks: int, gib: float | None) -> int:
        kept: dict[str, object] = {**BF16, "budget_gib": gib}
        config = deepspeed_config(train={"micro_batch": "auto"}, memory=kept, deepspeed=OFFLOADED)
        plan = make_plan(config, CUDA, crew=Crew(ranks, ranks))
        assert not plan.problems
        return plan.micro_batch

    assert micro_batch(1, None) == 4  # 8,192 tokens are enough for a GPU
    assert micro_batch(32, None) == 2  # a rank has no more
    assert 1 <= micro_batch(1, 4.0) < 4


def test_a_refusal_names_only_what_fits() -> None:
    def line(host: float, ranks: int = 1, **deepspeed: object) -> str:
        budgets = {"budget_gib": 20.0, "host_budget_gib": host}
        config = deepspeed_config(memory=budgets, deepspeed=deepspeed)
        with pytest.raises(DoesNotFit) as error:
            require_fit(make_plan(config, CUDA, crew=Crew(ranks, ranks)))
        return str(error.value)

    stage_3 = "deepspeed.stage=3, deepspeed.offload_param=cpu"
    both = f"what fits: memory.weights=bf16 with memory.moments=bf16, {stage_3}"
    assert f"{both}, or memory.engine=layerwise" in line(90)
    assert "what fits: deepspeed.stage=3 with deepspeed.offload_param=cpu, or" in line(200)
    little = line(40)
    assert "deepspeed.stage" not in little and "weights=bf16" not in little
    assert "what fits: memory.engine=layerwise with memory.weights=int8, memory.moments=int8" in little
    nothing = line(1)
    assert "what fits" not in nothing and nothing.startswith("memory.budget_gib")
    ranked = line(100, ranks=8)  # one GPU is no alternative to eight
    assert "layerwise" not in ranked and "each of 8 ranks needs" in ranked
    # what a line names does fit
    fitting = load_config(
        "configs/llama_7b_24gb_deepspeed.toml", ["memory.weights=bf16", "memory.moments=bf16"]
    )[0]
    assert not make_plan(fitting, CUDA).problems


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepspeed_config(memory=BF16 | {"host_budget_gib": 90.0}, deepspeed=OFFLOADED)
    shared = make_plan(config, CUDA, crew=Crew(8, 8))
    assert shared.budgets[HOST] == 90 * GIB // 8 and shared.problems  # and a unit of its own for each
    apart = make_plan(config, CUDA, crew=Crew(8, 1))
    assert not apart.problems and apart.peak(HOST) == shared.peak(HOST)
    need = 8 * shared.peak(HOST)
    monkeypatch.setattr(record, "device_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(record, "host_bytes", lambda: need - 1)
    with pytest.raises(DoesNotFit, match="of host memory, this machine has"):
        require_machine(shared, CUDA)
    monkeypatch.setattr(record, "host_bytes", lambda: need)
    require_machine(shared, CUDA)


def test_a_machine_too_small_is_told_what_fits_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(deepspeed_config(deepspeed=OFFLOADED), CUDA)
    monkeypatch.setattr(record, "device_bytes", lambda device: 24 * GIB)
    monkeypatch.setattr(record, "host_bytes", lambda: 100 * GIB)
    with pytest.raises(
        DoesNotFit, match=r"100.00 GiB free; what fits: memory\.weights=bf16 with memory\.moments=bf16$"
    ):
        require_machine(plan, CUDA)


# what real steps take, on a CPU, where both rooms are the same memory

MODEL = {"dim": 512, "n_layers": 4, "n_heads": 8, "ffn_dim": 1376, "vocab_size": 1000}
BUCKETS = {"reduce_bucket_size": 2_000_000, "stage3_prefetch_bucket_size": 1_000_000}
MEASURED: dict[str, Sections] = {
    "stage 2, fp32": {},
    "stage 3, fp32 state, bf16": {"memory": {"compute": "bf16"}, "deepspeed": OFFLOADED},
    "stage 2, bf16": {"memory": BF16},
}


def small(own: Sections, model: Mapping[str, object], buckets: Path) -> Config:
    base: dict[str, dict[str, object]] = {
        "model": dict(model),
        "data": {"seq_len": 32},
        "train": {"batch_tokens": 128, "micro_batch": 2},
        "memory": {"engine": "deepspeed", "loss_chunk": 64},
        "deepspeed": {"config_file": str(buckets)},
    }
    return parse_config({key: {**base[key], **own.get(key, {})} for key in base})[0]


def resident() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def steps(config: Config) -> Plan:
    """Build an engine as a run does, take two steps of two micro-batches and read it as a checkpoint does."""
    plan = make_plan(config, CPU)
    engine, _ = training_engine(config, plan, Rooms(CPU), False)
    initialize(engine.units(write=True), 0, CPU)
    for step in range(2):
        report = engine.step(make_batch(4, config.data.seq_len, config.model.vocab, step), step, 1.0)
        assert report.skipped == 0
    for unit in engine.units():
        assert unit.spec.tensors
    return plan


def measure(own: Sections, buckets: Path) -> tuple[int, int]:
    """Planned bytes, and by how many the peak of resident memory grew. A tiny model goes first: what it
    leaves are DeepSpeed's modules."""
    steps(
        small(
            own, MODEL | {"dim": 32, "n_layers": 1, "n_heads": 2, "ffn_dim": 64, "vocab_size": 300}, buckets
        )
    )
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    plan = steps(small(own, MODEL, buckets))
    return planned(plan), int(rss_gib() * GIB) - before


def planned(plan: Plan) -> int:
    """Peak of both rooms together, which share their phases."""
    shared = [replace(c, room=GPU) for c in plan.components if c.room == HOST]
    return replace(plan, components=(*plan.components, *shared)).peak(GPU)


def measure_all(buckets: Path) -> None:
    """Print a line of JSON for each variant, each in a fork that shares the imports, also those of a plan."""
    zero.deepspeed(CPU)
    zero.compile_operators(offloaded=True)
    make_plan(small({}, MODEL, buckets), CPU)
    for name, own in MEASURED.items():
        sys.stdout.flush()
        if not (child := os.fork()):
            print(json.dumps([name, *measure(own, buckets)]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak that resets")
def test_the_plan_is_what_real_steps_take(tmp_path: Path) -> None:
    """In total, to 10 %: what DeepSpeed allocates has no names."""
    pytest.importorskip("deepspeed")
    buckets = tmp_path / "buckets.json"
    buckets.write_text(json.dumps({"zero_optimization": BUCKETS}))
    program = "from tests.test_deepspeed_plan import *; measure_all(Path(sys.argv[1]))"
    # memory that is given back is not counted as held
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(buckets)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | fixed | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [line[0] for line in lines] == list(MEASURED)
    for name, planned, found in lines:
        assert abs(planned - found) <= 0.1 * found, (name, planned / MIB, found / MIB)
