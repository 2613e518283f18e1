"""Copies beside the computation are in order: nothing is read before it is written, or overwritten too soon.

Found without a GPU, by `tests.races`. That the detector finds anything is shown by taking away one wait at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowres import checkpoint
from lowres.config import Config
from lowres.engine import Engine, make_engine
from lowres.engine.boundaries import Door
from lowres.engine.residence import Residence
from lowres.model import Units, empty_units, initialize
from lowres.optim import make_optimizer
from lowres.relora import Relora, start_adapters, tensors_before
from lowres.rooms import Homes, Mover, Rooms
from tests.helpers import CPU, RELORA, make_batch, make_config
from tests.races import Detector, Stream

BLOCKS = tuple(f"layers.{i}" for i in range(4))
ALL = frozenset((*BLOCKS, "head", "embed"))
HOMES = {
    "gpu": Homes(),
    "weights": Homes(weights=ALL),
    "state": Homes(state=ALL),
    "stash": Homes(stash=4),
    "carry": Homes(carry=True),
    "mixed": Homes(frozenset(("layers.2", "head")), frozenset(("layers.0", "layers.2", "embed")), 1, True),
    "everything": Homes(ALL, ALL, 4, True),
}
# a tied embedding stays on the GPU
TIED = Homes(ALL - {"embed"}, ALL - {"embed"}, 4, True)
VOCAB, LENGTH = 50, 8


@pytest.fixture
def detector() -> Iterator[Detector]:
    with Detector() as found:
        yield found


def config_of(**sections: dict[str, Any]) -> Config:
    model = {"dim": 32, "n_layers": 4, "n_heads": 2, "ffn_dim": 64, "vocab_size": VOCAB}
    small = {"model": model, "data": {"seq_len": LENGTH}, "train": {"batch_tokens": 5 * LENGTH, "steps": 20}}
    for section, keys in sections.items():
        small[section] = small.get(section, {}) | keys
    return make_config(**small)


class Life:
    """An engine in the detector's care, and what a run does with it."""

    def __init__(
        self, detector: Detector, folder: Path, config: Config, homes: Homes, band: int = 1, adapted: bool = False
    ) -> None:
        self.detector, self.folder, self.config = detector, folder, config
        self.homes, self.band = homes, band
        self.steps = 0
        self.build(adapted)

    def build(self, adapted: bool) -> None:
        kept, rooms, homes = self.config.memory, Rooms(CPU), self.homes
        adapters = self.config.relora if adapted else None
        self.units: Units = empty_units(
            self.config.model, kept.weights, kept.embeddings_kept_in, rooms, homes.weights, adapters
        )
        optimizer = make_optimizer(self.config)
        optimizer.attach(self.units.values(), rooms, homes.state)
        self.relora = Relora(self.config.relora, optimizer)
        initialize(self.units.values(), 0, CPU)
        self.engine: Engine = make_engine(self.config, self.units, self.relora, 2, rooms, self.band, homes)

    def drop(self) -> None:
        """Give all memory back, as `trainer.Run.build` does before it builds anew."""
        del self.engine, self.units, self.relora

    def batch(self, sequences: int) -> Tensor:
        return self.detector.on_host(make_batch(sequences, LENGTH, VOCAB, seed=self.steps))

    def step(self, sequences: int = 5, rehearsal: bool = False) -> dict[str, Any]:
        before = len(self.detector.answers)
        self.engine.step(self.batch(sequences), self.steps, 1.0, rehearsal)
        self.steps += 1
        found = self.detector.answers[before:]
        assert len(found) == 1, f"the host waits inside a step: {found}"
        return self.relora.readings(self.steps)

    def evaluate(self, sequences: int) -> None:
        self.engine.evaluate(self.batch(sequences))

    def sample(self) -> None:
        for length in (3, 4):
            self.engine.logits(self.batch(2)[:, :length]).cpu()

    def save(self) -> Path:
        stored = ((unit.spec.name, unit.tensors()) for unit in self.engine.units())
        return checkpoint.save(self.folder, self.steps, stored, {}, 1)

    def load(self, saved: Path) -> None:
        for unit in self.engine.units(write=True):
            checkpoint.load_unit(saved, unit.spec.name, unit.tensors())

    def fail(self, after: int) -> None:
        """A step that is interrupted when it has updated some units."""
        update, left = self.relora.update, after

        def interrupted(*args: Any) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            update(*args)

        with mock.patch.object(self.relora, "update", interrupted), pytest.raises(KeyboardInterrupt):
            self.engine.step(self.batch(5), self.steps, 1.0)

    def run(self) -> None:
        """All that a run does, in an order that leaves no two of them unmet."""
        self.step(rehearsal=True)
        self.evaluate(3)
        self.step()
        self.step()
        saved = self.save()
        self.step()
        self.evaluate(7)  # more than there is room for
        self.sample()
        self.load(saved)
        self.step(7)
        self.sample()
        self.save()
        self.step(2)


@pytest.mark.parametrize("band", [1, 2, 3])
@pytest.mark.parametrize("homes", HOMES)
def test_a_run_has_no_races(detector: Detector, tmp_path: Path, homes: str, band: int) -> None:
    Life(detector, tmp_path, config_of(), HOMES[homes], band).run()
    detector.check()
    assert detector.copied or homes == "gpu"


