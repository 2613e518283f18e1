"""Optimizers: which rule updates which tensor, at which rate, and the state they keep.

Matrices of the blocks take the rule the config names; embedding, head and norms take AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres import rng
from lowres.config import OptimConfig
from lowres.optim.adamw import AdamW
from lowres.optim.apollo import Apollo
from lowres.optim.base import Clock, Rule, State, new_state
from lowres.storage import MATRIX_ROLES, Storage, TensorSpec, UnitSpec

__all__ = ["AdamW", "Apollo", "Clock", "Optimizer", "Rule", "State", "make_rule"]


@dataclass(frozen=True)
class Group:
    """Tensors that share a rule, a learning rate and a weight decay."""

    rule: Rule
    lr: float
    weight_decay: float


def make_rule(config: OptimConfig, dim: int, seed: int) -> Rule:
    """The rule that `optim.name` asks for, for the matrices of a model of width dim."""
    assert config.eps is not None
    if config.name == "adamw":
        return AdamW(config.betas, config.eps)
    assert config.scale is not None and config.refresh_every is not None
    return Apollo(
        config.betas,
        config.eps,
        rank=config.rank or max(1, dim // 4),
        scale=config.scale,
        refresh_every=config.refresh_every,
        per_channel=config.name == "apollo",
        scale_front=bool(config.scale_front),
        seed=seed,
    )


class Optimizer:
    """All update rules and all state of a run; an engine calls `update` once a unit and step."""

    def __init__(
        self, config: OptimConfig, units: list[UnitSpec], dim: int, seed: int, device: torch.device
    ) -> None:
        assert config.lr is not None and config.eps is not None
        self.seed = seed
        adamw = AdamW(config.betas, config.eps)
        self._groups = {
            "matrices": Group(make_rule(config, dim, seed), config.lr, config.weight_decay),
            "embeddings": Group(adamw, config.embed_lr or config.lr, config.weight_decay),
            "norms": Group(adamw, config.lr, 0.0),
        }
        specs = [spec for unit in units for spec in unit.tensors]
        self._group_of = {spec.name: group_name(spec) for spec in specs}
        assert len(self._group_of) == len(specs), "a tensor in two units"
        self.state: dict[str, State] = {
            spec.name: new_state(self._rule(spec.name), spec.shape, device) for spec in specs
        }
        self.updates = {unit.name: torch.zeros((), dtype=torch.int64, device=device) for unit in units}

    def _rule(self, name: str) -> Rule:
        return self._groups[self._group_of[name]].rule

    def update(
        self,
        unit: str,
        weights: Mapping[str, Storage],
        grads: Mapping[str, Tensor],
        step: int,
        schedule: float,
        accepted: Tensor,
    ) -> None:
        """Update the weights of a unit in place from its fp32 gradients, which are overwritten.

        step: completed steps before this one. schedule: factor on the peak learning rates.
        accepted: bool scalar on the device; if false neither weights nor state change.
        """
        assert weights.keys() == grads.keys(), f"{unit}: gradients and weights differ"
        self.updates[unit] += accepted
        clock = Clock(step, self.updates[unit], accepted)
        for grad in grads.values():
            grad.masked_fill_(~accepted, 0.0)
        for group_name, group in self._groups.items():
            names = [name for name in weights if self._group_of[name] == group_name]
            if not names:
                continue
            lr = group.lr * schedule
            directions = [grads[name] for name in names]
            states = [self.state[name] for name in names]
            factors = group.rule.directions(names, directions, states, lr, clock)
            decay = lr * group.weight_decay * accepted.float() if group.weight_decay else None
            for name, direction, factor in zip(names, directions, factors, strict=True):
                key = rng.make_key(self.seed, "rounding", name, step)
                weights[name].apply(direction, factor, decay, key)

    def tensors(self, unit: str, weights: Mapping[str, Storage]) -> dict[str, Tensor]:
        """State of a unit as a checkpoint stores it: by weight name and key, and the unit's count."""
        found = {f"{name}.{key}": t for name in weights for key, t in self.state[name].items()}
        return found | {f"{unit}.updates": self.updates[unit]}


def group_name(spec: TensorSpec) -> str:
    """The group of a tensor, by its role."""
    if spec.role in MATRIX_ROLES:
        return "matrices"
    return "embeddings" if spec.role in ("embedding", "head") else "norms"
