"""The norm-growth limiter (Chen et al., arXiv 2410.01623): it bounds how fast the norm of updates may grow.

    U <- U / max(1, ||U|| / (growth * ||last U that was accepted||))

So a spike in the gradient becomes an update of ordinary size, without the global norm that a layer-major
step does not have. APOLLO and Fira limit the part that their papers limit; for every other rule the whole
update is limited (`lowres.optim.Optimizer`). It stores one norm per tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.rules import lowrank
from lowres.rules.base import UPDATE_NORM, State
from lowres.storage import Fields

# how fast the remembered norm may fall per step: otherwise one tiny gradient would keep the updates small
# for a thousand steps, because growth is limited to 1 % per step
SLOWEST_FALL = 0.5
NORM_FIELDS: Fields = {UPDATE_NORM: (torch.float32, ())}


def limit(norms: Tensor, states: list[State], accepted: Tensor, growth: float) -> Tensor:
    """By what to divide updates of these norms [k]; stores the norms after division. growth: at least 1.

    Only accepted norms are stored, in `state["norm"]`. A gradient of zero does not change it. The first
    norm is stored and not limited.
    """
    kept = [state[UPDATE_NORM] for state in states]
    last = torch.stack(kept)
    excess = torch.where(last > 0, (norms / (last + 1e-8)).clamp(min=growth) / growth, 1.0)
    new = torch.maximum(norms / excess, last * SLOWEST_FALL)
    torch._foreach_copy_(kept, list(torch.where(accepted & (norms > 0), new, last).unbind()))
    return excess


def limited(
    directions: list[Tensor], factors: list[Tensor], states: list[State], accepted: Tensor, growth: float
) -> list[Tensor]:
    """Factors with which factor * direction stays within `growth`; shapes as in `base.Rule.directions`."""
    norms = torch.stack([update_norm(d, f) for d, f in zip(directions, factors, strict=True)])
    excess = limit(norms, states, accepted, growth)
    return [factor / e for factor, e in zip(factors, excess.unbind(), strict=True)]


def update_norm(direction: Tensor, factor: Tensor) -> Tensor:
    """Norm of factor * direction, a scalar, without a second tensor of its size."""
    if factor.dim() == 0:
        return lowrank.norms([direction])[0] * factor
    axis = 1 if factor.shape[1] == 1 else 0  # a factor for each row or for each column
    return (torch.linalg.vector_norm(direction, dim=axis, keepdim=True) * factor).norm()
