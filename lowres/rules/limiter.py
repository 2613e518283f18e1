"""The norm-growth limiter (Chen et al., arXiv 2410.01623): an update may grow in norm by a factor at most.

    U <- U / max(1, ||U|| / (growth * ||last U that was accepted||))

So a spike in the gradient passes as an ordinary update, without the global norm that a layer-major step
does not have. APOLLO and Fira limit inside what the papers limit; every other rule is limited as a whole
(`lowres.optim.Optimizer`). Memory is one norm a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.rules import lowrank
from lowres.rules.base import NORM, State
from lowres.storage import Fields

GROWTH = 1.01  # the published gamma
# how fast the limiter's memory may fall: one tiny gradient would else hold the updates down for a
# thousand steps, as growth is limited to 1 % a step
SLOWEST_FALL = 0.5
NORM_FIELDS: Fields = {NORM: (torch.float32, ())}


def limit(norms: Tensor, states: list[State], accepted: Tensor, growth: float) -> Tensor:
    """What to divide updates of these norms [k] by; remembers what is left. growth: at least 1.

    Only accepted norms enter its memory, `state["norm"]`. A gradient of zero leaves it alone. The first
    norm is only remembered.
    """
    kept = [state[NORM] for state in states]
    last = torch.stack(kept)
    excess = torch.where(last > 0, (norms / (last + 1e-8)).clamp(min=growth) / growth, 1.0)
    new = torch.maximum(norms / excess, last * SLOWEST_FALL)
    torch._foreach_copy_(kept, list(torch.where(accepted & (norms > 0), new, last).unbind()))
    return excess


def limited(
    directions: list[Tensor], factors: list[Tensor], states: list[State], accepted: Tensor, growth: float
) -> list[Tensor]:
    """Factors that keep factor * direction within `growth`; shapes as a rule returns them (`base.Rule`)."""
    norms = torch.stack([_update_norm(d, f) for d, f in zip(directions, factors, strict=True)])
    excess = limit(norms, states, accepted, growth)
    return [factor / e for factor, e in zip(factors, excess.unbind(), strict=True)]


def _update_norm(direction: Tensor, factor: Tensor) -> Tensor:
    """Norm of factor * direction, a scalar, without a second tensor of its size."""
    if factor.dim() == 0:
        return lowrank.norms([direction])[0] * factor
    axis = 1 if factor.shape[1] == 1 else 0  # a factor for each row or for each column
    return (torch.linalg.vector_norm(direction, dim=axis, keepdim=True) * factor).norm()
