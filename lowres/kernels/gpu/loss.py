"""Cross-entropy and its gradient. A row is read once for the loss and once more for the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowres.kernels.gpu.common import block_of, launch, warps_of


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, weights: Tensor | None) -> None:
    """losses: fp64 [tokens], weights: fp32 [tokens]: one for each row."""
    assert logits.is_contiguous()
    rows, n = logits.shape
    block = block_of(n, 4096)
    launch(
        *(_cross_entropy, (rows,), logits, targets.contiguous(), losses),
        *(losses if weights is None else weights, n, weights is not None, block),
        warps=warps_of(block),
    )


@triton.jit
def _cross_entropy(logits, targets, losses, weights, n, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * n
    target = tl.load(targets + row)
    counts = target >= 0
    # a target beyond the vocabulary gives a loss of NaN instead of whatever lies there
    picked = tl.load(logits + target, mask=counts & (target < n), other=float("nan")).to(tl.float32)
    # every lane has a largest value and a sum of its own; finite, so that no difference is inf - inf
    top = tl.full([BLOCK], -3e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        wide = tl.load(logits + columns, mask=columns < n, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, wide)
        total = total * tl.exp(top - higher) + tl.exp(wide - higher)
        top = higher
    # NaN and inf in a row make its sum NaN: inf - inf
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - highest), 0)
    loss = tl.where(counts, tl.log(total) - (picked - highest), 0.0)
    tl.store(losses + row, loss.to(tl.float64))
    if GRADIENT:
        weight = tl.load(weights + row)
        factor = weight / total
        own = target.to(tl.int32)
        for start in range(0, n, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < n
            wide = tl.load(logits + columns, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(wide - highest) * factor
            gradient = tl.where(columns == own, gradient - weight, gradient)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=mask)
