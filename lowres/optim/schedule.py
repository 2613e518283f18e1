"""The learning rate during the run, as a factor on the peak rate.

`factor(s)` is for the update that follows s completed updates. With a warm-up, factor(0) is 0. After
`decay_steps` it stays where it is.
"""

from __future__ import annotations

import math

from lowres.config import Config


def factor(config: Config, step: int) -> float:
    """Learning rate of the next update after `step` completed ones, divided by the peak rate."""
    schedule, total, warmup = config.schedule, config.decay_steps, config.warmup_steps
    if schedule.name == "sawtooth":
        relora = config.relora
        # without merges there is one cycle, which begins where the adapters start
        cycle = schedule.cycle_steps if relora.cycle_steps or not relora.enabled else max(total, step + 1)
        start = relora.start_step if relora.enabled else 0
        return sawtooth(step, total, warmup, cycle, schedule.rewarmup_steps, schedule.min_ratio, start)
    if step < warmup:
        return step / warmup
    if schedule.name == "cosine":
        return cosine(step, total, warmup, schedule.min_ratio)
    if schedule.name == "linear":
        return linear(step, total, warmup, schedule.min_ratio)
    if schedule.name == "wsd":
        cooldown = total // 5 if schedule.cooldown_steps is None else min(schedule.cooldown_steps, total)
        return wsd(step, total, cooldown, schedule.min_ratio)
    return 1.0


def cosine(step: int, total: int, warmup: int, floor: float) -> float:
    """Half a cosine from 1 at the end of the warm-up to `floor` at `total` (Loshchilov and Hutter, 2016)."""
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done))


def linear(step: int, total: int, warmup: int, floor: float) -> float:
    """A line from 1 at the end of the warm-up to `floor` at `total`."""
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - (1 - floor) * done


def wsd(step: int, total: int, cooldown: int, floor: float) -> float:
    """Warm-up, stable, decay: 1, then a line to `floor` over the last `cooldown` steps (arXiv 2404.06395)."""
    left = max(0, total - step)
    return 1.0 if left >= cooldown else floor + (1 - floor) * left / cooldown


def sawtooth(
    step: int, total: int, warmup: int, cycle: int, rewarmup: int, floor: float, start: int = 0
) -> float:
    """ReLoRA's jagged cosine (arXiv 2307.05695): one cosine, with a new warm-up from 0 after every cycle. The
    first cycle starts at `start`; if that is not 0, it also begins with a warm-up."""
    if step < warmup:
        return step / warmup
    since = step - start
    into = since % cycle
    if since >= (0 if start else cycle) and into < rewarmup:
        return into / rewarmup * cosine(step - into + rewarmup, total, warmup, floor)
    return cosine(step, total, warmup, floor)
