"""ReLoRA (Lialin et al., arXiv 2307.05695): many low-rank changes that add up to a high-rank change.

While its adapter trains, a matrix W of a block is frozen, and the model uses W + (alpha / rank) B A. Every
cycle ends with a merge. It happens right after the last update of the cycle, while the layer is in use, so
it needs no separate pass over the model:

    W <- W + (alpha / rank) B A      written by the storage of W: INT8 rounds stochastically, because
                                     rounding to nearest would lose nearly all of a change this small
    A <- uniform (Kaiming), B <- 0   so the model computes the same as before, and the next change differs
    moments <- mostly reset          both with the same mask: a first moment without its second would make
                                     the next update thousands of times too large

The applied change is compared with the intended one: cosine, and ratio of the norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowres import rng
from lowres.config import ReloraConfig
from lowres.model import fresh_adapter
from lowres.optim import Clock, Optimizer
from lowres.rules.base import UPDATE_NORM
from lowres.rules.moments import Moment
from lowres.storage import (
    ADAPTERS,
    FORMATS,
    LORA_A,
    LORA_B,
    MASTER,
    MERGED,
    UPDATES,
    Dense,
    TensorSpec,
    Unit,
)
from lowres.target import chunks

# rows of a weight that are merged at a time; must not change, because random bits are named by it
MERGE_ROWS = 256


class Relora:
    """An optimizer that merges adapters at the end of every cycle; the engine sees it as an `Updater`."""

    def __init__(self, config: ReloraConfig, optimizer: Optimizer) -> None:
        self.config, self.optimizer = config, optimizer
        # from the last merge: <applied, intended>, and the squared norm of each; effective ranks
        self._sums: Tensor | None = None
        self._ranks: list[Tensor] = []

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        """Update a unit (`Optimizer.update`), and merge its adapters if this step ends a cycle."""
        self.optimizer.update(unit, grads, step, schedule, accepted)
        if self.config.merges_at(step + 1) > self.config.merges_at(step):
            self._merge(unit, step + 1)
        elif self.optimizer.rehearsing:
            merged = [state[MERGED] for state in unit.state.values() if MERGED in state]
            for one in {change.shape: change for change in merged}.values():
                effective_rank(one)

    def readings(self, step: int) -> dict[str, Any]:
        """What to log after `step` steps. Waits for the device only after a merge.

        cycle: 0 in the warm start, then counted from 1. merges: number so far. After a merge also
        merge_cosine and merge_norm, which compare the applied with the intended change of all matrices
        together (1 means equal), and with relora.log_rank effective_rank (mean over the matrices of the
        middle layer).
        """
        merges = self.config.merges_at(step)
        found: dict[str, Any] = {
            "cycle": merges + 1 if step > self.config.start_step else 0,
            "merges": merges,
        }
        if self._sums is not None:
            dot, applied, intended = self._sums.tolist()
            found["merge_cosine"] = dot / (applied * intended) ** 0.5 if applied and intended else 0.0
            found["merge_norm"] = (applied / intended) ** 0.5 if intended else 0.0
            if self._ranks:
                found["effective_rank"] = float(torch.stack(self._ranks).mean())
            self._sums, self._ranks = None, []
        return found

    def _merge(self, unit: Unit, step: int) -> None:
        for spec in unit.spec.tensors:
            if spec.frozen:
                sums = merge(unit, spec, self.config.scaling, self.optimizer.seed, step)
                self._sums = sums if self._sums is None else self._sums + sums
                if MERGED in unit.state[spec.name]:
                    self._ranks.append(effective_rank(unit.state[spec.name][MERGED]))
        start_adapters(unit, self.optimizer.seed, step)
        for spec in unit.spec.adapters.values():
            forget(
                unit, spec, self.optimizer.group_of(spec).rule.moments, self.config, self.optimizer.seed, step
            )
        if unit.spec.adapters and self.config.reset == "zero":
            unit.state[ADAPTERS][UPDATES].zero_()


def adapters_of(unit: Unit, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """A [rank, n] and B [m, rank] of a frozen matrix of the unit, fp32."""
    specs = unit.spec.adapters
    a, b = (unit.weights[specs[spec.role + part].name].dense(torch.float32) for part in (LORA_A, LORA_B))
    return a, b


def start_adapters(unit: Unit, seed: int, step: int) -> None:
    """Set the adapters of a unit to their initial values for a start after `step` steps."""
    for spec in unit.spec.adapters.values():
        unit.fill(spec.name, iter([(0, fresh_adapter(spec, seed, step, unit.weights_slab.device))]))


def tensors_before(unit: Unit) -> dict[str, Tensor]:
    """The tensors of a unit with adapters (`Unit.tensors`) that also exist in the warm start."""
    new = (*(spec.name for spec in unit.spec.adapters.values()), f"{ADAPTERS}.")
    return {
        name: tensor
        for name, tensor in unit.tensors().items()
        if not name.startswith(new) and not name.endswith(f".{MERGED}")
    }


def merge(unit: Unit, spec: TensorSpec, scaling: float, seed: int, step: int) -> Tensor:
    """W <- W + scaling B A for a frozen matrix of the unit, through its master copy if it has one.

    Returns fp64 [3]: <applied, intended>, and the squared norms of the applied and the intended change.
    """
    a, b = adapters_of(unit, spec)
    stored, state = unit.weights[spec.name].tensors(), unit.state.get(spec.name, {})
    add = torch.full((), -1.0, device=a.device)
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for rows in chunks(spec.shape[0], MERGE_ROWS):
        weight = FORMATS[unit.kinds[spec.name]].over({key: t[rows] for key, t in stored.items()})
        written = Dense(state[MASTER][rows]) if MASTER in state else weight
        applied = written.dense(torch.float32).neg()
        intended = (b[rows] @ a).mul_(scaling)
        written.apply(intended, add, None, rng.make_key(seed, "merge", f"{spec.name}.{rows.start}", step))
        applied.add_(written.dense(torch.float32))
        if written is not weight:
            weight.fill(iter([(0, state[MASTER][rows].float())]))
        if MERGED in state:
            state[MERGED][rows] += applied
        pairs = (applied, intended), (applied, applied), (intended, intended)
        sums += torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in pairs])
    return sums


def forget(
    unit: Unit,
    spec: TensorSpec,
    signed: Mapping[str, bool],
    config: ReloraConfig,
    seed: int,
    step: int,
) -> None:
    """Reset the moments of an adapter, all or most of them (`reset_keep`), and the norm of its limiter.

    signed: its moments, as in `Rule.moments`.

    Both moments lose the same elements. If the second has another shape (Adam-mini's blocks), it is kept when
    part of the first is kept: this can only make an update too small. Without a first moment (RACS) nothing
    is kept: with the sizes of earlier gradients the first updates would be tiny, and the limiter would let
    them grow by 1 % a step.
    """
    state = unit.state[spec.name]
    moments = [key for key in signed if key in state]
    if UPDATE_NORM in state:
        state[UPDATE_NORM].zero_()
    if config.reset == "zero" or not any(signed.values()):
        for key in moments:
            for part in (key, f"{key}.absmax"):
                if part in state:
                    state[part].zero_()
        return
    always = torch.ones((), dtype=torch.bool, device=unit.weights_slab.device)
    clock = Clock(step, unit.state[ADAPTERS][UPDATES], always, seed)
    opened = [Moment(spec, key, state, clock, signed=signed[key]) for key in moments]
    values = [moment.read(slice(0, moment.value.numel())) for moment in opened]
    if not values:
        return
    mask = kept(values[0], config, rng.make_key(seed, "reset", spec.name, step))
    pairs = [pair for pair in zip(opened, values, strict=True) if pair[1].numel() == mask.numel()]
    for _, value in pairs:
        mask &= value != 0  # in 8 bits a second moment may be 0 where the first is not
    for moment, value in pairs:
        moment.write(value.mul_(mask), slice(0, value.numel()))


def kept(first: Tensor, config: ReloraConfig, key: rng.Key) -> Tensor:
    """Which elements of the moments are kept: bool, with the shape of the flat first moment."""
    if config.reset == "random":
        return rng.uniform(key, 0, first.numel(), first.device) < config.reset_keep
    count = round(config.reset_keep * first.numel())
    mask = torch.zeros_like(first, dtype=torch.bool)
    mask[first.abs().topk(count).indices] = True
    return mask


def effective_rank(change: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007), fp32 scalar; 0 if the
    change is zero."""
    values = torch.linalg.svdvals(change)
    total = values.sum()
    p = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(total > 0, torch.exp(torch.special.entr(p).sum()), 0.0)
