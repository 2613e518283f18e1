"""Optimizers: which rule updates which tensor, at which rate, and the state they keep.

Matrices of the blocks take the rule the config names. Embedding, head and norms take it too if it works
element by element or by blocks (AdamW, Adam-mini, SGD); beside a rule that projects they take AdamW.

`Optimizer` serves the engines of lowres. AdamMini, Apollo, ApolloMini, Fira and GaLore are the same rules
as ordinary `torch.optim.Optimizer` classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres import rng
from lowres.config import Config, ModelConfig, OptimConfig
from lowres.device import kind_of
from lowres.optim.adam_mini import AdamMiniRule
from lowres.optim.adamw import AdamWRule
from lowres.optim.apollo import ApolloRule
from lowres.optim.base import Clock, Rule
from lowres.optim.fira import FiraRule
from lowres.optim.galore import GaLoreRule
from lowres.optim.limiter import NORM_FIELDS, limited
from lowres.optim.lowrank import RandomProjection, SvdProjection, workspace_bytes
from lowres.optim.moments import bitsandbytes_functional
from lowres.optim.sgd import SgdRule
from lowres.optim.torch_optim import AdamMini, Apollo, ApolloMini, Fira, GaLore
from lowres.rooms import GPU, HOST, Rooms
from lowres.storage import (
    ADAPTER_ROLES,
    ADAPTERS,
    DENSE_DTYPES,
    EMBEDDING_ROLES,
    MASTER,
    MATRIX_ROLES,
    MERGED,
    NORM_ROLES,
    UPDATES,
    Fields,
    TensorSpec,
    Unit,
    UnitSpec,
    field_bytes,
    state_fields,
)

__all__ = [
    "AdamMini",
    "Apollo",
    "ApolloMini",
    "Clock",
    "Fira",
    "GaLore",
    "Optimizer",
    "Rule",
    "make_optimizer",
    "make_rule",
]

# optimizers whose rule serves embedding, head and norms too
FOR_ALL_TENSORS = ("adamw", "adamw8bit", "adam-mini", "sgd")

PROJECTING = ApolloRule, GaLoreRule, FiraRule
# rules that limit inside what their papers limit
SELF_LIMITING = ApolloRule, FiraRule


@dataclass(frozen=True)
class Group:
    """Tensors that share a rule, a learning rate and a weight decay. name: of the rule, as `optim.name` has
    it. growth: most that the norm of an update may grow by, where the rule does not see to it; 0 is no limit.
    """

    roles: tuple[str, ...]
    name: str
    rule: Rule
    lr: float
    weight_decay: float
    growth: float


def make_rule(config: OptimConfig, model: ModelConfig, seed: int, moments: str = "fp32") -> Rule:
    """The rule that `optim.name` asks for, for the matrices of the blocks.

    moments: fp32, bf16 or int8, what element-wise moments are kept in. Those of blocks and of projected
    gradients are few, and always fp32.
    """
    betas, eps, name = config.betas, config.eps, config.name
    assert eps is not None
    if name in ("adamw", "adamw8bit"):
        return AdamWRule(betas, eps, "int8" if name == "adamw8bit" else moments)
    if name == "adam-mini":
        return AdamMiniRule(betas, eps, model.head_dim, moments)
    if name == "sgd":
        return SgdRule(betas[0], moments)
    assert config.scale is not None and config.refresh_every is not None
    rank = config.rank or max(1, model.dim // 4)
    svd = SvdProjection(rank, config.refresh_every)
    if name == "galore":
        return GaLoreRule(betas, eps, svd, config.scale)
    if name == "fira":
        return FiraRule(betas, eps, svd, config.scale, config.limiter)
    random = RandomProjection(rank, config.refresh_every, seed)
    projection = svd if config.projection == "svd" else random
    front = bool(config.scale_front)
    return ApolloRule(betas, eps, projection, config.scale, name == "apollo", front, config.limiter)


class Optimizer:
    """All update rules of a run. State lives in the units; an engine calls `update` once a unit and step."""

    def __init__(
        self,
        config: OptimConfig,
        model: ModelConfig,
        seed: int,
        moments: str = "fp32",
        master: str | None = None,
        adapter_lr: float | None = None,
        followed: str | None = None,
    ) -> None:
        """moments, master: number formats of element-wise moments and of the master copy of the block
        matrices, if there is one. adapter_lr: peak learning rate of adapters; default that of matrices.
        followed: the unit in which the sum of merges is kept."""
        assert config.lr is not None and config.eps is not None
        self.seed, self.master, self.followed = seed, master, followed
        rule = make_rule(config, model, seed, moments)
        growth = 0.0 if isinstance(rule, SELF_LIMITING) else config.limiter
        if config.name in FOR_ALL_TENSORS:
            beside, rest, rest_growth = config.name, rule, growth
        else:
            beside, rest, rest_growth = "adamw", AdamWRule(config.betas, config.eps, moments), 0.0
        embed_lr = config.embed_lr or config.lr
        embed_decay = config.weight_decay if config.decay_embeddings else 0.0
        self.groups = (
            Group(MATRIX_ROLES, config.name, rule, config.lr, config.weight_decay, growth),
            Group(ADAPTER_ROLES, config.name, rule, adapter_lr or config.lr, config.weight_decay, growth),
            Group(EMBEDDING_ROLES, beside, rest, embed_lr, embed_decay, rest_growth),
            Group(NORM_ROLES, beside, rest, config.lr, 0.0, rest_growth),
        )

    def group_of(self, spec: TensorSpec) -> Group:
        """The one group that a tensor belongs to, by its role."""
        (group,) = (group for group in self.groups if spec.role in group.roles)
        return group

    def state_fields(self, spec: TensorSpec) -> Fields:
        """The state tensors of a weight: dtype and shape by key."""
        group = self.group_of(spec)
        fields = {} if spec.frozen else group.rule.state_fields(spec) | (NORM_FIELDS if group.growth else {})
        if self.master is not None and spec.role in MATRIX_ROLES:
            fields = fields | {MASTER: (DENSE_DTYPES[self.master], spec.shape)}
        return fields

    def unit_fields(self, unit: UnitSpec) -> dict[str, Fields]:
        """The state of a unit, by weight name and key. Adapters count their updates apart, as a merge may
        forget them."""
        fields = {spec.name: self.state_fields(spec) for spec in unit.tensors}
        if unit.adapters:
            fields[ADAPTERS] = {UPDATES: (torch.int64, ())}
        if unit.name == self.followed:
            for spec in unit.tensors:
                if spec.frozen:
                    fields[spec.name] |= {MERGED: (torch.float32, spec.shape)}
        return fields

    def projection_bytes(self, specs: Iterable[TensorSpec]) -> int:
        """Bytes that random projections take between steps."""
        rules = ((spec, self.group_of(spec).rule) for spec in specs)
        projecting = ((s.shape, r) for s, r in rules if isinstance(r, PROJECTING) and not s.frozen)
        return sum(rule.projection.kept_bytes(shape) for shape, rule in projecting)

    def workspace_bytes(self, unit: UnitSpec) -> int:
        """Bytes beside gradients and state while the directions of a unit are found by a rule that
        projects; the others work in small chunks."""
        rules = ((spec, self.group_of(spec).rule) for spec in unit.trained)
        found = [(spec.shape, rule.projection) for spec, rule in rules if isinstance(rule, PROJECTING)]
        return workspace_bytes(found[0][1], [shape for shape, _ in found]) if found else 0

    def attach(self, units: Iterable[Unit], rooms: Rooms, on_host: Collection[str] = ()) -> None:
        """Give every unit its state before the first update, all zero. The states of the units named in
        `on_host` have their home there."""
        for unit in units:
            fields = self.unit_fields(unit.spec)
            if any(dtype == torch.uint8 for own in fields.values() for dtype, _ in own.values()):
                bitsandbytes_functional()  # say that it is missing now, not at the first update
            size = sum(field_bytes(state_fields(fields)).values())
            home = HOST if unit.spec.name in on_host else GPU
            unit.give_state(fields, rooms.slab("optimizer state", home, size))

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        """Update the weights of a unit in place from the fp32 gradients of those that are not frozen, which
        are overwritten.

        step: completed steps before this one. schedule: factor on the peak learning rates.
        accepted: bool scalar on the device; if false neither weights nor state change.
        """
        trained = unit.spec.trained
        assert grads.keys() == {s.name for s in trained}, f"{unit.spec.name}: gradients and weights differ"
        assert unit.updates is not None, f"{unit.spec.name}: has no optimizer state"
        counts = [unit.updates, *(own[UPDATES] for key, own in unit.state.items() if key == ADAPTERS)]
        for count in counts:
            count.add_(accepted)
        clocks = [Clock(step, count, accepted, self.seed) for count in counts]
        if kind_of(accepted.device) == "cuda" or not accepted:  # to ask a GPU would be to wait for it
            refused = ~accepted
            for grad in grads.values():
                grad.masked_fill_(refused, 0.0)
        for group in self.groups:
            specs = [spec for spec in trained if spec.role in group.roles]
            if specs:
                clock = clocks[-1] if group.roles == ADAPTER_ROLES else clocks[0]
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
        if group.growth:
            # norms are those at a rate of 1, so that a warm-up is no growth and a rate of 0 no update of 0
            factors = group.rule.directions(specs, directions, states, 1.0, clock)
            factors = limited(directions, factors, states, clock.accepted, group.growth)
            factors = [factor * lr for factor in factors]
        else:
            factors = group.rule.directions(specs, directions, states, lr, clock)
        decay = lr * group.weight_decay * clock.accepted.float() if group.weight_decay else None
        for spec, direction, factor in zip(specs, directions, factors, strict=True):
            key = rng.make_key(self.seed, "rounding", spec.name, clock.step)
            unit.apply(spec.name, direction, factor, decay, key)


def make_optimizer(config: Config) -> Optimizer:
    """The optimizer of a run."""
    kept = config.memory
    master = kept.master_dtype if kept.master == "host" else None
    adapter_lr = (config.optim.lr or 0) * config.relora.lr_factor
    followed = f"layers.{config.model.n_layers // 2}" if config.relora.log_rank else None
    return Optimizer(config.optim, config.model, config.run.seed, kept.moments, master, adapter_lr, followed)
