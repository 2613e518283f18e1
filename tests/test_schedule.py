"""Schedules against golden values and their definitions."""

import pytest

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
