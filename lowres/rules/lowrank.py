"""What APOLLO, GaLore and Fira share: projections of a gradient, and Adam on what is projected.

For a gradient G [m, n] the smaller dimension is compressed to the rank r:

    m >= n ("tall"):  P [r, n],  R = G P^T [m, r],  back(R) = R P
    m <  n ("wide"):  P [m, r],  R = P^T G [r, n],  back(R) = P R

Lists of small tensors are worked on with `torch._foreach_*`, one kernel for all tensors of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from lowres import rng
from lowres.rooms import Event
from lowres.rules.base import EXP_AVG, EXP_AVG_SQ, Clock, Rule, State
from lowres.rules.registry import Key, Settings
from lowres.storage import Fields, TensorSpec, chunk_elements
from lowres.target import kind_of

# a random projection of more numbers is drawn again in every step instead of being kept
KEPT_PROJECTION = 1 << 14
# projected numbers in a batch of tensors; above it a launch is cheap beside its work, and memory is not
BATCH = 1 << 20

RANK = Key(
    "rank",
    Annotated[int, Field(ge=1)],
    "at least 1",
    "Rank of the projected gradient, at most the smaller dimension of a matrix; where there is no default, "
    "a quarter of model.dim.",
)
SCALE = Key(
    "scale",
    Annotated[float, Field(gt=0)],
    "above 0",
    "apollo: the update is multiplied by its square root. galore, fira: factor on what comes back from the "
    "projection.",
)
REFRESH_EVERY = Key(
    "refresh_every",
    Annotated[int, Field(ge=1)],
    "at least 1",
    "Steps between two choices of the projection.",
)


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

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that P takes between steps beside the state."""

    def matrix(self, spec: TensorSpec, grad: Tensor, state: State, clock: Clock) -> Tensor:
        """P [r, n] or [m, r] for this step, in the dtype of the gradient."""


