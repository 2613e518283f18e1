"""Cross-entropy of logits and its gradient in one pass, in place. Arithmetic is fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from lowres.kernels import native
from lowres.kernels.forms import NATIVE, PLAIN, TRITON, form_of


def cross_entropy(logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
    """The loss of each target, fp64 [tokens], from logits [tokens, V] in fp32 or bf16, which may be
    overwritten.

    targets: int64 [tokens]; a negative one does not count, its loss is 0. With a weight, the logits become
    the gradient of weight times the sum of the losses.
    """
    form = form_of(logits)
    losses = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    if form == NATIVE:
        name = f"cross_entropy_{native.suffix(logits.dtype)}"
        how = int(weight is not None), float(weight or 0)
        native.call(name, logits, targets.contiguous(), losses, *how, *logits.shape)
    elif form == TRITON:
        from lowres.kernels.gpu import loss

        loss.cross_entropy(logits, targets, losses, weight)
    elif form == PLAIN:
        counts, index = (targets >= 0).unsqueeze(1), targets.clamp_min(0).unsqueeze(1)
        logs = logits.float().log_softmax(1)
        losses = (-logs.gather(1, index)).masked_fill(~counts, 0.0).double().squeeze(1)
        if weight is not None:
            gradient = logs.exp().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
            logits.copy_(gradient.mul_(weight).masked_fill_(~counts, 0.0))
    return losses
