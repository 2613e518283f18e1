"""The watch over a run's numbers."""

import math
from typing import Any

import pytest

from lowres.config import HealthConfig
from lowres.engine import StepReport
from lowres.health import FEWEST, Limits, Watch

VOCAB = 1000
GUESS = math.log(VOCAB)


def watch(**keys: Any) -> Watch:
    return Watch(HealthConfig(**keys), VOCAB, warmup=2)


def report(loss: float = 4.0, norm: float = 1.0, skipped: int = 0) -> StepReport:
    return StepReport(loss, norm, skipped)


def after(steps: int, loss: float = 4.0, **keys: Any) -> Watch:
    """A watch that has seen ordinary steps, with norms between 0.9 and 1.1."""
    found = watch(**keys)
    for step in range(1, steps + 1):
        verdict = found.see(step, report(loss + 0.01 * math.cos(step), 1 + 0.1 * math.sin(step)))
        assert not (verdict.spike or verdict.bad or verdict.dead) and not found.doubtful
    return found


@pytest.mark.parametrize(
    "seen, wanted",
    [
        (report(norm=1e6), "gradient norm 1e+06, 9.1"),
        (report(norm=5.6), "gradient norm 5.6"),
        (report(norm=5.4), ""),
        (report(loss=4.6), "loss 4.600, median "),
        (report(loss=4.4), ""),
        (report(loss=3.0), ""),
    ],
)
def test_a_spike_is_far_above_what_was_accepted(seen: StepReport, wanted: str) -> None:
    for steps, expected in ((FEWEST, wanted), (FEWEST - 1, "")):
        found = after(steps).see(steps + 1, seen)
        assert found.spike.startswith(expected) and bool(found.spike) == bool(expected)
        assert not found.bad
    assert not after(FEWEST, spikes="off").see(FEWEST + 1, seen).spike


def test_a_spike_does_not_hide_the_next_one() -> None:
    """Only accepted values are compared with; the state of a checkpoint has them."""
    found = after(40)
    before = found.seen
    for step in range(41, 60):
        assert found.see(step, report(norm=100.0)).spike
    assert found.see(60, report(math.nan, math.nan, skipped=4)).bad
    assert (found.seen.losses, found.seen.norms) == (before.losses, before.norms)
    again = Watch(HealthConfig(), VOCAB, 2, before)
    assert again.see(41, report(norm=100.0)) == after(40).see(41, report(norm=100.0))


def test_what_stays_is_a_new_level_if_spikes_are_only_said() -> None:
    found = after(40, patience=5)
    spikes = [found.see(step, report(norm=100.0)).spike for step in range(41, 60)]
    assert [bool(spike) for spike in spikes] == [True] * 5 + [False] * 14 and "new level" in spikes[4]


def test_the_window_is_as_long_as_asked_for() -> None:
    found = after(100, window=20)
    assert len(found.seen.norms) == 20


def test_limits_are_for_the_policy_that_refuses() -> None:
    assert after(40).limits() == Limits() == after(FEWEST - 1, spikes="skip").limits()
    found = after(40, spikes="skip").limits()
    assert found.norm == pytest.approx(5.5, rel=0.01) and found.loss == pytest.approx(4.5, abs=0.02)
    verdict = after(40, spikes="skip").see(41, report(norm=99, skipped=3))
    assert verdict.spike and verdict.bad == "skipped: a spike"


@pytest.mark.parametrize(
    "seen, wanted",
    [
        (report(math.nan, math.nan, skipped=4), "not finite"),
        (report(4.0, math.inf, skipped=2), "not finite"),
        (report(4.0, 0.0), "no gradient"),
        (report(4.0, 1e-7), "no gradient"),
        (report(GUESS, 1.0), "no better than guessing"),
        (report(12.0, 1.0), "no better than guessing"),
    ],
)
def test_a_dead_run_is_named_and_ends(seen: StepReport, wanted: str) -> None:
    found = after(40, patience=7, spikes="off")
    for step in range(41, 48):
        verdict = found.see(step, seen)
        assert wanted in verdict.bad and found.doubtful
        assert verdict.dead == (step == 47) and found.worth_saying == (step == 41)
    found = after(40, patience=7, spikes="off")
    for step in range(41, 47):
        found.see(step, seen)
    assert not found.see(47, report()).bad and not found.doubtful  # it lives
    assert not found.see(48, seen).dead


def test_a_slow_start_is_no_death_but_ruin_is() -> None:
    """Before a run has learnt anything, its loss may be somewhat above that of guessing."""
    found = watch(patience=10)
    for step in range(1, 60):
        verdict = found.see(step, report(GUESS + 0.01 + 0.1 * (step % 2), 1.0))
        assert not (verdict.bad or verdict.dead or found.doubtful)
    for loss in (GUESS, GUESS + 2):
        found = watch(patience=10, spikes="off")
        for step in range(1, 13):
            verdict = found.see(step, report(loss, 1.0))
            # in the warm-up it may be
            assert bool(verdict.bad) == found.doubtful == (step > 2) and verdict.dead == (step == 12)
            assert found.worth_saying == (step == 3)
    assert watch().see(1, report(GUESS, 0.0)).bad  # no gradient at all is wrong at once


def test_a_run_that_ends_with_bad_steps_has_no_good_end() -> None:
    found = after(40)
    for step in range(41, 46):
        found.see(step, report(4.0, math.nan, skipped=4))
        assert found.ends_badly(50) == (step == 45) and found.ends_badly(20) == (step > 41)
    found.see(46, report())
    assert not found.ends_badly(50)
