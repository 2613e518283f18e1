"""The order of copies and computation: nothing is read before it is written, or overwritten too soon.

`tests.races` tests this without a GPU. The tests also remove one wait at a time, to show that the detector
then finds a race.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowres import checkpoint
from lowres.config import Config
from lowres.engine import Choice, Engine, LayerwiseEngine, make_engine
from lowres.engine.boundaries import Boundary, Door, Piece
from lowres.engine.residence import Residence, Visit
from lowres.model import Units, empty_units, initialize
from lowres.optim import make_optimizer
from lowres.relora import Relora, start_adapters, tensors_before
from lowres.rooms import GPU, HOST, Homes, Mover, Rooms, Slab, _page_locked
from tests.full import full
from tests.helpers import CPU, RELORA, make_batch, make_config, save_checkpoint
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
    """An engine that the detector watches, and everything that a run does with it."""

    def __init__(
        self,
        detector: Detector,
        folder: Path,
        config: Config,
        homes: Homes,
        band: int = 1,
        adapted: bool = False,
        micro_batch: int = 2,
    ) -> None:
        self.detector, self.folder, self.config = detector, folder, config
        self.homes, self.band, self.micro_batch = homes, band, micro_batch
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
        choice = Choice(self.micro_batch, self.band, homes)
        self.engine: Engine = make_engine(self.config, self.units, self.relora, rooms, choice)

    def drop(self) -> None:
        """Free all memory, as `runs.Run.build` does before it builds new parts."""
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
        return save_checkpoint(self.folder, self.steps, stored, 1)

    def load(self, saved: Path) -> None:
        for unit in self.engine.units(write=True):
            checkpoint.load_unit(saved, unit.spec.name, unit.tensors())

    def fail(self, after: int) -> None:
        """A step that is interrupted after it has updated some units."""
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
        """Everything that a run does, in an order in which each follows every other."""
        self.step(rehearsal=True)
        self.evaluate(3)
        self.step()
        self.step()
        saved = self.save()
        self.step()
        self.evaluate(7)  # larger than the reserved memory
        self.sample()
        self.load(saved)
        self.step(7)
        self.sample()
        self.save()
        self.step(2)


@pytest.mark.parametrize("band", [1, 3])  # 2: test_other_runs_have_no_races
@pytest.mark.parametrize("homes", HOMES)
def test_a_run_has_no_races(detector: Detector, tmp_path: Path, homes: str, band: int) -> None:
    Life(detector, tmp_path, config_of(), HOMES[homes], band).run()
    detector.check()
    assert detector.copied or homes == "gpu"


CASES: dict[str, tuple[dict[str, dict[str, Any]], Homes]] = {
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


@pytest.mark.parametrize("case", CASES)
def test_other_runs_have_no_races(detector: Detector, tmp_path: Path, case: str) -> None:
    sections, homes = CASES[case]
    Life(detector, tmp_path, config_of(**sections), homes, band=2).run()
    detector.check()


@pytest.mark.parametrize("homes", ["gpu", "mixed", "everything"])
@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_relora_has_no_races(detector: Detector, tmp_path: Path, homes: str, kept: str) -> None:
    """Both parts of a run, the new engine between them, and merges."""
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
    life.sample()
    life.step(3)
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


SHRINKING: dict[str, tuple[dict[str, dict[str, Any]], Homes]] = {
    "everything": ({}, HOMES["everything"]),
    "stash": ({}, HOMES["stash"]),
    **{case: CASES[case] for case in ("exact forward", "int8 stash", "tied and clip")},
}


def shrinking(detector: Detector, folder: Path, case: str, every: int) -> None:
    """Steps and evaluations in each of which the GPU is full once, at another place."""
    sections, homes = SHRINKING[case]
    life = Life(detector, folder, config_of(**sections), homes, micro_batch=5)
    engine = life.engine
    assert isinstance(engine, LayerwiseEngine)
    for method in ("each", "again"):
        for at in itertools.count(every // 2, every):
            engine._sequences.number, engine._tokens.number = 5, 12
            with full(at, method=method) as mode:
                life.step(10)
            if mode.count <= at:
                break
            assert (engine.micro_batch, engine._tokens.number) != (5, 12)
    engine._sequences.number = 5
    with full(7, method="again"):
        life.evaluate(10)
    life.save()
    life.step(10)


@pytest.mark.parametrize("case", SHRINKING)
def test_smaller_micro_batches_have_no_races(detector: Detector, tmp_path: Path, case: str) -> None:
    shrinking(detector, tmp_path, case, 67 if case == "everything" else 131)
    detector.check()


def test_parts_of_what_was_written_as_a_whole_are_waited_for(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two micro-batches of 5 is halved, so a part of the next layer is the end of one that was
    written as a whole, and the start of another."""
    piece = Boundary._piece

    def first_only(self: Boundary, part: slice) -> Piece:
        found = piece(self, part)
        return found._replace(names=found.names[:1])

    monkeypatch.setattr(Boundary, "_piece", first_only)
    shrinking(detector, tmp_path, "everything", 67)
    with pytest.raises(AssertionError, match="may come before the end of"):
        detector.check()


