"""Several sources in given proportions.

The parts take turns (`turns.Schedule`), and each gives its own sequences in its own order: so a part is read
once per epoch, as if it were alone, and a batch is a pure function of seed and step. When the weights of a
run change, the new ones count from the next sequence on, and every part goes on where it was. That needs two
things to be remembered (`record`): when the present weights began, with what each part had given until then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowres.data.base import Data
from lowres.data.batches import TokenData
from lowres.data.manifest import hash_of
from lowres.data.turns import Limit, Schedule, whole_shares
from lowres.errors import UserError

_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Part:
    """weight: in proportion to those of the others; 0 gives no sequence. epochs: how often the part may be
    read; None: without limit."""

    name: str
    data: TokenData
    weight: float
    epochs: float | None = None


class MixedData(Data):
    """The parts of a mixture as one. Raises UserError unless they have one tokenizer and different tokens.

    own_validation: whether each part has validation tokens of its own; otherwise all have the same.
    """

    def __init__(self, parts: list[Part], seed: int, own_validation: bool = True) -> None:
        self.names = [part.name for part in parts]
        # in an order of their own, so that it does not matter how they are listed
        self._parts = sorted(parts, key=lambda part: part.data.fingerprint)
        self._seed, self._own_validation = seed, own_validation
        self._gone: list[dict[str, Any]] = []  # records of parts that a resumed run does not have any more
        first = parts[0].data
        for part in parts:
            if part.data.tokenizer.fingerprint != first.tokenizer.fingerprint:
                remedy = "set data.tokenizer, and prepare both with it"
                if not part.data.tokenizer.has_text and not first.tokenizer.has_text:
                    remedy = "set data.vocab_size, data.bos and data.eos to those of all parts"
                what = f"data.mixture.{part.name}: has another tokenizer than {parts[0].name}"
                raise UserError(f"{what}; {remedy}")
        for one, other in zip(self._parts, self._parts[1:], strict=False):
            if one.data.fingerprint == other.data.fingerprint:
                raise UserError(
                    f"data.mixture.{one.name}: has the same tokens as {other.name}; leave one of them out, "
                    "and give the other the sum of the weights"
                )
        self.folder, self.seq_len = first.folder, first.seq_len
        self.tokenizer, self.vocab_size = first.tokenizer, first.vocab_size
        self.notes = [f"{part.name}: {note}" for part in parts for note in part.data.notes]
        self.fingerprint = hash_of(self.tokenizer.fingerprint, [p.data.fingerprint for p in self._parts])
        self.validation_fingerprint = first.validation_fingerprint
        if own_validation:
            self.validation_fingerprint = hash_of([p.data.validation_fingerprint for p in self._parts])
        self._begin(0, [0] * len(parts))

    def _begin(self, since: int, before: list[int]) -> None:
        """Let the weights count from a sequence on. before: what each part has given until then."""
        self._since, self._before = since, before
        weights, limits = [part.weight for part in self._parts], [_limit(part) for part in self._parts]
        self._schedule = Schedule(weights, limits, self._seed, since, before)

    @property
    def train_tokens(self) -> int | None:
        found = [part.data.train_tokens for part in self._parts]
        known = [tokens for tokens in found if tokens is not None]
        return sum(known) if len(known) == len(found) else None

    def batch(self, step: int, sequences: int, offset: int = 0) -> Tensor:
        batch = torch.empty(sequences, self.seq_len + 1, dtype=torch.int64)
        turns = self._schedule.turns(offset + step * sequences, sequences)
        for part, (rows, first) in zip(self._parts, turns, strict=True):
            if len(rows):
                batch[torch.from_numpy(rows)] = part.data.batch(0, len(rows), offset=first)
        return batch

    def validation(self, max_tokens: int) -> Tensor:
        """Every part has an equal share of `max_tokens`."""
        return torch.cat(list(self.validation_parts(max_tokens).values()))

    def validation_parts(self, max_tokens: int) -> dict[str, Tensor]:
        if not self._own_validation:
            return self._parts[0].data.validation_parts(max_tokens)
        each = max(1, max_tokens // len(self._parts)) if max_tokens else 0
        windows = {part.name: part.data.validation(each) for part in self._parts}
        return {name: windows[name] for name in self.names if len(windows[name])} or {
            "": self._parts[0].data.validation(each)
        }

    def hashes(self, validation: bool = False) -> Iterator[np.ndarray]:
        for part in self._parts:
            if validation or part.weight > 0:
                yield from part.data.hashes(validation)

    def close(self) -> None:
        for part in self._parts:
            part.data.close()

    # ---- what was read, and what will be

    def read(self, sequence: int) -> dict[str, tuple[int, float | None]]:
        """Of each part, before sequence `sequence` of the run: how many sequences it gave, and its share of
        all since the weights were last changed (None if that is none)."""
        given = self._schedule.given(sequence)
        turns = sequence - self._since
        found = {
            part.name: (now, (now - before) / turns if turns else None)
            for part, now, before in zip(self._parts, given, self._before, strict=True)
        }
        return {name: found[name] for name in self.names}

    def ends(self) -> list[tuple[str, int]]:
        """(part, sequence of the run from which on it is used up), as far as that is known."""
        return [(self._parts[part].name, sequence) for part, sequence in self._schedule.ends()]

    @property
    def over(self) -> int | None:
        """The sequence of the run from which on every part is used up; None if that is never, or not
        known."""
        return self._schedule.over

    def described(self, end: int) -> str:
        """The parts with their shares of the weights, and how often each will be read by sequence `end` of
        the run, where that is known without waiting for a stream."""
        shares = _shares([(part.name, part.weight, part.epochs) for part in self._parts])
        epochs = {}
        if not any(part.epochs and part.data.is_stream for part in self._parts):
            known = [part for part in self._parts if not part.data.is_stream]
            given = {name: count for name, (count, _) in self.read(end).items()}
            epochs = {p.name: given[p.name] / (p.data.epoch(_ENDLESS) or 1) for p in known}
        listed = (
            f"{name} {float(shares[name][0]) if name in shares else 0:.3g}"
            + (f" ({epochs[name]:.3g} epochs)" if name in epochs else "")
            for name in self.names
        )
        return ", ".join(listed)

    # ---- resuming

    def record(self, sequence: int) -> dict[str, Any]:
        """What a run that goes on at `sequence` needs; see `checkpoint.Mixture`."""
        given = self._schedule.given(sequence)
        parts = [
            {
                "name": part.name,
                "fingerprint": part.data.fingerprint,
                "weight": float(part.weight),
                "epochs": part.epochs,
                "before": before,
                "read": read,
            }
            for part, before, read in zip(self._parts, self._before, given, strict=True)
        ]
        return {"since": self._since, "parts": parts + self._gone}

    def go_on(self, record: dict[str, Any], sequence: int) -> tuple[str, str] | None:
        """Go on at `sequence` of a run with this record. If the weights, the limits or the parts are others,
        they count from there on; then returns the mixture before and after in words.

        Raises UserError if a part is not what it was, or nothing is.
        """
        if record["since"] > sequence:
            raise UserError(
                f"data.mixture: by its record it began at sequence {record['since']:,}, but the run has used "
                f"only {sequence:,}; delete this checkpoint and use an older one"
            )
        was = {one["fingerprint"]: one for one in record["parts"]}
        ours = {part.data.fingerprint: part for part in self._parts}
        for one in record["parts"]:
            if one["fingerprint"] not in ours and one["name"] in self.names:
                raise UserError(
                    f"data.mixture.{one['name']}: is not what the run was trained on; give the files that it "
                    "started with, or another name, under which it is a new part"
                )
        if not was.keys() & ours.keys():
            raise UserError(
                "data.mixture: no part is what the run was trained on; keep one, with weight = 0 if it is no "
                "longer wanted"
            )
        old = _shares([(key, one["weight"], one["epochs"]) for key, one in was.items()])
        new = _shares([(key, part.weight, part.epochs) for key, part in ours.items()])
        self._gone = [one | {"weight": 0.0} for key, one in was.items() if key not in ours]
        position, since = ("before", record["since"]) if old == new else ("read", sequence)
        self._begin(since, [was[key][position] if key in was else 0 for key in ours])
        if old == new:
            return None
        # in the order in which they are listed
        listed = {
            p.data.fingerprint: p.name for p in sorted(self._parts, key=lambda p: self.names.index(p.name))
        }
        names = listed | {key: one["name"] for key, one in was.items() if key not in listed}
        return _in_words(old, names), _in_words(new, names)


def record_of_one(fingerprint: str, sequence: int) -> dict[str, Any]:
    """The record of a run that had one source and no mixture."""
    part = {"name": "", "fingerprint": fingerprint, "weight": 1.0, "epochs": None}
    return {"since": 0, "parts": [part | {"before": 0, "read": sequence}]}


def _limit(part: Part) -> Limit:
    if part.epochs is None:
        return None
    data, epochs = part.data, Fraction(str(part.epochs))
    if not data.is_stream:
        return max(1, int(epochs * (data.epoch(_ENDLESS) or 0)))

    def limit(reached: int) -> int | None:
        epoch = data.epoch(math.ceil(reached / epochs))
        return None if epoch is None else max(1, int(epochs * epoch))

    return limit


def _shares(parts: list[tuple[str, float, float | None]]) -> dict[str, tuple[Fraction, float | None]]:
    """Share of the whole, and limit, of the parts (key, weight, epochs) that take turns."""
    active = [part for part in parts if part[1] > 0]
    counts = whole_shares([weight for _, weight, _ in active])
    return {
        key: (Fraction(count, sum(counts)), epochs)
        for (key, _, epochs), count in zip(active, counts, strict=True)
    }


def _in_words(shares: dict[str, tuple[Fraction, float | None]], names: dict[str, str]) -> str:
    limits = {key: f" for {epochs:g} epochs" if epochs else "" for key, (_, epochs) in shares.items()}
    listed = (
        f"{name} {float(shares[key][0]):.3g}{limits[key]}" for key, name in names.items() if key in shares
    )
    return ", ".join(listed)
