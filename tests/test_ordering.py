"""Copies beside the computation are in order: nothing is read before it is written, or overwritten too soon.

Found without a GPU, by `tests.races`. That the detector finds anything is shown by taking away one wait at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres import checkpoint
from lowres.config import Config
from lowres.engine import Engine, make_engine
from lowres.model import Units, empty_units, initialize
from lowres.optim import make_optimizer
from lowres.relora import Relora
from lowres.rooms import Homes, Rooms
from tests.helpers import CPU, RELORA, make_batch, make_config
from tests.races import Detector

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

    def batch(self, sequences: int) -> Tensor:
        return self.detector.on_host(make_batch(sequences, LENGTH, VOCAB, seed=self.steps))

    def step(self, sequences: int = 5, rehearsal: bool = False) -> None:
        before = len(self.detector.answers)
        self.engine.step(self.batch(sequences), self.steps, 1.0, rehearsal)
        self.steps += 1
        found = self.detector.answers[before:]
        assert len(found) == 1, f"the host waits inside a step: {found}"
        self.relora.readings(self.steps)

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
