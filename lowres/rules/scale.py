"""SCALE (Glentis et al., arXiv 2506.16659): normalised gradients, and momentum only in the head.

    matrix     W <- W - lr G / RMS of each row of G
    embedding  the same with the RMS of each column, because a row is one token
    head       M <- beta1 M + (1 - beta1) G,  W <- W - lr M / RMS of each row of M

A row [n] of a matrix belongs to one output. The factors commute with storing, so no matrix is written, and a
matrix has no state at all. AdamW updates norms and biases. The paper's embedding and head are two tensors; a
tied one is treated as a head here, because most of its gradient is that of a head. Written from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowres.rules.base import MOMENTUM, Betas, Clock, Rule, State
from lowres.rules.moments import average_, moment_fields
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec

EMBEDDING, HEAD = "embedding", "head"  # roles


class ScaleRule(Rule):
    """4, 2 or about 1 byte of state per parameter of the head; none for other tensors."""

    moments: ClassVar = {MOMENTUM: True}

    def __init__(self, betas: Betas, eps: float, moments: str = "fp32", tied: bool = False) -> None:
        """eps: the least RMS to divide by. tied: the embedding is the head."""
        self.betas, self.eps, self.kept_in = betas, eps, moments
        self.heads = (EMBEDDING, HEAD) if tied else (HEAD,)

    def state_fields(self, spec: TensorSpec) -> Fields:
        if spec.role not in self.heads:
            return {}
        return moment_fields(MOMENTUM, spec.shape, self.kept_in, linear=True)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        rate, factors = lr * clock.accepted.float(), []
        for spec, grad, state in zip(specs, grads, states, strict=True):
            if spec.role in self.heads:
                average_(grad, spec, MOMENTUM, state, clock, self.betas)
            # which dimension the mean square is taken over
            axis = 0 if spec.role == EMBEDDING and EMBEDDING not in self.heads else 1
            norms = torch.linalg.vector_norm(grad, dim=axis, keepdim=True)
            factors.append(rate / (norms / grad.shape[axis] ** 0.5).clamp_(min=self.eps))
        return factors


@makes("scale")
def _make(settings: Settings) -> ScaleRule:
    return ScaleRule(settings.betas, settings.eps, settings.moments, bool(settings.keys["tied"]))
