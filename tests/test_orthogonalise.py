"""The iteration of Muon against its effect on singular values."""

from __future__ import annotations

import pytest
import torch

from lowres.rules.muon import orthogonalise_
from lowres.target import planned_for


def exact(matrix: torch.Tensor) -> torch.Tensor:
    """U f(S) V^T in fp64, where f is five times the polynomial, of singular values with a norm of 1."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


@pytest.mark.parametrize(("kind", "error"), [("cpu", 1e-4), ("cuda", 0.08)])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_a_gradient_of_low_rank_keeps_its_update(kind: str, error: float, shape: tuple[int, int]) -> None:
    # bf16 products, as in torch.optim.Muon, are off by 0.5 here: they lift rounding errors to new directions
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
    wanted = exact(matrix)
    with planned_for(kind):
        orthogonalise_(matrix)
    assert (matrix - wanted).norm() / wanted.norm() < error
