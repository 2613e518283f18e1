"""The plan compared with measured memory, component by component, and with known sizes."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lowres.config import Config
from lowres.config_file import load_config, parse_config
from lowres.memory import GIB, Choice, Plan, make_plan
from lowres.meter import LiveTensors
from lowres.model import initialize
from lowres.rooms import GPU, HOST, Component, Homes, Rooms
from tests.helpers import CPU, LLAMA3, make_batch, make_config
from tests.measuring import Bytes, build, held, phases, planned

CUDA = torch.device("cuda")  # planning needs no device
MODEL = {"dim": 128, "n_layers": 4, "n_heads": 4, "ffn_dim": 344, "vocab_size": 1000}
WIDE = {"dim": 512, "n_layers": 1, "ffn_dim": 1376}
MIB = 1 << 20


def measured(config: Config, plan: Plan) -> tuple[Bytes, dict[str, int]]:
    """Measured memory of two steps as planned: bytes by component and room, and the peak by room. With
    adapters if the config has some."""
    rooms, adapted = Rooms(CPU), config.relora.enabled
    with LiveTensors(rooms) as live:
        units, engine = build(config, plan, rooms, adapted)
        initialize(units.values(), 0, CPU)
        engine.reserve(config.batch_sequences, config.data.seq_len, training=True)
        live.reset()
        for step in (1,) if adapted else (0, 1):  # with adapters: one step, which merges
            batch = make_batch(config.batch_sequences, config.data.seq_len, config.model.vocab)
            engine.step(batch, step, 1.0)
            del batch
    found = held(units, plan.choice.homes, rooms)
    return found | (phases(live, rooms) if config.memory.engine == "layerwise" else {}), live.peak


def agree(one: int, other: int, part: float = 0.05, allowance: int = 16 * MIB) -> bool:
    return abs(one - other) <= max(part * other, allowance)


def check(config: Config, allowance: int) -> None:
    plan = make_plan(config, CPU, adapted=config.relora.enabled)
    found, peaks = measured(config, plan)
    wanted = planned(plan)
    report = {key: (wanted.get(key, 0) / MIB, found.get(key, 0) / MIB) for key in sorted({*wanted, *found})}
    for key in report:
        assert agree(wanted.get(key, 0), found.get(key, 0), allowance=allowance), (key, report)
    for room in (GPU, HOST):
        assert agree(plan.peak(room), peaks[room], allowance=allowance), (
            room,
            plan.peak(room),
            peaks,
            report,
        )


ON_HOST = {"weights_on": "host", "state_on": "host", "stash_on": "host", "carry_on": "host"}
VARIANTS: dict[str, dict[str, Mapping[str, object]]] = {
    "int8": {},
    "fp32": {"memory": {"weights": "fp32"}},
    "bf16 compute": {"memory": {"compute": "bf16"}},
    "deep": {"model": {"n_layers": 8}},
    "wide vocabulary": {"model": {"vocab_size": 16000}},
    "tied": {"model": {"tie_embeddings": True, "vocab_size": 8000}},
    "grouped": {"model": {"n_kv_heads": 1}},
    "qwen2": {"model": {"n_kv_heads": 2, "qkv_bias": True}},
    "qwen3": {
        "model": {"n_kv_heads": 2, "qk_norm": True} | LLAMA3,
        "memory": {"band": 2, "compute": "bf16"},
    },
    "one sequence": {"train": {"micro_batch": 1}},
    "adamw": {"optim": {"name": "adamw"}},
    "adamw int8 on host": {"optim": {"name": "adamw"}, "memory": {"moments": "int8", "state_on": "host"}},
    "adam-mini bf16": {"optim": {"name": "adam-mini"}, "memory": {"moments": "bf16"}},
    "apollo": {"optim": {"name": "apollo"}},
    "galore": {"optim": {"name": "galore"}},
    "muon int8": {"optim": {"name": "muon"}, "memory": {"moments": "int8"}},
    # wide: matrices of more chunks than a trace runs
    "muon bf16, wide": {"optim": {"name": "muon"}, "model": WIDE, "memory": {"moments": "bf16"}},
    "racs, wide": {"optim": {"name": "racs"}, "model": WIDE},
    "stash on host": {"memory": {"stash_on": "host"}},
    "carry on host": {"memory": {"carry_on": "host", "compute": "bf16"}},
    "all on host": {"memory": ON_HOST},
    "all on host, band 2": {"memory": ON_HOST | {"band": 2}},
    "band 4, bf16": {"memory": {"band": 4, "compute": "bf16"}},
    "int8 stash": {"memory": {"stash_dtype": "int8", "stash_on": "host"}},
    "bf16 stash": {"memory": {"stash_dtype": "bf16"}},
    "master": {"memory": {"master": "host"}, "optim": {"name": "adam-mini"}},
    "clipped": {"optim": {"grad_clip": 1.0}, "memory": {"carry_on": "host"}},
    "bf16 master": {"memory": {"master": "host", "master_dtype": "bf16"}},
}


RELORA = {"enabled": True, "rank": 32, "cycle_steps": 2, "rewarmup_steps": 1}
ADAPTED: dict[str, dict[str, Mapping[str, object]]] = {
    "int8": {},
    "qwen": {"model": {"qkv_bias": True, "qk_norm": True} | LLAMA3},
    "bf16": {"memory": {"weights": "bf16"}},
    "fp32": {"memory": {"weights": "fp32"}},
    "adamw bf16, magnitude": {
        "optim": {"name": "adamw"},
        "memory": {"moments": "bf16"},
        "relora": {"reset": "magnitude"},
    },
    "adamw8bit, high rank, random": {
        "optim": {"name": "adamw8bit"},
        "relora": {"rank": 125, "reset": "random"},
    },
    "apollo": {"optim": {"name": "apollo"}},
    "dropout": {"relora": {"dropout": 0.1}},
    "dropout, bf16 compute, band 2": {
        "relora": {"dropout": 0.1},
        "memory": {"compute": "bf16", "band": 2},
        "train": {"batch_tokens": 4 * 128},
    },
    "some targets": {"relora": {"targets": ["q", "v", "down"]}},
    "never merged": {"relora": {"cycle_steps": 0}},
    "bf16 master": {"memory": {"master": "host", "master_dtype": "bf16"}},
    "all on host, band 2": {"memory": ON_HOST | {"band": 2}},
    "effective rank": {"relora": {"log_rank": True}},
}


def varied(variant: Mapping[str, Mapping[str, object]], **base: Mapping[str, object]) -> Config:
    sections = {*base, *variant}
    return make_config(**{key: {**base.get(key, {}), **variant.get(key, {})} for key in sections})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_is_what_a_step_takes(variant: str) -> None:
    """Every component to 5 % or 256 KiB, with models of a few MiB."""
    config = varied(
        VARIANTS[variant],
        model=MODEL,
        data={"seq_len": 128},
        train={"batch_tokens": 8 * 128, "micro_batch": 4},
        memory={"loss_chunk": 128, "band": 1},
    )
    check(config, allowance=MIB // 4)


@pytest.mark.parametrize("variant", ADAPTED)
def test_the_plan_knows_about_adapters(variant: str) -> None:
    """In a step that merges."""
    config = varied(
        ADAPTED[variant],
        model=MODEL,
        data={"seq_len": 128},
        train={"batch_tokens": 8 * 128, "micro_batch": 4},
        memory={"loss_chunk": 128, "band": 1},
        relora=RELORA,
    )
    check(config, allowance=MIB // 4)


AUTOGRAD: dict[str, dict[str, Mapping[str, object]]] = {
    name: VARIANTS[name]
    for name in ("fp32", "int8", "bf16 compute", "deep", "wide vocabulary", "tied", "adamw")
}
AUTOGRAD |= {
    "tied, short micro-batches": {
        "model": {"tie_embeddings": True, "vocab_size": 16000},
        "data": {"seq_len": 64},
        "train": {"batch_tokens": 4 * 64, "micro_batch": 1},
        "optim": {"name": "sgd"},
    },
    "adapters": {"relora": RELORA, "model": LLAMA3},
    "adapters, some targets": {"relora": RELORA | {"targets": ["q", "v", "down"]}},
    "adapters, dropout": {"relora": RELORA | {"dropout": 0.1}},
    "adapters, dropout, bf16 compute": {
        "relora": RELORA | {"dropout": 0.1},
        "memory": {"compute": "bf16"},
    },
}


@pytest.mark.parametrize("variant", AUTOGRAD)
def test_the_plan_of_the_autograd_engine(variant: str) -> None:
    """Only the total, because autograd's allocations have no names."""
    config = varied(
        AUTOGRAD[variant],
        model=MODEL,
        data={"seq_len": 128},
        train={"batch_tokens": 8 * 128, "micro_batch": 4},
        memory={"loss_chunk": 128, "engine": "autograd"},
    )
    plan = make_plan(config, CPU, adapted=config.relora.enabled)
    _, peaks = measured(config, plan)
    assert agree(plan.peak(GPU), peaks[GPU], allowance=0), (plan.peak(GPU) / MIB, peaks[GPU] / MIB)


