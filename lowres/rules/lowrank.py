"""What APOLLO, GaLore and Fira share: projections of a gradient, and Adam on the projected gradient.

For a gradient G [m, n], the smaller dimension is compressed to the rank r:

    m >= n ("tall"):  P [r, n],  R = G P^T [m, r],  back(R) = R P
    m <  n ("wide"):  P [m, r],  R = P^T G [r, n],  back(R) = P R

Lists of small tensors are processed with `torch._foreach_*`: one kernel for all tensors of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowres import rng
from lowres.rooms import Event
from lowres.rules.base import EXP_AVG, EXP_AVG_SQ, Clock, Rule, State
from lowres.rules.registry import Settings
from lowres.storage import Fields, TensorSpec
from lowres.target import chunk_elements, kind_of

# a random projection with more numbers than this is drawn again in every step instead of being kept
KEPT_PROJECTION = 1 << 14
# projected numbers in a batch of tensors; above this a launch costs little compared with its work, and
# memory matters more
BATCH = 1 << 20


def is_tall(shape: tuple[int, ...]) -> bool:
    return shape[0] >= shape[1]


def channel_axis(shape: tuple[int, ...]) -> int:
    """The dimension to sum over for one number per index of the larger dimension."""
    return 1 if is_tall(shape) else 0


def project(grad: Tensor, projection: Tensor) -> Tensor:
    """R [m, r] or [r, n]."""
    return grad @ projection.T if is_tall(grad.shape) else projection.T @ grad


class Projection(Protocol):
    """Where P comes from. rank None: a quarter of the smaller dimension."""

    rank: int | None

    def state_fields(self, shape: tuple[int, ...]) -> Fields:
        """What must be kept of P."""

    def matrix(self, spec: TensorSpec, grad: Tensor, state: State, clock: Clock) -> Tensor:
        """P [r, n] or [m, r] for this step, in the dtype of the gradient."""


def rank_of(rank: int | None, shape: tuple[int, ...]) -> int:
    """The rank for a matrix: at most its smaller dimension, where nothing is left to compress."""
    return min(rank or max(1, min(shape) // 4), *shape)


def projection_shape(rank: int | None, shape: tuple[int, ...]) -> tuple[int, int]:
    r = rank_of(rank, shape)
    return (r, shape[1]) if is_tall(shape) else (shape[0], r)


def projected_shape(rank: int | None, shape: tuple[int, ...]) -> tuple[int, int]:
    r = rank_of(rank, shape)
    return (shape[0], r) if is_tall(shape) else (r, shape[1])


class RandomProjection:
    """Entries N(0, 1 / r), drawn again every `refresh_every` steps. It depends only on the seed, the name of
    the weight and the step, so it is not part of the state; it is kept only to save drawing it again."""

    def __init__(self, rank: int | None, refresh_every: int, seed: int = 0) -> None:
        self.rank, self.refresh_every, self.seed = rank, refresh_every, seed
        self._drawn: dict[str, tuple[int, Tensor]] = {}  # name -> (draw, projection)

    def state_fields(self, shape: tuple[int, ...]) -> Fields:
        return {}

    def matrix(self, spec: TensorSpec, grad: Tensor, state: State, clock: Clock) -> Tensor:
        return self.draw(spec.name, spec.shape, clock.step, grad.device).to(grad.dtype)

    def draw(self, name: str, shape: tuple[int, ...], step: int, device: torch.device) -> Tensor:
        """fp32 P of a weight at a step."""
        draw = step // self.refresh_every
        if name in self._drawn and self._drawn[name][0] == draw:
            return self._drawn[name][1]
        size = projection_shape(self.rank, shape)
        key = rng.make_key(self.seed, "projection", name, draw)
        scale = math.sqrt(rank_of(self.rank, shape))
        projection = rng.normal(key, 0, math.prod(size), device).div_(scale).view(size)
        if projection.numel() <= KEPT_PROJECTION:
            self._drawn[name] = (draw, projection)
        return projection


class SvdProjection:
    """The first r singular vectors of the gradient, computed again every `refresh_every` steps.

    They depend on the gradient of that step, so they are part of the state, together with the number of the
    refresh. A gradient that is refused or zero has none; then the next gradient is used.

    Whether to compute them depends on the step number and on what earlier steps found; whether to keep them
    is decided on the device. Two things wait for the GPU: `torch.linalg.svd` itself, which reads whether it
    converged with every driver (for each matrix, in the first step of a period); and reading which refresh
    the state holds, if the first step of a process (or a rehearsal) is not the first of a period.
    """

    def __init__(self, rank: int | None, refresh_every: int) -> None:
        self.rank, self.refresh_every = rank, refresh_every
        self._held: dict[str, _Reading] = {}  # weight name -> the refresh that the state holds
        self._rehearsed: set[torch.Size] = set()

    def state_fields(self, shape: tuple[int, ...]) -> Fields:
        matrix = torch.float32, projection_shape(self.rank, shape)
        return {"projection": matrix, "refreshes": (torch.int64, ())}

    def matrix(self, spec: TensorSpec, grad: Tensor, state: State, clock: Clock) -> Tensor:
        period, name = clock.step // self.refresh_every + 1, spec.name
        if name not in self._held:
            self._held[name] = _Reading(state["refreshes"])
        # the first step of a period always refreshes, because a rule may be used for a second run
        if clock.step % self.refresh_every == 0 or self._held[name].value != period:
            self._refresh(grad, state, clock, period)
            self._held[name] = _Reading(state["refreshes"])
        return state["projection"]

    def _refresh(self, grad: Tensor, state: State, clock: Clock, period: int) -> None:
        if clock.rehearsal:
            if grad.shape in self._rehearsed:
                return
            self._rehearsed.add(grad.shape)
        # a refused gradient has been set to zero, so every number here is finite
        vectors = singular_vectors(grad, rank_of(self.rank, grad.shape))
        found = clock.accepted & grad.any()
        kept, refreshes = state["projection"], state["refreshes"]
        torch.where(found, vectors, kept, out=kept)
        torch.where(found, torch.full_like(refreshes, period), refreshes, out=refreshes)


class _Reading:
    """An integer on the device that the host reads in a later step. The copy starts now, so a later read
    waits at most for the current step, which is finished by then."""

    def __init__(self, number: Tensor) -> None:
        self._copied: Event = None
        if number.is_cuda:
            self._copy = number.to("cpu", non_blocking=True)  # page-locked
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._known = int(number)

    @property
    def value(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
            self._known, self._copied = int(self._copy), None
        return self._known


def singular_vectors(grad: Tensor, rank: int) -> Tensor:
    """The first `rank` singular vectors of the smaller side, as P: [r, n] or [m, r].

    The decomposition is in fp32, as in the references. The signs are arbitrary, but they matter, because
    moments are kept across a refresh. For a short time it needs about twice the gradient's memory.
    """
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    return vh[:rank] if is_tall(grad.shape) else u[:, :rank]


def batches(specs: list[TensorSpec], rank: int | None) -> Iterator[slice]:
    """Groups of neighbouring tensors whose projected gradients have at most BATCH numbers together, or
    single larger tensors."""
    start = total = 0
    for i, spec in enumerate(specs):
        numel = math.prod(projected_shape(rank, spec.shape))
        if i > start and total + numel > BATCH:
            yield slice(start, i)
            start, total = i, 0
        total += numel
    yield slice(start, len(specs))


def rank_for(settings: Settings) -> int | None:
    """The rank from the settings. The default is a quarter of the model's width or, if that is unknown, None:
    a quarter of each matrix's smaller dimension."""
    asked: int | None = settings.keys["rank"]
    return asked or (max(1, settings.width // 4) if settings.width else None)


class LowRankRule(Rule):
    """What the rules that project have in common: their memory use, and its description."""

    moments: ClassVar = {EXP_AVG: True, EXP_AVG_SQ: False}
    projection: Projection

    def describe(self, spec: TensorSpec) -> dict[str, str]:
        if isinstance(self.projection, SvdProjection):
            return {}
        shape = projection_shape(self.projection.rank, spec.shape)
        return {"": f"random projection {list(shape)} (no state)"}


def moment_fields(rank: int | None, shape: tuple[int, ...]) -> Fields:
    projected = torch.float32, projected_shape(rank, shape)
    return {EXP_AVG: projected, EXP_AVG_SQ: projected}


def adam(
    projected: list[Tensor], states: list[State], clock: Clock, betas: tuple[float, float], eps: float
) -> list[Tensor]:
    """Update the moments M and V of the projected gradients; returns N = M / (sqrt(V) + eps).

    The caller applies the bias corrections (`rate`): eps is added before them, as in the references.
    """
    weight1, weight2 = clock.moment_weights(betas)
    first, second = ([state[key] for state in states] for key in (EXP_AVG, EXP_AVG_SQ))
    _move(first, projected, weight1)
    _move(second, torch._foreach_mul(projected, projected), weight2)
    denominators = torch._foreach_sqrt(second)
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(first, denominators))


def _move(values: list[Tensor], ends: list[Tensor] | tuple[Tensor, ...], weight: Tensor) -> None:
    """values <- values + weight (ends - values): `lerp_` with a weight on the device."""
    steps = torch._foreach_sub(ends, values)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(values, steps)


def rate(lr: float, clock: Clock, betas: tuple[float, float]) -> Tensor:
    """Learning rate with the bias corrections of `adam`, fp32 scalar; zero if the update is refused."""
    correction1, correction2 = clock.bias_corrections(betas)
    return lr * correction2.sqrt() / correction1 * clock.accepted


def channel_norms(tensors: list[Tensor], axes: list[int]) -> list[Tensor]:
    """Norms over one dimension of each tensor; the dimension is kept with size 1."""
    return [torch.linalg.vector_norm(t, dim=d, keepdim=True) for t, d in zip(tensors, axes, strict=True)]


def norms(tensors: list[Tensor]) -> Tensor:
    """Frobenius norms: [k]."""
    if kind_of(tensors[0].device) == "cpu" and tensors[0].numel() > chunk_elements(tensors[0].device):
        # a dot product takes half the time of a norm; with 45 M elements its error is 5e-5 instead of 3e-3
        return torch.stack([torch.dot(t.reshape(-1), t.reshape(-1)) for t in tensors]).sqrt_()
    return torch.stack(torch._foreach_norm(tensors))