CASES = {
    "clip": ({"optim": {"grad_clip": 0.1}}, HOMES["everything"]),
    "exact forward": ({"memory": {"stash_dtype": "int8", "exact_forward": True}}, HOMES["everything"]),
    "exact forward and clip": (
        {"memory": {"stash_dtype": "int8", "exact_forward": True}, "optim": {"grad_clip": 0.1}},
        HOMES["mixed"],
    ),
    "int8 stash": ({"memory": {"stash_dtype": "int8"}}, HOMES["mixed"]),
    "tied": ({"model": {"tie_embeddings": True}}, TIED),
    "tied and clip": ({"model": {"tie_embeddings": True}, "optim": {"grad_clip": 0.1}}, TIED),
    "master": ({"memory": {"weights": "int8", "master": "host"}}, HOMES["everything"]),
    "adamw": ({"memory": {"moments": "bf16"}, "optim": {"name": "adamw"}}, HOMES["everything"]),
}


@pytest.mark.parametrize("band", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_other_runs_have_no_races(detector: Detector, tmp_path: Path, case: str, band: int) -> None:
    sections, homes = CASES[case]
    Life(detector, tmp_path, config_of(**sections), homes, band).run()
    detector.check()


@pytest.mark.parametrize("homes", ["gpu", "mixed", "everything"])
@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_relora_has_no_races(detector: Detector, tmp_path: Path, homes: str, kept: str) -> None:
    """Both parts of a run, the engine that is built anew between them, and merges."""
    memory = {"weights": kept} | ({"master": "host"} if kept == "int8" else {})
    config = config_of(relora=RELORA | {"start_step": 2, "log_rank": True}, memory=memory)
    life = Life(detector, tmp_path, config, HOMES[homes])
    life.step()
    life.step()
    saved = life.save()
    life.drop()
    life.build(adapted=True)
    for unit in life.engine.units(write=True):
        checkpoint.load_unit(saved, unit.spec.name, tensors_before(unit), all_used=False)
        start_adapters(unit, 0, 2)
    merges = [life.step() for _ in range(4)]
    assert sum("merge_cosine" in readings for readings in merges) == 1
    life.load(life.save())
    life.evaluate(5)
    life.run()
    detector.check()


@pytest.mark.parametrize("after", [0, 1, 3, 5])
@pytest.mark.parametrize("then", ["drop", "grow", "save", "load", "step"])
def test_after_an_interrupted_step_there_are_no_races(
    detector: Detector, tmp_path: Path, then: str, after: int
) -> None:
    life = Life(detector, tmp_path, config_of(), HOMES["everything"])
    life.step()
    saved = life.save()
    life.fail(after)
    if then == "drop":
        life.drop()
    elif then == "grow":
        life.evaluate(9)
    elif then == "save":
        life.save()
    elif then == "load":
        life.load(saved)
    else:
        life.step()
    detector.check()


class Forgets(dict[Any, Any]):
    """Keeps no event."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def update(self, *_: Any, **__: Any) -> None:
        pass


def without_stream_wait(way: str) -> Callable[[pytest.MonkeyPatch], None]:
    wait = Stream.wait_stream

    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            Stream, "wait_stream", lambda self, other: None if self.name.endswith(way) else wait(self, other)
        )

    return mutate


def changed(kind: type, change: Callable[[Any], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Every new object of a kind is changed."""
    start = kind.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        change(self)

    return lambda patch: patch.setattr(kind, "__init__", begin)


def forgetting(kind: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return changed(kind, lambda made: setattr(made, name, Forgets({0: None, 1: None} if name == "_left" else {})))


class Impatient:
    """A mover that lets nothing wait."""

    def __init__(self, mover: Mover) -> None:
        self.fetch, self.store = mover.fetch, mover.store

    def wait(self, event: object) -> None:
        pass


def start_unseen(patch: pytest.MonkeyPatch) -> None:
    start = Door._start
    patch.setattr(Door, "_start", lambda self, slot, piece: start(self, slot, piece) and None)


MUTATIONS = {
    "a fetch does not wait for the computation": without_stream_wait("in"),
    "a store does not wait for the computation": without_stream_wait("out"),
    "a visit does not wait for its units": changed(
        Residence, lambda made: setattr(made, "_mover", Impatient(made._mover))
    ),
    "a slot for units is filled before it is left": forgetting(Residence, "_left"),
    "a unit is fetched before it is written": forgetting(Residence, "_written"),
    "a piece is used before it is there": start_unseen,
    "a slot for pieces is filled before it is left": forgetting(Door, "_left"),
    "a piece is fetched before it is written": forgetting(Door, "_written"),
    "the host looks before the copies are done": lambda patch: patch.setattr(Mover, "finish", lambda self: None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_without_a_wait_there_are_races(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    MUTATIONS[mutation](monkeypatch)
    Life(detector, tmp_path, config_of(), HOMES["everything"]).run()
    assert detector.races
    print(len(detector.races), detector.races[0])
