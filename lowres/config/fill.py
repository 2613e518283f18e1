"""Defaults that follow from other keys, filled in before types and limits are checked.

`fill` runs these steps from top to bottom; each step may use the results of the steps before it.

    objective  -> chats do not see each other
    engine     -> number format of the weights, and the optimizer
    optimizer  -> betas, eps, limiter, its own keys, format of the moments
    relora     -> cycles of the schedule
    rates      -> lr, batch and lr over batch: two determine the third

Values that the config gives are kept. The input is nested dicts of sections that nothing has checked yet.
So a step ignores values of a wrong type; the checks that follow report them.
"""

from __future__ import annotations

from typing import Any

from lowres import rates
from lowres.catalogue import RULES
from lowres.config.data import DataConfig
from lowres.config.optim import OptimConfig
from lowres.config.sections import ReloraConfig, TrainConfig

Values = dict[str, Any]

RATE_DEFAULTS = rates.Defaults(
    optimizer=OptimConfig.model_fields["name"].default,
    lr={name: rule.lr for name, rule in RULES.items()},
    norm_lr={name: rule.norm_lr for name, rule in RULES.items() if rule.norm_lr is not None},
    batch_tokens=TrainConfig.model_fields["batch_tokens"].default,
    seq_len=DataConfig.model_fields["seq_len"].default,
)


def fill(values: Values) -> Values:
    """The values with all defaults that follow from other keys. Raises ValueError that names the key."""
    for step in (_chats, engine_defaults, _optimizer, _schedule_of_relora, _rates):
        values = step(values)
    return values


def _section(values: Values, name: str) -> Values | None:
    """A section, empty if it is missing; None if the value is not a section."""
    found = values.get(name, {})
    return found if isinstance(found, dict) else None


def _chats(values: Values) -> Values:
    objective, data = _section(values, "objective"), _section(values, "data")
    if objective is None or data is None or objective.get("name", "pretrain") == "pretrain":
        return values
    return values | {"data": {"document_mask": True} | data}


def engine_defaults(values: Values) -> Values:
    """The values with the defaults of the deepspeed engine, if it is chosen: it has AdamW and no INT8."""
    memory, optim = _section(values, "memory"), _section(values, "optim")
    if memory is None or optim is None or memory.get("engine") != "deepspeed":
        return values
    return values | {"memory": {"weights": "fp32"} | memory, "optim": {"name": "adamw"} | optim}


def _optimizer(values: Values) -> Values:
    optim, memory = _section(values, "optim"), _section(values, "memory")
    if optim is None or memory is None:
        return values
    name = optim.get("name", RATE_DEFAULTS.optimizer)
    if not isinstance(name, str):
        return values
    if name not in RULES:
        raise ValueError(f"optim.name: {name!r} is not known; use one of {', '.join(RULES)}")
    for key in ("betas", "adamw_betas"):
        given = optim.get(key, (0.9, 0.999))
        if not (given is None or (isinstance(given, list | tuple) and len(given) == 2)):
            raise ValueError(f"optim.{key}: must be two numbers, such as [0.9, 0.95] (got {given!r})")
    rule = RULES[name]
    optim = rule.defaults | {"name": name} | optim
    if not rule.for_all:
        betas, eps = rule.adamw(optim["betas"], optim["eps"])
        optim = {"adamw_betas": betas, "adamw_eps": eps} | optim
    # with DeepSpeed, `checks` refuses such an optimizer by its name
    if rule.moments is not None and memory.get("engine") != "deepspeed":
        values = values | {"memory": memory | {"moments": rule.moments}}
    return values | {"optim": optim}


def _schedule_of_relora(values: Values) -> Values:
    """With ReLoRA the learning rate restarts at the merges: the schedule takes its cycles from [relora]."""
    relora, schedule = _section(values, "relora"), _section(values, "schedule")
    if relora is None or schedule is None or relora.get("enabled") is not True:
        return values
    default = ReloraConfig()
    own = {key: relora.get(key, getattr(default, key)) for key in ("cycle_steps", "rewarmup_steps")}
    # 0 cycle steps is LoRA, which needs no cycles in the schedule; the checks of [relora] report wrong values
    own = {key: steps for key, steps in own.items() if isinstance(steps, int) and steps > 0}
    kept = {key: value for key, value in schedule.items() if key not in ("cycle_steps", "rewarmup_steps")}
    return values | {"schedule": {"name": "sawtooth"} | kept | own}


def _rates(values: Values) -> Values:
    optim, train = _section(values, "optim"), _section(values, "train")
    if optim is None or train is None:
        return values
    lr, batch, ratio = rates.tied(values, RATE_DEFAULTS)
    filled = {"lr": lr, "lr_over_batch": ratio, "batch_policy": rates.default_policy(values)}
    return values | {"optim": filled | optim, "train": {"batch_tokens": batch} | train}
