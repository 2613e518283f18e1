"""How a rule is made from the config: one function for each optimizer that the config can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowres.catalogue import RULES
from lowres.rules.base import Betas, Rule


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


Make = Callable[[Settings], Rule]
_MAKERS: dict[str, Make] = {}


def makes(name: str) -> Callable[[Make], Make]:
    """Marks the function that makes the rule for the matrices of an optimizer in the catalogue."""
    assert name in RULES and name not in _MAKERS, name

    def found(make: Make) -> Make:
        _MAKERS[name] = make
        return make

    return found


def make(name: str, settings: Settings) -> Rule:
    """The rule of an optimizer for matrices."""
    return _MAKERS[name](settings)
