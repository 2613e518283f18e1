"""The keys of [optim], which depend on the rules there are, and of [schedule]."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from lowres.catalogue import GROWTH, KEYS, RULES, WITHOUT_NORMS
from lowres.config.base import Count, OneOf, Positive, Rate, Section, adjustable, resumable

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


def _listed(names: Iterable[str], word: str = "or") -> str:
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


def _except(key: str, usual: object = None) -> str:
    """Which optimizers have another default of a key of [optim] than the usual one, as part of a sentence."""
    found: dict[object, list[str]] = {}
    for rule in RULES.values():
        if getattr(rule, key) != usual:
            found.setdefault(getattr(rule, key), []).append(rule.name)
    parts = [f"{value} for {_listed(names, 'and')}" for value, names in found.items()]
    return f", but {' and '.join(parts)}" if parts else ""


class GeneralOptim(Section):
    """The optimizer. Defaults that depend on its name are filled in when the config is read."""

    name: Annotated[str, OneOf(RULES)] = Field(
        default="apollo-mini",
        description="Updates the matrices of the blocks, and every other tensor too if it is "
        f"{_listed(rule.name for rule in RULES.values() if rule.for_all)}, or embedding and head if it is "
        f"{_listed(rule.name for rule in RULES.values() if rule.kinds == WITHOUT_NORMS)}; AdamW updates the "
        "rest.",
    )
    lr: Annotated[float, Field(gt=0)] | None = adjustable(None)
    """Peak learning rate; default lr_over_batch times the batch if that is given, otherwise the optimizer's
    default."""
    lr_over_batch: Annotated[float, Field(gt=0)] | None = adjustable(None)
    """Peak learning rate divided by the batch in sequences, train.batch_tokens / data.seq_len (arXiv
    2412.08347). Two of lr, train.batch_tokens and lr_over_batch determine the third."""
    batch_policy: Literal["fixed", "linear", "sqrt"] | None = resumable(None)
    """What happens to lr, embed_lr and norm_lr when --set changes the batch of the file, or a resumed run has
    another batch than at its start. fixed: nothing. linear: they change in proportion to the batch in
    sequences, so lr_over_batch stays the same. sqrt: in proportion to its square root. Default linear if
    lr_over_batch is given instead of lr, otherwise fixed."""
    embed_lr: Annotated[float, Field(gt=0)] | None = adjustable(None)
    """Peak learning rate of embedding and head; default lr."""
    norm_lr: Annotated[float, Field(gt=0)] | None = adjustable(
        None, description=f"Peak learning rate of norms and biases; default lr{_except('norm_lr')}."
    )
    betas: Betas | None = Field(
        default=None,
        description="Decay of the first and second moment; default (0.9, 0.999)"
        f"{_except('betas', (0.9, 0.999))}.",
    )
    eps: Rate | None = None
    """Added to the denominator, or its least value; the default depends on the optimizer."""
    adamw_betas: Betas | None = Field(
        default=None,
        description="betas of the AdamW that updates embedding, head, norms and biases if the optimizer does "
        f"not; default betas{_except('adamw_betas')}.",
    )
    adamw_eps: Rate | None = Field(
        default=None,
        description=f"Added to the denominator in that AdamW; default eps{_except('adamw_eps')}.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = adjustable(0.0)
    """Decoupled weight decay of the matrices (norms and biases have none)."""
    decay_embeddings: bool = True
    """Whether weight_decay also applies to embedding and head."""
    grad_clip: Annotated[float, Field(ge=0)] = adjustable(0.0)
    """Clip the global gradient norm to this; 0 = off. The layerwise engine needs a second backward pass for
    it, because it does not know the global norm before its first update."""
    limiter: float | None = adjustable(
        None,
        description="Fira's norm-growth limiter: the largest factor by which the norm of a tensor's update "
        "may grow from one step to the next (without the learning rate); 0 = off. It applies to every tensor "
        "that the named optimizer updates, not to those that AdamW updates instead; with fira, to the part "
        "of the gradient outside the projection. Default 0, but 1.01 for "
        f"{_listed(rule.name for rule in RULES.values() if rule.limiter == GROWTH)}.",
    )

    @model_validator(mode="after")
    def _check_limiter(self) -> GeneralOptim:
        if self.limiter and self.limiter < 1:
            raise ValueError(
                f"limiter: {self.limiter:g} is too small; use a factor of at least 1, or 0 for no limiter"
            )
        return self


def describe_key(name: str) -> str:
    """Documentation of a key of [optim] that only some rules read, with the rules and their defaults."""
    defaults: dict[str, list[str]] = {}
    for rule in RULES.values():
        for key, value in rule.keys.items():
            if key.name == name:
                text = json.dumps(value) if value is not None else "none"
                defaults.setdefault(text, []).append(rule.name)
    texts = (f"{text} for {_listed(names, 'and')}" for text, names in defaults.items())
    return f"{KEYS[name].about} Default {', '.join(texts)}."


if TYPE_CHECKING:

    class OptimConfig(GeneralOptim):
        def __getattr__(self, key: str) -> Any: ...

else:  # add the keys that the rules declare
    OptimConfig = create_model(
        "OptimConfig",
        __base__=GeneralOptim,
        __doc__=GeneralOptim.__doc__,
        **{
            key.name: (key.type | None, Field(None, description=describe_key(key.name)))
            for key in KEYS.values()
        },
    )


# schedule -> the keys that only this schedule reads
SCHEDULE_KEYS = {
    "cosine": (),
    "constant": (),
    "wsd": ("cooldown_steps",),
    "sawtooth": ("cycle_steps", "rewarmup_steps"),
}


class ScheduleConfig(Section):
    """The learning rate during the run, as a factor on the peak rates."""

    name: Literal["cosine", "linear", "sawtooth", "wsd", "constant"] = "cosine"
    """cosine, linear: decays to min_ratio. sawtooth: as cosine, but every cycle starts with a new warm-up.
    wsd: constant, then a linear cooldown."""
    warmup_steps: Count | None = None
    """Steps of linear learning-rate warm-up; at most a tenth of decay_steps, which is the default."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a fraction of decay_steps; at least one step is at the peak."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Lowest learning rate of the decay, as a fraction of the peak."""
    decay_steps: Positive | None = adjustable(None)
    """Steps at whose end the rate is lowest; it stays there. Default: the whole run. A run that is resumed to
    train for longer keeps the end that it had, see docs/resuming.md. Not for constant."""
    cycle_steps: Positive = 1000
    """sawtooth: steps in a cycle."""
    rewarmup_steps: Positive = 50
    """sawtooth: steps of warm-up at the start of a cycle."""
    cooldown_steps: Count | None = resumable(None)
    """wsd: steps of the final cooldown; default a fifth of decay_steps."""