LARGE: dict[str, dict[str, Mapping[str, object]]] = {
    "350m fp32": {"model": {"preset": "350m"}, "memory": {"weights": "fp32"}},
    "350m adamw": {"model": {"preset": "350m"}, "optim": {"name": "adamw"}},
    "350m all on host": {
        "model": {"preset": "350m"},
        "optim": {"name": "adamw"},
        "memory": ON_HOST | {"band": 2},
    },
    "350m adam-mini": {
        "model": {"preset": "350m"},
        "optim": {"name": "adam-mini"},
        "memory": {"compute": "bf16"},
    },
    "1b": {"model": {"preset": "1b"}, "train": {"batch_tokens": 1024}, "memory": {"moments": "int8"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", LARGE)
def test_the_plan_is_what_a_large_step_takes(variant: str) -> None:
    """Every component to 5 % or 16 MiB, with models above 2 GiB."""
    base: dict[str, dict[str, object]] = {
        "model": {"vocab_size": 32000},
        "data": {"seq_len": 512},
        "train": {"batch_tokens": 4 * 512, "micro_batch": 2},
        "memory": {"band": 1},
    }
    own = LARGE[variant]
    config, _ = parse_config({key: {**base.get(key, {}), **own.get(key, {})} for key in {*base, *own}})
    plan = make_plan(config, CPU)
    assert plan.peak(GPU) + plan.peak(HOST) > 2 * GIB
    check(config, allowance=16 * MIB)


def plan_7b(**memory: object) -> Plan:
    config, _ = parse_config(
        {
            "model": {"preset": "7b"},
            "data": {"seq_len": 2048},
            "train": {"batch_tokens": 131072, "micro_batch": 2},
            "optim": {"name": "apollo-mini"},
            "memory": memory,
        }
    )
    return make_plan(config, CUDA)


def test_int8_7b_at_rest() -> None:
    plan = plan_7b()
    assert plan.size("block matrices: int8 codes") / GIB == pytest.approx(6.03, abs=0.01)
    assert plan.size("stash") / GIB == pytest.approx(32.0, abs=0.01)
    assert plan.size("carry") / GIB == pytest.approx(1.0, abs=0.01)
    assert plan.parameters == 6738415616
    assert plan.choice.homes == Homes() and plan.choice.band == 1  # no budget, no need
    json.dumps(plan.as_dict())
    assert plan.as_dict()["fits"] is True and "131,072 tokens a step" in plan.table()
    assert plan_7b(band=4).size("stash") * 4 == plan.size("stash")
    assert plan_7b(stash_dtype="int8").size("stash") / plan.size("stash") == pytest.approx(0.53, abs=0.01)


def test_a_budget_moves_to_the_host_what_does_not_fit_and_no_more() -> None:
    free = plan_7b()
    tight = plan_7b(budget_gib=20.0)
    assert not tight.problems and tight.peak(GPU) <= 20 * GIB < free.peak(GPU)
    homes = tight.choice.homes
    assert 0 < homes.stash < 32 and not homes.weights and not homes.state and not homes.carry
    assert tight.peak(GPU) + tight.size("stash") // 32 > 20 * GIB  # with one boundary less it would not fit
    tighter = plan_7b(budget_gib=8.0)
    assert not tighter.problems and tighter.choice.homes.stash == 32 and tighter.choice.homes.weights
    # a larger band is tried before giving up
    small_host = plan_7b(budget_gib=20.0, host_budget_gib=14.0)
    assert not small_host.problems and small_host.choice.band == 2


def test_what_must_be_on_the_gpu_stays_there() -> None:
    plan = plan_7b(budget_gib=20.0, stash_on="gpu", weights_on="gpu", state_on="gpu", carry_on="gpu")
    assert plan.choice.homes == Homes() and plan.choice.band > 1 and plan.problems  # no band is enough
    assert plan.problems[0].startswith("memory.budget_gib: the run needs")
    wide = plan_7b(budget_gib=20.0, band=1, stash_on="gpu")
    assert "the stash (32.00 GiB); lower train.batch_tokens, raise memory.band" in wide.problems[0]


def test_slots_that_do_not_fit_are_made_smaller() -> None:
    slots = Component("transfer of layers", GPU, 8 * GIB)
    (problem,) = Plan((slots,), Choice(1), 0, 1, {GPU: 4 * GIB, HOST: None}).problems
    assert "raise memory.host_budget_gib" in problem and "memory.moments=int8" in problem


@pytest.mark.parametrize("name, gpu, host", [("24gb", 20, 24), ("12gb", 10.5, 24), ("8gb", 6.5, 32)])
def test_the_7b_presets_keep_their_promise(name: str, gpu: float, host: float) -> None:
    config, _ = load_config(f"configs/llama_7b_{name}.toml")
    plan = make_plan(config, CUDA)
    assert config.train.batch_tokens == 131072 and config.data.seq_len == 2048
    assert not plan.problems
    assert plan.peak(GPU) <= gpu * GIB and plan.peak(HOST) <= host * GIB


def test_auto_takes_the_largest_micro_batch_within_the_budget() -> None:
    everything = {"stash_on": "gpu", "weights_on": "gpu", "state_on": "gpu", "carry_on": "gpu", "band": 1}

    def planned(budget: float | None) -> int:
        memory = everything if budget is None else everything | {"budget_gib": budget}
        config = make_config(
            model=MODEL,
            data={"seq_len": 128},
            train={"batch_tokens": 64 * 128, "micro_batch": "auto"},
            memory=memory,
        )
        plan = make_plan(config, CPU)
        assert budget is None or not plan.problems
        return plan.micro_batch

    free = planned(None)
    assert free == 16  # 2,048 tokens are enough for a CPU
    config = make_config(
        model=MODEL, data={"seq_len": 128}, train={"batch_tokens": 64 * 128, "micro_batch": 3}
    )
    budget = make_plan(config, CPU).peak("gpu") / GIB
    assert planned(budget * 1.0001) == 3
    config = make_config(model=MODEL, memory={"budget_gib": 0.001})
    assert "memory.budget_gib" in make_plan(config, CPU).problems[0]


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_config_parses_and_fits_its_budget(path: Path) -> None:
    config, notes = load_config(path)
    assert notes == []
    plan = make_plan(config, CUDA if config.run.device == "cuda" else CPU)
    assert plan.peak("gpu") > 0 and not plan.problems
