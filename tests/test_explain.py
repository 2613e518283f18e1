"""`lowres plan --explain`: what limits a run, the next best changes, and what a budget trains best."""

import json
import re
from pathlib import Path

import pytest
import torch

from lowres import explain, pace
from lowres.catalogue import CARDS
from lowres.cli import main
from lowres.config import Config
from lowres.explain import Change, Explained
from lowres.memory import GIB, Plan, make_plan
from lowres.probe.roofline import Estimate, estimate, predict
from tests.helpers import lowres_here, make_config

CUDA = torch.device("cuda")
WIDE = {"dim": 512, "n_layers": 8, "n_heads": 8, "ffn_dim": 1376, "vocab_size": 1000}


def config_of(budget: float | None = None, **memory: object) -> Config:
    return make_config(
        model=WIDE,
        data={"seq_len": 256},
        train={"batch_tokens": 65536, "steps": 100},
        memory=memory | {"budget_gib": budget},
    )


def explained(config: Config, **options: object) -> Explained:
    def speed(config: Config, plan: Plan) -> Estimate:
        return estimate(config, plan, CARDS["RTX 4090"])

    plan = make_plan(config, CUDA)
    return explain.explain(config, plan, CUDA, speed, machine="an RTX 4090", **options)  # type: ignore[arg-type]


def test_changes_are_what_a_run_with_them_would_have() -> None:
    config = config_of(0.25, weights="bf16")
    found = explained(config)
    assert 1 <= len(found.changes) <= 3
    for change in found.changes:
        assert len(change.keys) == 1 and change.plan and change.speed
        ((key, value),) = change.keys.items()
        section, name = key.split(".")
        other = config.model_dump()
        other[section][name] = value
        if key == "train.batch_tokens":  # the ratio follows
            other["optim"]["lr_over_batch"] = None
        planned = make_plan(Config.model_validate(other), CUDA)
        assert change.plan.peak("gpu") == planned.peak("gpu") <= 0.25 * GIB
        assert change.speed.tokens_per_s > (found.before.speed or change.speed).tokens_per_s * 1.01 or (
            sum(map(change.plan.peak, ("gpu", "host")))
            < 0.98 * sum(map((found.before.plan or planned).peak, ("gpu", "host")))
        )
    rates = [c.speed.tokens_per_s for c in found.changes if c.speed]
    assert found.changes[0].keys == {"memory.weights": "int8"} and rates[0] == max(rates)


def test_another_optimizer_is_planned_with_its_own_keys() -> None:
    config = make_config(
        model=WIDE,
        data={"seq_len": 256},
        train={"batch_tokens": 65536, "steps": 100},
        optim={"name": "adamw", "lr": 1e-4},
        memory={"weights": "int8", "moments": "int8", "master": "host"},
    )
    plan = make_plan(config, CUDA)
    (change,) = (one for one in explain.dials(config, plan) if "optim.name" in one.keys)
    assert change.keys == {"optim.name": "apollo-mini"}
    given = {section: config.model_dump()[section] for section in ("model", "data", "train", "memory")}
    fresh = Config.model_validate(given | {"optim": {"name": "apollo-mini"}})
    assert explain.with_keys(config, change.keys) == fresh
    asked = explain.asks_for_host(config)
    assert "In host memory between uses, as the config says: opt" in explain.memory_in_words(plan, asked)


def change_of(name: str, gib: float, rate: float, fits: bool = True) -> Change:
    plan = make_plan(config_of(), CUDA)

    class Own(Plan):
        problems = [] if fits else ["too large"]

        def peak(self, room: str) -> int:
            return int(gib * GIB) if room == "gpu" else 0

    own = Own(plan.components, plan.choice, plan.parameters, plan.batch_tokens, plan.budgets)
    return Change({name: 1}, "", plan=own, speed=Estimate(rate, "products", 1.0, {"products": 1.0}))


