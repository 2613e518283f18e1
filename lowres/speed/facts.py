"""What a run notes about its machine and its work, so that its speed can be judged later, elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from lowres.config import Config
from lowres.probe.rates import device_name
from lowres.probe.work import model_flops_per_token
from lowres.speed.peak import DTYPES, gemm_peak
from lowres.speed.subject import products_in
from lowres.target import CUDA

# side of the measured product: it takes 0.1 GiB and some milliseconds, and a run has not begun to use memory
SIDE = 4096


def facts(config: Config, device: torch.device) -> dict[str, Any]:
    """device: its name. products_in: number format of the matrix products. model_flops_per_token.
    peak_tflops: of the fastest product of this GPU, see `gemm_peak`; None on a CPU, where it takes long."""
    form, peak = products_in(config, device), None
    if device.type == CUDA:
        peak = gemm_peak(DTYPES[form], device, SIDE)
        torch.cuda.empty_cache()
    return {
        "device": device_name(device),
        "products_in": form,
        "model_flops_per_token": model_flops_per_token(config.model, config.data.seq_len),
        "peak_tflops": peak,
    }
