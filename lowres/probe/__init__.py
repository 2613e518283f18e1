"""Predicts how fast a run will be: measures rates for a few seconds, and divides the work of a planned step
by them.

work        the work of a step, counted: operations, elements, bytes
rates       the rates of this machine, measured
prediction  work divided by rates
fastest     which number format of products is fastest here

Not included: reading the batch, the embedding lookup, evaluation and checkpoints.
"""

from __future__ import annotations

import torch

from lowres.config import Config
from lowres.device import pick_device, use_kernels
from lowres.errors import UserError
from lowres.memory import Plan
from lowres.probe.fastest import choose
from lowres.probe.prediction import Prediction, Probe, predict
from lowres.probe.rates import Rates, measure
from lowres.probe.work import (
    dequantised_elements,
    flops_per_token,
    model_flops_per_token,
    step_bytes,
    step_flops,
    update_flops,
)

__all__ = [
    "Prediction",
    "Probe",
    "Rates",
    "dequantised_elements",
    "flops_per_token",
    "measure",
    "model_flops_per_token",
    "predict",
    "probe",
    "step_bytes",
    "step_flops",
    "update_flops",
]


def probe(config: Config, plan: Plan) -> Probe:
    """Measure the device that the run would use, or the CPU if it has none, and predict."""
    if config.memory.engine == "deepspeed":
        raise UserError(
            "--probe: measures the layer-major step; leave it out, or set memory.engine=layerwise"
        )
    missing = config.run.device == "cuda" and not torch.cuda.is_available()
    device = torch.device("cpu") if missing else pick_device(config)
    note = ""
    if missing:
        note = "there is no CUDA device here: rates and prediction are for this CPU"
    config, chosen = choose(config, device)
    notes = [note] if note else []
    notes += chosen + use_kernels(config, device)
    if config.train.epochs is not None:
        notes.append(
            f"train.epochs: the length of the data is not known here, so times are for "
            f"{config.train.total_steps:,} steps"
        )
    if config.objective.name != "pretrain":
        notes.append("objective.name: without padding, and with as many tokens as a step can have")
    rates = measure(config, plan, device)
    target = config.train.total_steps * config.train.batch_tokens
    prediction = predict(config, plan, rates, device)
    return Probe(rates=rates, prediction=prediction, target_tokens=target, notes=notes)