def rank_of(rank: int | None, shape: tuple[int, ...]) -> int:
    """No rank is larger than the smaller dimension: there is nothing left to project."""
    return min(rank or max(1, min(shape) // 4), *shape)


def projection_shape(rank: int | None, shape: tuple[int, ...]) -> tuple[int, int]:
    r = rank_of(rank, shape)
    return (r, shape[1]) if is_tall(shape) else (shape[0], r)


def projected_shape(rank: int | None, shape: tuple[int, ...]) -> tuple[int, int]:
    r = rank_of(rank, shape)
    return (shape[0], r) if is_tall(shape) else (r, shape[1])


class RandomProjection:
    """Entries N(0, 1 / r), drawn anew every `refresh_every` steps. A function of the seed, the name of
    the weight and the step alone, so it is no state; it is kept only to save drawing it again."""

    def __init__(self, rank: int | None, refresh_every: int, seed: int = 0) -> None:
        self.rank, self.refresh_every, self.seed = rank, refresh_every, seed
        self._drawn: dict[str, tuple[int, Tensor]] = {}  # name -> (draw, projection)

    def state_fields(self, shape: tuple[int, ...]) -> Fields:
        return {}

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        numel = math.prod(projection_shape(self.rank, shape))
        return 4 * numel if numel <= KEPT_PROJECTION else 0

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
    """The first r singular vectors of the gradient, found anew every `refresh_every` steps.

    They depend on the gradient of that step, so they are state, with the number of the refresh beside
    them. A gradient that is refused or zero has none; the next one is asked then.

    Whether to look for them is decided by the number of the step and by what earlier steps found; whether to
    keep them, on the device. What waits for a GPU is `torch.linalg.svd` itself, which reads there whether it
    converged, whatever the driver: in the first step of a period, for each matrix. And if the first step of a
    process, a rehearsal included, is not the first of a period, it reads which refresh the state holds.
    """

    def __init__(self, rank: int | None, refresh_every: int) -> None:
        self.rank, self.refresh_every = rank, refresh_every
        self._held: dict[str, _Reading] = {}  # by name: the refresh that the state holds
        self._rehearsed: set[torch.Size] = set()

    def state_fields(self, shape: tuple[int, ...]) -> Fields:
        matrix = torch.float32, projection_shape(self.rank, shape)
        return {"projection": matrix, "refreshes": (torch.int64, ())}

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        return 0

    def matrix(self, spec: TensorSpec, grad: Tensor, state: State, clock: Clock) -> Tensor:
        period, name = clock.step // self.refresh_every + 1, spec.name
        if name not in self._held:
            self._held[name] = _Reading(state["refreshes"])
        # a step that starts a period asks again, as a rule may be used for a second run
        if clock.step % self.refresh_every == 0 or self._held[name].value != period:
            self._refresh(grad, state, clock, period)
            self._held[name] = _Reading(state["refreshes"])
        return state["projection"]

    def _refresh(self, grad: Tensor, state: State, clock: Clock, period: int) -> None:
        if clock.rehearsal:
            if grad.shape in self._rehearsed:
                return
            self._rehearsed.add(grad.shape)
        # a refused gradient is zero by now, so nothing that is not finite gets in
        vectors = singular_vectors(grad, rank_of(self.rank, grad.shape))
        found = clock.accepted & grad.any()
        kept, refreshes = state["projection"], state["refreshes"]
        torch.where(found, vectors, kept, out=kept)
        torch.where(found, torch.full_like(refreshes, period), refreshes, out=refreshes)


class _Reading:
    """An integer of the device for the host, which asks for it in a later step: it is copied now, so that
    asking waits for the step of now at most, and that is over by then."""

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

    A decomposition in fp32, as in the references: signs are free, but moments outlive a refresh, so they
    matter. It needs about twice the gradient's memory for a moment.
    """
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    return vh[:rank] if is_tall(grad.shape) else u[:, :rank]


def batches(specs: list[TensorSpec], rank: int | None) -> Iterator[slice]:
    """Runs of tensors whose projected gradients have BATCH numbers together, or that are alone."""
    start = total = 0
    for i, spec in enumerate(specs):
        numel = math.prod(projected_shape(rank, spec.shape))
        if i > start and total + numel > BATCH:
            yield slice(start, i)
            start, total = i, 0
        total += numel
    yield slice(start, len(specs))


def rank_for(settings: Settings) -> int | None:
    """The rank that settings ask for: a quarter of the model's width by default, or None, which is a
    quarter of each matrix, where that is not known."""
    asked: int | None = settings.keys["rank"]
    return asked or (max(1, settings.width // 4) if settings.width else None)


class LowRankRule(Rule):
    """What rules that project have in common: their memory, and the words for it."""

    moments: ClassVar = {EXP_AVG: True, EXP_AVG_SQ: False}
    projection: Projection

    def kept_bytes(self, spec: TensorSpec) -> int:
        return self.projection.kept_bytes(spec.shape)

    def workspace_bytes(self, specs: Sequence[TensorSpec]) -> int:
        """Of one of the `batches` the projections, the projected gradients, and two more of their size."""
        rank, numbers = self.projection.rank, []
        for run in batches(list(specs), rank):
            shapes = [spec.shape for spec in specs[run]]
            projected = sum(math.prod(projected_shape(rank, shape)) for shape in shapes)
            numbers.append(3 * projected + sum(math.prod(projection_shape(rank, s)) for s in shapes))
        if isinstance(self.projection, SvdProjection):  # U, V and a copy of the gradient
            numbers.append(max(2 * spec.numel + min(spec.shape) ** 2 for spec in specs))
        return 4 * max(numbers)

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
    """Brings the moments M and V of the projected gradients up to date; returns N = M / (sqrt(V) + eps).

    The bias corrections are the caller's (`rate`): eps is added before them, as in the references.
    """
    weight1, weight2 = clock.moment_weights(betas)
    first, second = ([state[key] for state in states] for key in (EXP_AVG, EXP_AVG_SQ))
    _move(first, projected, weight1)
    _move(second, torch._foreach_mul(projected, projected), weight2)
    denominators = torch._foreach_sqrt(second)
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(first, denominators))


def _move(values: list[Tensor], ends: list[Tensor] | tuple[Tensor, ...], weight: Tensor) -> None:
    """values <- values + weight (ends - values): `lerp_` with a weight that is on the device."""
    steps = torch._foreach_sub(ends, values)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(values, steps)


def rate(lr: float, clock: Clock, betas: tuple[float, float]) -> Tensor:
    """Learning rate with the bias corrections of `adam`, fp32 scalar; zero if the update is refused."""
    correction1, correction2 = clock.bias_corrections(betas)
    return lr * correction2.sqrt() / correction1 * clock.accepted


def channel_norms(tensors: list[Tensor], axes: list[int]) -> list[Tensor]:
    """Norms over one dimension of each tensor, which is kept with the size 1."""
    return [torch.linalg.vector_norm(t, dim=d, keepdim=True) for t, d in zip(tensors, axes, strict=True)]


def norms(tensors: list[Tensor]) -> Tensor:
    """Frobenius norms: [k]."""
    if kind_of(tensors[0].device) == "cpu" and tensors[0].numel() > chunk_elements(tensors[0].device):
        # a dot product takes half the time of a norm, and for 45 M elements errs by 5e-5 instead of 3e-3
        return torch.stack([torch.dot(t.reshape(-1), t.reshape(-1)) for t in tensors]).sqrt_()
    return torch.stack(torch._foreach_norm(tensors))
