"""The scores of an evaluation: their keys in the metrics, and how they are shown.

Bits per byte stand first, as only they compare across tokenizers; then the loss, then the perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

BITS, LOSS, PERPLEXITY = "val_bits_per_byte", "val_loss", "val_ppl"
TASK = "task/"  # begins the keys of the scores of tasks: task/<task>/<metric>
STDERR = "_stderr"
OF = "/"  # between a score and the part of the validation data, or the text, that it is of


class Shown(NamedTuple):
    """A score. name: for people. form: of its number."""

    key: str
    name: str
    form: str


SHOWN = (
    Shown(BITS, "bits per byte", ".4f"),
    Shown(LOSS, "loss", ".4f"),
    Shown(PERPLEXITY, "perplexity", ".3f"),
    Shown("val_accuracy", "accuracy", ".1%"),
)


def in_words(scores: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """ "1.2345 bits per byte, loss 3.1234, perplexity 22.713": the scores that are there. before: earlier
    ones, shown as "2.8812 -> 1.2345 bits per byte"."""
    return ", ".join(_told(shown, scores, before) for shown in SHOWN if shown.key in scores)


def _told(shown: Shown, scores: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    records = [record for record in (before, scores) if record is not None and shown.key in record]
    numbers = " -> ".join(_number(record[shown.key], shown.form) for record in records)
    return f"{numbers} {shown.name}" if shown.key == BITS else f"{shown.name} {numbers}"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "not finite"


def by_part(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of each part of a mixture and of each text with a name, under the keys that they have
    without it."""
    found: dict[str, dict[str, Any]] = {}
    for key, name, value in _of_parts(scores):
        found.setdefault(name, {})[key] = value
    return found


def _of_parts(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for key, value in scores.items():
        score, of, name = key.partition(OF)
        if of and score.startswith("val_"):
            yield score, name, value


class TaskScore(NamedTuple):
    """stderr: its standard error, if that is known."""

    value: Any
    stderr: Any


def of_tasks(scores: Mapping[str, Any]) -> dict[str, dict[str, TaskScore]]:
    """The scores of tasks, by task and metric."""
    found: dict[str, dict[str, TaskScore]] = {}
    for key, value in scores.items():
        task, _, metric = key.removeprefix(TASK).rpartition("/")
        if key.startswith(TASK) and not is_error(key):
            name, comma, kind = key.partition(",")
            error = scores.get(f"{name}{STDERR}{comma}{kind}")
            found.setdefault(task, {})[metric] = TaskScore(value, error)
    return found


def is_error(key: str) -> bool:
    """Whether a score of a task is the standard error of another one."""
    return key.partition(",")[0].endswith(STDERR)


def task_in_words(found: Mapping[str, TaskScore]) -> str:
    """ "acc 0.2512 ± 0.0194, acc_norm 0.2600 ± 0.0196" """
    return ", ".join(f"{metric} {number_in_words(score)}" for metric, score in found.items())


def number_in_words(score: TaskScore) -> str:
    error = f" ± {score.stderr:.4f}" if isinstance(score.stderr, int | float) else ""
    return f"{_number(score.value, '.4f')}{error}"
