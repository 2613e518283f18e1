"""What happened to a run, and what its model wrote, thinned out to what can be looked at."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

MOST_EVENTS = 400
MOST_PROMPTS, MOST_SAMPLES = 20, 50
LONGEST = 4000  # characters of a text


class Thinned:
    """A bounded part of a long series, evenly spread; the newest is always in it."""

    def __init__(self, most: int) -> None:
        self._most, self._every, self._count = most, 1, 0
        self._kept: list[Any] = []
        self._newest: Any = None

    def add(self, one: Any) -> None:
        self._newest = one
        if self._count % self._every == 0:
            self._kept.append(one)
            if len(self._kept) > self._most:
                self._kept, self._every = self._kept[::2], self._every * 2
        self._count += 1

    def __iter__(self) -> Any:
        yield from self._kept
        if self._kept and self._newest is not self._kept[-1]:
            yield self._newest


class Sample(NamedTuple):
    step: int
    prompt: str
    text: str


class History:
    """The events of a run. counts: by kind. started: the first and the last "started". last: the last event
    of all."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._by_kind: dict[str, Thinned] = {}
        self.first: dict[str, Any] = {}
        self.started: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def add(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            kind = str(event.get("event", ""))[:40]
            if kind not in self._by_kind and len(self._by_kind) >= 100:
                continue
            self.counts[kind] += 1
            self._by_kind.setdefault(kind, Thinned(MOST_EVENTS)).add(event)
            self.last = event
            if kind == "started":
                self.first, self.started = self.first or event, event

    def of(self, kind: str) -> list[dict[str, Any]]:
        return list(self._by_kind.get(kind, ()))


class Samples:
    """What the model has written. The lines have a step, a text, and perhaps a prompt."""

    def __init__(self) -> None:
        self._kept: dict[str, Thinned] = {}

    def add(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            step, text, prompt = record.get("step"), record.get("text"), _short(str(record.get("prompt", "")))
            if not (isinstance(step, int) and isinstance(text, str)):
                continue
            if prompt in self._kept or len(self._kept) < MOST_PROMPTS:
                own = self._kept.setdefault(prompt, Thinned(MOST_SAMPLES))
                own.add(Sample(step, prompt, _short(text)))

    def by_prompt(self, most: int = 12) -> dict[str, list[Sample]]:
        """For each prompt up to `most` samples over time, with the first and the last. Of a step that was
        done again, the newest."""
        found = {}
        for prompt, kept in self._kept.items():
            by_step = {sample.step: sample for sample in kept}
            found[prompt] = _spread([by_step[step] for step in sorted(by_step)], most)
        return found


def _spread(samples: list[Sample], most: int) -> list[Sample]:
    if len(samples) <= most:
        return samples
    return [samples[round(i * (len(samples) - 1) / (most - 1))] for i in range(most)]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
