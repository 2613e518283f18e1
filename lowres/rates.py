"""The relation of learning rate, batch and their ratio: two of `optim.lr`, `train.batch_tokens` and
`optim.lr_over_batch` determine the third.

It applies when a config is read (`tied`), when `--set` changes it (`retie`) and when a resumed run has
another batch (`follow`). `lowres.config` and `lowres.config_file` call these functions with nested dicts of
sections that are not checked yet. Impossible values raise ValueError that names the key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# for a batch r times as large, the learning rate is multiplied by r to this power
BATCH_POLICIES = {"fixed": 0.0, "sqrt": 0.5, "linear": 1.0}
# the learning rates that follow the batch
RATES = ("lr", "embed_lr", "norm_lr")


@dataclass(frozen=True)
class Defaults:
    """Values of keys that are missing. lr, norm_lr: by the name of the optimizer; norm_lr has only those with
    a rate of their own for norms."""

    optimizer: str
    lr: dict[str, float]
    norm_lr: dict[str, float]
    batch_tokens: int
    seq_len: int


def tied(values: dict[str, Any], defaults: Defaults) -> tuple[float | None, float, float | None]:
    """lr, batch_tokens and lr_over_batch.

    lr and lr_over_batch are None for an unknown optimizer without a rate; later checks refuse its name.
    """
    lr, ratio = _number(values, "optim", "lr"), _number(values, "optim", "lr_over_batch")
    batch, seq_len = _number(values, "train", "batch_tokens"), _seq_len(values, defaults)
    if ratio and lr and not batch:
        wanted = lr / ratio
        whole = max(1, round(wanted))
        if not math.isclose(wanted, whole, rel_tol=1e-6):
            raise ValueError(
                f"train.batch_tokens: optim.lr {lr} / optim.lr_over_batch {ratio} gives {wanted:.6g} "
                f"sequences, not a whole number; the nearest is {whole}, with optim.lr_over_batch = "
                f"{lr / whole:.6g}"
            )
        return lr, whole * seq_len, ratio
    batch = batch or defaults.batch_tokens
    sequences = batch / seq_len
    if not ratio:
        name = values.get("optim", {}).get("name", defaults.optimizer)
        lr = lr or (defaults.lr.get(name) if isinstance(name, str) else None)
        return lr, batch, lr / sequences if lr else None
    wanted = ratio * sequences
    if lr and not math.isclose(lr, wanted, rel_tol=1e-6):
        raise ValueError(
            f"optim.lr: {lr} divided by train.batch_tokens {batch} ({sequences:g} sequences) is "
            f"{lr / sequences:.6g}, but optim.lr_over_batch is {ratio}; leave one of the three out"
        )
    return lr or wanted, batch, ratio


def default_policy(values: dict[str, Any]) -> str:
    """The default of `optim.batch_policy`: whichever of lr and lr_over_batch is given stays the same."""
    optim = values.get("optim", {})
    return "linear" if "lr_over_batch" in optim and "lr" not in optim else "fixed"


def retie(file: dict[str, Any], values: dict[str, Any], keys: set[str], defaults: Defaults) -> list[str]:
    """Determine lr, batch_tokens and lr_over_batch after `--set` of `keys` changed `file` into `values`.

    If two of them were set, they replace the file's third. If lr or lr_over_batch alone was set, it replaces
    the other. If the batch differs from the file's, lr follows it as optim.batch_policy says. Changes
    `values` in place; returns notes for the user.
    """
    if not all(isinstance(values.get(section, {}), dict) for section in ("optim", "train", "data")):
        return []
    optim, train = values.setdefault("optim", {}), values.setdefault("train", {})
    rates = {"optim.lr", "optim.lr_over_batch"}
    pair = file.get("optim", {}).keys() >= {"lr", "lr_over_batch"}
    if rates <= keys and "train.batch_tokens" not in keys:
        train.pop("batch_tokens", None)
    elif rates & keys:
        if pair and "batch_tokens" not in train:
            train["batch_tokens"] = tied(file, defaults)[1]  # the batch that the file's pair determined
        for key in rates - keys:
            optim.pop(key.removeprefix("optim."), None)
    elif _number(file, "train", "batch_tokens") or ("train.batch_tokens" in keys and pair):
        return _follow_file(file, values, keys, defaults)
    return []


def _follow_file(
    file: dict[str, Any], values: dict[str, Any], keys: set[str], defaults: Defaults
) -> list[str]:
    """Adapt the rates in `values` to a batch that differs from the file's."""
    optim, train = values["optim"], values["train"]
    file = file | {"optim": file.get("optim", {}) | {"name": optim.get("name", defaults.optimizer)}}
    lr, file_batch, _ = tied(file, defaults)
    before = file_batch / _seq_len(file, defaults)
    after = (_number(values, "train", "batch_tokens") or file_batch) / _seq_len(values, defaults)
    policy = optim.setdefault("batch_policy", default_policy(file))
    if before == after or lr is None or policy not in BATCH_POLICIES:
        return []
    factor = (after / before) ** BATCH_POLICIES[policy]
    optim.pop("lr_over_batch", None)
    optim["lr"] = lr * factor
    train.setdefault("batch_tokens", file_batch)
    name = optim.get("name", defaults.optimizer)
    if isinstance(name, str) and name in defaults.norm_lr:
        optim.setdefault("norm_lr", defaults.norm_lr[name])
    for key in ("embed_lr", "norm_lr"):
        if f"optim.{key}" not in keys and _number(values, "optim", key):
            optim[key] *= factor
    return [batch_note(policy, (before, lr), (after, lr * factor))]


def follow(
    asked: dict[str, Any], start: dict[str, Any], batch_tokens: int, policy: str
) -> dict[str, Any] | None:
    """The rates of a resumed run (`RATES`): start * (batch / batch at the start) ** power.

    start: batch_tokens and the rates with which the run was started. asked: the rates in the config. None if
    they are neither those of the start nor those that follow from the batch.
    """
    factor = (batch_tokens / start["batch_tokens"]) ** BATCH_POLICIES[policy]
    start = dict.fromkeys(RATES) | start  # a run from before a key existed has no value for it
    rates = {key: start[key] and start[key] * factor for key in RATES}
    for key, rate in rates.items():
        wanted = asked[key]
        if wanted != start[key] and not (wanted and rate and math.isclose(wanted, rate, rel_tol=1e-9)):
            return None
    return rates


def batch_note(policy: str, old: tuple[float, float], new: tuple[float, float]) -> str:
    """A note for the user about the change of (batch in sequences, lr)."""
    rate = f"stays {old[1]:.6g}" if old[1] == new[1] else f"{old[1]:.6g} -> {new[1]:.6g}"
    return (
        f"the batch goes from {old[0]:g} to {new[0]:g} sequences; optim.batch_policy is {policy}: "
        f"lr {rate}, lr/batch {old[1] / old[0]:.6g} -> {new[1] / new[0]:.6g}"
    )


def _number(values: dict[str, Any], section: str, key: str) -> float | None:
    """A positive number from a config that is not checked yet; None if there is none."""
    value = values.get(section, {}).get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return value if usable and 0 < value < math.inf else None


def _seq_len(values: dict[str, Any], defaults: Defaults) -> float:
    return _number(values, "data", "seq_len") or defaults.seq_len
