"""A table of how the optimizer treats every tensor of a model, for `lowres plan --optimizer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lowres.optim.optimizer import Optimizer
from lowres.storage import TensorSpec, field_bytes

GIB = 1 << 30
KIND = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "int8", torch.int8: "int8"}


def overview(optimizer: Optimizer, specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """One row per role of a model's tensors, in their order.

    lr: the peak learning rate; 0 for frozen tensors. state_bytes: of one tensor, with alignment in the slab.
    product_flops: as in `Rule.product_flops`, of one tensor.
    """
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for spec in specs:
        group = optimizer.group_of(spec)
        new = {
            "role": spec.role,
            "tensors": 0,
            "shape": list(spec.shape),
            "optimizer": "frozen" if spec.frozen else group.name,
            "lr": 0.0 if spec.frozen else group.lr,
            "weight_decay": 0.0 if spec.frozen else group.weight_decay,
            "state": _state(optimizer, spec),
            "state_bytes": sum(field_bytes(optimizer.state_fields(spec)).values()),
            "product_flops": optimizer.product_flops(spec),
        }
        rows.setdefault((spec.role, spec.shape), new)["tensors"] += 1
    return list(rows.values())


def table(rows: list[dict[str, Any]], step_flops: int) -> str:
    """The rows as a text table, with a line for all of them. step_flops: operations of a whole step."""
    head = ["role", "tensors", "shape", "optimizer", "peak lr", "decay", "bytes each", "state"]
    cells = [
        [
            row["role"],
            str(row["tensors"]),
            str(row["shape"]),
            row["optimizer"],
            f"{row['lr']:.4g}",
            f"{row['weight_decay']:.4g}",
            f"{row['state_bytes']:,}",
            row["state"],
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    words = (0, 2, 3, 7)  # the columns that are not numbers
    lines = [
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *cells]
    ]
    return "\n".join([*lines, _in_all(rows, step_flops)])


def _in_all(rows: list[dict[str, Any]], step_flops: int) -> str:
    state, flops = (
        sum(row["tensors"] * row[key] for row in rows) for key in ("state_bytes", "product_flops")
    )
    text = f"in all: {state / GIB:.3g} GiB of state"
    if flops:
        text += (
            f"; matrix products of the updates: {flops / 1e12:.3g} TFLOP, {flops / step_flops:.1%} of the "
            "operations of a step"
        )
    return text


def _state(optimizer: Optimizer, spec: TensorSpec) -> str:
    """A tensor's state in words: a number format for state of the tensor's shape, otherwise the state's shape
    or the rule's own description."""
    words = {} if spec.frozen else optimizer.group_of(spec).rule.describe(spec)
    parts = []
    for key, (dtype, shape) in optimizer.state_fields(spec).items():
        if key in words:
            parts.append(words[key])
        elif shape == spec.shape:
            parts.append(f"{key} {KIND.get(dtype, str(dtype).removeprefix('torch.'))}")
        elif not key.endswith(".absmax"):  # these are part of an int8 moment
            parts.append(f"{key} {list(shape)}" if shape else key)
    return ", ".join([*parts, *([words[""]] if "" in words else [])]) or "none"
