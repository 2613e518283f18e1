"""Tuning in other forms than the plain one, and what is kept when it is interrupted."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres import baseline, checkpoint, metrics
from lowres.config_file import load_config
from lowres.data import ChatData, open_data
from lowres.data.batches import BEGINS
from lowres.engine import Choice, make_engine
from lowres.engine.common import MARKED
from lowres.health import Watch
from lowres.memory import make_plan
from lowres.meter import LiveTensors
from lowres.model import empty_units, initialize
from lowres.objective import Pairs
from lowres.probe.fastest import _seconds as seconds
from lowres.rooms import GPU, Rooms
from lowres.runs import CHECKPOINTS
from lowres.speed.subject import Subject
from lowres.start import is_finished
from tests.helpers import CPU, ROOMS, lowres_here, make_batch, make_config, make_optimizer
from tests.test_health import report
from tests.test_tuning import MODEL, WORDS, instruction, toml

ADAPTERS = {"enabled": True, "rank": 4, "cycle_steps": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, and a config for them."""
    folder = tmp_path_factory.mktemp("forms")
    draw = random.Random(1)
    (folder / "text.txt").write_text(
        "\n".join(" ".join(draw.choices((*WORDS, "say", "then"), k=12)) for _ in range(300))
    )
    rows = [instruction(draw) for _ in range(24)]
    pairs = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    base = toml(
        folder / "base.toml",
        model=MODEL | {"vocab_size": 280},
        data={"source": str(folder / "text.txt")},
        train={"batch_tokens": 4 * 48, "steps": 1, "eval_every": 0},
    )
    lowres_here("train", base, "--run", folder / "base")
    toml(
        folder / "dpo.toml",
        data={"source": str(folder / "pairs.jsonl"), "chat_template": "tulu"},
        objective={"name": "dpo", "loss": "ipo", "beta": 0.1},
        train={"batch_tokens": 4 * 48, "steps": 6, "eval_every": 0, "checkpoint_every": 4},
        health={"patience": 4},
    )
    return folder


def with_engine(engine: str, **sections: Any) -> Any:
    """An engine, with the optimizer, adapters and micro-batches of two."""
    config = make_config(
        objective={"name": "dpo", "beta": 1.0},
        optim={"name": "adamw", "lr": 0.01},
        memory={"engine": engine, "weights": "fp32", "compute": "fp32"},
        relora=ADAPTERS | {"dropout": 0.2},
        **sections,
    )
    units = empty_units(config.model, "fp32", "fp32", ROOMS, adapters=config.relora)
    initialize(units.values(), 0, CPU)
    optimizer = make_optimizer(config, units)
    return make_engine(config, units, optimizer, ROOMS, Choice(2), MARKED)


def test_dropout_is_the_same_in_the_probabilities_and_in_their_gradients() -> None:
    """A pair more or less in a step: masks are named by window, so engines agree whatever their number."""
    losses: list[list[float]] = []
    for name in ("layerwise", "autograd"):
        engine, found = with_engine(name), list[float]()
        for step, count in enumerate((6, 4, 6)):
            batch = make_batch(count)
            batch[:, 0] |= BEGINS
            pairs = Pairs(torch.arange(count), torch.full((count,), -100.0, dtype=torch.float64))
            found.append(engine.step(batch, step, 1.0, pairs=pairs).loss)
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] != pytest.approx(losses[0][0], rel=1e-3)


def test_formats_and_speed_are_measured_without_chats() -> None:
    config = make_config(
        model={"dim": 32, "n_layers": 1},
        objective={"name": "dpo"},
        memory={"weights": "fp32", "compute": "fp32"},
        train={"micro_batch": 3},
    )
    assert seconds(config, CPU, 1) > 0
    subject = Subject(config, CPU)
    assert subject.step(None, 0)[1] > 0 and subject.step(1, 0)[1] > 0
    assert subject.sequences() == 2 * 7 and subject.sequences(1) == 4  # whole pairs


def test_the_loss_of_pairs_is_not_compared_with_guessing() -> None:
    of_text, of_pairs = (Watch(make_config().health, vocab, warmup=0) for vocab in (300, None))
    assert of_text.see(1, report(loss=25.0)).bad and not of_pairs.see(1, report(loss=25.0)).bad
    assert of_pairs.see(2, report(math.nan, math.nan, skipped=3)).bad


def test_epochs_are_not_taken_for_a_number_of_steps(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"step": 1000, "tokens": 10}))
    checkpoint.step_folder(tmp_path / CHECKPOINTS, 1000).mkdir(parents=True)
    assert not is_finished(make_config(train={"epochs": 3.0, "steps": None}), tmp_path)
    path = tmp_path / "c.toml"
    text = "[schedule]\nwarmup_steps = 200\n[relora]\nenabled = true\nstart_step = 1500\n[train]\n"
    path.write_text(text + "epochs = 3.0")
    assert not [note for note in load_config(path)[1] if "step" in note and "schedule.name" not in note]
    path.write_text(text + "steps = 1000")
    assert len([note for note in load_config(path)[1] if "_step" in note]) == 2


