"""The plan of every shipped config compared with a whole step, at the real shapes and full depth.

The step runs the real engine, with the homes of the plan, on tensors without memory and as on a GPU, so a 7B
model takes seconds. The plan's own traces cut the model to one band and loops to a few chunks. Here only the
number of micro-batches is cut, to two; brief steps also cut those loops. Arithmetic of no shipped config
is compared with six layers.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres import rng, target
from lowres.config import Config
from lowres.config_file import load_config, parse_config
from lowres.engine import LayerwiseEngine, layerwise, working
from lowres.engine.common import Documents, Grouping, one_example_each
from lowres.errors import UserError
from lowres.memory import ADAPTERS, GIB, Choice, Crew, Plan, choice, make_plan, make_plans, trace
from lowres.memory.choice import _Planner
from lowres.memory.trace import Tracer, without_memory
from lowres.model import block, unit_specs
from lowres.optim import make_optimizer
from lowres.optim.overview import overview, table
from lowres.rng import round_to_integer
from lowres.rooms import GPU, HOST, Homes, Rooms
from tests.helpers import CPU, make_config
from tests.measuring import PHASES, Bytes, build, held, phases, planned

CUDA = torch.device("cuda")
MICRO_BATCHES = 2
# components that no step allocates: of cuBLAS on the GPU, of saving on the host, and of samples
NOT_OF_THE_STEP = ("cuBLAS workspace", "saving", "sampling")


def whole_step(path: str, part: str, brief: bool, *overrides: str) -> tuple[Plan, Bytes]:
    """The plan of a part of a run, and the memory of a step of it. brief: see `target.planned_for`."""
    config, _ = load_config(path, [*overrides, "log.update_every=1"])  # this step measures its updates
    config = config.with_vocab(config.model.vocab_size or config.data.vocab_size or 0)
    plan, rooms, adapted = make_plans(config, CUDA)[part], Rooms(CPU), part == ADAPTERS
    relora, length = config.relora, config.data.seq_len
    count = min(MICRO_BATCHES, -(-config.most_windows // plan.micro_batch))
    with without_memory("cuda", rooms, brief, config.memory.kernels != "plain") as live:
        units, engine = build(config, plan, rooms, adapted)
        assert isinstance(engine, LayerwiseEngine)
        engine.reserve(config.most_windows, length, training=True)
        with rooms.allocate_in(HOST):
            batch = torch.zeros(count * plan.micro_batch, length, dtype=torch.int64)
            grouping: Grouping | None = None
            if engine.settings.objective:
                grouping = one_example_each(batch)
        live.reset()
        step = relora.start_step + relora.cycle_steps - 1 if adapted else 0  # with adapters one that merges
        # the plan assumes one document in each sequence
        many: Documents = [(length - 9, 8, 1)] * len(batch) if config.packed else None
        engine.enqueue(batch, batch, 1, step, 1.0, rehearsal=False, documents=many, grouping=grouping)
        found = held(units, plan.choice.homes, rooms) | phases(live, rooms)
        left = live.current[GPU] - sum(size for (_, room), size in rooms.held().items() if room == GPU)
        found["projections", GPU] = left  # which are in no slab
    return plan, found


def parts() -> list[tuple[str, str]]:
    """Every shipped config of the layer-major engine, and the parts of its run."""
    found = []
    for path in sorted(Path("configs").glob("*.toml")):
        config, _ = load_config(path)
        if config.memory.engine == "layerwise":
            found += [
                (str(path), part)
                for part in (("warm start", ADAPTERS) if config.relora.enabled else ("run",))
            ]
    return found


def check(path: str, part: str, brief: bool, *overrides: str) -> None:
    """Every component and every phase agree to 1 %. Projections are small and exist from the first update on,
    so in this step they count in some phases and not in others."""
    plan, found = whole_step(path, part, brief, *overrides)
    projections = plan.size("projections")
    wanted = {key: size for key, size in planned(plan).items() if key[0] not in NOT_OF_THE_STEP}
    wanted["projections", GPU] = projections
    assert wanted.keys() == found.keys()
    for key, size in found.items():
        allowance = projections if key[0] in PHASES else 1024  # sums of a merge
        assert abs(wanted[key] - size) <= 0.01 * size + allowance, (key, wanted[key], size)


SLOW = ("llama_7b_12gb", "llama_7b_24gb", "llama_13b_24gb", "relora_7b_24gb", "smoltulu_sft")


@pytest.mark.parametrize(
    "path, part",
    [
        pytest.param(*found, id=f"{Path(found[0]).stem} {found[1]}", marks=[pytest.mark.slow] * slow)
        for found in parts()
        for slow in [Path(found[0]).stem in SLOW]
    ],
)
def test_the_plan_is_what_a_whole_step_takes(path: str, part: str) -> None:
    check(path, part, brief=True)


INT8 = "memory.compute=int8"
LAYERS = "model.n_layers=6"
# as all 32 layers have it there
ON_HOST = [LAYERS, "memory.band=2", "memory.weights_on=host", "memory.state_on=host", "memory.stash_on=host"]


@pytest.mark.parametrize(
    "name, part, keys",
    [
        ("tiny", "run", [INT8]),
        # its MLP is 5,461 wide, so copies are padded
        ("llama_1b_8gb", "run", [LAYERS, INT8]),
        ("llama_7b_8gb", "run", [*ON_HOST, INT8]),
        ("llama_7b_8gb", "run", [*ON_HOST, INT8, "memory.compute_wgrad=dense"]),
        ("llama_7b_8gb", "run", [*ON_HOST, "memory.compute=bf16", "memory.kernels=plain"]),
        ("llama_1b_8gb", "run", [LAYERS, "data.document_mask=true"]),
        ("tiny", "run", ["data.document_mask=true", "memory.compute=bf16", "memory.kernels=plain"]),
        ("relora_7b_24gb", ADAPTERS, [LAYERS]),
        ("relora_7b_24gb", ADAPTERS, [LAYERS, "memory.stash_on=host", INT8]),
    ],
)
def test_and_with_other_arithmetic(name: str, part: str, keys: list[str]) -> None:
    check(f"configs/{name}.toml", part, True, *keys)


def test_int8_products_need_less_memory_than_a_copy_of_a_layer() -> None:
    config = load_config("configs/llama_7b_12gb.toml")[0].with_vocab(32000)
    plans = {
        compute: make_plan(
            config.model_copy(update={"memory": config.memory.model_copy(update={"compute": compute})}), CUDA
        )
        for compute in ("bf16", "int8")
    }
    codes = plans["int8"].size("transposed codes of a layer")
    assert 2 * codes == plans["bf16"].size("layers in compute precision") > 0
    assert plans["int8"].size("layers in compute precision") == 0
    assert plans["int8"].peak(GPU) < plans["bf16"].peak(GPU)


@pytest.mark.parametrize(
    "name, keys",
    [
        *(("tiny", ()), ("llama_1b_8gb", ())),
        *(("llama_1b_8gb", ("model.n_layers=2", f"optim.name={rule}")) for rule in ("muon", "racs")),
        pytest.param("llama_7b_24gb", (), marks=pytest.mark.slow),
    ],
)
def test_and_with_all_chunks_of_every_loop(name: str, keys: tuple[str, ...]) -> None:
    check(f"configs/{name}.toml", "run", False, *keys)


def test_what_the_plan_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak per layer, where the plan's trace sees one layer; and a leak per chunk of an update, where it
    sees two chunks."""
    left: list[Tensor] = []

    def leaving(x: Tensor, *arguments: Any) -> Tensor:
        left.append(x.clone())
        return block(x, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(layerwise, "block", leaving)
        with pytest.raises(AssertionError):
            check("configs/tiny.toml", "run", brief=True)
    left.clear()
    trace.tracers.clear()
    check("configs/tiny.toml", "run", brief=True)

    def rounding(x: Tensor, *arguments: Any) -> Tensor:
        left.append(x.clone())
        return round_to_integer(x, *arguments)

    trace.tracers.clear()
    monkeypatch.setattr(rng, "round_to_integer", rounding)
    monkeypatch.setattr(target, "CHUNK_CUDA", 1 << 12)
    with pytest.raises(AssertionError):
        check("configs/tiny.toml", "run", False, "memory.kernels=plain", "memory.compute=bf16")
    trace.tracers.clear()


def test_larger_bands_are_what_the_layers_of_smaller_ones_take() -> None:
    """The plan traces three layers of a band and assumes that further ones are like the last."""
    config = make_config(model={"n_layers": 6, "n_kv_heads": 2}, train={"batch_tokens": 6 * 32})
    found = Tracer(config, "cuda", None, compiled=True)
    assert found.phases(2, 5, True) == found._trace(2, 5, True)


def test_the_search_finds_what_trying_everything_would() -> None:
    """The first homes whose plan fits, of all, sorted from the least to the most on the host."""
    config = make_config(optim={"name": "adamw"}, model={"n_layers": 5, "dim": 128, "ffn_dim": 256})
    planner = _Planner(config, CUDA, {GPU: None, HOST: None}, None, Crew())
    for band in (1, 2):
        every = [planner.plan(Choice(3, band, moved.homes())) for moved, _ in planner.steps(3, band)]
        assert len({plan.choice.homes for plan in every}) == len(every) > 14
        peaks = [plan.peak(GPU) for plan in every]
        for budget in range(min(peaks) - 1000, max(peaks) + 1000, (max(peaks) - min(peaks)) // 40):
            planner.budgets[GPU] = budget
            fitting = [p for p in every if p.peak(GPU) <= budget] if peaks[-1] <= budget else every[-1:]
            assert planner.place(3, band).choice == fitting[0].choice


@pytest.mark.parametrize("name, first", [("adamw", "state"), ("apollo-mini", "stash")])
def test_what_frees_a_byte_for_the_least_traffic_moves_first(name: str, first: str) -> None:
    """Moments of a 7B model are cheaper to move than the stash, except if all of them fit into the slots."""
    sections: dict[str, dict[str, object]] = {
        "model": {"preset": "7b"},
        "optim": {"name": name},
        "memory": {"moments": "bf16"},
    }
    sections |= {"data": {"seq_len": 2048}, "train": {"batch_tokens": 131072, "micro_batch": 4}}
    config, _ = parse_config(sections)
    planner = _Planner(config, CUDA, {GPU: None, HOST: None}, None, Crew())
    (start, _), (moved, _) = itertools.islice(planner.steps(4, 1), 2)
    assert start.homes() == Homes() and getattr(moved, first) == 1
    layout, footprint = planner.footprint.layout(4, 1), planner.footprint
    costs = {}
    for key, homes in (("stash", Homes(stash=32)), ("state", Homes(state=frozenset(footprint.units)))):
        plans = [planner.plan(Choice(4, 1, place)) for place in (Homes(), homes)]
        freed = plans[0].peak(GPU) - plans[1].peak(GPU)
        costs[key] = sum(layout.traffic(homes, 64, 2048)) / freed
    assert costs["stash"] == pytest.approx(3, rel=0.02)
    assert (costs["state"] < 2.2) if first == "state" else (costs["state"] > 3.5)


def test_a_weight_gradient_on_cuda_needs_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """If PyTorch can, the bf16 product is added to the fp32 buffer; else it exists in fp32 first."""
    config = make_config(
        model={"vocab_size": 20000, "dim": 256}, memory={"weights": "int8", "loss_chunk": 64}
    )
    product, logits = 4 * 20000 * 256, 64 * 20000 * (4 + 2)
    found = {}
    for able in (True, False):
        monkeypatch.setattr(working, "adds_wide", lambda able=able: able)
        found[able] = Tracer(config, "cuda", None, compiled=True).phases(4, 1, True)["loss"]
    assert 0 <= found[True] - logits < 1 << 20
    assert found[False] > product > 2 * found[True]


def test_a_gpu_keeps_a_gib_for_what_no_plan_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "device_bytes", lambda device: 24 * GIB)
    open_, asked = make_config(), make_config(memory={"budget_gib": 24.0})
    assert make_plan(open_, CUDA, on_this_machine=True).budgets[GPU] == 23 * GIB
    assert make_plan(asked, CUDA, on_this_machine=True).budgets[GPU] == 24 * GIB
    assert make_plan(open_, CPU, on_this_machine=True).budgets[GPU] == 24 * GIB
    monkeypatch.setattr(choice, "device_bytes", lambda device: GIB // 2)  # nothing fits: not "no limit"
    assert make_plan(open_, CUDA, on_this_machine=True).problems


def test_it_can_be_planned_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("int8 moments need the package bitsandbytes")

    config = make_config(optim={"name": "adamw8bit"})
    wanted = make_plan(config, CUDA)
    monkeypatch.setattr(trace, "bitsandbytes_functional", missing)
    trace.tracers.clear()
    found = make_plan(config, CUDA)
    trace.tracers.clear()
    assert found.size("optimizer state") == wanted.size("optimizer state")
    assert found.size("update workspace") >= wanted.size("update workspace")


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"budget_gib": 0.002},  # everything moves, layer by layer, and it still does not fit
        {"budget_gib": 0.05, "host_budget_gib": 0.001},
        {"engine": "autograd"},
        {"engine": "deepspeed", "weights": "bf16", "moments": "bf16", "budget_gib": 0.001},
    ],
    ids=["all on the gpu", "all on the host", "nowhere", "autograd", "deepspeed"],
)
def test_the_work_grows_with_the_layers_and_no_faster(memory: dict[str, object]) -> None:
    """Calls of functions; with 10,000 layers, anything quadratic would take for ever."""
    found = [calls_to_plan(make_config(model={"n_layers": n}, memory=memory)) for n in (40, 80, 160)]
    first, second = found[1] - found[0], found[2] - found[1]
    assert 0 < second < 2.1 * first, found


def calls_to_plan(config: Config) -> int:
    """Calls of functions of Python and C for a plan and its texts."""

    def look() -> None:
        plan = make_plan(config, CUDA)
        assert plan.table() and plan.as_dict()
        specs = (spec for unit in unit_specs(config.model) for spec in unit.tensors)
        assert table(overview(make_optimizer(config), specs), 1)

    look()  # makes the traces, which do not depend on the number of layers
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        look()
    finally:
        sys.setprofile(None)
    return calls


def test_rates_share_a_trace_and_what_allocates_does_not() -> None:
    def of(**optim: float) -> Tracer:
        return trace.tracer(make_config(optim={"name": "adamw", "lr": 0.01} | optim), "cpu", None)

    assert of() is of(lr=0.02, embed_lr=0.1, norm_lr=0.3)
    assert of() is not of(weight_decay=0.1) and of() is not of(grad_clip=1.0)
