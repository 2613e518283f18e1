"""A GPU that is full in the middle of a run: the step goes on in smaller pieces, and adds nothing twice.

There is no GPU here. Instead, one operation that allocates memory raises PyTorch's error before it does
anything: every such operation of a small step in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowres.config import Config
from lowres.data.batches import IGNORED
from lowres.engine import Choice, EngineSettings, LayerwiseEngine
from lowres.engine.pieces import Additions, Size
from lowres.meter import LiveTensors
from lowres.model import Units, empty_units, initialize
from lowres.rooms import GPU, Homes, Rooms
from tests.full import allocates, full
from tests.helpers import CPU, LLAMA3, Recorder, make_batch, make_config, make_optimizer, stored_tensors

LENGTH, SEQUENCES = 8, 4
NAMES = frozenset(("embed", "layers.0", "layers.1", "head"))
EVERYTHING = Homes(NAMES, NAMES, 2, True)


@dataclass(frozen=True)
class Case:
    """sections: of the config. changes: of the settings that it gives. precision: how close gradients must
    be; the sum of the parts is rounded differently."""

    precision: float
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    band: int = 1
    homes: Homes = field(default_factory=Homes)


EXACT, FUSED = {"compute": torch.float64}, {"fused": True}
ADAPTED = {"enabled": True, "rank": 4, "start_step": 0, "dropout": 0.3}
INT8 = {"weights": "int8", "compute": "int8"}
CASES = {
    "plain": Case(1e-12, {}, EXACT),
    "bands on the host": Case(1e-12, {}, EXACT, 2, EVERYTHING),
    "clipped, on the host": Case(1e-12, {"optim": {"grad_clip": 0.1}}, EXACT, 1, EVERYTHING),
    "tied, biases, norms of heads": Case(
        1e-12, {"model": {"tie_embeddings": True, "qkv_bias": True, "qk_norm": True, "n_kv_heads": 1}}, EXACT
    ),
    "adapters with dropout": Case(1e-12, {"relora": ADAPTED, "memory": {"weights": "int8"}}, EXACT),
    "int8 stash on the host": Case(1e-12, {"memory": {"stash_dtype": "int8"}}, EXACT, 1, EVERYTHING),
    "exact forward": Case(
        1e-12, {"memory": {"stash_dtype": "int8", "exact_forward": True}}, EXACT, 1, EVERYTHING
    ),
    "fused": Case(1e-5, {"model": {"qkv_bias": True, "qk_norm": True} | LLAMA3}, FUSED),
    "fused, tied, clipped": Case(
        1e-5, {"model": {"tie_embeddings": True}, "optim": {"grad_clip": 0.1}}, FUSED, 2
    ),
    "fused adapters": Case(1e-5, {"relora": ADAPTED, "memory": {"weights": "int8"}}, FUSED),
    "int8 products": Case(1e-5, {"memory": {**INT8, "compute_wgrad": "dense"}}),
    # the gradient of each part is quantised with scales of its own
    "int8 gradients": Case(0.06, {"memory": INT8}),
    "int8 adapters": Case(1e-5, {"relora": ADAPTED, "memory": INT8}),
    "bf16": Case(0.02, {"memory": {"compute": "bf16"}}),
}


def config_of(case: Case) -> Config:
    sections: dict[str, dict[str, Any]] = {
        "model": {"dim": 32, "n_layers": 2, "n_heads": 2, "ffn_dim": 48, "vocab_size": 40},
        "data": {"seq_len": LENGTH},
        "train": {"batch_tokens": SEQUENCES * LENGTH, "steps": 20},
        "memory": {"loss_chunk": 12},
    }
    for section, keys in case.sections.items():
        sections[section] = sections.get(section, {}) | keys
    return make_config(**sections)


def made(case: Case, micro_batch: int = SEQUENCES) -> tuple[LayerwiseEngine, Recorder]:
    config = config_of(case)
    adapters, rooms = config.relora if config.relora.enabled else None, Rooms(CPU)
    units: Units = empty_units(config.model, config.memory.weights, "fp32", rooms, adapters=adapters)
    initialize(units.values(), 0, CPU)
    for unit in units.values():
        for spec in unit.spec.adapters.values():  # B too, which starts at zero
            value = unit.weights[spec.name].dense(torch.float32)
            value.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    homes = case.homes
    if config.model.tie_embeddings:
        homes = Homes(homes.weights - {"embed"}, homes.state - {"embed"}, homes.stash, homes.carry)
    settings = EngineSettings.of(config, Choice(micro_batch, case.band, homes), CPU, adapters is not None)
    recorder = Recorder()
    settings = replace(settings, **case.changes)
    return LayerwiseEngine(config.model, units, recorder, rooms, settings), recorder


def batch_of(sequences: int = SEQUENCES) -> Tensor:
    batch = make_batch(sequences, LENGTH, 40)
    batch[1, 5:] = IGNORED
    return batch


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[n] - grad).norm() / grad.norm()) for n, grad in wanted.items())


LOSS = 120  # allocations, with which a backward pass begins


def some(name: str, count: int, most: int, step: int = 17) -> list[int]:
    """Numbers of allocations, others in every case: every `step`-th of the first ones, and at most about
    `most` of those that follow."""
    first = list(CASES).index(name) % step
    sparse = max(step, (count - LOSS) // most)
    return [*range(first, min(count, LOSS), step), *range(LOSS + first, count, sparse)]


@pytest.mark.parametrize(
    "name, every",
    [
        *((name, False) for name in CASES),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in CASES),
    ],
)
def test_a_gradient_does_not_depend_on_where_memory_ran_out(name: str, every: bool) -> None:
    """At every allocation of the backward pass, or at some, which are others in every case."""
    case = CASES[name]
    engine, recorder = made(case)
    report = engine.step(batch_of(), 3, 1.0)
    wanted = dict(recorder.grads)
    with full() as counted:
        recorder.grads.clear()
        assert engine.step(batch_of(), 3, 1.0) == report
    assert counted.count > 100
    sizes = set()
    for at in range(counted.count) if every else some(name, counted.count, 14):
        recorder.grads.clear()
        engine._sequences.number, engine._tokens.number = SEQUENCES, 12
        with full(at) as mode:
            found = engine.step(batch_of(), 3, 1.0)
        assert mode.count > at
        assert found.loss == pytest.approx(report.loss, rel=1e-6) and found.skipped == 0
        error = distance(recorder.grads, wanted)
        assert error < case.precision, at
        sizes.add((engine.micro_batch, engine._tokens.number))
    # a micro-batch is halved, or the tokens of a loss, whose last chunk has 32 - 2 * 12 tokens
    assert sizes == {(2, 12), (4, 6), (4, 4)}


@pytest.mark.parametrize("name", ["plain", "bands on the host", "fused", "adapters with dropout"])
def test_nor_on_how_often_it_ran_out(name: str) -> None:
    """Twice, at many distances: in a part, in the part after it, and in another layer."""
    case = CASES[name]
    engine, recorder = made(case)
    with full() as counted:
        engine.step(batch_of(), 3, 1.0)
    wanted = dict(recorder.grads)
    sizes = set()
    for at in some(name, counted.count, 14, 9):
        recorder.grads.clear()
        engine._sequences.number, engine._tokens.number = SEQUENCES, 12
        with full(at, at + 1 + at * 5 % 89):
            engine.step(batch_of(), 3, 1.0)
        assert distance(recorder.grads, wanted) < case.precision, at
        sizes.add(engine.micro_batch)
    assert {1, 4} <= sizes


@pytest.mark.parametrize("name", CASES)
def test_in_the_forward_pass_the_step_starts_again(name: str) -> None:
    """And is, bit for bit, that of a run with the smaller micro-batch."""
    case, sequences = CASES[name], 5
    (engine, recorder), (other, smaller) = made(case), made(case, 2)
    wanted = other.step(batch_of(sequences), 3, 1.0)
    score = other.evaluate(batch_of(sequences))
    with full(method="again") as counted:
        engine.step(batch_of(sequences), 3, 1.0)
    assert counted.count > 50
    for at in some(name, counted.count, 5):
        recorder.grads.clear()
        engine._sequences.number = SEQUENCES
        with full(at, method="again"):
            assert engine.step(batch_of(sequences), 3, 1.0) == wanted
        assert engine.micro_batch == 2
        assert all(torch.equal(grad, smaller.grads[n]) for n, grad in recorder.grads.items())
    # it stays small
    recorder.grads.clear()
    with full(method="again") as mode:
        assert engine.step(batch_of(sequences), 3, 1.0) == wanted
    assert mode.count > counted.count
    assert engine.evaluate(batch_of(sequences)) == score


@pytest.mark.parametrize("name", ["plain", "bands on the host", "fused"])
@pytest.mark.parametrize("method", ["again", "each"])
def test_an_evaluation_goes_on_too(name: str, method: str) -> None:
    engine, _ = made(CASES[name])
    score, (each, _) = engine.evaluate(batch_of()), engine.log_probabilities(batch_of())
    with full(method=method) as counted:
        engine.evaluate(batch_of())
    for at in range(counted.count):
        engine._sequences.number, engine._tokens.number = SEQUENCES, 12
        with full(at, method=method):
            total, count = engine.evaluate(batch_of())
        assert count == score[1] and total == pytest.approx(score[0], rel=1e-6)
        assert (engine.micro_batch, engine._tokens.number) != (SEQUENCES, 12)
    for at in range(0, counted.count, 7):
        engine._sequences.number, engine._tokens.number = SEQUENCES, 12
        with full(at, method=method):
            torch.testing.assert_close(engine.log_probabilities(batch_of())[0], each, rtol=1e-5, atol=1e-5)


class Small(LiveTensors):
    """A GPU with so many bytes."""

    def __init__(self, rooms: Rooms, limit: float) -> None:
        super().__init__(rooms)
        self.limit = limit

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if allocates(func) and self.current[GPU] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result


@pytest.mark.parametrize("name", ["plain", "fused", "bands on the host"])
def test_it_goes_on_with_what_fits(name: str) -> None:
    """With a limit between what micro-batches of 1 and of 8 sequences need. What the attempt that failed had
    in memory is free for the next one."""
    case = CASES[name]
    longer = {"data": {"seq_len": 64}, "train": {"batch_tokens": 512, "steps": 20}}
    case = replace(case, sections={**case.sections, **longer, "memory": {"loss_chunk": 4}})
    batch = make_batch(8, 64, 40)
    peaks, wanted = {}, {}
    for micro_batch in (1, 2, 4, 8):
        engine, recorder = made(case, micro_batch)
        engine.step(batch, 0, 1.0)
        with LiveTensors(engine.rooms) as live:
            live.reset()
            recorder.grads.clear()
            before = live.current[GPU]
            engine.step(batch, 0, 1.0)
        peaks[micro_batch], wanted = live.peak[GPU] - before, dict(recorder.grads)
    assert peaks[8] > 1.5 * peaks[4] > 2 * peaks[2]
    for fitting, larger in ((4, 8), (2, 4), (1, 2)):
        engine, recorder = made(case, 8)
        engine.step(batch, 0, 1.0)
        recorder.grads.clear()
        small = Small(engine.rooms, math.inf)
        with small:
            small.limit = small.current[GPU] + (peaks[fitting] + peaks[larger]) / 2
            engine.step(batch, 0, 1.0)
            assert engine.micro_batch == fitting
            assert distance(recorder.grads, wanted) < case.precision
            recorder.grads.clear()
            with mock.patch.object(Size, "_halve", side_effect=AssertionError):
                engine.step(batch, 1, 1.0)
        assert engine.micro_batch == fitting


@pytest.mark.parametrize("method", ["again", "each"])
def test_what_cannot_be_smaller_fails(method: str) -> None:
    engine, _ = made(CASES["plain"], 1)
    engine._tokens.number = 1
    with full(30, method=method), pytest.raises(torch.OutOfMemoryError):
        engine.step(batch_of(), 0, 1.0)
    assert engine.micro_batch == 1
    engine.step(batch_of(), 0, 1.0)


@pytest.mark.parametrize("method", ["again", "each"])
def test_a_rehearsal_fails(method: str) -> None:
    """Its purpose is to find out whether the plan fits."""
    engine, _ = made(CASES["plain"])
    with full(30, method=method), pytest.raises(torch.OutOfMemoryError):
        engine.step(batch_of(), 0, 1.0, rehearsal=True)
    assert engine.micro_batch == SEQUENCES


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), KeyboardInterrupt()])
def test_other_errors_are_not_retried(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = made(CASES["plain"])
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(engine, "_backward", broken)
    with pytest.raises(type(error)):
        engine.step(batch_of(), 0, 1.0)
    assert len(calls) == 1 and engine.micro_batch == SEQUENCES


def test_weights_are_those_of_an_undisturbed_run() -> None:
    """Of a real optimizer: the layers above have been updated when memory runs out, and are not updated
    again."""
    case = replace(CASES["bands on the host"], sections={"optim": {"name": "adamw", "lr": 1e-3}}, changes={})
    config, results = config_of(case), []
    counts: list[int] = []
    for disturbed in (False, True):
        rooms = Rooms(CPU)
        units = empty_units(config.model, "fp32", "fp32", rooms, NAMES)
        initialize(units.values(), 0, CPU)
        settings = EngineSettings.of(config, Choice(SEQUENCES, 1, EVERYTHING), CPU, adapted=False)
        optimizer = make_optimizer(config, units, rooms, NAMES)
        engine = LayerwiseEngine(config.model, units, optimizer, rooms, settings)
        for step in range(3):
            # the first of the two layers is the last third of the work
            at = [counts[step] * 3 // 4] if disturbed and step == 1 else []
            with full(*at) as mode:
                assert engine.step(batch_of(), step, 1.0).skipped == 0
            counts.append(mode.count)
        assert engine.micro_batch == (2 if disturbed else SEQUENCES)
        results.append(stored_tensors(units))
    for key, value in results[0].items():
        scale = value.abs().max() if value.is_floating_point() else 1
        assert ((value - results[1][key]).abs() <= 1e-4 * scale).all(), key
    assert any(not torch.equal(value, results[1][key]) for key, value in results[0].items())


# the pieces


def test_pieces_are_halved_from_the_one_that_failed() -> None:
    size, done, failing = Size(5), [], {(5, 10): 1, (5, 7): 1}

    def work(piece: slice) -> None:
        key = piece.start, piece.stop
        if failing.get(key):
            failing[key] -= 1
            raise torch.OutOfMemoryError("full")
        done.append(key)

    size.each(13, work)
    assert done == [(0, 5), *((i, i + 1) for i in range(5, 13))]
    assert size.number == 1


def test_every_buffer_gets_every_item_once() -> None:
    additions, buffers = Additions(), list(torch.zeros(2, 8))
    assert additions.lacks(buffers[0])
    additions.done(buffers[0])
    assert additions.lacks(buffers[0])  # outside of pieces, everything is added
    additions.begin()
    additions.end = 4
    additions.done(buffers[0])
    for end, lacking in ((2, [False, True]), (4, [False, True]), (6, [True, True])):
        additions.end = end
        assert [additions.lacks(buffer) for buffer in buffers] == lacking
        additions.done(buffers[1])
    additions.begin()
    assert all(additions.lacks(buffer) for buffer in buffers)
