"""Schedules against golden values and their definitions."""

import pytest

from lowres import resuming
from lowres.checkpoint import Start, State
from lowres.config_file import changed_config
from lowres.errors import UserError
from lowres.optim.schedule import factor, sawtooth
from tests.helpers import make_config

GOLDEN_SAWTOOTH = {
    250: 0.5,
    500: 1,
    4999: 0.886878,
    5000: 0,
    5001: 0.00882,
    5050: 0.440989,
    5100: 0.881979,
    9999: 0.568192,
    10000: 0,
    10100: 0.560874,
    19999: 0.1,
}


@pytest.mark.parametrize("step, value", GOLDEN_SAWTOOTH.items())
def test_sawtooth(step: int, value: float) -> None:
    assert sawtooth(step, total=20000, warmup=500, cycle=5000, rewarmup=100, floor=0.1) == pytest.approx(
        value, abs=1e-6
    )


def test_cosine_and_constant() -> None:
    cosine = make_config(train={"steps": 1000}, schedule={"warmup_steps": 100, "min_ratio": 0.1})
    assert [factor(cosine, s) for s in (0, 50, 100)] == [0, 0.5, 1]
    assert factor(cosine, 550) == pytest.approx(0.55)
    assert factor(cosine, 1000) == pytest.approx(0.1)
    constant = make_config(train={"steps": 1000}, schedule={"name": "constant", "warmup_steps": 10})
    assert [factor(constant, s) for s in (5, 10, 999)] == [0.5, 1, 1]


def test_wsd() -> None:
    config = make_config(
        train={"steps": 1000},
        schedule={"name": "wsd", "warmup_steps": 10, "cooldown_steps": 100, "min_ratio": 0.0},
    )
    assert [factor(config, s) for s in (5, 10, 900)] == [0.5, 1, 1]
    assert factor(config, 950) == pytest.approx(0.5)
    assert factor(config, 1000) == 0


def test_warmup_is_at_most_a_tenth_of_the_run() -> None:
    assert make_config(train={"steps": 50}, schedule={"warmup_steps": 400}).warmup_steps == 5
    assert make_config(train={"steps": 50}).warmup_steps == 5
    assert make_config(train={"steps": 50}, schedule={"warmup_steps": 0}).warmup_steps == 0
    assert factor(make_config(train={"steps": 2}), 0) == 1


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant", "sawtooth"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_the_shortest_run_learns(name: str, steps: int, ratio: float) -> None:
    """A warm-up begins at 0 and never fills the whole run."""
    config = make_config(train={"steps": steps}, schedule={"name": name, "warmup_ratio": ratio})
    assert max(factor(config, step) for step in range(steps)) > 0.5


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "sawtooth"])
def test_after_its_end_the_rate_stays_lowest(name: str) -> None:
    whole = make_config(train={"steps": 100}, schedule={"name": name})
    longer = make_config(train={"steps": 5000}, schedule={"name": name, "decay_steps": 100})
    assert longer.warmup_steps == whole.warmup_steps == 10
    assert [factor(longer, s) for s in range(101)] == [factor(whole, s) for s in range(101)]
    assert [factor(longer, s) for s in range(100, 900)] == pytest.approx([0.1] * 800)


# what the run was; then the step it has reached, what it should become, and where its rate is then lowest
LONGER: dict[str, tuple[dict[str, object], int, dict[str, object], int | None]] = {
    "finished": ({"name": "cosine"}, 64, {"train.steps": 600}, 64),
    "in the middle": ({"name": "linear"}, 30, {"train.steps": 600}, 64),
    "at the beginning nothing jumps": ({"name": "cosine"}, 7, {"train.steps": 600}, None),
    "in the stable phase nothing jumps": ({"name": "wsd"}, 40, {"train.steps": 600}, None),
    "after the cooldown": ({"name": "wsd"}, 64, {"train.steps": 600}, 64),
    "no decay": ({"name": "constant"}, 64, {"train.steps": 600}, None),
    "shorter": ({"name": "cosine"}, 30, {"train.steps": 40}, None),
    "another batch for the same tokens": (
        {"name": "cosine"},
        32,
        {"train.steps": 96, "train.batch_tokens": 224},
        None,
    ),
    "another batch for more tokens": (
        {"name": "cosine"},
        32,
        {"train.steps": 200, "train.batch_tokens": 224},
        96,
    ),
    "once more": ({"name": "cosine", "decay_steps": 40}, 64, {"train.steps": 900}, 40),
    "asked for": ({"name": "cosine"}, 64, {"train.steps": 600, "schedule.decay_steps": 600}, 600),
    "a cooldown asked for": ({"name": "wsd"}, 64, {"train.steps": 80, "schedule.cooldown_steps": 16}, None),
}


@pytest.mark.parametrize("case", LONGER)
def test_a_run_that_becomes_longer(case: str) -> None:
    schedule, at, changed, end = LONGER[case]
    saved = make_config(train={"steps": 64, "batch_tokens": 448}, schedule=schedule)
    config = changed_config(saved, [f"{key}={value}" for key, value in changed.items()], "")[0]
    state = State(step=at, tokens=at * 448, data="", start=Start(batch_tokens=448))
    found, notes = resuming._with_end_of_schedule(config, saved, state)
    assert found.schedule.decay_steps == end
    said = ("finished", "in the middle", "after the cooldown", "another batch for more tokens")
    assert len(notes) == (case in said or "asked" in case)
    again, more = resuming._with_end_of_schedule(
        resuming._with_schedule_of(config, found), found, state.model_copy(update={"step": at + 1})
    )
    assert (again, more) == (found, [])  # also when it is resumed once more by the same command
    if not any(word in case for word in ("asked", "batch")):
        assert factor(found, at) <= 1.1 * factor(saved, at)


def test_a_run_that_has_reached_the_rate_0_is_not_continued() -> None:
    saved = make_config(train={"steps": 64}, schedule={"min_ratio": 0.0})
    config = changed_config(saved, ["train.steps=600"], "")[0]
    state = State(step=64, tokens=0, data="", start=Start(batch_tokens=224))
    with pytest.raises(UserError, match="learning rate of this run is 0 from step 64 on"):
        resuming._with_end_of_schedule(config, saved, state)
