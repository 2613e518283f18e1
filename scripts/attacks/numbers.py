"""Batches and settings that ruin the numbers of a run."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.children import Case, Done, run
from attacks.world import DETECTED, EXACT, Verdict, World, WrongError, at_step, both, losses_in, no_picture
from lowres import checkpoint
from lowres.checkpoint import DTYPES
from lowres.checkpoint.tensors import read_header
from lowres.engine import LayerwiseEngine

POISONED = 26  # completed steps before the poisoned batch
LONG = ("train.steps=36", "train.checkpoint_every=4", "train.eval_every=0", "health.window=16")
POISONS = {"gradient x 1e6": 1e6, "gradient nan": math.nan, "gradient inf": math.inf, "loss nan": None}
POLICIES = ("off", "warn", "skip", "rollback")


def poison(factor: float | None) -> None:
    """For a child: the batch of step POISONED has a gradient of the head and of what is below it times a
    factor, or a loss that is not a number (None), whenever it comes."""
    engine: Any = LayerwiseEngine
    step, back = engine.step, engine._loss_and_backward
    marked: list[Tensor] = []
    now = False

    def taken(self: Any, batch: Tensor, number: int, *more: Any, **named: Any) -> Any:
        nonlocal now
        if number == POISONED and not marked:
            marked.append(batch.clone())
        now = bool(marked) and torch.equal(batch, marked[0])
        return step(self, batch, number, *more, **named)

    def poisoned(self: Any, w: Any, kept: Any, targets: Any, count: int) -> Tensor:
        loss = back(self, w, kept, targets, count)
        if now and factor is None:
            return loss * math.nan
        if now:
            for part in self._micro_batches(targets):
                kept.carry.put(part, kept.carry.get(part) * factor)
            for grad in self._grads["head"].values():
                grad.mul_(factor)
        return loss

    engine.step, engine._loss_and_backward = taken, poisoned


def poisoned_batches(world: World, short: bool) -> Iterator[Case]:
    for number, name in enumerate(POISONS):
        for policy in POLICIES:
            if not short or policy == ("rollback", "skip")[number % 2]:
                yield f"{name}, health.spikes={policy}", partial(_poisoned, world, name, policy)


def _poisoned(world: World, name: str, policy: str) -> Verdict:
    keys = (*LONG, f"health.spikes={policy}")
    poisoning = both(no_picture, partial(poison, POISONS[name]))
    with world.place() as place:
        folder = place / "run"
        done = run(world.train(folder, *keys), poisoning)
        if done.code != 0 or done.ill():
            raise WrongError(f"exit {done.code}: {done.ill() or done.line}")
        if wrong := not_finite(folder):
            raise WrongError(wrong)
        events = _events(folder)
        if policy == "rollback" and name == "gradient x 1e6":
            if events.count("rolled back") != 1:
                raise WrongError(f"did not go back once: {events}")
        elif not ({"bad", "spike"} & set(events)) and not (policy == "off" and name == "gradient x 1e6"):
            raise WrongError(f"no word about it: {events}")
        steps = [step for step, what, _ in losses_in(folder) if what == "loss"]
        if steps != [*range(1, 37)]:
            raise WrongError(f"metrics.jsonl has the steps {steps}")
        # killed before and after the next checkpoint, and resumed, it is the same
        for step in (POISONED + 1, POISONED + 4):
            other = place / f"killed-{step}"
            kill = at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            done = run(world.train(other, *keys), both(poisoning, kill))
            if done.code != -signal.SIGKILL:
                raise WrongError(f"was not killed: exit {done.code}: {done.line}")
            done = run(world.again(other, *keys), poisoning)
            if done.code != 0 or done.ill():
                raise WrongError(f"resumed: exit {done.code}: {done.ill() or done.line}")
            if _tensors(other) != _tensors(folder) or losses_in(other) != losses_in(folder):
                raise WrongError(f"killed in step {step + 1} and resumed, it ends differently")
    return (EXACT if policy == "off" else DETECTED), done.line


def _tensors(folder: Path) -> dict[str, bytes]:
    last = checkpoint.find(folder / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def _events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]


def not_finite(folder: Path) -> str:
    """A number in a checkpoint that is not finite; "" if there is none."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    for path in folder.glob("checkpoints/*/*.safetensors"):
        content = path.read_bytes()
        with path.open("rb") as file:
            places = read_header(file)
        for name, place in places.items():
            dtype = dtypes[place.dtype]
            if dtype.is_floating_point and place.end > place.start:
                values = torch.frombuffer(bytearray(content[place.start : place.end]), dtype=dtype)
                if not values.float().isfinite().all():
                    return f"{path}: {name} is not finite"
    return ""


def ruined(world: World, short: bool) -> Iterator[Case]:
    """Learning rates at which a run dies: it is named dead, and exit 1."""
    for rate in ("1e6", "1e30"):
        for policy in ("warn",) if short else ("warn", "rollback"):
            for weights in ("int8",) if short else ("int8", "fp32"):
                yield f"lr {rate}, {policy}, {weights}", partial(_ruined, world, rate, policy, weights)


def _ruined(world: World, rate: str, policy: str, weights: str) -> Verdict:
    keys: tuple[str, ...] = (
        f"optim.lr={rate}",
        f"health.spikes={policy}",
        f"memory.weights={weights}",
        "health.patience=10",
    )
    keys += ("train.steps=80", "train.eval_every=0", "train.checkpoint_every=5")
    with world.place() as place:
        folder = place / "run"
        done: Done = run(world.train(folder, *keys), no_picture)
        if done.code != 1 or done.ill():
            raise WrongError(f"exit {done.code}: {done.ill() or done.line}")
        if "the run is dead" not in done.line and "not finite" not in done.line:
            raise WrongError(f"is not named dead: {done.line}")
        if wrong := not_finite(folder):
            raise WrongError(wrong)
    return DETECTED, done.line
