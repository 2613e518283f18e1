"""Adapters, merges and resets, and what both engines make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres import memory
from lowres.config import Config
from lowres.engine import Engine, make_engine
from lowres.model import Units, empty_units, initialize
from lowres.optim import make_optimizer
from lowres.optim.schedule import factor, sawtooth
from lowres.relora import Relora, effective_rank, merge
from lowres.storage import Unit
from tests.helpers import ROOMS, lowres, make_batch, make_config

RELORA = {"enabled": True, "rank": 4, "alpha": 8.0, "cycle_steps": 3, "rewarmup_steps": 1}


def built(config: Config, micro_batch: int = 3, band: int = 1) -> tuple[Units, Relora, Engine]:
    kept = config.memory
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, ROOMS, adapters=config.relora)
    optimizer = make_optimizer(config)
    optimizer.attach(units.values(), ROOMS)
    initialize(units.values(), config.run.seed, ROOMS.device)
    relora = Relora(config.relora, optimizer)
    return units, relora, make_engine(config, units, relora, micro_batch, ROOMS, band)


def relora_config(weights: str = "fp32", engine: str = "layerwise", **more: Any) -> Config:
    """more: section__key=value."""
    sections: dict[str, dict[str, Any]] = {
        "relora": dict(RELORA),
        "memory": {"weights": weights, "engine": engine},
        "optim": {"name": "adamw", "lr": 0.01},
    }
    for key, value in more.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    return make_config(**sections)


def stored(units: Units) -> dict[str, torch.Tensor]:
    return {n: t.clone() for unit in units.values() for n, t in unit.tensors().items()}


def test_a_merge_leaves_the_function_unchanged_and_the_adapters_new() -> None:
    config = relora_config(relora__cycle_steps=3)
    units, relora, engine = built(config)
    tokens = make_batch(2)[:, :-1]
    for step in range(2):
        engine.step(make_batch(seed=step), step, 1.0)
    before = engine.logits(tokens)
    frozen = {s.name for unit in units.values() for s in unit.spec.tensors if s.frozen}
    assert len(frozen) == 21
    moved = stored(units)
    for unit in units.values():
        relora._merge(unit, 3)
    torch.testing.assert_close(engine.logits(tokens), before, rtol=0, atol=1e-5)
    after = stored(units)
    assert all(not torch.equal(after[n], moved[n]) for n in frozen)
    assert all(not after[n].any() for n in after if n.endswith("lora_B.weight"))
    found = relora.readings(3)
    assert found["merge_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["merge_norm"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"relora__dropout": 0.3}, {"relora__targets": ["q", "up"]}])
def test_both_engines_train_adapters_alike(more: dict[str, Any]) -> None:
    found = []
    for engine_name, micro_batch, band in (("layerwise", 3, 1), ("layerwise", 2, 2), ("autograd", 7, 1)):
        # SGD, as AdamW's first updates are the signs of numbers close to zero
        config = relora_config(engine=engine_name, optim__name="sgd", optim__lr=0.1, **more)
        units, _, engine = built(config, micro_batch, band)
        losses = [engine.step(make_batch(seed=step), step, 1.0).loss for step in range(5)]  # over a merge
        found.append((losses, {n: t for n, t in stored(units).items() if t.is_floating_point()}))
    for losses, tensors in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, tensor in tensors.items():
            if name.endswith(".weight"):
                torch.testing.assert_close(tensor, found[0][1][name], rtol=0, atol=1e-5, msg=name)


def test_frozen_matrices_rest_between_merges_and_have_no_state() -> None:
    for weights in ("int8", "bf16", "fp32"):
        units, _, engine = built(relora_config(weights))
        before = stored(units)
        engine.step(make_batch(), 0, 1.0)
        after = stored(units)
        for unit in units.values():
            for spec in unit.spec.tensors:
                same = torch.equal(before[spec.name], after[spec.name])
                # A has no gradient while B is zero
                assert same == (spec.frozen or spec.role.endswith(".lora_a")), spec.name
                if spec.frozen:
                    assert not unit.state[spec.name]


def test_dropout_is_for_training_only() -> None:
    plain, dropping = (built(relora_config(relora__dropout=rate)) for rate in (0.0, 0.5))
    for units, _, _ in (plain, dropping):
        for name, tensor in stored(units).items():
            if name.endswith("lora_B.weight"):
                unit = next(unit for unit in units.values() if name in unit.weights)
                unit.fill(name, iter([(0, torch.ones_like(tensor) * 0.1)]))
    batch = make_batch()
    assert plain[2].evaluate(batch) == dropping[2].evaluate(batch)
    assert plain[2].step(batch, 0, 0.0).loss != dropping[2].step(batch, 0, 0.0).loss


def one_matrix(weights: str) -> tuple[Unit, str]:
    units, _, _ = built(relora_config(weights))
    unit = units["layers.0"]
    return unit, next(spec.name for spec in unit.spec.tensors if spec.role == "q")


def test_a_merge_into_int8_is_right_on_average() -> None:
    unit, name = one_matrix("int8")
    spec = next(s for s in unit.spec.tensors if s.name == name)
    b = unit.spec.adapters["q.lora_b"]
    unit.fill(b.name, iter([(0, torch.randn(b.shape, generator=torch.Generator().manual_seed(0)) * 1e-4)]))
    start = {key: t.clone() for key, t in unit.weights[name].tensors().items()}
    before = unit.weights[name].dense(torch.float64).clone()
    a64, b64 = (unit.weights[unit.spec.adapters[f"q.lora_{part}"].name].dense(torch.float64) for part in "ab")
    intended = 2.0 * b64 @ a64
    total, rounds = torch.zeros_like(before), 400
    for i in range(rounds):
        sums = merge(unit, spec, 2.0, seed=i, step=7)
        applied = unit.weights[name].dense(torch.float64) - before
        assert sums[1].item() == pytest.approx(applied.square().sum().item(), rel=1e-3)
        total += applied
        for key, tensor in unit.weights[name].tensors().items():
            tensor.copy_(start[key])
    code = start[".scales"].double()
    assert (intended.abs() / code).max() < 0.5  # far below a code, or the test says little
    # a rounded change has at most a quarter of a squared code as variance, over all elements together
    error = (total / rounds - intended) / code
    bound = (intended.abs() / code).sum().sqrt() / rounds**0.5
    assert error.sum().abs() < 5 * bound
    along = (total / rounds * intended).sum() / intended.square().sum()
    assert along == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_the_first_update_after_a_reset_is_bounded(reset: str) -> None:
    config = relora_config(relora__reset=reset, relora__reset_keep=0.1, optim__lr=1e-3)
    units, _, engine = built(config)
    for step in range(3):
        engine.step(make_batch(seed=step), step, 1.0)
    unit = units["layers.1"]
    for spec in unit.spec.adapters.values():
        m, v = (unit.state[spec.name][key] for key in ("exp_avg", "exp_avg_sq"))
        kept = int((m != 0).sum())
        assert torch.equal(m != 0, v != 0)
        assert kept == 0 if reset == "zero" else kept <= 0.15 * m.numel()
    before = stored(units)
    engine.step(make_batch(seed=3), 3, 1.0)
    after = stored(units)
    # a forgotten element moves by (1 - beta1) / sqrt(1 - beta2) = 3.2 rates if the count went on, bias
    # corrections of few steps make it less; Adam's bound for any history is 7.3
    for name in before:
        if "lora_" in name and name.endswith(".weight"):
            assert (after[name] - before[name]).abs().max() <= 7.3 * 1e-3


def test_the_sum_of_merges_has_the_rank_of_all_cycles() -> None:
    config = relora_config(relora__rank=2, relora__cycle_steps=4)
    units, _, engine = built(config)
    name = next(s.name for s in units["layers.0"].spec.tensors if s.role == "gate")
    start = units["layers.0"].weights[name].dense(torch.float64).clone()
    for step in range(12):
        engine.step(make_batch(seed=step), step, 1.0)
    values = torch.linalg.svdvals(units["layers.0"].weights[name].dense(torch.float64) - start)
    assert values[5] > 1e-3 * values[0] and values[6] < 1e-5 * values[0]


def test_effective_rank() -> None:
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(effective_rank(torch.ones(4, 7))) == pytest.approx(1, abs=1e-3)
    assert float(effective_rank(torch.zeros(4, 7))) == 0


def test_notches_fall_on_the_merges() -> None:
    config = make_config(
        relora={**RELORA, "start_step": 100, "cycle_steps": 50, "rewarmup_steps": 10}, train={"steps": 300}
    )
    assert config.schedule.name == "sawtooth" and config.schedule.cycle_steps == 50
    zeros = [step for step in range(1, 300) if factor(config, step) == 0]
    merges = [s for s in range(1, 301) if config.relora.merges_at(s) > config.relora.merges_at(s - 1)]
    assert zeros == [100, 150, 200, 250] and merges == [150, 200, 250, 300]
    # from step 0 on it is the published one
    golden = {250: 0.5, 4999: 0.886878, 5000: 0, 5050: 0.440989, 10100: 0.560874, 19999: 0.1}
    for step, value in golden.items():
        assert sawtooth(step, 20000, 500, 5000, 100, 0.1) == pytest.approx(value, abs=1e-6)


def test_7b_with_rank_128_fits_its_card() -> None:
    from lowres.config import load_config

    config, _ = load_config("configs/relora_7b_24gb.toml")
    plans = memory.make_plans(config, torch.device("cuda"))
    assert list(plans) == ["warm start", "adapters"] and not any(p.problems for p in plans.values())
    adapters = plans["adapters"].size("adapters: fp32")
    assert adapters == pytest.approx(4 * 128 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)), rel=1e-3)


def test_a_run_resumes_in_every_part(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 400)
    keys = ["relora.enabled=true", "relora.rank=4", "relora.start_step=2", "relora.cycle_steps=3"]
    keys += ["relora.rewarmup_steps=1", "relora.log_rank=true", "relora.dropout=0.1", "train.steps=9"]
    keys += [f"data.source={tmp_path / 'text.txt'}", f"data.cache={tmp_path / 'cache'}", "data.seq_len=16"]
    keys += ["data.vocab_size=300", "train.batch_tokens=64", "train.eval_every=3", "train.checkpoint_every=1"]
    keys += ["train.keep_checkpoints=0", "model.dim=32", "model.n_heads=2", "model.ffn_dim=64"]
    (tmp_path / "c.toml").write_text("")
    options = [part for key in keys for part in ("--set", key)]
    run = tmp_path / "run"
    lowres("train", tmp_path / "c.toml", "--run", run, *options)
    whole = (run / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [r["step"] for r in records if "merge_cosine" in r] == [5, 8]
    assert all("effective_rank" in r for r in records if "merge_cosine" in r)
    last = sorted((run / "checkpoints").iterdir())[-1]
    wanted = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}

    def comparable(text: str) -> list[tuple[object, ...]]:
        found = [json.loads(line) for line in text.splitlines()]
        return [(r["step"], r.get("loss"), r.get("val_loss"), r.get("merge_norm")) for r in found]

    for stop in (2, 5, 6):  # where adapters start, on a merge, inside a cycle
        again = tmp_path / f"again{stop}"
        shutil.copytree(run, again)
        (again / "summary.json").unlink()
        for folder in (again / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step_")) > stop:
                shutil.rmtree(folder)
        lowres("train", tmp_path / "c.toml", "--run", again, "--resume", *options)
        assert comparable((again / "metrics.jsonl").read_text()) == comparable(whole)
        assert wanted == {p.name: p.read_bytes() for p in (again / "checkpoints" / last.name).glob("*.safe*")}

    scores = json.loads(lowres("eval", run, "--json").stdout)
    assert scores["val_loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-6)
    # another run takes the weights, with the adapters merged
    plain = [part for key in keys if not key.startswith("relora") for part in ("--set", key)]
    plain += ["--set", "memory.weights=fp32"]
    warm = tmp_path / "warm"
    lowres("train", tmp_path / "c.toml", "--run", warm, "--init-from", run, *plain)
    first = json.loads((warm / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-4)
    other = lowres(
        "train", tmp_path / "c.toml", "--run", tmp_path / "x", "--init-from", run, *plain,
        "--set", "model.ffn_dim=96", code=2,
    )  # fmt: skip
    assert "model.ffn_dim: 96 here" in other.stderr


def test_bad_settings_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("")
    for key, text in (
        ("relora.rewarmup_steps=2000", "relora.rewarmup_steps"),
        ("relora.rank=0", "relora.rank"),
    ):
        done = lowres("config", tmp_path / "c.toml", "--set", key, code=2)
        assert text in done.stderr
