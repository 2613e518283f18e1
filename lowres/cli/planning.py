"""`lowres plan` and `bench`."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

import torch

from lowres import explain, memory
from lowres.catalogue import CARDS
from lowres.cli.configs import load
from lowres.config import Config
from lowres.device import pick_device
from lowres.errors import UserError
from lowres.exchange import open_model, with_model_of
from lowres.model import unit_specs
from lowres.optim import make_optimizer
from lowres.optim.overview import overview, table
from lowres.outlook import outlook
from lowres.probe import forecast, predict, probe, step_flops
from lowres.probe.roofline import Estimate, estimate
from lowres.ranks import say
from lowres.speed import bench, with_random_tokens
from lowres.start import with_prepared


def _load(parsed: argparse.Namespace) -> Config:
    """The config with what a run reads when it starts: the model of `run.init_from`, and prepared data."""
    config = load(parsed)
    if config.run.init_from:
        config = with_model_of(config, open_model(config.run.init_from))
    config, notes = with_prepared(config)
    for note in notes:
        say(f"note: {note}")
    return config


def run_plan(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    _refuse(parsed, config)
    # the vocabulary that the data will have, if the config gives it
    config, card = with_random_tokens(config), None
    if parsed.card:
        config, card = forecast.for_card(config, parsed.card)
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
    pace = _Pace(config, plan, device)
    if memory.ADAPTERS in plans:
        pace.why_not = "no speed is predicted with adapters; for the warm start: relora.enabled=false"
    elif parsed.probe and not plan.problems:
        tables += pace.probe(values)
    elif device.type == "cuda":
        tables += pace.predict(card or forecast.card_here(), values)
    elif not parsed.optimizer:
        pace.why_not = "--probe measures this CPU and says how long the run takes; --card NAME predicts"
    tables += [pace.why_not] * bool(pace.why_not)
    if parsed.explain:
        told = pace.explain(parsed.hours, parsed.tokens)
        values["explained"] = told.as_dict()
        tables += told.lines()
    print(json.dumps(values, indent=1) if parsed.json else "\n".join(tables))
    memory.require_fit(plan)


def _refuse(parsed: argparse.Namespace, config: Config) -> None:
    """Raise UserError for options that do not go together, or not with the config."""
    if parsed.probe and config.memory.engine == "deepspeed":
        raise UserError(
            "--probe: measures the layer-major step; leave it out, or set memory.engine=layerwise"
        )
    if parsed.probe and parsed.card:
        raise UserError("--probe: measures this machine, and --card is for another; leave one of them out")
    for option in ("hours", "tokens"):
        if getattr(parsed, option) is not None and not parsed.explain:
            raise UserError(f"--{option}: is the budget of --explain; give it with that")
    if parsed.explain and (config.memory.engine == "deepspeed" or config.relora.enabled):
        key = "relora.enabled=false" if config.relora.enabled else "memory.engine=layerwise"
        raise UserError(f"--explain: explains the layer-major step without adapters; add --set {key}")


class _Pace:
    """How fast a planned run is, as far as that is known."""

    def __init__(self, config: Config, plan: memory.Plan, device: torch.device) -> None:
        self.config, self.plan, self.device = config, plan, device
        self.why_not = ""
        self.speed: explain.Speed | None = None
        self.measured, self.machine = False, "this machine"

    def probe(self, values: dict[str, Any]) -> list[str]:
        """Lines on what is measured here; adds it to the values for --json."""
        found = probe(self.config, self.plan)
        values["probe"] = found.as_dict()
        self.measured, self.machine = True, found.machine
        device = torch.device("cpu") if found.machine == "this CPU" else self.device

        def speed(config: Config, plan: memory.Plan) -> Estimate:
            return explain.of_probe(predict(config, plan, found.rates, device))

        self.speed = speed
        source = f"predicted for {found.machine}, from these rates"
        said = outlook(self.config, found.prediction.step_s, source, datetime.now(), machine=found.machine)
        return [found.table(), *said]

    def predict(self, card: str | None, values: dict[str, Any]) -> list[str]:
        """Lines on one card, or on all that hold the plan; adds it to the values for --json."""
        found = forecast.forecast(self.config, self.plan, card)
        likely = card or (forecast.likeliest(found) if found else None)
        if likely and not forecast.why_not(self.config):
            self.machine = f"an {likely}"
            self.speed = lambda config, plan: estimate(config, plan, CARDS[likely])
        if self.plan.problems:
            return []
        values["predicted"] = forecast.as_dict(self.config, found)
        return forecast.lines(self.config, found, datetime.now())

    def explain(self, hours: float | None, tokens: int | None) -> explain.Explained:
        if hours is not None and self.speed is None:
            raise UserError("--hours: needs a speed; add --probe, or --card NAME")
        return explain.explain(
            self.config,
            self.plan,
            self.device,
            self.speed,
            measured=self.measured,
            machine=self.machine,
            hours=hours,
            tokens=tokens,
        )


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
