"""How long a planned step will take: its work divided by the machine's rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowres.config import Config
from lowres.memory import Plan
from lowres.probe.rates import Rates
from lowres.probe.work import (
    backward_passes,
    dequantised_elements,
    flops_per_token,
    step_bytes,
    step_flops,
    update_flops,
)
from lowres.storage import compute_dtype

SECONDS_A_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A planned step at measured rates."""

    gflops_per_token: float
    to_gpu_gb: float  # moved in a step, 10^9 bytes
    to_host_gb: float
    products_s: float  # seconds of a step; compute_s is the sum of these four
    beside_products_s: float
    dequantise_s: float
    update_s: float
    update_products_s: float  # of update_s, matrix products
    compute_s: float
    transfer_s: float
    step_s: float
    limit: str  # compute or transfers
    tokens_per_s: float
    days_to_target: float
    days_per_billion_tokens: float


def predict(config: Config, plan: Plan, rates: Rates, device: torch.device) -> Prediction:
    """Seconds of a step, with as many windows as it can have. On CUDA, computation and the transfers in both
    directions run in parallel; on a CPU, transfers are copies that take time of their own."""
    tokens, model = config.most_windows * config.data.seq_len, config.model
    engine = config.memory.engine
    compute = compute_dtype(config.memory.activations_in, device)
    passes = backward_passes(config)
    flops = flops_per_token(model, config.data.seq_len, plan.choice.band, engine, passes)
    head_backward = passes * 4 * model.vocab * model.dim
    forward = flops["forward"] + flops["recomputation"] + flops["head"] - head_backward
    backward = flops["backward"] + head_backward
    products = tokens * (
        forward / (rates.products_tflops * 1e12) + backward / (rates.backward_products_tflops * 1e12)
    )
    block_us = rates.block_forward_us + passes * rates.block_backward_us
    beside_products = tokens * (model.n_layers * block_us + passes * rates.loss_us) / 1e6
    dequantise = (
        dequantised_elements(config, compute) / (rates.dequantise_g_s * 1e9) if rates.dequantise_g_s else 0.0
    )
    update_products = (
        update_flops(config) / (rates.update_products_tflops * 1e12) if rates.update_products_tflops else 0.0
    )
    update = plan.parameters / (rates.update_g_s * 1e9) + update_products
    compute_s = products + beside_products + dequantise + update

    # boundaries have the compute format of the planned device, which may not be in this machine
    planned_for = torch.device("cuda" if config.run.device == "cuda" else device.type)
    fetched, stored = step_bytes(config, plan, compute_dtype(config.memory.activations_in, planned_for))
    directions = fetched / (rates.to_gpu_gb_s * 1e9), stored / (rates.to_host_gb_s * 1e9)
    transfer_s = max(directions) if device.type == "cuda" else sum(directions)
    step_s = max(compute_s, transfer_s) if device.type == "cuda" else compute_s + transfer_s
    return Prediction(
        gflops_per_token=step_flops(config, plan) / tokens / 1e9,
        to_gpu_gb=fetched / 1e9,
        to_host_gb=stored / 1e9,
        products_s=products,
        beside_products_s=beside_products,
        dequantise_s=dequantise,
        update_s=update,
        update_products_s=update_products,
        compute_s=compute_s,
        transfer_s=transfer_s,
        step_s=step_s,
        limit="compute" if compute_s >= transfer_s else "transfers",
        tokens_per_s=tokens / step_s,
        days_to_target=config.train.total_steps * step_s / SECONDS_A_DAY,
        days_per_billion_tokens=1e9 / tokens * step_s / SECONDS_A_DAY,
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Rates, the prediction for a run, and notes on how they were measured."""

    rates: Rates
    prediction: Prediction
    target_tokens: int
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For `lowres plan --probe --json`."""
        return {
            **asdict(self.rates),
            **asdict(self.prediction),
            "target_tokens": self.target_tokens,
            "notes": self.notes,
        }

    def table(self) -> str:
        """For people."""
        r, p = self.rates, self.prediction
        dequantised = f"{r.dequantise_g_s:.3g}" if r.dequantise_g_s else "no"
        products_rate = products_time = ""
        if r.update_products_tflops:
            products_rate = f"; products of updates {r.update_products_tflops:.3g} TFLOPS"
            products_time = f" (of them products {p.update_products_s:.3g} s)"
        return "\n".join(
            [
                *(f"note: {note}" for note in self.notes),
                f"{r.device}: {r.compute} products {r.products_tflops:.3g} TFLOPS, backward "
                f"{r.backward_products_tflops:.3g}; other work {r.block_forward_us:.3g} and "
                f"{r.block_backward_us:.3g} us per token and block, loss {r.loss_us:.3g} us per token",
                f"copies to the GPU {r.to_gpu_gb_s:.3g} GB/s, to the host {r.to_host_gb_s:.3g} GB/s; "
                f"{dequantised} G elements/s dequantised, {r.update_g_s:.3g} updated{products_rate}",
                f"a step: {p.gflops_per_token:.3g} GFLOPs per token; products {p.products_s:.3g} s, other "
                f"work {p.beside_products_s:.3g} s, dequantising {p.dequantise_s:.3g} s, updates "
                f"{p.update_s:.3g} s{products_time}: compute {p.compute_s:.3g} s",
                f"transfers {p.to_gpu_gb:.3g} GB to the GPU, {p.to_host_gb:.3g} GB to the host: "
                f"{p.transfer_s:.3g} s; {p.limit} {'limits' if p.limit == 'compute' else 'limit'} the step",
                f"predicted: {p.tokens_per_s:,.4g} tokens/s, {p.days_to_target:,.3g} days for "
                f"{self.target_tokens:,} tokens, {p.days_per_billion_tokens:,.3g} days per billion tokens",
            ]
        )
