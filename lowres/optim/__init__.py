"""Optimizers: which rule updates which tensor, at which rate, and the state they keep.

Matrices of the blocks take the rule the config names; embedding, head and norms take AdamW.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres import rng
from lowres.config import OptimConfig
from lowres.optim.adamw import AdamW
from lowres.optim.apollo import Apollo
from lowres.optim.base import Clock, Rule, State
from lowres.rooms import GPU, HOST, Rooms
from lowres.storage import EMBEDDING_ROLES, MATRIX_ROLES, NORM_ROLES, TensorSpec, Unit, UnitSpec, Fields, field_bytes, state_fields

__all__ = ["AdamW", "Apollo", "Clock", "Optimizer", "Rule", "State", "make_rule"]


@dataclass(frozen=True)
class Group:
    """Tensors that share a rule, a learning rate and a weight decay."""

    roles: tuple[str, ...]
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
    """All update rules of a run. State lives in the units; an engine calls `update` once a unit and step."""

    def __init__(self, config: OptimConfig, dim: int, seed: int) -> None:
        assert config.lr is not None and config.eps is not None
        self.seed = seed
        adamw = AdamW(config.betas, config.eps)
        embed_lr = config.embed_lr or config.lr
        self.groups = (
            Group(MATRIX_ROLES, make_rule(config, dim, seed), config.lr, config.weight_decay),
            Group(EMBEDDING_ROLES, adamw, embed_lr, config.weight_decay),
            Group(NORM_ROLES, adamw, config.lr, 0.0),
        )

    def group_of(self, spec: TensorSpec) -> Group:
        """The one group that a tensor belongs to, by its role."""
        (group,) = (group for group in self.groups if spec.role in group.roles)
        return group

    def attach(self, units: Iterable[Unit], rooms: Rooms, on_host: Collection[str] = ()) -> None:
        """Give every unit its state before the first update, all zero. The states of the units named in
        `on_host` have their home there."""
        for unit in units:
            fields = self.unit_fields(unit.spec)
            size = sum(field_bytes(state_fields(fields)).values())
            home = HOST if unit.spec.name in on_host else GPU
            unit.give_state(fields, rooms.slab("optimizer state", home, size))

    def unit_fields(self, unit: UnitSpec) -> dict[str, Fields]:
        """The state of a unit, by weight name and key."""
        return {
            spec.name: {
                k: (torch.float32, s) for k, s in self.group_of(spec).rule.state_shapes(spec.shape).items()
            }
            for spec in unit.tensors
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
        clock = Clock(step, unit.updates, accepted)
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