@pytest.mark.parametrize("objective, compute", [("sft", "int8"), ("dpo", "fp32")])
def test_the_plan_is_what_a_step_takes(objective: str, compute: str) -> None:
    """With as many windows as a step can have: two for each pair."""
    config = make_config(
        model={"dim": 256, "n_layers": 2, "n_heads": 4, "ffn_dim": 688, "vocab_size": 4000},
        data={"seq_len": 128},
        objective={"name": objective, "reduction": "sequences"},
        train={"batch_tokens": 4 * 128, "micro_batch": 2},
        memory={"loss_chunk": 128, "band": 1, "weights": "int8", "compute": compute},
    )
    plan, rooms = make_plan(config, CPU), Rooms(CPU)
    with LiveTensors(rooms) as live:
        kept = config.memory
        units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms)
        optimizer = make_optimizer(config, units, rooms)
        engine = make_engine(config, units, optimizer, rooms, plan.choice, MARKED)
        initialize(units.values(), 0, CPU)
        engine.reserve(config.most_windows, 128, training=True)
        live.reset()
        batch = make_batch(config.most_windows, 128, 4000)
        batch[:, 0] |= BEGINS
        engine.step(batch, 0, 1.0, pairs=Pairs(torch.arange(len(batch)), torch.zeros(len(batch))))
    assert abs(plan.peak(GPU) - live.peak[GPU]) < max(0.05 * live.peak[GPU], 3 << 19)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_7b_12gb", "llama_7b_24gb"])
def test_a_7b_is_tuned_within_the_presets(name: str) -> None:
    """128 windows of 2,048 tokens a step: chats, or 64 pairs."""
    for objective, batch in (("sft", 128), ("dpo", 64)):
        keys = [f"objective.name={objective}", "data.seq_len=2048", f"train.batch_tokens={batch * 2048}"]
        plan = make_plan(load_config(f"configs/{name}.toml", keys)[0], torch.device("cuda"))
        assert not plan.excess, plan


def test_new_weights_have_no_preferences(world: Path, tmp_path: Path) -> None:
    refused = lowres_here("train", world / "dpo.toml", "--run", tmp_path / "run", code=2)
    assert refused.stderr.startswith("lowres: run.init_from: ")


def test_a_run_keeps_its_reference(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed once, also if it is interrupted, and it is never that of other weights. A loss far above
    guessing is no reason to stop."""
    own = tmp_path / "model"
    run, command = tmp_path / "run", ["train", world / "dpo.toml", "--init-from", own]
    _copy(world / "base", own)
    asked = []

    def sums(engine: Any, windows: Any, sequences: int) -> Any:
        asked.append(len(windows))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return computed(engine, windows, sequences)

    computed = baseline.sums_of_examples
    monkeypatch.setattr(baseline, "sums_of_examples", sums)
    lowres_here(*command, "--run", run, code=130)
    lowres_here(*command, "--run", run, "--resume")
    monkeypatch.undo()
    kept = (run / "baseline.json").read_bytes()
    data = _data(run)
    pairs = data.epoch_examples + data.validation_examples
    assert len(asked) == 1 + -(-data.epoch_examples // 4) + -(-data.validation_examples // 4) and pairs > 12
    losses = [one["loss"] for one in metrics.read(run / "metrics.jsonl") if "margin" in one]
    assert losses[0] == pytest.approx(25.0) and len(losses) == 6

    # the straight run has the same
    lowres_here(*command, "--run", tmp_path / "straight", "--set", f"data.cache={tmp_path / 'cache'}")
    assert (tmp_path / "straight" / "baseline.json").read_bytes() == kept
    straight = [one for one in metrics.read(tmp_path / "straight" / "metrics.jsonl") if "margin" in one]
    assert [one["loss"] for one in straight] == losses

    # other weights in the place of the model: what is kept still counts, and is not computed from them
    _copy(run, own)
    longer = (*command, "--run", run, "--resume", "--set", "train.steps=7")
    lowres_here(*longer)
    assert (run / "baseline.json").read_bytes() == kept
    (run / "baseline.json").write_bytes(kept[:-9])
    refused = lowres_here(*command, "--run", run, "--resume", "--set", "train.steps=8", code=2)
    assert f"lowres: {run / 'baseline.json'}: is damaged or missing" in refused.stderr
    changed = lowres_here(*longer[:-1], "objective.beta=1.0", code=2)
    assert "lowres: objective.beta: " in changed.stderr


def _copy(run: Path, target: Path) -> None:
    """The newest checkpoint of a run."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(max((run / CHECKPOINTS).iterdir()), target)


def _data(run: Path) -> ChatData:
    config = load_config(run / "config.toml")[0]
    found = open_data(config.data, config.model.vocab_size, config.run.seed, False, config.objective)
    assert isinstance(found, ChatData)
    return found


def test_a_pair_that_is_equal_where_it_is_cut_is_left_out(world: Path, tmp_path: Path) -> None:
    long = "red " * 60
    rows = [{"prompt": f"q{i}", "chosen": f"{long} a", "rejected": f"{long} b"} for i in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = lowres_here(
        *("train", world / "dpo.toml", "--init-from", world / "base", "--run", tmp_path / "run"),
        *("--set", f"data.source={path}"),
        code=2,
    )
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("lowres: data.source: no pairs are left to train on") and "3 pairs" in last
