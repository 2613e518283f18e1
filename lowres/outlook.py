"""What a rate of tokens means for a run: the time of a step, when it ends, and a goal if that is too long."""

from __future__ import annotations

import statistics
from datetime import datetime
from functools import cache

from lowres import pace
from lowres.config import PRESETS, Config, ModelConfig
from lowres.config.model import PRESET_VOCAB
from lowres.model import count_parameters

# a pace is measured on so many steps and seconds; the first step of a process also warms up
LEAST_STEPS, ENOUGH_SECONDS = 2, 10.0
# a preset is proposed if a goal has not more parameters, or fewer, than by this factor
NEAR = 2.5


def outlook(
    config: Config,
    step_s: float,
    source: str,
    now: datetime,
    *,
    machine: str = "this machine",
    done: int = 0,
    more_s: float = 0.0,
) -> list[str]:
    """A line on how long the rest of a run takes, and one more if that is long.

    step_s: seconds of a step. source: where they are from, such as "measured on this machine". machine: what
    trains. done: steps that are behind it. more_s: seconds beside the steps, such as evaluations.
    """
    tokens, left = config.most_windows * config.data.seq_len, max(0, config.train.total_steps - done)
    rate, seconds = tokens / step_s, left * step_s + more_s
    line = (
        f"{source}: {_rate(rate)} tokens/s, {pace.in_words(step_s)} a step, {pace.per_billion(rate)} per "
        "billion tokens"
    )
    if config.train.epochs is not None:  # the length of the data is not known yet
        times = f"{config.train.epochs:g} times those of the data, which lowres data inspect counts"
        return [f"{line}; the run has {times}"]
    what = "the rest of the run" if done else "the run"
    line += (
        f"; {what}, {pace.count(left * tokens)} tokens, takes {pace.in_words(seconds)} and ends "
        f"{pace.ends(now, seconds)}"
    )
    return [line] + ([advice(config, rate, seconds, machine)] if seconds > pace.LONG else [])


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"


def advice(config: Config, tokens_per_s: float, seconds: float, machine: str = "this machine") -> str:
    """What to do about a run of so many seconds: a goal for a few days, if the model is new."""
    long = f"note: {pace.in_words(seconds)} is a long run"
    if is_continued(config):
        return f"{long}; lower train.tokens, or set train.max_minutes to save and stop in time"
    reached = goal(config, tokens_per_s, pace.LONG, machine)
    return f"{long}; in {pace.in_words(pace.LONG)} {reached}"


def is_continued(config: Config) -> bool:
    """Whether a run does not begin with new weights, so no size is to choose."""
    return config.run.init_from is not None or config.objective.name != "pretrain"


def goal(config: Config, tokens_per_s: float, seconds: float, machine: str = "this machine") -> str:
    """What is compute-optimal in some seconds on what reaches this rate with the config's model."""
    found = pace.optimal_in(seconds, count_parameters(config.model), tokens_per_s)
    return (
        f"{machine} trains {pace.count(_rounded(found.parameters))} parameters on "
        f"{pace.count(_rounded(found.tokens))} tokens best (20 a parameter){as_keys(found)}"
    )


def as_keys(found: pace.Goal) -> str:
    """How to set a goal: the nearest preset, with its tokens for as many operations; "" if none is near."""
    sizes = preset_sizes()
    name = pace.nearest(found.parameters, sizes)
    if not 1 / NEAR < sizes[name] / found.parameters < NEAR:
        return ""
    tokens = _rounded(found.operations / (pace.OPERATIONS * sizes[name]))
    return f": --set model.preset={name} --set train.tokens={tokens:_.0f}"


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")


@cache
def preset_sizes() -> dict[str, int]:
    """Parameters of the presets, with their vocabulary."""
    return {
        name: count_parameters(ModelConfig.model_validate({"preset": name, "vocab_size": PRESET_VOCAB}))
        for name in PRESETS
    }


class Stopwatch:
    """Measures the first steps of a process, and says once how long the rest takes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.seconds: list[float] = []
        self.warm = self.told = False
        self.evaluation = 0.0  # seconds of the last one

    def after(self, step: int, seconds: float, now: datetime) -> list[str]:
        """Lines for the user, after a step that took so long. step: completed steps."""
        if self.told or not self.warm:
            self.warm = True
            return []
        self.seconds.append(seconds)
        if len(self.seconds) < LEAST_STEPS or sum(self.seconds) < ENOUGH_SECONDS:
            return []
        self.told = True
        train = self.config.train
        every = train.eval_every
        evaluations = -(-train.total_steps // every) - step // every if every else 0
        more = max(0, evaluations) * self.evaluation
        measured = statistics.median(self.seconds)
        return outlook(self.config, measured, "measured on this machine", now, done=step, more_s=more)
