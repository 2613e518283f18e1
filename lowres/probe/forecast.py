"""How long a planned run would take on graphics cards that one names, or that are here, or that hold it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import torch

from lowres import pace
from lowres.catalogue import CARDS, CONSUMER, find_card, recognise
from lowres.config import Config
from lowres.config_file import with_values
from lowres.errors import UserError
from lowres.memory import Plan
from lowres.outlook import advice, outlook
from lowres.probe.roofline import Estimate, estimate, version_of, why_not
from lowres.rooms import GPU
from lowres.terminal import aligned

NOT_MEASURED = "from its data sheet, not measured"


def card_here() -> str | None:
    """The name of this machine's card, if `CARDS` has it."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return recognise(found.name, found.total_memory)


def for_card(config: Config, name: str) -> tuple[Config, str]:
    """The config for a card that a user names, with no larger budget than it has; and its name in `CARDS`.
    Raises UserError if it is not known, or if the speed of the config cannot be predicted."""
    card = find_card(name)
    if reason := why_not(config):
        raise UserError(f"--card: {reason}; leave it out")
    most, asked = CARDS[card].budget_gib, config.memory.budget_gib
    budget = most if asked is None else min(most, asked)
    return with_values(with_values(config, "run", device="cuda"), "memory", budget_gib=budget), card


def forecast(config: Config, plan: Plan, card: str | None = None) -> dict[str, Estimate]:
    """Estimates by card: of the one that is named, or of all consumer cards that hold the plan. Empty if the
    speed of the config cannot be predicted."""
    if why_not(config):
        return {}
    need = plan.peak(GPU) / (1 << 30)
    names = [card] if card else [name for name in CONSUMER if CARDS[name].budget_gib >= need]
    return {name: estimate(config, plan, CARDS[name]) for name in names}


def as_dict(config: Config, found: dict[str, Estimate]) -> dict[str, Any]:
    """For `lowres plan --json`."""
    return {name: asdict(own) | _more(config, own) for name, own in found.items()}


def _more(config: Config, own: Estimate) -> dict[str, float]:
    return {
        "step_s": own.step_s,
        "days_per_billion_tokens": 1e9 / own.tokens_per_s / pace.DAY,
        "days_to_target": config.train.total_steps * own.step_s / pace.DAY,
    }


def lines(config: Config, found: dict[str, Estimate], now: datetime) -> list[str]:
    """For people: a sentence about one card, or a table of several."""
    if not found:
        reason = why_not(config) or "it fits none of the cards whose data sheets are known"
        return [f"no speed is predicted ({reason})"]
    products = version_of(config).name
    if len(found) == 1:
        ((name, own),) = found.items()
        source = f"predicted for an {name} ({products}; {NOT_MEASURED})"
        return outlook(config, own.step_s, source, now, machine=f"an {name}")
    rows = [["predicted, not measured", "tokens/s", "a step", "per billion tokens", "the run", "ends"]]
    for name, own in found.items():
        seconds = config.train.total_steps * own.step_s
        end = now + timedelta(seconds=min(seconds, 1000 * pace.YEAR))
        rows.append(
            [
                name,
                f"{own.tokens_per_s:,.0f}",
                pace.in_words(own.step_s),
                pace.per_billion(own.tokens_per_s),
                pace.in_words(seconds),
                pace.ends(now, (end - now).total_seconds()),
            ]
        )
    if config.train.epochs is not None:  # its length is not known yet
        rows = [row[:-2] for row in rows]
    text = aligned(rows, words=(0, 5))
    text.append(f"{products}, from data sheets: upper bounds; --card NAME predicts for one")
    likely = likeliest(found)
    seconds = config.train.total_steps * found[likely].step_s
    if config.train.epochs is None and seconds > pace.LONG:
        text.append(advice(config, found[likely].tokens_per_s, seconds, f"an {likely}"))
    return text


def likeliest(found: dict[str, Estimate]) -> str:
    """The card for which a plan was made: the fastest of those with the least memory that hold it."""
    least = min(CARDS[name].budget_gib for name in found)
    return max(
        (name for name in found if CARDS[name].budget_gib == least), key=lambda name: found[name].tokens_per_s
    )
