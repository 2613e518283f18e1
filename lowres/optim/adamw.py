"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in `torch.optim.AdamW`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.optim.base import Clock, State
from lowres.storage import TensorSpec


class AdamW:
    """Both moments element by element: 8 bytes of state a parameter."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def directions(
        self, specs: list[TensorSpec], grads: list[Tensor], states: list[State], lr: float, clock: Clock
    ) -> list[Tensor]:
        weight1, weight2 = clock.moment_weights(self.betas)
        correction1, correction2 = clock.bias_corrections(self.betas)
        for grad, state in zip(grads, states, strict=True):
            state["exp_avg"].lerp_(grad, weight1)
            state["exp_avg_sq"].lerp_(grad.square_(), weight2)
            # the gradient's memory becomes the denominator, then the direction
            torch.div(state["exp_avg_sq"], correction2, out=grad).sqrt_().add_(self.eps)
            torch.div(state["exp_avg"], grad, out=grad)
        return [lr / correction1 * clock.accepted] * len(grads)
