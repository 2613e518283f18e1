"""`lowres plan` and `bench`."""

from __future__ import annotations

import argparse
import json

import torch

from lowres import memory
from lowres.cli.configs import load
from lowres.config import Config
from lowres.device import pick_device
from lowres.errors import UserError
from lowres.exchange import open_model, with_model_of
from lowres.model import unit_specs
from lowres.optim import make_optimizer
from lowres.optim.overview import overview, table
from lowres.probe import probe, step_flops
from lowres.speed import bench, with_random_tokens


def _load(parsed: argparse.Namespace) -> Config:
    """The config with the model of `run.init_from`, which a run reads when it starts."""
    config = load(parsed)
    return with_model_of(config, open_model(config.run.init_from)) if config.run.init_from else config


def run_plan(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    if parsed.probe and config.memory.engine == "deepspeed":
        raise UserError(
            "--probe: measures the layer-major step; leave it out, or set memory.engine=layerwise"
        )
    # the vocabulary that the data will have, if the config gives it
    config = with_random_tokens(config)
    # a plan for a GPU does not need one
    device = torch.device("cuda") if config.run.device == "cuda" else pick_device(config)
    here = parsed.gpus or 1
    crew = memory.Crew(here * parsed.machines, here)
    if crew.ranks > 1 and config.memory.engine != "deepspeed":
        raise UserError(f"memory.engine: {config.memory.engine} uses one GPU; set it to deepspeed")
    plans = memory.make_plans(config, device, crew=crew)
    if parsed.probe and memory.ADAPTERS in plans:
        raise UserError(
            "--probe: it measures no adapters; add --set relora.enabled=false for the speed of the warm start"
        )
    plan = max(plans.values(), key=lambda plan: (plan.excess, plan.peak("gpu")))
    parts, tables = {}, []
    for part, own in plans.items():
        parts[part] = own.as_dict()
        tables += [f"--- {part} ---"] * (len(plans) > 1) + [own.table(), *_on_the_preset(config)]
        if device.type == "cpu":
            tables.append(f"without a GPU both rooms are one memory: {own.in_words(device)}")
        if parsed.optimizer:
            adapters = config.relora if part == memory.ADAPTERS else None
            specs = (spec for unit in unit_specs(config.model, adapters) for spec in unit.tensors)
            parts[part]["optimizer"] = overview(make_optimizer(config), specs)
            tables.append(table(parts[part]["optimizer"], step_flops(config, own)))
    values = plan.as_dict() | ({"parts": parts} if len(parts) > 1 else parts[next(iter(parts))])
    if parsed.probe and not plan.problems:
        found = probe(config, plan)
        values["probe"] = found.as_dict()
        tables.append(found.table())
    print(json.dumps(values, indent=1) if parsed.json else "\n".join(tables))
    memory.require_fit(plan)


def run_bench(parsed: argparse.Namespace) -> None:
    config = with_random_tokens(_load(parsed))
    found = bench(config, parsed.steps)
    if parsed.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print("\n".join([found.table(pick_device(config).type == "cuda"), *_on_the_preset(config)]))


def _on_the_preset(config: Config) -> list[str]:
    """A line on what a preset is named for, if that is another number than that of the model."""
    return [config.model.size] if "preset" in config.model.size else []
