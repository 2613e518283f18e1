"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982): the momentum of a matrix, orthogonalised.

    M <- beta1 M + (1 - beta1) G,  U = (1 - beta1) G + beta1 M         (Nesterov's momentum)
    W <- W - lr 0.2 sqrt(max(m, n)) NewtonSchulz(U)

Newton-Schulz moves all singular values of U to about 1. The factor gives an update the RMS of AdamW's, so
AdamW's learning rate carries over. The arithmetic is that of `torch.optim.Muon` with `match_rms_adamw`, but
not in bf16: Newton-Schulz also lifts the rounding errors of a gradient, and where its rank is low, as with
few tokens, they become a large part of the update. Products are fp16 on CUDA, with an eighth of the error in
as many bytes, and fp32 on a CPU. State: one number per parameter; linear int8 is enough for it (arXiv
2509.23106). Written from the papers.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lowres.rules.base import MOMENTUM, Betas, Clock, Rule, State
from lowres.rules.moments import average_, moment_fields
from lowres.rules.registry import Settings, makes
from lowres.storage import Fields, TensorSpec
from lowres.target import chunks, kind_of

# of the polynomial a x + b x^3 + c x^5, whose slope at 0 is large: it moves small singular values in few
# steps, and leaves all of them between about 0.7 and 1.2
A, B, C = 3.4445, -4.775, 2.0315
LEAST_NORM = 1e-7
# What is multiplied is this many times as large: a large matrix of norm 1 has elements that fp16 would keep
# with few digits. A power of two changes no other digit, and squares of what is at most 64 fit into fp16.
ENLARGED = 64.0
RMS_OF_ADAMW = 0.2


class MuonRule(Rule):
    """4, 2 or about 1 byte of state per parameter."""

    moments: ClassVar = {MOMENTUM: True}

    def __init__(
        self, betas: Betas, moments: str = "fp32", steps: int = 5, split: tuple[int, ...] | None = None
    ) -> None:
        """split: rows of the matrices that are fused in every tensor, such as query, key and value."""
        self.betas, self.kept_in, self.steps, self.split = betas, moments, steps, split
        self._rehearsed: set[tuple[int, ...]] = set()

    def state_fields(self, spec: TensorSpec) -> Fields:
        return moment_fields(MOMENTUM, spec.shape, self.kept_in, linear=True)

    def product_flops(self, spec: TensorSpec) -> int:
        rows = self.split or spec.shape[:1]
        return sum(orthogonalisation_flops(m, spec.shape[1], self.steps) for m in rows)

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        factors = []
        for spec, grad, state in zip(specs, grads, states, strict=True):
            average_(grad, spec, MOMENTUM, state, clock, self.betas, nesterov=True)
            sizes = [math.sqrt(max(rows, spec.shape[1])) for rows in self.split or spec.shape[:1]]
            for part, size in zip(grad.split(self.split or spec.shape[0]), sizes, strict=True):
                if not (clock.rehearsal and spec.shape in self._rehearsed):
                    orthogonalise_(part, self.steps)
                if self.split:
                    part.mul_(size)
            factors.append(lr * RMS_OF_ADAMW * (1.0 if self.split else sizes[0]) * clock.accepted.float())
            if clock.rehearsal:
                self._rehearsed.add(spec.shape)
        return factors


def orthogonalise_(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> None:
    """Replace a matrix [m, n] by about U V^T of its singular value decomposition U S V^T; zero stays zero.

    dtype: of the products, by default fp16 on CUDA, otherwise that of the matrix. Takes memory for a copy of
    the matrix and three squares of its smaller side, in this dtype.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if dtype is None:
        dtype = torch.float16 if kind_of(matrix.device) == "cuda" else matrix.dtype
    # its spectral norm is then at most ENLARGED, so that nothing overflows in fp16
    x = torch.empty_like(wide, dtype=dtype)
    torch.div(wide, torch.linalg.vector_norm(matrix).clamp(min=LEAST_NORM) / ENLARGED, out=x)
    # columns are independent of each other
    parts = chunks(x.shape[1], x.shape[0])
    for _ in range(steps):
        square = x @ x.T
        step = torch.addmm(square, square, square, beta=B / ENLARGED**2, alpha=C / ENLARGED**4)
        for part in parts:
            x[:, part] = torch.addmm(x[:, part], step, x[:, part], beta=A)
    wide.copy_(x).div_(ENLARGED)


def orthogonalisation_flops(m: int, n: int, steps: int = 5) -> int:
    """Floating-point operations of the products of `orthogonalise_` for a matrix [m, n]."""
    side, length = min(m, n), max(m, n)
    return steps * (4 * side * side * length + 2 * side**3)


@makes("muon")
def _make(settings: Settings) -> MuonRule:
    steps, split = settings.keys["newton_schulz_steps"], settings.keys.get("split")
    return MuonRule(settings.betas, settings.moments, steps, split or None)
