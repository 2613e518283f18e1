"""The optimizers that `optim.name` can name, and the keys of [optim] that only some of them read.

The records hold names, keys and defaults (for the config), which tensors an optimizer updates, its class in
`lowres.optim`, and texts (for help and docs). Its arithmetic is a rule in `lowres.rules`, made by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from lowres.catalogue.tensors import EVERYTHING, ONLY_MATRICES, WITHOUT_NORMS

Betas = tuple[float, float]
GROWTH = 1.01  # of an update's norm per step; the published gamma of the norm-growth limiter


@dataclass(frozen=True)
class Key:
    """A key of [optim] that only some rules read. type: for pydantic, with limits. wanted: these limits in
    words, for a message."""

    name: str
    type: Any
    wanted: str
    about: str


@dataclass(frozen=True)
class Definition:
    """An optimizer that the config can name.

    about: a phrase for help and docs, with the source. lr, eps, betas,
    limiter, keys: defaults. class_keys: the same for keywords that only its class has, because a run knows
    them from its model. reads: the general keys that the rule uses. kinds: of the tensors that it
    updates (EMBEDDING: embedding and head, NORM: norms and biases); AdamW updates the rest, with adamw_betas
    and adamw_eps, by default those of the rule. norm_lr: default of the key, if it is not lr. limits_itself:
    the rule limits the part that its paper limits; for other rules the optimizer limits the whole update.
    moments: the number format of its element-wise moments, if only one is possible. class_name: its
    `torch.optim` class in `lowres.optim`, if it has one.
    """

    name: str
    about: str
    lr: float
    eps: float = 1e-8
    betas: Betas = (0.9, 0.999)
    limiter: float = 0.0
    keys: Mapping[Key, Any] = field(default_factory=dict)
    class_keys: Mapping[Key, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ("betas", "eps")
    kinds: tuple[str, ...] = ONLY_MATRICES
    norm_lr: float | None = None
    adamw_betas: Betas | None = None
    adamw_eps: float | None = None
    limits_itself: bool = False
    moments: str | None = None
    class_name: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the [optim] keys that depend on the optimizer, except the learning rate, which may
        follow from the batch."""
        own = {key.name: value for key, value in self.keys.items()}
        rate = {} if self.norm_lr is None else {"norm_lr": self.norm_lr}
        return {"eps": self.eps, "betas": self.betas, "limiter": self.limiter} | rate | own

    @property
    def for_all(self) -> bool:
        """Whether it updates every tensor."""
        return self.kinds == EVERYTHING

    def adamw(self, betas: Betas, eps: float) -> tuple[Betas, float]:
        """betas and eps of the AdamW for the other tensors, for a rule with these."""
        return self.adamw_betas or betas, self.adamw_eps or eps


# ---- keys

RANK = Key(
    "rank",
    Annotated[int, Field(ge=1)],
    "at least 1",
    "Rank of the projected gradient, limited to the smaller dimension of each matrix; without a default, a "
    "quarter of model.dim.",
)
SCALE = Key(
    "scale",
    Annotated[float, Field(gt=0)],
    "above 0",
    "apollo: the update is multiplied by the square root of this. galore, fira: factor on the update that is "
    "projected back.",
)
REFRESH_EVERY = Key(
    "refresh_every",
    Annotated[int, Field(ge=1)],
    "at least 1",
    "Steps until a new projection is chosen.",
)
SCALE_FRONT = Key(
    "scale_front", bool, "True or False", "Scale before the norm-growth limiter instead of after it."
)
PROJECTION = Key(
    "projection",
    Literal["random", "svd"],
    "random or svd",
    "random: random numbers, which are not stored. svd: the first singular vectors of the gradient, as in "
    "galore and fira.",
)
NEWTON_SCHULZ_STEPS = Key(
    "newton_schulz_steps",
    Annotated[int, Field(ge=1, le=20)],
    "1 to 20",
    "Steps of the iteration that orthogonalises.",
)
SINKHORN_STEPS = Key(
    "sinkhorn_steps",
    Annotated[int, Field(ge=1, le=20)],
    "1 to 20",
    "How often rows and columns are normalised.",
)
# of classes
SPLIT = Key(
    "split",
    tuple[Annotated[int, Field(ge=1)], ...],
    "rows, such as (4096, 1024, 1024)",
    "Rows of each of the matrices that are fused in one parameter, such as query, key and value; () to "
    "orthogonalise it as one. For the param group of such parameters.",
)
TIED = Key(
    "tied", bool, "True or False", "Whether the embedding is also the head; it is then updated as a head."
)