def test_the_order_of_changes() -> None:
    before = change_of("before", 10, 100)
    little, slow, fast = change_of("a", 9.9, 100.5), change_of("b", 5, 90), change_of("c", 12, 150)
    small, quick, no = change_of("d", 3, 100), change_of("e", 9, 120), change_of("f", 1, 900, fits=False)
    names = [next(iter(c.keys)) for c in explain.best(before, [little, slow, fast, small, quick, no])]
    assert names == ["c", "e", "d"]
    assert explain.best(before, [little, no]) == []
    # what does not fit is helped by whatever does
    broken = change_of("before", 10, 100, fits=False)
    assert [next(iter(c.keys)) for c in explain.best(broken, [little, slow, no])] == ["a", "b"]


def test_words_on_memory_and_speed() -> None:
    config = config_of(0.25)
    plan = make_plan(config, CUDA)
    said = explain.memory_in_words(plan)
    assert f"{plan.peak('gpu') / GIB:.2f} of 0.25 GiB" in said
    assert "because the budget has no room for it: " + plan.hosted() in said
    phase = re.search(r"in the phase (\w+)", said)
    own = {
        p: sum(c.bytes for c in plan.components if c.room == "gpu" and c.phase == p)
        for p in {c.phase for c in plan.components} - {""}
    }
    assert phase and own[phase[1]] == max(own.values())
    terms = {"products": 3.0, "head": 1.0, "update": 0.5, "transfers": 2.0}
    assert explain.speed_in_words(predict(terms, 100), "it") == (
        "Speed on it: the limit is the products of the blocks. Of a step of 4.5 s: the products of the "
        "blocks 67%, the products of the head 22%, the update 11%. Copies between GPU and host take 2 s "
        "beside them, which costs nothing."
    )
    waiting = explain.speed_in_words(predict(terms | {"transfers": 9.0}, 100), "it")
    assert "the limit is copies between GPU and host, 9 s a step" in waiting


def test_budgets() -> None:
    config = config_of()
    found = Estimate(1000.0, "products", 1.0, {"products": 65.536})
    parameters = make_plan(config, CUDA).parameters
    said = explain.budget_in_words(config, found, "it", None, 2_000_000_000)
    # 100 M on 2 billion: 1.2e18 operations, at 6 N a token
    seconds = 6 * 1e8 * 2e9 / (6 * parameters * 1000)
    assert f"for 2 billion tokens, in {pace.in_words(seconds)} on it, 100 M parameters" in said
    assert "--set model.preset=130m" in said
    said = explain.budget_in_words(config, found, "it", 10.0, None)
    own = (6 * parameters * 1000 * 36000 / 120) ** 0.5
    assert f"in 10 h on it, {pace.count(float(f'{own:.2g}'))} parameters" in said
    said = explain.budget_in_words(config, None, "it", None, None)
    assert f"the run has {6_553_600 / parameters:.2g} tokens a parameter" in said


def test_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--explain", "--card", "4090", "--hours", "2"]) == 0
    printed = capsys.readouterr().out
    for words in ("Memory: the GPU is", "Speed on an RTX 4090: ", "as it is", "in 2 h on an RTX 4090"):
        assert words in printed
    assert main(["plan", str(config), "--explain", "--json"]) == 0  # for this CPU, whose speed is not known
    told = json.loads(capsys.readouterr().out)["explained"]
    assert told["speed"] == "" and all(c["tokens_per_s"] is None for c in told["changes"])
    # what does not fit is explained as well
    assert main(["plan", str(config), "--explain", "--set", "memory.budget_gib=0.0001"]) == 3
    assert "no change of one key makes it fit" in capsys.readouterr().out
    for wrong, word in (
        (["--hours", "2"], "--explain"),
        (["--explain", "--hours", "2"], "--probe"),
        (["--probe", "--card", "4090"], "--card"),
        (["--explain", "--set", "relora.enabled=true"], "relora.enabled=false"),
    ):
        if "--hours" in wrong and torch.cuda.is_available():
            continue
        assert word in lowres_here("plan", config, *wrong, code=2).stderr


def test_measured_rates_serve_for_changes_of_size_only(config: Path) -> None:
    told = json.loads(lowres_here("plan", config, "--explain", "--probe", "--json").stdout)["explained"]
    assert "this CPU" in told["speed"]
    assert all(c["tokens_per_s"] > 0 for c in told["changes"])
    formats = {"memory.weights", "memory.compute", "memory.moments", "optim.name"}
    assert not formats & {key for c in told["changes"] for key in c["set"]}
