"""The plan against what is measured, and against known sizes."""

import json
from pathlib import Path

import pytest
import torch

from lowres.config import load_config, parse_config
from lowres.engine import make_engine
from lowres.memory import GIB, LiveTensors, make_plan
from lowres.model import empty_units, initialize
from tests.helpers import CPU, make_batch, make_config, make_optimizer

CUDA = torch.device("cuda")  # planning needs no device
MODEL = {"dim": 256, "n_layers": 4, "n_heads": 4, "ffn_dim": 688, "vocab_size": 2000}


@pytest.mark.parametrize("weights, compute", [("int8", "fp32"), ("fp32", "fp32"), ("int8", "bf16")])
@pytest.mark.parametrize(
    "changed", [{}, {"n_layers": 8}, {"vocab_size": 8000}, {"tie_embeddings": True}, {"n_kv_heads": 1}]
)
@pytest.mark.parametrize(
    "micro_batch, name",
    [(1, "apollo-mini"), (4, "apollo-mini"), (4, "adamw"), (8, "adamw"), (8, "adam-mini")],
)
def test_the_plan_is_what_a_step_takes(
    weights: str, compute: str, changed: dict[str, object], micro_batch: int, name: str
) -> None:
    config = make_config(
        model=MODEL | changed,
        data={"seq_len": 64},
        train={"batch_tokens": 8 * 64, "micro_batch": micro_batch},
        memory={"weights": weights, "loss_chunk": 256, "compute": compute},
        optim={"name": name},
    )
    plan = make_plan(config, CPU)
    with LiveTensors() as live:
        units = empty_units(config.model, weights, config.memory.embeddings_kept_in, CPU)
        initialize(units, 0, CPU)
        engine = make_engine(config, units, make_optimizer(config, units), micro_batch, CPU)
        live.peak = live.current
        for step in range(2):
            engine.step(make_batch(8, 64, 2000), step, 1.0)
    planned, measured = plan.peak("gpu"), live.peak
    assert abs(planned - measured) < 0.1 * measured, (
        f"planned {planned / 2**20:.1f}, measured {measured / 2**20:.1f} MiB"
    )


def test_int8_7b_at_rest() -> None:
    config, _ = parse_config(
        {
            "model": {"preset": "7b"},
            "data": {"seq_len": 2048},
            "train": {"batch_tokens": 131072, "micro_batch": 2},
            "optim": {"name": "apollo-mini"},
        }
    )
    plan = make_plan(config, CUDA)
    sizes = {c.name: c.bytes / GIB for c in plan.components}
    assert sizes["block matrices: int8 codes"] == pytest.approx(6.03, abs=0.01)
    assert sizes["stash"] == pytest.approx(32.0, abs=0.01)
    assert sizes["carry"] == pytest.approx(1.0, abs=0.01)
    assert plan.parameters == 6738415616
    json.dumps(plan.as_dict())
    assert plan.as_dict()["fits"] is True and "131,072 tokens a step" in plan.table()


def test_auto_takes_the_largest_micro_batch_within_the_budget() -> None:
    def planned(budget: float | None) -> int:
        memory = {} if budget is None else {"budget_gib": budget}
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
def test_every_shipped_config_parses_and_plans(path: Path) -> None:
    config, notes = load_config(path)
    assert notes == []
    assert make_plan(config, CPU).peak("gpu") > 0