@pytest.mark.parametrize("seed", range(5))
def test_visits_in_any_order_have_no_races(detector: Detector, seed: int) -> None:
    random_visits(seed)
    detector.check()


def random_visits(seed: int) -> None:
    """Thirty visits; neighbouring ones share no unit."""
    chance = random.Random(seed)
    rooms, mover, homes = Rooms(CPU), Mover(CPU), Homes(weights=ALL - {"layers.1", "layers.2"})
    units = empty_units(config_of().model, "fp32", "fp32", rooms, homes.weights)
    groups = [("embed",), ("layers.0", "layers.1"), ("layers.2",), ("layers.3",), ("head",)]
    order = [chance.choice(groups)]
    while len(order) < 30:
        order.append(chance.choice([group for group in groups if group != order[-1]]))
    visits = [Visit(group, update=chance.random() < 0.4) for group in order]
    largest = max(sum(units[n].weights_slab.numel() for n in set(v.units) & homes.weights) for v in visits)
    slots = rooms.make(Slab("transfer of layers", GPU, largest, 2))
    residence, wanted = Residence(units, homes, slots, mover), dict.fromkeys(units, 0)
    for part in (visits[:15], visits[15:]):  # the host does not wait in between
        residence.begin(part)
        for visit in part:
            with residence.visit() as here:
                for name, unit in zip(visit.units, here, strict=True):
                    assert (unit.weights_slab == wanted[name]).all()
                    if visit.update:
                        unit.weights_slab.add_(1)
                        wanted[name] += 1
    mover.finish()
    for name, unit in units.items():
        assert (unit.weights_slab == wanted[name]).all()


# a wait is removed


class Forgets(dict[Any, Any]):
    """A dict that stores no event."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def update(self, *_: Any, **__: Any) -> None:
        pass


Mutation = Callable[[pytest.MonkeyPatch], None]


def deaf(method: str, to: Callable[[Stream], bool]) -> Mutation:
    """A kind of wait does nothing for some streams."""
    wait = getattr(Stream, method)

    def unless(self: Stream, *args: Any) -> None:
        if not to(self):
            wait(self, *args)

    return lambda patch: patch.setattr(Stream, method, unless)


def changed(kind: Any, change: Callable[[Any], None]) -> Mutation:
    """Change every new object of a class."""
    start = kind.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        change(self)

    return lambda patch: patch.setattr(kind, "__init__", begin)


def forgetting(kind: type, name: str) -> Mutation:
    return changed(
        kind, lambda made: setattr(made, name, Forgets({0: None, 1: None} if name == "_left" else {}))
    )


class Impatient:
    """A mover whose `wait` does nothing."""

    def __init__(self, mover: Mover) -> None:
        self.fetch, self.store = mover.fetch, mover.store

    def wait(self, event: object) -> None:
        pass


def start_unseen(patch: pytest.MonkeyPatch) -> None:
    start = Door._start
    patch.setattr(Door, "_start", lambda self, slot, piece: start(self, slot, piece) and None)


UNITS, PIECES = 1, 2  # the movers, in the order in which the engine makes them
MUTATIONS = {
    "a unit comes before the computation left its slot": deaf(
        "wait_stream", lambda s: s.name == f"mover {UNITS} in"
    ),
    "a unit goes before it is computed": deaf("wait_stream", lambda s: s.name == f"mover {UNITS} out"),
    "a piece comes before the computation left its slot": deaf(
        "wait_stream", lambda s: s.name == f"mover {PIECES} in"
    ),
    "a piece goes before it is computed": deaf("wait_stream", lambda s: s.name == f"mover {PIECES} out"),
    "a visit does not wait for its units": changed(
        Residence, lambda made: setattr(made, "_mover", Impatient(made._mover))
    ),
    "a unit comes before the last one left its slot": forgetting(Residence, "_left"),
    "a piece is used before it is there": start_unseen,
    "a piece is put where the last one has not left": forgetting(Door, "_left"),
    "a piece is fetched before it is written": forgetting(Door, "_written"),
    "a step does not wait at its end": lambda patch: patch.setattr(Mover, "join", lambda _: None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_step_without_a_wait_has_races(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    MUTATIONS[mutation](monkeypatch)
    life = Life(detector, tmp_path, config_of(), HOMES["everything"])
    life.step()
    life.save()
    life.step()
    with pytest.raises(AssertionError, match="may come before the end of"):
        detector.check()


def test_visits_that_do_not_wait_for_an_update_have_races(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine alone does not need this wait: a step ends after all updates, and updates a unit once."""
    forgetting(Residence, "_written")(monkeypatch)
    for seed in range(5):
        random_visits(seed)
    with pytest.raises(AssertionError, match=r"_fetch.* reads weights .*\n.*\n.*writes weights"):
        detector.check()


