"""What is known of an update rule without building it: one record, which its file registers.

The config takes names, keys and defaults from here, the optimizer what a rule serves, `lowres.optim` the
`torch.optim` classes, help and docs the texts. So an optimizer is one file of this package, its test, and the
docs that `scripts/write_docs.py` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowres.rules.base import Betas, Rule


@dataclass(frozen=True)
class Key:
    """A key of [optim] that only some rules read. type: as pydantic takes it, with limits. wanted: those
    limits in words, for a message."""

    name: str
    type: Any
    wanted: str
    about: str


@dataclass(frozen=True)
class Settings:
    """What a rule is built from.

    eps: added to the denominator. moments: number format of element-wise moments. limiter: most that the
    norm of an update may grow by, for rules that see to it themselves; 0 is no limit. width, head_dim: of
    the model, where they are known. keys: the values of its own keys.
    """

    betas: Betas
    eps: float
    moments: str
    seed: int
    limiter: float
    width: int | None
    head_dim: int | None
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Definition:
    """An optimizer by its name.

    about: a phrase for help and docs, with the source. make: builds the rule for matrices. lr, eps, betas,
    limiter, keys: defaults. reads: the general keys that mean something to it. for_all: embedding, head,
    norms and biases take it too; otherwise they take AdamW. limits_itself: the rule limits what its paper
    limits; any other is limited as a whole by the optimizer. moments: the only number format of its
    element-wise moments, if there is just one. class_name: of its `torch.optim` class in `lowres.optim`, if
    it has one.
    """

    name: str
    about: str
    make: Callable[[Settings], Rule]
    lr: float
    eps: float = 1e-8
    betas: Betas = (0.9, 0.999)
    limiter: float = 0.0
    keys: Mapping[Key, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ("betas", "eps")
    for_all: bool = False
    limits_itself: bool = False
    moments: str | None = None
    class_name: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of [optim] that depend on the optimizer, where the config gives none; but for the rate,
        which may follow from the batch."""
        own = {key.name: value for key, value in self.keys.items()}
        return {"eps": self.eps, "betas": self.betas, "limiter": self.limiter} | own


RULES: dict[str, Definition] = {}
KEYS: dict[str, Key] = {}  # every key that only some rules read, by name


def register(found: Definition) -> None:
    """Make an optimizer known under its name."""
    assert found.name not in RULES, f"two optimizers are called {found.name}"
    for key in found.keys:
        assert KEYS.setdefault(key.name, key) == key, f"two keys are called {key.name}"
    RULES[found.name] = found
