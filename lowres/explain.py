"""Explains a plan in words: what limits memory and speed, what the next best changes would do, and what size
of model a budget of hours or tokens trains best.

Every change is planned as a run would plan it, and its speed is found in the same way as that of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowres import memory, pace
from lowres.config import Config
from lowres.config_file import parse_config, to_values, with_values
from lowres.memory import GIB, Plan
from lowres.model import count_parameters
from lowres.outlook import as_keys, is_continued
from lowres.probe import Prediction
from lowres.probe.roofline import BESIDE, Estimate
from lowres.rooms import GPU, HOST
from lowres.terminal import aligned

Speed = Callable[[Config, Plan], Estimate]
MOST_CHANGES, MOST_PARTS = 3, 3
# a change counts if it gains so much speed, or saves so much memory
WORTH_SPEED, WORTH_MEMORY = 0.01, 0.02
# tokens of a sequence and of a chunk of the loss that are not halved further
SHORTEST, LEAST_CHUNK = 512, 256
NEXT_TO_NO_STATE = ("apollo-mini", "scale", "sinkgd", "racs")
# terms of a prediction, in words
NAMES = {
    "products": "the products of the blocks",
    "head": "the products of the head",
    "attention": "attention",
    "memory traffic": "what reads and writes memory between the products",
    "beside products": "what is computed between the products",
    "dequantising": "dequantising",
    "update": "the update",
    "products of the update": "the products of the update",
    "transfers": "copies between GPU and host",
    "launches": "launching kernels from Python, as the model or the micro-batch is small",
}


@dataclass(frozen=True)
class Change:
    """Keys of the config with other values, planned. same_rates: rates that were measured still hold."""

    keys: dict[str, Any]
    means: str
    same_rates: bool = True
    plan: Plan | None = None
    speed: Estimate | None = None

    @property
    def text(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.keys.items())


@dataclass(frozen=True)
class Explained:
    """What there is to say about a plan, and the config with the changes that are worth most."""

    memory: str
    speed: str
    budget: str
    before: Change
    changes: list[Change]

    def lines(self) -> list[str]:
        """For people."""
        found = [self.memory, *([self.speed] if self.speed else [])]
        if self.changes:
            head = ["next best changes", "GPU, GiB", "host, GiB", "tokens/s", "what it means"]
            rows = [head, *(_row(one) for one in (self.before, *self.changes))]
            if self.before.speed is None:
                rows = [[cell for i, cell in enumerate(row) if i != 3] for row in rows]
            found += aligned(rows, words=(0, len(rows[0]) - 1))
        else:
            better = "fit" if self.before.means else "faster or smaller"
            found.append(f"no change of one key makes it {better}")
        return [*found, *([self.budget] if self.budget else [])]

    def as_dict(self) -> dict[str, Any]:
        """For `lowres plan --explain --json`."""
        return {
            "memory": self.memory,
            "speed": self.speed,
            "budget": self.budget,
            "changes": [
                {
                    "set": one.keys,
                    "means": one.means,
                    "gpu_peak_bytes": one.plan.peak(GPU),
                    "host_peak_bytes": one.plan.peak(HOST),
                    "tokens_per_s": one.speed.tokens_per_s if one.speed else None,
                }
                for one in self.changes
                if one.plan
            ],
        }


def explain(
    config: Config,
    plan: Plan,
    device: torch.device,
    speed: Speed | None,
    *,
    measured: bool = False,
    machine: str = "this machine",
    hours: float | None = None,
    tokens: int | None = None,
) -> Explained:
    """Explain the plan of a config. speed: None if it is not known. measured: speed is from rates that hold
    for the number formats of this config only. machine: whose speed it is. hours, tokens: the budget;
    default: what the run takes."""
    now = speed(config, plan) if speed else None
    before = Change({"as it is": ""}, "does not fit" if plan.problems else "", plan=plan, speed=now)
    planned = []
    for one in dials(config, plan):
        if measured and not one.same_rates:
            continue
        other = with_keys(config, one.keys)
        found = memory.make_plan(other, device)
        rate = speed(other, found) if speed else None
        planned.append(dataclasses.replace(one, plan=found, speed=rate))
    return Explained(
        memory=memory_in_words(plan, asks_for_host(config)),
        speed=speed_in_words(now, machine) if now else "",
        budget=budget_in_words(config, now, machine, hours, tokens),
        before=before,
        changes=best(before, planned),
    )


# ---- changes


def dials(config: Config, plan: Plan) -> Iterator[Change]:
    """Changes of one key that a run may make, with what they mean."""
    if config.memory.engine != "layerwise":
        yield Change({"memory.engine": "layerwise"}, "the same gradients, layer by layer", same_rates=False)
        return
    yield from _formats(config)
    yield from _sizes(config, plan)


def _formats(config: Config) -> Iterator[Change]:
    kept = config.memory
    if kept.weights != "int8":
        yield Change({"memory.weights": "int8"}, "updates are rounded stochastically", same_rates=False)
    if kept.compute in ("bf16", "fp32"):
        yield Change({"memory.compute": "auto"}, "takes what is fastest, such as INT8", same_rates=False)
    if kept.kernels == "plain":
        yield Change({"memory.kernels": "auto"}, "one kernel for each chain of operations", same_rates=False)
    if kept.moments == "fp32":
        yield Change({"memory.moments": "int8"}, "moments in blocks of 256", same_rates=False)
    if config.optim.grad_clip:
        yield Change({"optim.grad_clip": 0.0}, "one backward pass, but no clipping")
    if config.optim.name not in NEXT_TO_NO_STATE:
        about = "another optimizer with next to no state, and its own rates"
        yield Change({"optim.name": "apollo-mini"}, about, same_rates=False)
    if kept.stash_dtype != "int8":
        yield Change({"memory.stash_dtype": "int8"}, "the inputs of layers are rounded")


def _sizes(config: Config, plan: Plan) -> Iterator[Change]:
    length, chunk = config.data.seq_len, config.memory.loss_chunk
    band, micro, batch = plan.choice.band, plan.micro_batch, config.batch_sequences
    for other in _half_and_double(band, config.model.n_layers):
        yield Change({"memory.band": other}, f"the same losses; {_of_band(other < band)}")
    for other in _half_and_double(micro, config.most_windows):
        yield Change({"train.micro_batch": other}, "the same losses, but for rounding")
    if chunk > LEAST_CHUNK:
        yield Change({"memory.loss_chunk": chunk // 2}, "the same losses, but for rounding")
    for other in _half_and_double(batch, 2 * batch):
        keys = {"train.batch_tokens": other * length}
        yield Change(keys, "another batch, with another learning rate")
    if length >= 2 * SHORTEST:
        yield Change({"data.seq_len": length // 2}, "the model sees shorter texts")


def _half_and_double(now: int, most: int) -> list[int]:
    return [other for other in (now // 2, min(2 * now, most)) if other >= 1 and other != now]


def _of_band(smaller: bool) -> str:
    return "a larger stash, smaller buffers" if smaller else "a smaller stash, larger buffers"


def with_keys(config: Config, keys: dict[str, Any]) -> Config:
    """The config with `section.key` of a change."""
    for key, value in keys.items():
        section, name = key.split(".")
        if key == "optim.name":  # with its own keys, which the one before need not have
            own = {name: value, "grad_clip": config.optim.grad_clip}
            config = parse_config(to_values(config) | {section: own})[0]
        else:
            config = with_values(config, section, **{name: value})
    return config


def best(before: Change, changes: list[Change]) -> list[Change]:
    """The best three that fit: first those that are faster, by their speed; then those that take less memory,
    by what they save. If the config does not fit: whatever fits, the fastest first."""
    assert before.plan is not None
    bytes_before = _bytes(before)
    fitting = [one for one in changes if one.plan and not one.plan.problems]
    if before.plan.problems:
        return sorted(fitting, key=lambda one: (-_rate(one), _bytes(one)))[:MOST_CHANGES]
    faster = [one for one in fitting if _rate(one) > _rate(before) * (1 + WORTH_SPEED)]
    smaller = [
        one for one in fitting if one not in faster and _bytes(one) < bytes_before * (1 - WORTH_MEMORY)
    ]
    ranked = sorted(faster, key=lambda one: -_rate(one)) + sorted(smaller, key=_bytes)
    return ranked[:MOST_CHANGES]


def _rate(change: Change) -> float:
    return change.speed.tokens_per_s if change.speed else 0.0


def _bytes(change: Change) -> int:
    return change.plan.peak(GPU) + change.plan.peak(HOST) if change.plan else 0


def _row(change: Change) -> list[str]:
    assert change.plan is not None
    rate = f"{change.speed.tokens_per_s:,.0f}" if change.speed else ""
    if change.plan.problems:
        rate = ""
    gpu, host = (f"{change.plan.peak(room) / GIB:.2f}" for room in (GPU, HOST))
    return [change.text.removesuffix("="), gpu, host, rate, change.means]


# ---- words


def asks_for_host(config: Config) -> bool:
    """Whether a config itself puts something into host memory."""
    kept = config.memory
    return "host" in (kept.master, kept.weights_on, kept.state_on, kept.stash_on, kept.carry_on)


def memory_in_words(plan: Plan, asked: bool = False) -> str:
    """What takes the memory, when it is fullest, and what the plan did about it. asked: see
    `asks_for_host`."""
    own = [c for c in plan.components if c.room == GPU]
    phases = {c.phase for c in own if c.phase}
    sizes = {phase: sum(c.bytes for c in own if c.phase == phase) for phase in phases}
    fullest = max(sizes, key=lambda phase: sizes[phase], default="")
    alive = [c for c in own if c.phase in ("", fullest)]
    peak, budget = plan.peak(GPU), plan.budgets[GPU]
    of = "" if budget is None else f" of {budget / GIB:.2f}"
    when = f"in the phase {fullest}" if fullest else "all the time"
    text = (
        f"Memory: the GPU is fullest {when}, with {peak / GIB:.2f}{of} GiB. The most is for "
        f"{_largest(alive, peak)}."
    )
    choice = plan.choice
    if hosted := plan.hosted():
        given = asked or budget is None
        why = "as the config says" if given else "because the budget has no room for it"
        text += f" In host memory between uses, {why}: {hosted}."
    if choice.band > 1:
        text += (
            f" Bands of {choice.band} layers are recomputed together, which divides the stash by "
            f"{choice.band} and multiplies the gradient buffer."
        )
    return text


def _largest(components: list[Any], peak: int) -> str:
    found = sorted(components, key=lambda c: -c.bytes)[:MOST_PARTS]
    return ", ".join(f"{c.name} ({c.bytes / GIB:.2f} GiB, {c.bytes / max(1, peak):.0%})" for c in found)


def speed_in_words(found: Estimate, machine: str) -> str:
    """Which term limits the speed, and what the copies cost."""
    step, copies = found.step_s, found.seconds.get("transfers", 0.0)
    shares = sorted(((s, name) for name, s in found.seconds.items() if name not in BESIDE), reverse=True)
    rest = ", ".join(f"{NAMES[name]} {s / step:.0%}" for s, name in shares[:MOST_PARTS] if s)
    if found.limit == "transfers":
        return (
            f"Speed on {machine}: the limit is copies between GPU and host, {pace.in_words(copies)} a step; "
            f"the computation waits for them ({rest}). A larger batch or less in host memory helps."
        )
    text = (
        f"Speed on {machine}: the limit is {NAMES[found.limit]}. Of a step of {pace.in_words(step)}: {rest}."
    )
    if copies and "beside products" not in found.seconds:
        text += f" Copies between GPU and host take {pace.in_words(copies)} beside them, which costs nothing."
    return text


def budget_in_words(
    config: Config, found: Estimate | None, machine: str, hours: float | None, tokens: int | None
) -> str:
    """Which size of model a budget trains best; without one, what the run itself takes."""
    parameters = count_parameters(config.model)
    run = config.train.total_steps * config.train.batch_tokens
    if is_continued(config):
        return ""
    if hours is not None and found is not None:
        goal = pace.optimal_in(hours * pace.HOUR, parameters, found.tokens_per_s)
        what = f"In {pace.in_words(hours * pace.HOUR)} on {machine}"
    elif tokens is not None:
        goal = pace.Goal(tokens / pace.TOKENS_A_PARAMETER, tokens)
        what = f"For {pace.count(tokens)} tokens"
        if found is not None:
            seconds = goal.operations / (pace.OPERATIONS * parameters * found.tokens_per_s)
            what += f", in {pace.in_words(seconds)} on {machine}"
    elif config.train.epochs is None:
        goal = pace.optimal(pace.OPERATIONS * parameters * run)
        what = (
            f"The run has {run / parameters:.2g} tokens a parameter, and 20 are compute-optimal. With its "
            "operations"
        )
    else:
        return ""
    return (
        f"Budget: {what[0].lower() + what[1:]}, {pace.count(float(f'{goal.parameters:.2g}'))} parameters on "
        f"{pace.count(float(f'{goal.tokens:.2g}'))} tokens are trained best{as_keys(goal)}"
    )


def of_probe(found: Prediction) -> Estimate:
    """A prediction from measured rates, by term."""
    terms = {
        "products": found.products_s,
        "beside products": found.beside_products_s,
        "dequantising": found.dequantise_s,
        "update": found.update_s,
        "transfers": found.transfer_s,
    }
    limit = max(terms, key=lambda name: terms[name])
    return Estimate(found.tokens_per_s, limit, terms[limit] / found.step_s, terms)