@pytest.mark.parametrize("mover", [UNITS, PIECES])
def test_an_interrupted_step_that_does_not_wait_has_races(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mover: int
) -> None:
    life = Life(detector, tmp_path, config_of(), HOMES["everything"])
    life.step()
    deaf("synchronize", lambda s: s.name.startswith(f"mover {mover}"))(monkeypatch)
    life.fail(3)
    life.drop()
    with pytest.raises(AssertionError, match="is given back"):
        detector.check()


# the detector


def test_a_race_says_who_and_where(detector: Detector) -> None:
    room, mover = Rooms(CPU), Mover(CPU)
    here, there = room.slab("stash", GPU, 100), room.slab("stash", HOST, 100)
    mover.store([(there[:60], here[:60])])
    here[60:].fill_(1)  # other bytes
    detector.check()
    here[50:70].fill_(1)
    (race,) = detector.races
    assert "aten.fill_.Scalar (a test) on the compute stream writes stash #0 (gpu) [50:70]" in race
    assert "aten.copy_.default (a test) on mover 1 out reads stash #0 (gpu) [0:60]" in race


def test_what_is_in_order_is_no_race(detector: Detector) -> None:
    room, mover = Rooms(CPU), Mover(CPU)
    here, there = room.slab("stash", GPU, 100), room.slab("stash", HOST, 100)
    here.fill_(1)
    done = mover.store([(there, here)])
    here.sum()  # two that read
    mover.wait(done)
    here.fill_(2)
    mover.wait(mover.fetch([(here, there)], [done]))
    assert int(here.sum()) == 100  # the host waits for the computation, which waited for the copies
    there.fill_(3)
    del here, there
    detector.check()


@pytest.mark.parametrize("kept", [GPU, HOST])
def test_memory_in_use_may_not_be_given_back(detector: Detector, kept: str) -> None:
    room, mover = Rooms(CPU), Mover(CPU)
    here, there = room.slab("stash", GPU, 100), room.slab("stash", HOST, 100)
    done = mover.fetch([(here, there)])
    if kept == HOST:
        del here
        assert len(detector.races) == 1 and "stash #0 (gpu) is given back" in detector.races[0]
        return
    mover.wait(done)  # enough for GPU memory, which only the computation can use next
    del there
    assert len(detector.races) == 1 and "stash #1 (host) is given back" in detector.races[0]
    del here
    assert len(detector.races) == 1


def test_the_host_sees_what_it_waited_for(detector: Detector) -> None:
    room, mover = Rooms(CPU), Mover(CPU)
    here, there = room.slab("stash", GPU, 100), room.slab("stash", HOST, 100)
    mover.store([(there, here)])
    mover.finish()
    there.sum()
    detector.check()
    mover.store([(there, here)])
    there.numpy()
    assert len(detector.races) == 1 and "numpy (a test) on the host reads" in detector.races[0]


def test_what_is_on_the_host_cannot_be_computed_with(detector: Detector) -> None:
    room = Rooms(CPU)
    here, there = room.slab("stash", GPU, 100), room.slab("stash", HOST, 100)
    there.copy_(here)
    there.add_(there)
    detector.check()
    here.add_(there)
    assert detector.races == ["aten.add_.Tensor (a test) computes on stash #1 (host)"]


def test_locked_memory_is_unlocked_when_the_device_is_done_and_before_it_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []

    def unregister(address: int) -> None:
        calls.append(ctypes.string_at(address + 4999, 1))

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    slab = _page_locked(5000)
    slab.fill_(7)
    view = slab[:10]
    del slab
    assert not calls
    del view
    assert calls == ["wait", b"\7"]
