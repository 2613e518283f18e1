"""Optimizers: which rule updates which tensor, at which rate, and the state they keep.

Matrices of the blocks take the rule the config names. Embedding, head and norms take it too if it is
Adam-mini, else AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres import rng
from lowres.config import ModelConfig, OptimConfig
from lowres.optim.adam_mini import AdamMini
from lowres.optim.adamw import AdamW
from lowres.optim.apollo import Apollo
from lowres.optim.base import Clock, Fields, Rule, State
from lowres.optim.moments import bitsandbytes_functional
from lowres.storage import EMBEDDING_ROLES, MATRIX_ROLES, NORM_ROLES, TensorSpec, Unit

__all__ = ["AdamMini", "AdamW", "Apollo", "Clock", "Fields", "Optimizer", "Rule", "State", "make_rule"]


@dataclass(frozen=True)
class Group:
    """Tensors that share a rule, a learning rate and a weight decay."""

    roles: tuple[str, ...]
    rule: Rule
    lr: float
    weight_decay: float


def make_rule(config: OptimConfig, model: ModelConfig, seed: int, moments: str = "fp32") -> Rule:
    """The rule that `optim.name` asks for, for the matrices of the blocks.

    moments: fp32, bf16 or int8, what element-wise moments are kept in. Those of blocks and of projected
    gradients are few, and always fp32.
    """
    assert config.eps is not None
    if config.name == "adamw":
        return AdamW(config.betas, config.eps, moments)
    if config.name == "adam-mini":
        return AdamMini(config.betas, config.eps, model.head_dim, moments)
    assert config.scale is not None and config.refresh_every is not None
    return Apollo(
        config.betas,
        config.eps,
        rank=config.rank or max(1, model.dim // 4),
        scale=config.scale,
        refresh_every=config.refresh_every,
        per_channel=config.name == "apollo",
        scale_front=bool(config.scale_front),
        seed=seed,
    )


class Optimizer:
    """All update rules of a run. State lives in the units; an engine calls `update` once a unit and step."""

    def __init__(self, config: OptimConfig, model: ModelConfig, seed: int, moments: str = "fp32") -> None:
        assert config.lr is not None and config.eps is not None
        self.seed, self.moments = seed, moments
        rule = make_rule(config, model, seed, moments)
        rest = rule if config.name == "adam-mini" else AdamW(config.betas, config.eps, moments)
        embed_lr = config.embed_lr or config.lr
        self.groups = (
            Group(MATRIX_ROLES, rule, config.lr, config.weight_decay),
            Group(EMBEDDING_ROLES, rest, embed_lr, config.weight_decay),
            Group(NORM_ROLES, rest, config.lr, 0.0),
        )

    def group_of(self, spec: TensorSpec) -> Group:
        """The one group that a tensor belongs to, by its role."""
        (group,) = (group for group in self.groups if spec.role in group.roles)
        return group

    def state_fields(self, spec: TensorSpec) -> Fields:
        """The state tensors of a weight: dtype and shape by key."""
        return self.group_of(spec).rule.state_fields(spec)

    def attach(self, units: Iterable[Unit], device: torch.device) -> None:
        """Give every weight its state before the first update."""
        if self.moments == "int8":
            bitsandbytes_functional()  # say that it is missing now, not at the first update
        for unit in units:
            for spec in unit.spec.tensors:
                unit.state[spec.name] = {
                    key: torch.zeros(shape, dtype=dtype, device=device)
                    for key, (dtype, shape) in self.state_fields(spec).items()
                }

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        """Update the weights of a unit in place from its fp32 gradients, which are overwritten.

        step: completed steps before this one. schedule: factor on the peak learning rates.
        accepted: bool scalar on the device; if false neither weights nor state change.
        """
        assert grads.keys() == unit.weights.keys(), f"{unit.spec.name}: gradients and weights differ"
        unit.updates += accepted
        clock = Clock(step, unit.updates, accepted, self.seed)
        for grad in grads.values():
            grad.masked_fill_(~accepted, 0.0)
        for group in self.groups:
            specs = [spec for spec in unit.spec.tensors if spec.role in group.roles]
            if specs:
                self._update_group(group, unit, specs, grads, schedule, clock)

    def _update_group(
        self,
        group: Group,
        unit: Unit,
        specs: list[TensorSpec],
        grads: Mapping[str, Tensor],
        schedule: float,
        clock: Clock,
    ) -> None:
        lr = group.lr * schedule
        directions = [grads[spec.name] for spec in specs]
        states = [unit.state[spec.name] for spec in specs]
        factors = group.rule.directions(specs, directions, states, lr, clock)
        decay = lr * group.weight_decay * clock.accepted.float() if group.weight_decay else None
        for spec, direction, factor in zip(specs, directions, factors, strict=True):
            key = rng.make_key(self.seed, "rounding", spec.name, clock.step)
            unit.weights[spec.name].apply(direction, factor, decay, key)
