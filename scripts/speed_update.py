"""How long the update of a layer takes: ours on INT8 weights, with compiled kernels and with PyTorch's
operations, against torch.optim.AdamW(fused=True) on fp32 tensors of the same shapes. They take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import comparison
import torch
from torch import Tensor

from lowres import rng
from lowres.config import ModelConfig
from lowres.config_file import parse_config
from lowres.kernels import forms
from lowres.model import empty_units
from lowres.optim import make_optimizer
from lowres.rooms import Rooms
from lowres.storage import MATRIX

LR = 1e-4
UPDATE, APPLY, ADAMW = "optimizer.update", "storage.apply", "torch AdamW"
PLAIN = "PyTorch's operations: "  # what there is without compiled kernels


def measure(
    pairs: int,
    preset: str = "7b",
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Medians over turns, and ratios to AdamW of the same turn."""
    works = works_of(preset, device or torch.device("cpu"))
    times: dict[str, list[float]] = {name: [] for name in works}
    with torch.no_grad():
        for turn in range(-2, pairs):
            for name, (prepare, work) in works.items():
                prepare()
                began = clock()
                work()
                if turn >= 0:
                    times[name].append(clock() - began)
    found: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        ratios = [mine / other for mine, other in zip(own, times[ADAMW], strict=True)]
        found[name] = {
            "ms": 1e3 * statistics.median(own),
            "spread_ms": [1e3 * min(own), 1e3 * max(own)],
            "time_over_adamw": statistics.median(ratios),
            "spread_time_over_adamw": [min(ratios), max(ratios)],
        }
    head = [f"update of a {preset} layer", "ms", "fastest to slowest", "time / AdamW"]
    rows = [
        [
            name,
            f"{own['ms']:,.0f}",
            f"{own['spread_ms'][0]:,.0f} to {own['spread_ms'][1]:,.0f}",
            f"{own['time_over_adamw']:.2f}",
        ]
        for name, own in found.items()
    ]
    return {"preset": preset, "pairs": pairs, "updates": found, "table": comparison.markdown(head, rows)}


Work = Callable[[], object]


def works_of(preset: str, device: torch.device) -> dict[str, tuple[Work, Work]]:
    """By name: what is done before a turn, and what is timed. `storage.apply` is a part of
    `optimizer.update`: rounding the changes of all matrices into INT8."""
    model = ModelConfig.model_validate({"preset": preset, "n_layers": 1, "vocab_size": 2})
    config, _ = parse_config(
        {"model": model.model_dump(), "optim": {"name": "apollo-mini"}, "memory": {"weights": "int8"}}
    )
    rooms = Rooms(device)
    unit = empty_units(config.model, "int8", "bf16", rooms)["layers.0"]
    for tensor in unit.weight_tensors().values():  # any values: drawing real ones takes a minute
        tensor.random_(-64, 65) if tensor.dtype == torch.int8 else tensor.fill_(1e-3)
    optimizer = make_optimizer(config)
    optimizer.attach([unit], rooms)
    grads = {spec.name: torch.randn(spec.shape, device=device) * 1e-3 for spec in unit.spec.tensors}
    kept = {name: grad.clone() for name, grad in grads.items()}  # the rule overwrites its gradients
    accepted = torch.ones((), dtype=torch.bool, device=device)
    parameters = []
    for name, grad in kept.items():
        parameters.append(torch.nn.Parameter(unit.weights[name].dense(torch.float32)))
        parameters[-1].grad = grad
    adamw = torch.optim.AdamW(parameters, lr=LR, fused=True)
    matrices = [spec for spec in unit.spec.tensors if spec.kind == MATRIX]
    factor, done = torch.tensor(LR, device=device), 0

    def restore() -> None:
        for name, grad in grads.items():
            grad.copy_(kept[name])

    def update() -> None:
        nonlocal done
        optimizer.update(unit, grads, done, LR, accepted)
        done += 1

    def apply() -> None:
        for spec in matrices:
            direction: Tensor = grads[spec.name]
            unit.weights[spec.name].apply(direction, factor, None, rng.make_key(0, "bench", spec.name, done))

    def prepared(compiled: bool) -> Work:
        def prepare() -> None:
            restore()
            if compiled:
                forms.enable(device.type)
            else:
                forms.disable(device.type)

        return prepare

    return {
        UPDATE: (prepared(True), update),
        APPLY: (prepared(True), apply),
        PLAIN + UPDATE: (prepared(False), update),
        PLAIN + APPLY: (prepared(False), apply),
        ADAMW: (lambda: None, adamw.step),
    }
