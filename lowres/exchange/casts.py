"""Weights on their way into another number format: checked, and what it costs measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowres.errors import UserError
from lowres.storage import all_finite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# a cast that costs more than this part of the change by adapters hides a good deal of it
_HIDES = 0.1


@dataclass
class _Sums:
    """Of a matrix: the squared norms of its values and of what a cast changes."""

    values: float = 0.0
    errors: float = 0.0

    @property
    def relative(self) -> float:
        return (self.errors / self.values) ** 0.5 if self.values else 0.0


@dataclass
class Cast:
    """A cast of all weights of a model to `dtype`, a name of DTYPES. merged: squared norm of what adapters
    have added to the weights."""

    dtype: str
    merged: float = 0.0
    _matrices: dict[str, _Sums] = field(default_factory=dict)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """fp32 rows of a weight in the format, rounded to nearest. Raises UserError if a number is not finite
        or too large for the format."""
        cast = rows.to(DTYPES[self.dtype])
        if not all_finite([cast]):
            if not all_finite([rows]):
                raise UserError(f"{name}: has a number that is not finite; use another checkpoint or folder")
            raise UserError(
                f"--dtype {self.dtype}: {float(rows.abs().max()):g} in {name} is too large for this format; "
                f"use {'bf16 or fp32' if self.dtype == 'fp16' else 'fp32'}"
            )
        if rows.dim() > 1:
            sums = self._matrices.setdefault(name, _Sums())
            sums.values += _squared(rows)
            if cast.dtype != rows.dtype:
                sums.errors += _squared(cast.float().sub_(rows))
        return cast

    def lines(self) -> list[str]:
        """What the cast costs, for the user; nothing if it changes nothing."""
        total = _Sums(
            sum(sums.values for sums in self._matrices.values()),
            sum(sums.errors for sums in self._matrices.values()),
        )
        if not total.errors:
            return []
        worst = max(self._matrices, key=lambda name: self._matrices[name].relative)
        found = [
            f"{self.dtype} changes the matrices by {total.relative:.2g} of their norm, at most "
            f"{self._matrices[worst].relative:.2g} ({worst})"
        ]
        if self.merged and total.errors > _HIDES**2 * self.merged:
            found.append(
                f"the change by the adapters is {(self.merged / total.values) ** 0.5:.2g} of it; "
                "--dtype fp32 keeps all of it"
            )
        return found


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