# ---- optimizers

_OPTIMIZERS = (
    Definition(
        name="adamw",
        about="AdamW (arXiv 1711.05101)",
        lr=1e-3,
        kinds=EVERYTHING,
    ),
    Definition(
        name="adamw8bit",
        about="AdamW with memory.moments = int8",
        lr=1e-3,
        kinds=EVERYTHING,
        moments="int8",
    ),
    Definition(
        name="adam-mini",
        about="one second moment for each head, row or norm (arXiv 2406.16793)",
        lr=1e-3,
        kinds=EVERYTHING,
    ),
    Definition(
        name="apollo",
        about="Adam's scaling per channel, from a low-rank projection (arXiv 2412.05270)",
        lr=1e-2,
        eps=1e-6,
        limiter=GROWTH,
        keys={RANK: None, SCALE: 1.0, REFRESH_EVERY: 200, SCALE_FRONT: False, PROJECTION: "random"},
        limits_itself=True,
        class_name="Apollo",
    ),
    Definition(
        name="apollo-mini",
        about="APOLLO with rank 1 and one factor for the whole matrix; its state is two vectors and a norm",
        lr=1e-2,
        eps=1e-6,
        limiter=GROWTH,
        keys={RANK: 1, SCALE: 128.0, REFRESH_EVERY: 200, SCALE_FRONT: False, PROJECTION: "random"},
        limits_itself=True,
        class_name="ApolloMini",
    ),
    Definition(
        name="galore",
        about="Adam in the space of the gradient's first singular vectors (arXiv 2403.03507)",
        lr=1e-2,
        eps=1e-6,
        keys={RANK: None, SCALE: 0.25, REFRESH_EVERY: 200},
        class_name="GaLore",
    ),
    Definition(
        name="fira",
        about="GaLore, plus the rest of the gradient scaled as in APOLLO (arXiv 2410.01623)",
        lr=1e-2,
        eps=1e-6,
        limiter=GROWTH,
        keys={RANK: None, SCALE: 0.25, REFRESH_EVERY: 200},
        limits_itself=True,
        class_name="Fira",
    ),
    Definition(
        name="sgd",
        about="SGD with momentum betas[0]; with 0 it has no momentum and no state (Polyak, 1964)",
        lr=0.1,
        reads=("betas",),
        kinds=EVERYTHING,
    ),
    Definition(
        name="scale",
        about="gradients normalised per row, with momentum in the head only (arXiv 2506.16659)",
        lr=1e-3,
        class_keys={TIED: False},
        kinds=WITHOUT_NORMS,
        norm_lr=1e-3,
        class_name="Scale",
    ),
    Definition(
        name="muon",
        about="orthogonalised momentum at AdamW's rates (arXiv 2502.16982)",
        lr=1e-3,
        betas=(0.95, 0.999),
        keys={NEWTON_SCHULZ_STEPS: 5},
        class_keys={SPLIT: None},
        reads=("betas",),
        adamw_betas=(0.9, 0.999),
        adamw_eps=1e-8,
        class_name="Muon",
    ),
    Definition(
        name="sinkgd",
        about="rows and columns of the gradient normalised in turns, no state (arXiv 2502.06742)",
        lr=1e-3,
        keys={SINKHORN_STEPS: 5},
        reads=(),
        adamw_betas=(0.9, 0.999),
        adamw_eps=1e-8,
        class_name="SinkGD",
    ),
    Definition(
        name="racs",
        about="gradients scaled by running sizes of their rows and columns (arXiv 2502.07752)",
        lr=1e-3,
        betas=(0.0, 0.9),
        limiter=GROWTH,
        adamw_betas=(0.9, 0.999),
        limits_itself=True,
        class_name="RACS",
    ),
)
RULES = {found.name: found for found in _OPTIMIZERS}
# every key that only some optimizers read, by name
KEYS = {key.name: key for found in _OPTIMIZERS for key in found.keys}
