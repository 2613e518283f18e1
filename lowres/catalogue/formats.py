"""The number formats of weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """A number format that `memory.weights` can name.

    about: one sentence for help and docs. exact: an update is stored without rounding. any_shape: also for
    embedding, head and 1-D tensors; otherwise only for the matrices of the blocks.
    """

    name: str
    about: str
    exact: bool = False
    any_shape: bool = False


_FORMATS = (
    WeightFormat("fp32", "4 bytes per parameter, exact updates", exact=True, any_shape=True),
    WeightFormat("bf16", "2 bytes, updates computed in fp32 and rounded stochastically", any_shape=True),
    WeightFormat(
        "int8",
        "codes with one scale per row, 1.001 to 1.008 bytes per parameter; only the change is rounded, "
        "stochastically",
    ),
)
WEIGHT_FORMATS = {found.name: found for found in _FORMATS}
