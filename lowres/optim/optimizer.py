"""The optimizer of a run: which rule updates which tensor at which learning rate, and the optimizer state.

The rule that the config names updates the matrices of the blocks, and those of the other tensors that it is
made for (`Definition.kinds`); AdamW updates the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowres import rng
from lowres.catalogue import KEYS, RULES
from lowres.config import Config, ModelConfig, OptimConfig
from lowres.rooms import GPU, HOST, Rooms
from lowres.rules import Clock, Rule, Settings, make
from lowres.rules.limiter import NORM_FIELDS, limited, update_norm
from lowres.rules.moments import bitsandbytes_functional
from lowres.storage import (
    ADAPTER,
    ADAPTERS,
    BIAS,
    DENSE_DTYPES,
    EMBEDDING,
    MASTER,
    MATRIX,
    MERGED,
    NORM,
    UPDATES,
    Fields,
    TensorSpec,
    Unit,
    UnitSpec,
    field_bytes,
    state_fields,
)
from lowres.target import kind_of


@dataclass(frozen=True)
class Group:
    """Tensors that share a rule, a learning rate and a weight decay. kinds: which kinds of tensors. name: of
    the rule, as in `optim.name`. growth: the limiter's factor, if the rule does not limit its updates itself;
    0 = no limit.
    """

    kinds: tuple[str, ...]
    name: str
    rule: Rule
    lr: float
    weight_decay: float
    growth: float

    def has(self, spec: TensorSpec) -> bool:
        return spec.kind in self.kinds


def make_rule(config: OptimConfig, model: ModelConfig, seed: int, moments: str = "fp32") -> Rule:
    """The rule that `optim.name` names, for the matrices of the blocks.

    moments: fp32, bf16 or int8, the number format of element-wise moments. Moments of blocks and of projected
    gradients are small and always fp32.
    """
    assert config.betas is not None and config.eps is not None and config.limiter is not None
    keys = {key: getattr(config, key) for key in KEYS} | {"tied": model.tie_embeddings}
    settings = Settings(
        config.betas,
        config.eps,
        moments,
        seed,
        config.limiter,
        model.dim,
        model.head_width,
        keys,
    )
    return make(config.name, settings)


def _adamw(config: OptimConfig, model: ModelConfig, seed: int, moments: str) -> Rule:
    """The AdamW for the tensors that the rule of the matrices does not update."""
    assert config.adamw_betas is not None and config.adamw_eps is not None
    settings = Settings(
        config.adamw_betas, config.adamw_eps, moments, seed, 0.0, model.dim, model.head_width, {}
    )
    return make("adamw", settings)


class Optimizer:
    """All update rules of a run. The state is stored in the units; an engine calls `update` once per unit and
    step."""

    def __init__(
        self,
        config: OptimConfig,
        model: ModelConfig,
        seed: int,
        moments: str = "fp32",
        master: str | None = None,
        adapter_lr: float | None = None,
        followed: str | None = None,
        measured_every: int = 0,
    ) -> None:
        """moments: number format of element-wise moments. master: number format of the master copy of the
        block matrices, or None. adapter_lr: peak learning rate of adapters; default as for matrices.
        followed: the unit that keeps the sum of its merges. measured_every: steps between readings of the
        size of the updates; 0 for none."""
        assert config.lr is not None and config.limiter is not None
        self.seed, self.master, self.followed = seed, master, followed
        self.measured_every = measured_every
        # fp64 [2] by unit, on the host: squared norms of its last measured update, and of its weights
        self._sizes: dict[str, Tensor] = {}
        self.rehearsing = False  # whether updates are refused ones that should need as much memory as any
        known, rule = RULES[config.name], make_rule(config, model, seed, moments)
        growth = 0.0 if known.limits_itself else config.limiter
        named = config.name, rule, growth
        adamw = named if known.for_all else ("adamw", _adamw(config, model, seed, moments), 0.0)
        embeddings, norms = (named if kind in known.kinds else adamw for kind in (EMBEDDING, NORM))
        decay = config.weight_decay
        embed_lr, embed_decay = config.embed_lr or config.lr, decay if config.decay_embeddings else 0.0
        self.groups = (
            Group((MATRIX,), config.name, rule, config.lr, decay, growth),
            Group((ADAPTER,), config.name, rule, adapter_lr or config.lr, decay, growth),
            Group((EMBEDDING,), *embeddings[:2], embed_lr, embed_decay, embeddings[2]),
            Group((NORM, BIAS), *norms[:2], config.norm_lr or config.lr, 0.0, norms[2]),
        )

    def group_of(self, spec: TensorSpec) -> Group:
        """The one group that a tensor belongs to."""
        (group,) = (group for group in self.groups if group.has(spec))
        return group

    def state_fields(self, spec: TensorSpec) -> Fields:
        """The state tensors of a weight: dtype and shape by key."""
        group = self.group_of(spec)
        fields = {} if spec.frozen else group.rule.state_fields(spec) | (NORM_FIELDS if group.growth else {})
        if self.master is not None and spec.kind == MATRIX:
            fields = fields | {MASTER: (DENSE_DTYPES[self.master], spec.shape)}
        return fields

    def unit_fields(self, unit: UnitSpec) -> dict[str, Fields]:
        """The state of a unit, by weight name and key. Adapters have their own update count, because a merge
        may reset it."""
        fields = {spec.name: self.state_fields(spec) for spec in unit.tensors}
        if unit.adapters:
            fields[ADAPTERS] = {UPDATES: (torch.int64, ())}
        if unit.name == self.followed:
            for spec in unit.tensors:
                if spec.frozen:
                    fields[spec.name] |= {MERGED: (torch.float32, spec.shape)}
        return fields

    def product_flops(self, spec: TensorSpec) -> int:
        """Floating-point operations as in `Rule.product_flops`, of one update."""
        return 0 if spec.frozen else self.group_of(spec).rule.product_flops(spec)

    def attach(self, units: Iterable[Unit], rooms: Rooms, on_host: Collection[str] = ()) -> None:
        """Give every unit its state before the first update, all zero. The units named in `on_host` keep
        their state on the host."""
        units = list(units)
        if self.measured_every:
            with rooms.allocate_in(HOST):
                sizes = torch.zeros(len(units), 2, dtype=torch.float64)
                sizes = sizes.pin_memory() if rooms.device.type == "cuda" else sizes
            self._sizes = {unit.spec.name: own for unit, own in zip(units, sizes, strict=True)}
        for unit in units:
            fields = self.unit_fields(unit.spec)
            if any(dtype == torch.uint8 for own in fields.values() for dtype, _ in own.values()):
                bitsandbytes_functional()  # if it is missing, fail now, not at the first update
            size = sum(field_bytes(state_fields(fields)).values())
            home = HOST if unit.spec.name in on_host else GPU
            unit.give_state(fields, rooms.slab("optimizer state", home, size))

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        """Update the weights of a unit in place. grads: fp32, of all tensors that are not frozen; they are
        overwritten.

        step: completed steps before this one. schedule: factor on the peak learning rates.
        accepted: bool scalar on the device; if false, neither weights nor state change.
        """
        trained = unit.spec.trained
        assert grads.keys() == {s.name for s in trained}, f"{unit.spec.name}: gradients and weights differ"
        assert unit.updates is not None, f"{unit.spec.name}: has no optimizer state"
        counts = [unit.updates, *(own[UPDATES] for key, own in unit.state.items() if key == ADAPTERS)]
        for count in counts:
            count.add_(accepted)
        clocks = [Clock(step, count, accepted, self.seed, self.rehearsing) for count in counts]
        if kind_of(accepted.device) == "cuda" or not accepted:  # reading the value on a GPU would wait for it
            refused = ~accepted
            for grad in grads.values():
                grad.masked_fill_(refused, 0.0)
        sizes = None
        if self._measures(step):
            sizes = torch.zeros(2, dtype=torch.float64, device=accepted.device)
        for group in self.groups:
            specs = [spec for spec in trained if group.has(spec)]
            if specs:
                clock = clocks[-1] if ADAPTER in group.kinds else clocks[0]
                self._update_group(group, unit, specs, grads, schedule, clock, sizes)
        if sizes is not None:
            self._sizes[unit.spec.name].copy_(sizes, non_blocking=True)

    def _measures(self, step: int) -> bool:
        """Whether the update after `step` completed ones is measured."""
        due = self.measured_every and (self.rehearsing or (step + 1) % self.measured_every == 0)
        return bool(due and self._sizes)

    def readings(self, step: int) -> dict[str, float]:
        """What to log after `step` steps: of every unit the RMS of its update, before rounding and without
        weight decay, divided by the RMS of the weights that it changed. Empty if the step was not measured.
        They are there as soon as the results of the step are."""
        if not self._measures(step - 1):
            return {}
        pairs = {name: own.tolist() for name, own in self._sizes.items()}
        return {f"update/{name}": (u / w) ** 0.5 if w else math.nan for name, (u, w) in pairs.items()}

    def _update_group(
        self,
        group: Group,
        unit: Unit,
        specs: list[TensorSpec],
        grads: Mapping[str, Tensor],
        schedule: float,
        clock: Clock,
        sizes: Tensor | None,
    ) -> None:
        """sizes: gets the squared norms of updates and weights added, if the step is measured."""
        lr = group.lr * schedule
        directions = [grads[spec.name] for spec in specs]
        states = [unit.state[spec.name] for spec in specs]
        if group.growth:
            # limit norms at a learning rate of 1, so warm-up does not count as growth, and a learning rate
            # of 0 does not give norms of 0
            factors = group.rule.directions(specs, directions, states, 1.0, clock)
            factors = limited(directions, factors, states, clock.accepted, group.growth)
            factors = [factor * lr for factor in factors]
        else:
            factors = group.rule.directions(specs, directions, states, lr, clock)
        decay = lr * group.weight_decay * clock.accepted.float() if group.weight_decay else None
        for spec, direction, factor in zip(specs, directions, factors, strict=True):
            if sizes is not None:
                size = update_norm(direction, factor).double().square()
                sizes += torch.stack([size, unit.square(spec.name)])
            key = rng.make_key(self.seed, "rounding", spec.name, clock.step)
            unit.apply(spec.name, direction, factor, decay, key)


def make_optimizer(config: Config) -> Optimizer:
    """The optimizer of a run."""
    kept = config.memory
    master = kept.master_dtype if kept.master == "host" else None
    adapter_lr = (config.optim.lr or 0) * config.relora.lr_factor
    followed = f"layers.{config.model.n_layers // 2}" if config.relora.log_rank else None
    return Optimizer(
        *(config.optim, config.model, config.run.seed, kept.moments, master, adapter_lr, followed),
        config.log.update_every,
    )
