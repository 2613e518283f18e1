"""What is known about an update rule without building it: one record, registered by the rule's file.

The records hold names, keys and defaults (for the config), which tensors a rule updates (for the optimizer),
the `torch.optim` classes (for `lowres.optim`), and texts (for help and docs). So a new optimizer takes one
file in this package, a test for it, and a run of `scripts/write_docs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowres.rules.base import Betas, Rule
from lowres.storage import EMBEDDING, MATRIX, NORM


@dataclass(frozen=True)
class Key:
    """A key of [optim] that only some rules read. type: for pydantic, with limits. wanted: these limits in
    words, for a message."""

    name: str
    type: Any
    wanted: str
    about: str


@dataclass(frozen=True)
class Settings:
    """What a rule is built from.

    eps: added to the denominator. moments: number format of element-wise moments. limiter: the largest
    growth of an update's norm, for rules that limit it themselves; 0 = no limit. width, head_dim: of the
    model, if known. keys: the values of the rule's own keys, and of those of its class.
    """

    betas: Betas
    eps: float
    moments: str
    seed: int
    limiter: float
    width: int | None
    head_dim: int | None
    keys: Mapping[str, Any]


# the kinds of tensors that a rule may update
ONLY_MATRICES, WITHOUT_NORMS, EVERYTHING = (MATRIX,), (MATRIX, EMBEDDING), (MATRIX, EMBEDDING, NORM)


@dataclass(frozen=True)
class Definition:
    """An optimizer that the config can name.

    about: a phrase for help and docs, with the source. make: builds the rule for matrices. lr, eps, betas,
    limiter, keys: defaults. class_keys: the same for keywords that only its class has, because a run knows
    them from its model. reads: the general keys that the rule uses. kinds: of the tensors that it
    updates (EMBEDDING: embedding and head, NORM: norms and biases); AdamW updates the rest, with adamw_betas
    and adamw_eps, by default those of the rule. norm_lr: default of the key, if it is not lr. limits_itself:
    the rule limits the part that its paper limits; for other rules the optimizer limits the whole update.
    moments: the number format of its element-wise moments, if only one is possible. class_name: its
    `torch.optim` class in `lowres.optim`, if it has one.
    """

    name: str
    about: str
    make: Callable[[Settings], Rule]
    lr: float
    eps: float = 1e-8
    betas: Betas = (0.9, 0.999)
    limiter: float = 0.0
    keys: Mapping[Key, Any] = field(default_factory=dict)
    class_keys: Mapping[Key, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ("betas", "eps")
    kinds: tuple[str, ...] = ONLY_MATRICES
    norm_lr: float | None = None
    adamw_betas: Betas | None = None
    adamw_eps: float | None = None
    limits_itself: bool = False
    moments: str | None = None
    class_name: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the [optim] keys that depend on the optimizer, except the learning rate, which may
        follow from the batch."""
        own = {key.name: value for key, value in self.keys.items()}
        rate = {} if self.norm_lr is None else {"norm_lr": self.norm_lr}
        return {"eps": self.eps, "betas": self.betas, "limiter": self.limiter} | rate | own

    @property
    def for_all(self) -> bool:
        """Whether it updates every tensor."""
        return self.kinds == EVERYTHING

    def adamw(self, betas: Betas, eps: float) -> tuple[Betas, float]:
        """betas and eps of the AdamW for the other tensors, for a rule with these."""
        return self.adamw_betas or betas, self.adamw_eps or eps


RULES: dict[str, Definition] = {}
KEYS: dict[str, Key] = {}  # every key that only some rules read, by name


def register(found: Definition) -> None:
    """Make an optimizer known under its name."""
    assert found.name not in RULES, f"two optimizers are called {found.name}"
    for key in found.keys:
        assert KEYS.setdefault(key.name, key) == key, f"two keys are called {key.name}"
    RULES[found.name] = found
