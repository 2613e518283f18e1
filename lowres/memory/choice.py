"""Chooses what the config leaves open so that a run fits: band, micro-batch, and what lives on the host.

If a run with DeepSpeed does not fit, it also finds settings that would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowres import ranks
from lowres.config import Config, ReloraConfig
from lowres.engine import Choice
from lowres.engine.layout import Layout
from lowres.memory.footprint import Footprint
from lowres.memory.plan import GIB, Crew, Plan, device_bytes, host_bytes
from lowres.rooms import GPU, HOST, Homes

ADAPTERS = "adapters"  # the name of the part of a run that has adapters
# with more tokens in a micro-batch, matrix products do not get faster
USEFUL_TOKENS = {"cuda": 8192, "cpu": 2048}
BANDS = (1, 2, 4, 8)
# memory on a GPU that no plan lists: kernels that are loaded at their first use, the cuBLAS workspace of the
# thread that runs autograd, and gaps between the allocator's blocks
LEFT_TO_CUDA = GIB
# of a weight: how much longer it takes to copy it to the GPU than to read it there
COPY_COST = 16
# for the deepspeed engine: changes that may make a config fit, from the smallest to the largest
_STAGE_3 = {"deepspeed.stage": 3, "deepspeed.offload_optimizer": "cpu", "deepspeed.offload_param": "cpu"}
_BF16 = {"memory.weights": "bf16", "memory.moments": "bf16"}
_LAYERWISE = {"memory.engine": "layerwise"}
_INT8 = {"memory.weights": "int8", "memory.moments": "int8"}
_INSTEAD = (
    {"train.micro_batch": "auto"},
    _BF16,
    _STAGE_3,
    _BF16 | _STAGE_3,
    _LAYERWISE,
    _LAYERWISE | _INT8,
)


def make_plans(
    config: Config, device: torch.device, on_this_machine: bool = False, crew: Crew | None = None
) -> dict[str, Plan]:
    """The plan of each part of a run by name: `run`; with ReLoRA `warm start` and `adapters`."""
    relora, parts = config.relora, ["run"]
    if relora.enabled and relora.start_step < config.train.total_steps:
        parts = ["warm start", ADAPTERS] if relora.start_step else [ADAPTERS]
    return {part: make_plan(config, device, on_this_machine, part == ADAPTERS, crew) for part in parts}


def make_plan(
    config: Config,
    device: torch.device,
    on_this_machine: bool = False,
    adapted: bool = False,
    crew: Crew | None = None,
) -> Plan:
    """The plan of a run: the smallest band that fits, with the largest useful micro-batch and as little as
    possible on the host.

    on_this_machine: a budget that the config leaves open is the memory of this machine, or with several
    ranks the smallest of theirs. adapted: with the adapters of ReLoRA. crew: default: the started ranks.
    """
    crew = crew or Crew(ranks.size(), ranks.size_here())
    budgets = _budgets(config, device, on_this_machine)
    if (host := budgets[HOST]) is not None:
        budgets[HOST] = host // crew.here
    plan = _first_that_fits(config, device, budgets, adapted, crew)
    if config.memory.engine != "deepspeed":
        return plan
    others = []
    for keys in _INSTEAD:
        other = _changed(config, keys)
        if other not in (None, config) and (crew.ranks == 1 or other.memory.engine == "deepspeed"):
            others.append((_named(config, keys), _first_that_fits(other, device, budgets, adapted, crew)))
    return replace(plan, alternatives=tuple(others))


def plan_use(
    config: Config,
    device: torch.device,
    adapted: bool = False,
    texts: int = 1,
    length: int | None = None,
    evaluates: bool = True,
    on_this_machine: bool = True,
) -> Plan:
    """The plan of a trained model that is only used, by the layer-major engine: as few weights on the host as
    possible.

    texts: to sample; as many of them together as is fastest (`Choice.texts`), where each has up to `length`
    tokens, by default data.seq_len. evaluates: whether it is also evaluated.
    """
    length = length or config.data.seq_len
    users = _Users(config, device, _budgets(config, device, on_this_machine), adapted, length, evaluates)
    while True:
        plans = [users.plan_of(texts >> i) for i in reversed(range(texts.bit_length()))]
        fitting = [plan for plan in plans if not plan.problems]
        if fitting:
            return min(fitting, key=lambda plan: users.seconds(plan, texts))
        if not users.lower():
            return plans[0]


class _Users:
    """The search for a plan of a model that is used."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        budgets: dict[str, int | None],
        adapted: bool,
        length: int,
        evaluates: bool,
    ) -> None:
        self.config, self.budgets, self.length, self.evaluates = config, budgets, length, evaluates
        self.footprint = Footprint(config, device, config.relora if adapted else None, 1)
        asked, most = config.train.micro_batch, config.most_windows
        useful = USEFUL_TOKENS[device.type] // config.data.seq_len
        self.micro_batch = max(1, min(most, useful if asked == "auto" else asked)) if evaluates else 1
        self.carry = False
        tied = config.model.tie_embeddings  # used at both ends of the model, so it stays
        self.units = (*self.footprint.blocks, "head", *(() if tied else ("embed",)))

    def lower(self) -> bool:
        """Whether there is a way to need less memory, which is taken."""
        if self.micro_batch > 1:
            self.micro_batch //= 2
            return True
        if self.evaluates and not self.carry:
            self.carry = True
            return True
        return False

    def plan_of(self, texts: int) -> Plan:
        """With the fewest units on the host that fit; if none do, with all."""
        low, high = 0, len(self.units)
        if self.config.memory.weights_on != "auto":
            low = high = high if self.config.memory.weights_on == "host" else 0
        while low < high:
            middle = (low + high) // 2
            if self._plan(texts, middle).problems:
                low = middle + 1
            else:
                high = middle
        return self._plan(texts, low)

    def _plan(self, texts: int, hosted: int) -> Plan:
        homes = Homes(weights=frozenset(self.units[:hosted]), carry=self.carry)
        choice = Choice(self.micro_batch, 1, homes, texts)
        found = self.footprint.in_use(choice, self.length, self.evaluates)
        return Plan(found, choice, self.footprint.parameters, self.config.train.batch_tokens, self.budgets)

    def seconds(self, plan: Plan, texts: int) -> float:
        """For one token of all texts, in relation to other plans: the bytes that are read."""
        passes = -(-texts // plan.choice.texts)
        sizes = {name: sum(own.values()) for name, own in self.footprint.weights.items()}
        copied = sum(sizes[name] for name in plan.choice.homes.weights)
        return passes * (copied * COPY_COST + sum(sizes.values()))


def _budgets(config: Config, device: torch.device, on_this_machine: bool) -> dict[str, int | None]:
    """Bytes that a run may use, by room; None is no limit."""
    found: dict[str, int | None] = {GPU: None, HOST: None}
    if on_this_machine:
        least = ranks.least(_free_on(device), host_bytes() or 0)
        found = {room: int(size) or None for room, size in zip(found, least, strict=True)}
    asked = {GPU: config.memory.budget_gib, HOST: config.memory.host_budget_gib}
    return {room: found[room] if gib is None else int(gib * GIB) for room, gib in asked.items()}


def _free_on(device: torch.device) -> int:
    """Bytes that a plan may use if the config sets no budget; 0 if not known."""
    free = device_bytes(device) or 0
    return max(1, free - LEFT_TO_CUDA) if free and device.type == "cuda" else free


def _named(config: Config, keys: dict[str, Any]) -> str:
    """The keys whose values differ from the config, as text: `a=1 with b=2, c=3`."""
    before = config.model_dump()
    first, *rest = [
        f"{key}={value}" for key, value in keys.items() if before[(k := key.split("."))[0]][k[1]] != value
    ]
    return f"{first} with {', '.join(rest)}" if rest else first


def _changed(config: Config, keys: dict[str, Any]) -> Config | None:
    """The config with other values, or None if they contradict its other keys."""
    values = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValueError:
        return None


def _first_that_fits(
    config: Config, device: torch.device, budgets: dict[str, int | None], adapted: bool, crew: Crew
) -> Plan:
    planner = _Planner(config, device, budgets, config.relora if adapted else None, crew)
    plans = []
    for band in planner.bands():
        plans.append(planner.with_largest_micro_batch(band))
        if not plans[-1].problems:
            return plans[-1]
    return min(plans, key=lambda plan: plan.excess)


@dataclass(frozen=True)
class _Moved:
    """How much has its home on the host, counted in order: stash boundaries; units for state and weights."""

    units: tuple[str, ...]
    stash: int = 0
    state: int = 0
    weights: int = 0
    carry: int = 0

    def homes(self) -> Homes:
        weights, state = (frozenset(self.units[:count]) for count in (self.weights, self.state))
        return Homes(weights, state, self.stash, bool(self.carry))


class _Planner:
    """The search for a plan within budgets."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        budgets: dict[str, int | None],
        adapters: ReloraConfig | None,
        crew: Crew,
    ) -> None:
        self.config, self.device, self.budgets, self.crew = config, device, budgets, crew
        self.sequences = -(-config.most_windows // crew.ranks)  # per rank and step
        self.footprint = Footprint(config, device, adapters, crew.ranks)

    def bands(self) -> tuple[int, ...]:
        asked, layers = self.config.memory.band, self.config.model.n_layers
        if self.config.memory.engine != "layerwise":
            return (1,)
        return tuple(b for b in BANDS if b <= layers) if asked == "auto" else (min(asked, layers),)

    def with_largest_micro_batch(self, band: int) -> Plan:
        config = self.config
        asked = config.train.micro_batch
        if asked != "auto":
            return self.place(min(asked, self.sequences), band)
        most = max(1, min(self.sequences, USEFUL_TOKENS[self.device.type] // config.data.seq_len))
        best = self.place(most, band)
        if most == 1 or not best.problems:  # the usual case; every other size costs a trace
            return best
        best = self.place(1, band)
        low, high = 1, most - 1
        while low < high and not best.problems:  # binary search for the largest that fits
            middle = (low + high + 1) // 2
            plan = self.place(middle, band)
            if plan.problems:
                high = middle - 1
            else:
                low, best = middle, plan
        return best

    def place(self, micro_batch: int, band: int) -> Plan:
        """The plan with as little as possible on the host; if none fits, the one with most there."""
        *steps, (everything, least) = self.steps(micro_batch, band)
        last = self.plan(Choice(micro_batch, band, everything.homes()))
        budget = self.budgets[GPU]
        if not steps or (budget is not None and last.peak(GPU) > budget):
            return last
        for moved, movable in steps:
            if budget is None or last.peak(GPU) + movable - least <= budget:
                return self.plan(Choice(micro_batch, band, moved.homes()))
        return last

    def steps(self, micro_batch: int, band: int) -> Iterator[tuple[_Moved, int]]:
        """What is on the host, from the least to the most that the config allows, in the order of
        `_cheapest_first`; with each, the bytes on the GPU (`Footprint.movable`)."""
        kept = self.config.memory
        if kept.engine != "layerwise":
            yield _Moved(()), 0
            return
        layout = self.footprint.layout(micro_batch, band)
        # a tied embedding is used at both ends of the model, so it stays
        units = (*self.footprint.blocks, "head", *(() if self.config.model.tie_embeddings else ("embed",)))
        limits = {
            "stash": (kept.stash_on, len(layout.bands)),
            "state": ("host" if kept.master == "host" else kept.state_on, len(units)),
            "weights": (kept.weights_on, len(units)),
            "carry": (kept.carry_on, 1),
        }
        moved, hosted = _Moved(units), layout.hosted()

        def move(key: str) -> _Moved:
            if key in ("state", "weights"):
                hosted.move(units[getattr(moved, key)], key)
            return replace(moved, **{key: getattr(moved, key) + 1})

        def found() -> tuple[_Moved, int]:
            return moved, self.footprint.movable(layout, hosted, moved.stash, bool(moved.carry))

        for key, (home, most) in limits.items():
            for _ in range(most if home == "host" else 0):
                moved = move(key)
        yield found()
        movable = {key: most for key, (home, most) in limits.items() if home == "auto"}
        for key in self._cheapest_first(layout, moved, movable):
            while getattr(moved, key) < movable[key]:
                moved = move(key)
                yield found()

    def _cheapest_first(self, layout: Layout, start: _Moved, limits: dict[str, int]) -> list[str]:
        """What may move, sorted by the traffic in a step per byte that it frees on the GPU. So the carry
        comes last, and state before weights. State also costs less than the stash, unless its slots take as
        much as it frees: so it is if the embedding has state and the blocks have little."""
        sequences, length = self.config.most_windows, self.config.data.seq_len

        def measured(moved: _Moved) -> tuple[int, int]:
            homes = moved.homes()
            hosted = layout.hosted(homes)
            on_gpu = self.footprint.movable(layout, hosted, homes.stash, homes.carry)
            return on_gpu, sum(layout.traffic(homes, sequences, length))

        before, base = measured(start)

        def cost(moved: _Moved) -> float:
            after, traffic = measured(moved)
            return (traffic - base) / (before - after) if after < before else math.inf

        keys = list(limits)
        if keys[:2] == ["stash", "state"]:
            stash, state = replace(start, stash=limits["stash"]), replace(start, state=limits["state"])
            if cost(state) < cost(stash):
                keys[:2] = ["state", "stash"]
        return keys

    def plan(self, choice: Choice) -> Plan:
        found, batch = self.footprint.components(choice), self.config.train.batch_tokens
        kept, length = self.footprint.bytes_of_a_token, self.config.data.seq_len
        return Plan(
            *(found, choice, self.footprint.parameters, batch, self.budgets, self.crew),
            kept_of_a_token=kept,
            seq_len=length,
        )
