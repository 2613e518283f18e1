"""Helpers for the tests of rules: an update rule on one weight, and the `torch.optim` classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowres.optim import AdamMini
from lowres.optim.torch_optim import RuleOptimizer
from lowres.rules.base import Clock, Rule, State
from lowres.storage import Dense, TensorSpec

BETAS = (0.9, 0.999)
Make = Callable[..., RuleOptimizer]
SHAPE: dict[str, Any] = {"dim": 64, "n_heads": 4, "n_kv_heads": 2}


def adam_mini(params: Any, **more: Any) -> AdamMini:
    return AdamMini(params, **(SHAPE | more))


def spec_of(shape: tuple[int, ...], role: str = "up") -> TensorSpec:
    return TensorSpec("w", shape, role)


def new_state(rule: Rule, spec: TensorSpec) -> State:
    return {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in rule.state_fields(spec).items()}


def state_bytes(rule: Rule, spec: TensorSpec) -> int:
    """Bytes of state, counted without allocating it."""
    return sum(d.itemsize * torch.Size(s).numel() for d, s in rule.state_fields(spec).values())


class Waits(TorchDispatchMode):
    """Counts operations whose result the host reads; for these it would wait for a GPU."""

    count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and the default calls torch._dynamo for every operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def random_grads(shape: tuple[int, ...], steps: int = 20, scale: float = 1e-3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) * scale * (1 + 0.5 * (i % 3)) for i in range(steps)]


def run_rule(
    rule: Rule,
    start: Tensor,
    grads: list[Tensor],
    lr: float,
    decay: float = 0.0,
    bad: tuple[int, ...] = (),
    role: str = "up",
) -> tuple[Tensor, State, list[float]]:
    """Apply a rule to an fp32 weight. Returns the weight, the state, and the norm of every change."""
    spec = spec_of(tuple(start.shape), role)
    kept = Dense(start.clone())
    state = new_state(rule, spec)
    updates = torch.zeros((), dtype=torch.int64)
    changes = []
    for step, grad in enumerate(grads):
        accepted = torch.tensor(step not in bad)
        updates += accepted
        before = kept.value.clone()
        direction = grad.clone() * accepted
        clock = Clock(step, updates, accepted, 0)
        (factor,) = rule.directions([spec], [direction], [state], lr, clock)
        kept.apply(direction, factor, torch.tensor(lr * decay) if decay else None, (0, 0))
        changes.append(float((kept.value - before).norm()))
    return kept.value, state, changes
