"""A run in one line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from lowres.scores import in_words, of_tasks, task_in_words
from lowres.terminal import clean
from lowres.view import View, duration
from lowres.watch.card import Card

MOST_TASKS = 6
NAMES = (
    ("loss", "loss", ".4f"),
    ("lr", "lr", ".2e"),
    ("grad_norm", "gradient norm", ".3g"),
)


def line(view: View, cards: Sequence[Card] = ()) -> str:
    """The state of a run, its last numbers, how long it takes, and the cards."""
    parts = [f"{view.name}: {view.state().text}", f"step {view.step:,}" + _of(view.total)]
    parts += [f"{name} {format(x, form)}" for key, name, form in NAMES if _is(x := view.last.get(key))]
    if view.evaluated:
        parts.append(f"validation: {in_words(view.evaluated)}")
    for task, found in islice(of_tasks(view.tasks).items(), MOST_TASKS):
        parts.append(f"{task} {task_in_words(found)}")
    if rate := view.tokens_per_s:
        parts.append(f"{rate:,.0f} tokens/s")
    if (left := view.seconds_left) and view.step != view.total:
        parts.append(f"{duration(left)} left")
    if _is(peak := view.last.get("peak_mem_gib")):
        parts.append(f"memory {peak:.2f} GiB")
    parts += [told for card in cards if (told := about(card))]
    return clean(", ".join(parts))


def about(card: Card) -> str:
    """Temperature, power and use of a card."""
    parts = []
    if card.temperature is not None:
        parts.append(f"{card.temperature:.0f} °C")
    if card.power is not None:
        limit = "" if card.power_limit is None else f" of {card.power_limit:.0f}"
        parts.append(f"{card.power:.0f}{limit} W")
    if card.busy is not None:
        parts.append(f"{card.busy:.0f} % busy")
    return f"{card.name} {' '.join(parts)}" if parts else ""


def _of(total: int | None) -> str:
    return f" of {total:,}" if total else ""


def _is(value: Any) -> bool:
    return isinstance(value, int | float)
