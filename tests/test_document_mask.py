"""Documents that share a sequence and do not see each other (data.document_mask): the numbers of a packed
step are those of its documents one by one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lowres import metrics
from lowres.config import Config
from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.engine import (
    AutogradEngine,
    Choice,
    Engine,
    EngineSettings,
    LayerwiseEngine,
    StepReport,
    make_engine,
)
from lowres.engine.common import apart, split
from lowres.kernels import forms, rotary
from lowres.memory import make_plan
from lowres.meter import LiveTensors
from lowres.model import Llama, Units, empty_units, initialize, lengths_of, rotate, starting_with
from lowres.rooms import GPU, Homes, Rooms
from lowres.runs import open_run
from lowres.speed.subject import Subject
from lowres.storage import ADAPTER
from tests.helpers import CPU, ROOMS, Recorder, dense_copy, lowres_here, make_config
from tests.helpers import make_units as units_of
from tests.measuring import build, held, phases, planned
from tests.test_model import VARIANTS, reference

BOS = 1
START = starting_with(BOS)
SEQUENCES, LENGTH = 7, 32


def packed(seed: int = 0, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Windows [S, length + 1]. The first has one document from edge to edge, the second none that ends in it,
    the third one after every token; one ends with the last input, one with the last target; one is padded."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(3, 300, (sequences, length + 1), generator=generator)
    batch[torch.rand(batch.shape, generator=generator) < 0.15] = BOS
    batch[:2] = batch[:2].clamp(min=3)
    batch[0, 0] = BOS
    batch[2] = BOS
    batch[3, length - 1], batch[4, length] = BOS, BOS
    batch[5, 20:] = IGNORED
    return batch


def one_by_one(batch: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[int, slice]]]:
    """Tokens and targets of each document that the inputs of windows show, and where it is."""
    for row, window in enumerate(batch.tolist()):
        first = 0
        for at in range(1, len(window)):
            if window[at] == BOS or at == len(window) - 1:
                targets = window[first + 1 : at + 1]
                targets[-1] = IGNORED if targets[-1] == BOS else targets[-1]
                tokens = torch.tensor(window[first:at]).clamp(min=0)
                yield tokens, torch.tensor(targets), (row, slice(first, at))
                first = at


def by_transformers(
    variant: str, weights: dict[str, Tensor], batch: Tensor
) -> tuple[float, int, dict[str, Tensor]]:
    """Mean loss, number of targets and gradients, in fp64, of the documents each as a batch of its own."""
    model = reference(VARIANTS[variant]).double()
    model.load_state_dict(weights, strict=False)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, targets, _ in one_by_one(batch):
        logits = model(tokens[None]).logits[0]
        total = total + F.cross_entropy(logits, targets, reduction="sum")
        count += int((targets != IGNORED).sum())
    (total / count).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()) / count, count, grads


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of a gradient, relative to its norm."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - w).double().norm() / w.norm().clamp(min=1e-300)) for n, w in wanted.items())


EVERYWHERE = Homes(frozenset({"embed", "layers.0", "layers.1", "head"}), stash=9, carry=True)
ENGINES: dict[str, tuple[type, dict[str, Any]]] = {
    "layerwise": (LayerwiseEngine, {}),
    "ragged": (LayerwiseEngine, {"micro_batch": 3}),
    "one sequence": (LayerwiseEngine, {"micro_batch": 1, "band": 3}),
    "on the host": (LayerwiseEngine, {"micro_batch": 2, "band": 2, "homes": EVERYWHERE}),
    "clipped": (LayerwiseEngine, {"micro_batch": 3, "grad_clip": 1e9}),
    "exact forward": (LayerwiseEngine, {"micro_batch": 3, "exact_forward": True}),
    "fused": (LayerwiseEngine, {"micro_batch": 3, "fused": True, "band": 2}),
    "autograd": (AutogradEngine, {"micro_batch": 3}),
}


@pytest.mark.parametrize("variant", ["grouped", "tied"])
@pytest.mark.parametrize("name", ENGINES)
def test_loss_and_gradients_are_those_of_separate_sequences(name: str, variant: str) -> None:
    """In fp32, against transformers in fp64."""
    make, keys = ENGINES[name]
    if variant == "tied" and "homes" in keys:
        keys = keys | {"homes": Homes(stash=9, carry=True)}  # a tied embedding lives on the GPU
    config, batch = VARIANTS[variant], packed()
    units = units_of(config, dtype=torch.float32)
    loss, count, wanted = by_transformers(variant, dense_copy(units), batch)
    recorder = Recorder()
    settings = replace(EngineSettings(SEQUENCES, torch.float32, loss_chunk=50, starts=START), **keys)
    engine = make(config, units, recorder, Rooms(CPU), settings)
    assert engine.step(batch, 0, 1.0).loss == pytest.approx(loss, rel=1e-6)
    assert furthest(recorder.grads, wanted) < 1e-6
    assert engine.evaluate(batch) == (pytest.approx(loss * count, rel=1e-6), count)
    each, _ = engine.log_probabilities(batch)
    oracle, inside = Llama(config).double(), torch.zeros_like(each, dtype=torch.bool)
    oracle.load_state_dict(dense_copy(units))
    for tokens, targets, (row, where) in one_by_one(batch):
        logs = oracle(tokens[None])[0].log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        wanted = logs.masked_fill(targets == IGNORED, 0.0)
        torch.testing.assert_close(each[row, where].double(), wanted.detach(), rtol=1e-5, atol=1e-5)
        inside[row, where] = True
    assert inside.all()


def settings_of(config: Config, apart: bool, **changes: Any) -> EngineSettings:
    settings = EngineSettings.of(config, Choice(3), CPU, config.relora.enabled, START if apart else None)
    return replace(settings, **changes)


def both_ways(
    engine: Callable[[bool, Recorder], Engine], batch: Tensor
) -> tuple[StepReport, dict[str, Tensor], float, dict[str, Tensor]]:
    """Loss and gradients of a packed step, and of steps of the same engine with one document each."""
    recorder = Recorder()
    report = engine(True, recorder).step(batch, 4, 1.0)
    total, count, wanted = 0.0, 0, {name: torch.zeros_like(g) for name, g in recorder.grads.items()}
    for tokens, targets, _ in one_by_one(batch):
        own, number = Recorder(), int((targets != IGNORED).sum())
        if number:
            # a target that does not count may be any other token that is ignored
            window = torch.cat((tokens[:1], targets))[None]
            total += engine(False, own).step(window, 4, 1.0).loss * number
            count += number
            wanted = {name: grad + number * own.grads[name] for name, grad in wanted.items()}
    return report, recorder.grads, total / count, {name: g / count for name, g in wanted.items()}


@pytest.mark.parametrize("name", [name for name, (_, keys) in ENGINES.items() if "fused" not in keys])
def test_and_to_the_last_places_of_fp64(name: str) -> None:
    make, keys = ENGINES[name]
    config = VARIANTS["qwen3"]
    units = units_of(config, dtype=torch.float64)
    settings = replace(EngineSettings(SEQUENCES, torch.float64), **keys)

    def engine(apart: bool, recorder: Recorder) -> Engine:
        own: Engine = make(
            config, units, recorder, Rooms(CPU), replace(settings, starts=START if apart else None)
        )
        return own

    report, found, loss, wanted = both_ways(engine, packed())
    assert report.loss == pytest.approx(loss, rel=1e-12)
    assert furthest(found, wanted) < 1e-12


LOSSY: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "INT8 weights": ({"weights": "int8"}, {"compute": torch.float64}, 1e-12),
    "INT8 weights, padded": ({"weights": "int8"}, {"compute": torch.float64, "pad": 16}, 1e-12),
    "INT8 stash": ({"stash_dtype": "int8"}, {"compute": torch.float64, "band": 2}, 1e-12),
    "INT8 stash, fused": ({"stash_dtype": "int8", "weights": "fp32"}, {"fused": True}, 1e-2),
    "bf16": ({"weights": "bf16", "compute": "bf16"}, {}, 3e-2),
    "INT8 products": ({"weights": "int8", "compute": "int8", "compute_wgrad": "dense"}, {}, 1e-2),
}


@pytest.mark.parametrize("name", LOSSY)
def test_and_with_formats_that_lose_something(name: str) -> None:
    """What is rounded is rounded token by token, so it is the same in a sequence of its own. fp32 and bf16
    sums have another order, and a code next to a border falls on its other side."""
    memory, changes, tolerance = LOSSY[name]
    config, batch = make_config(memory=memory), packed()
    units = empty_units(config.model, config.memory.weights, config.memory.embeddings_kept_in, ROOMS)
    initialize(units.values(), 0, CPU)

    def engine(apart: bool, recorder: Recorder) -> LayerwiseEngine:
        return LayerwiseEngine(config.model, units, recorder, ROOMS, settings_of(config, apart, **changes))

    report, found, loss, wanted = both_ways(engine, batch)
    assert report.loss == pytest.approx(loss, rel=min(tolerance, 1e-3))
    assert furthest(found, wanted) < tolerance


def adapted(config: Config) -> Units:
    """With adapters whose B is not zero."""
    units = empty_units(config.model, "fp32", "fp32", ROOMS, adapters=config.relora)
    initialize(units.values(), 0, CPU)
    for unit in units.values():
        for spec in unit.spec.tensors:
            if spec.kind == ADAPTER:
                value = unit.weights[spec.name].dense(torch.float32)
                value.normal_(std=0.05, generator=torch.Generator().manual_seed(len(spec.name)))
    return units


def test_and_with_adapters() -> None:
    config = make_config(relora={"enabled": True, "rank": 4}, memory={"weights": "fp32"})
    units = adapted(config)

    def engine(apart: bool, recorder: Recorder) -> LayerwiseEngine:
        settings = settings_of(config, apart, compute=torch.float64)
        return LayerwiseEngine(config.model, units, recorder, ROOMS, settings)

    report, found, loss, wanted = both_ways(engine, packed())
    assert report.loss == pytest.approx(loss, rel=1e-12) and furthest(found, wanted) < 1e-12


def test_dropout_of_adapters_has_the_same_masks_in_every_engine() -> None:
    """They are named by sequence and element, which packing does not change."""
    config = make_config(relora={"enabled": True, "rank": 4, "dropout": 0.3}, memory={"weights": "fp32"})
    units, found = adapted(config), []
    for engine in ("layerwise", "autograd"):
        recorder = Recorder()
        memory = config.memory.model_copy(update={"engine": engine})
        data = config.data.model_copy(update={"document_mask": True})
        own = config.model_copy(update={"memory": memory, "data": data})
        report = make_engine(own, units, recorder, ROOMS, Choice(3), START).step(packed(), 2, 1.0)
        found.append((report.loss, recorder.grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert furthest(found[0][1], found[1][1]) < 1e-6


def test_another_document_changes_nothing() -> None:
    """Not one bit of the logits of the others; and only what is after it in the document itself."""
    config, batch = VARIANTS["grouped"], packed()[:, :-1].clamp(min=0)
    model = Llama(config).double()
    model.load_state_dict(dense_copy(units_of(config)))
    documents = lengths_of(START.where(batch))
    with torch.no_grad():
        before = model(batch, documents=documents)
        row, own = max(
            (place for *_, place in one_by_one(batch) if place[1].start), key=lambda p: p[1].stop - p[1].start
        )
        at = own.start + 3
        assert at < own.stop < LENGTH
        changed = batch.clone()
        changed[row, at] = 299 - batch[row, at]
        after = model(changed, documents=documents)
    same = (before == after).all(-1)
    wanted = torch.ones_like(same)
    wanted[row, at : own.stop] = False
    assert torch.equal(same, wanted)


@pytest.mark.parametrize("make", [LayerwiseEngine, AutogradEngine])
def test_the_next_token_follows_from_the_last_document(make: type) -> None:
    config, tokens = VARIANTS["plain"], packed()[6:7, :25]
    units = units_of(config)
    settings = EngineSettings(4, torch.float32)
    last = int((tokens[0] == BOS).nonzero()[-1])
    whole = make(config, units, None, ROOMS, settings)
    apart = make(config, units, None, ROOMS, replace(settings, starts=START))
    torch.testing.assert_close(apart.logits(tokens), whole.logits(tokens[:, last:]), rtol=1e-5, atol=1e-5)
    assert (apart.logits(tokens) - whole.logits(tokens)).abs().max() > 1e-2


def test_a_token_that_also_ends_the_document_before_is_predicted() -> None:
    batch = packed()
    whole, targets = split(batch, len(batch), ROOMS), inputs_and_targets(batch)[1]
    _, ends, count, documents = apart(batch, whole, ROOMS, starting_with(BOS, predicted=True))
    assert torch.equal(ends[0], targets) and count == int((targets != IGNORED).sum())
    _, kept, fewer, same = apart(batch, whole, ROOMS, START)
    assert fewer == count - int((targets == BOS).sum()) == int((kept[0] != IGNORED).sum())
    assert documents == same


def test_lengths() -> None:
    starts = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    assert lengths_of(starts) == [(4,), (2, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize("compiled", [False, True])
def test_rotation_with_a_row_for_every_token(compiled: bool) -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = (torch.cat((t, t), -1) for t in (torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4)))
    wanted = rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)
    with forms.using("cpu", compiled):
        rotary.rotate(x, cos, sin)
    torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("memory", [{}, {"kernels": "fused", "compute": "bf16"}, {"engine": "autograd"}])
def test_the_plan_knows_it(memory: dict[str, object]) -> None:
    """Rows of the rotary tables for every token, and attention that is put together from documents. More and
    shorter documents take no more."""
    model = {"dim": 256, "n_layers": 3, "n_heads": 4, "ffn_dim": 688, "vocab_size": 500}
    config = make_config(
        model=model,
        memory=memory,
        data={"seq_len": 128, "document_mask": True},
        train={"batch_tokens": 8 * 128, "micro_batch": 4},
    )
    plan = make_plan(config, CPU)
    rooms = Rooms(CPU)
    with forms.using("cpu", "kernels" in memory), LiveTensors(rooms) as live:
        units, engine = build(config, plan, rooms, adapted=False)
        initialize(units.values(), 0, CPU)
        engine.reserve(8, 128, training=True)
        live.reset()
        engine.step(packed(0, 8, 128), 0, 1.0)
    without = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": False})})
    rows = 2 * 4 * 4 * 128 * config.model.head_width
    assert plan.peak(GPU) >= make_plan(without, CPU).peak(GPU) + rows
    assert live.peak[GPU] == pytest.approx(plan.peak(GPU), rel=0.02)
    if config.memory.engine == "layerwise":
        found, wanted = held(units, plan.choice.homes, rooms) | phases(live, rooms), planned(plan)
        assert found["backward", GPU] == pytest.approx(wanted["backward", GPU], rel=0.02)


def test_a_benchmark_says_that_it_is_without() -> None:
    subject = Subject(make_config(data={"document_mask": True}), CPU)
    assert any(note.startswith("data.document_mask: ") for note in subject.notes)
    assert subject.step(None, 0)[1] > 0


def test_a_run_with_it(config: Path, tmp_path: Path) -> None:
    """It learns, its model is evaluated in the same way, and a resumed run cannot change its mind."""
    run = tmp_path / "run"
    keys = ["train.steps=6", "train.eval_every=3", "optim.name=adamw", "optim.lr=0.01"]
    options = [part for key in (*keys, "data.document_mask=true") for part in ("--set", key)]
    lowres_here("train", config, *options, "--run", run)
    scores = [r["val_loss"] for r in metrics.read(run / "metrics.jsonl") if "val_loss" in r]
    assert scores[-1] < scores[0]
    _, engine, tokenizer = open_run(run)
    batch = torch.tensor([[tokenizer.bos_id, 5, 6, tokenizer.bos_id, 7, 8]])
    assert engine.evaluate(batch)[1] == 4
    done = lowres_here("train", config, *options, "--run", run, "--resume", "--set", "train.steps=7")
    assert "step 7" in done.stderr
    options = [part for key in (*keys, "train.steps=8") for part in ("--set", key)]
    refused = lowres_here("train", config, *options, "--run", run, "--resume", code=2)
    assert refused.stderr.startswith("lowres: data.document_mask: ")
    assert "may not change on resume" in refused.stderr
