"""The layer-major engine compared with the autograd engine, and the laws of a step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lowres.catalogue import RULES
from lowres.config import ModelConfig
from lowres.data.batches import IGNORED
from lowres.engine import (
    AutogradEngine,
    Choice,
    EngineSettings,
    LayerwiseEngine,
    StepReport,
    make_engine,
)
from lowres.engine.common import Limits
from lowres.meter import LiveTensors
from lowres.model import Llama, Units, empty_units, initialize, unit_specs
from lowres.optim import Optimizer
from lowres.rooms import Homes, Rooms
from lowres.storage import Unit
from lowres.target import planned_for
from tests.helpers import (
    CPU,
    LLAMA3,
    ROOMS,
    SMALL,
    Recorder,
    dense_copy,
    make_batch,
    make_config,
    make_optimizer,
    make_units,
)

# also those that come later
OPTIONS = [key for key, field in ModelConfig.model_fields.items() if field.annotation is bool]
EVERY_OPTION: dict[str, object] = {"n_kv_heads": 2, **LLAMA3, **dict.fromkeys(OPTIONS, True)}
MODELS = {
    "plain": SMALL,
    "grouped": SMALL.model_copy(update={"n_kv_heads": 2}),
    "qwen2": SMALL.model_copy(update={"n_kv_heads": 2, "qkv_bias": True}),
    "qwen3": SMALL.model_copy(update={"n_kv_heads": 2, "qk_norm": True} | LLAMA3),
    **{key: SMALL.model_copy(update={key: True}) for key in OPTIONS},
}


def gradients(
    engine_type: type,
    config: ModelConfig,
    units: Units,
    micro_batch: int,
    dtype: torch.dtype,
    batch: Tensor,
) -> tuple[StepReport, dict[str, Tensor]]:
    recorder = Recorder()
    engine = engine_type(config, units, recorder, ROOMS, EngineSettings(micro_batch, dtype, loss_chunk=50))
    return engine.step(batch, 0, 1.0), recorder.grads


@pytest.mark.parametrize("micro_batch", [7, 4, 2, 3])  # 1, 2 and 4 micro-batches, the last one ragged
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_equal_autograd(model: str, dtype: torch.dtype, tolerance: float, micro_batch: int) -> None:
    config = MODELS[model]
    units = make_units(config, dtype=dtype)
    batch = make_batch()
    batch[3, 10:] = IGNORED
    report, grads = gradients(LayerwiseEngine, config, units, micro_batch, dtype, batch)
    wanted_report, wanted = gradients(AutogradEngine, config, units, 7, dtype, batch)
    assert abs(report.loss - wanted_report.loss) < tolerance * wanted_report.loss
    assert abs(report.grad_norm - wanted_report.grad_norm) < 2 * tolerance * wanted_report.grad_norm
    assert grads.keys() == wanted.keys() == {s.name for unit in unit_specs(config) for s in unit.tensors}
    for name, grad in grads.items():
        assert grad.dtype == dtype
        error = float((grad - wanted[name]).norm() / wanted[name].norm())
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("adapted", [False, True])
def test_padding_changes_nothing(adapted: bool) -> None:
    """Working copies with more rows and columns between the matrices of the MLP, which is 172 wide here."""
    relora: dict[str, object] = {"enabled": adapted, "rank": 4, "start_step": 0, "dropout": 0.2}
    config = make_config(relora=relora, memory={"weights": "int8"})
    found: list[tuple[StepReport, dict[str, Tensor], tuple[float, int], Tensor]] = []
    for pad in (1, 16, 500):
        units = empty_units(config.model, "int8", "fp32", ROOMS, adapters=config.relora if adapted else None)
        initialize(units.values(), 0, CPU)
        for unit in units.values():
            for spec in unit.spec.adapters.values():  # B too, which starts at zero
                value = unit.weights[spec.name].dense(torch.float32)
                value.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        settings = EngineSettings.of(config, Choice(3, 2), CPU, adapted)
        settings = replace(settings, pad=pad, compute=torch.float64)  # so that everything is copied
        recorder = Recorder()
        engine = LayerwiseEngine(config.model, units, recorder, ROOMS, settings)
        report = engine.step(make_batch(), 4, 1.0)
        found.append((report, recorder.grads, engine.evaluate(make_batch(5)), engine.logits(make_batch(2))))
        shapes = {
            r: tuple(w.value.shape)
            for r, w in engine._working([units["layers.0"]])[0].items()
            if r in ("gate", "down")
        }
        wide = -(-172 // pad) * pad
        assert shapes == {"gate": (wide, 64), "down": (64, wide)}
    for report, grads, scores, logits in found[1:]:
        assert report.loss == pytest.approx(found[0][0].loss, rel=1e-12)
        assert scores[0] == pytest.approx(found[0][2][0], rel=1e-12)
        torch.testing.assert_close(logits, found[0][3], rtol=1e-12, atol=1e-12)
        for name, grad in grads.items():
            wanted = found[0][1][name]
            assert float((grad - wanted).norm()) <= 1e-12 * float(wanted.norm()), name


def test_loss_is_the_mean_over_valid_targets() -> None:
    """Not the mean of the micro-batches' means, which differs if their numbers of targets differ."""
    units = make_units(SMALL)
    batch = make_batch()
    batch[0, 5:] = IGNORED
    batch[1, 2:] = IGNORED
    engine = LayerwiseEngine(SMALL, units, Recorder(), ROOMS, EngineSettings(2, torch.float32))
    total, count = engine.evaluate(batch)
    assert count == 5 * 32 + 4 + 1
    assert abs(engine.step(batch, 0, 1.0).loss - total / count) < 1e-6


def test_gradients_accumulate_in_fp32_under_bf16_compute() -> None:
    """The sum of 64 gradients of one sequence each is as exact as one micro-batch of all."""
    units = make_units(SMALL)
    batch = make_batch(64)
    _, exact = gradients(
        LayerwiseEngine, SMALL, make_units(SMALL, dtype=torch.float64), 64, torch.float64, batch
    )
    errors = {}
    for micro_batch in (64, 1):
        _, grads = gradients(LayerwiseEngine, SMALL, units, micro_batch, torch.bfloat16, batch)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        errors[micro_batch] = {n: float((g - exact[n]).norm() / exact[n].norm()) for n, g in grads.items()}
    for name, error in errors[1].items():
        assert error < 0.03
        assert error < 1.3 * errors[64][name] + 1e-3, name


@pytest.mark.parametrize("model", ["plain", "every option"])
@pytest.mark.parametrize(
    "name",
    [
        *("adamw", "adam-mini", "apollo-mini", "apollo", "apollo svd", "galore", "fira", "sgd"),
        *("adamw limited", "sgd limited"),
    ],
)
def test_engines_reach_the_same_weights(name: str, model: str) -> None:
    optimizer_name, _, variant = name.partition(" ")
    optim: dict[str, object] = {"name": optimizer_name, "lr": 1e-3, "eps": 1e-5}
    if optimizer_name not in ("adamw", "adam-mini", "sgd"):
        optim["refresh_every"] = 4
    if variant == "svd":
        optim["projection"] = "svd"
    if variant == "limited":
        optim["limiter"] = 1.01
    config = make_config(optim=optim, model=EVERY_OPTION if model == "every option" else {})
    results = []
    for engine_type, micro_batch in ((LayerwiseEngine, 2), (AutogradEngine, 7)):
        units = make_units(config.model, dtype=torch.float64)
        optimizer = make_optimizer(config, units)
        for state in (state for unit in units.values() for state in unit.state.values()):
            state.update({k: t.double() for k, t in state.items() if t.is_floating_point()})
        engine = engine_type(
            config.model, units, optimizer, ROOMS, EngineSettings(micro_batch, torch.float64)
        )
        for step in range(10):
            engine.step(make_batch(seed=step), step, 1.0)
        results.append(dense_copy(units))
    start = dense_copy(make_units(config.model))
    for key, value in results[0].items():
        moved = (value - start[key]).norm()
        assert moved > 0
        assert float((value - results[1][key]).norm() / moved) < 1e-6, key


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("homes", [Homes(), Homes(stash=2, carry=True)])
def test_clipping_is_the_same_rule_in_both_engines(model: str, homes: Homes) -> None:
    """Torch's own clipping is the oracle."""
    config, clip = MODELS[model], 0.05
    wanted = Recorder()
    units = make_units(config, dtype=torch.float64)
    whole = EngineSettings(7, torch.float64)
    report = AutogradEngine(config, units, wanted, ROOMS, whole).step(make_batch(), 0, 1.0)
    parameters = [torch.nn.Parameter(grad) for grad in wanted.grads.values()]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    assert norm > 10 * clip and abs(report.grad_norm - norm) < 1e-9
    one, other = Recorder(), Recorder()
    settings = EngineSettings(2, torch.float64, band=2, homes=homes, grad_clip=clip)
    layerwise = LayerwiseEngine(config, units, one, Rooms(CPU), settings)
    settings = EngineSettings(3, torch.float64, grad_clip=clip)
    autograd = AutogradEngine(config, units, other, ROOMS, settings)
    engines: list[tuple[LayerwiseEngine | AutogradEngine, Recorder]] = [(layerwise, one), (autograd, other)]
    for engine, clipped in engines:
        found = engine.step(make_batch(), 0, 1.0)
        assert abs(found.grad_norm - norm) < 1e-9 and abs(found.loss - report.loss) < 1e-9
        assert not found.skipped
        for name, parameter in zip(wanted.grads, parameters, strict=True):
            assert parameter.grad is not None
            error = float((clipped.grads[name] - parameter.grad).norm() / parameter.grad.norm())
            assert error < 1e-9, name
        # a norm below the limit changes nothing
        engine.settings = replace(engine.settings, grad_clip=1e6)
        clipped.grads.clear()
        engine.step(make_batch(), 0, 1.0)
        for name, grad in wanted.grads.items():
            assert float((clipped.grads[name] - grad).norm() / grad.norm()) < 1e-9, name
    # and a loss that is not finite skips everything
    units["head"].weights["model.norm.weight"].dense(torch.float64)[3] = torch.nan
    for engine, clipped in engines:
        clipped.grads.clear()
        assert engine.step(make_batch(), 0, 1.0).skipped == config.n_layers + 2


@pytest.mark.parametrize("name", ["layerwise", "autograd"])
def test_the_config_clips(name: str) -> None:
    config = make_config(memory={"engine": name}, optim={"grad_clip": 0.5})
    engine = make_engine(config, make_units(config.model), Recorder(), ROOMS, Choice(2))
    assert isinstance(engine, LayerwiseEngine | AutogradEngine) and engine.settings.grad_clip == 0.5


@pytest.mark.parametrize("weights", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("engine", ["layerwise", "autograd"])
def test_every_format_learns_a_batch(engine: str, weights: str) -> None:
    config = make_config(
        model={"n_layers": 1}, memory={"engine": engine, "weights": weights}, optim={"lr": 5e-3}
    )
    units = make_units(config.model, weights)
    optimizer = make_optimizer(config, units)
    made = make_engine(config, units, optimizer, ROOMS, Choice(3))
    losses = [made.step(make_batch(), step, 1.0).loss for step in range(30)]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("weights", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", RULES)
def test_every_optimizer_learns_a_batch(name: str, weights: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    lr = {"adamw": 3e-3, "adamw8bit": 3e-3, "adam-mini": 3e-3, "sgd": 0.1}.get(name, 5e-3)
    config = make_config(model={"n_layers": 1}, memory={"weights": weights}, optim={"name": name, "lr": lr})
    units = make_units(config.model, weights)
    made = make_engine(config, units, make_optimizer(config, units), ROOMS, Choice(3))
    losses = [made.step(make_batch(), step, 1.0).loss for step in range(30)]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 1
    dtypes = {t.dtype for t in units["layers.0"].state["model.layers.0.mlp.up_proj.weight"].values()}
    assert (torch.uint8 in dtypes) == (name == "adamw8bit")


@pytest.mark.parametrize("engine_type", [LayerwiseEngine, AutogradEngine])
def test_a_loss_that_is_not_finite_changes_nothing(engine_type: type) -> None:
    config = make_config(optim={"weight_decay": 0.1})
    units = make_units(config.model, "fp32")
    optimizer = make_optimizer(config, units)
    engine = engine_type(config.model, units, optimizer, ROOMS, EngineSettings(4, torch.float32))
    engine.step(make_batch(), 0, 1.0)
    norm = units["head"].weights["model.norm.weight"].dense(torch.float32)
    kept = float(norm[3])
    norm[3] = torch.nan
    before = dense_copy(units)
    state = {n: t.clone() for unit in units.values() for n, t in unit.tensors().items()}
    report = engine.step(make_batch(seed=1), 1, 1.0)
    assert report.skipped == config.model.n_layers + 2
    for name, value in dense_copy(units).items():
        assert torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)), name
    for unit in units.values():
        for name, tensor in unit.tensors().items():
            assert torch.equal(tensor.nan_to_num(9), state[name].nan_to_num(9)), name
    norm[3] = kept
    assert engine.step(make_batch(seed=1), 2, 1.0).skipped == 0
    assert all(unit.updates is not None and int(unit.updates) == 2 for unit in units.values())


def test_a_gradient_that_is_not_finite_ends_the_updates_there() -> None:
    config = make_config()
    units = make_units(config.model)

    class Poison(Optimizer):
        """After layer 2 is updated, put a value that is not finite into layer 1."""

        def update(self, unit: Unit, *arguments: Any) -> None:
            super().update(unit, *arguments)
            if unit.spec.name == "layers.2":
                units["layers.1"].weights["model.layers.1.mlp.up_proj.weight"].dense(torch.float32)[0, 0] = (
                    torch.inf
                )

    optimizer = Poison(config.optim, config.model, 0)
    optimizer.attach(units.values(), ROOMS)
    engine = LayerwiseEngine(config.model, units, optimizer, ROOMS, EngineSettings(4, torch.float32))
    before = dense_copy(units)
    report = engine.step(make_batch(), 0, 1.0)
    assert report.skipped == 3  # layers 1 and 0, embedding
    after = dense_copy(units)
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        assert after[name].isfinite().all() and not torch.equal(after[name], before[name])
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ):
        assert torch.equal(after[name], before[name])


def test_gradient_memory_does_not_grow_with_depth() -> None:
    """The temporary memory of a step is the same for 2 and for 8 layers."""
    extra = []
    for layers in (2, 8):
        config = make_config(model={"n_layers": layers, "dim": 128, "ffn_dim": 512})
        units = make_units(config.model, "int8")
        with LiveTensors() as live:
            optimizer = make_optimizer(config, units)
            engine = make_engine(config, units, optimizer, ROOMS, Choice(2))
            engine.step(make_batch(), 0, 1.0)
            live.reset()
            before = live.current["gpu"]
            engine.step(make_batch(), 1, 1.0)
        extra.append(live.peak["gpu"] - before)
    assert extra[0] > 0
    assert abs(extra[1] - extra[0]) < 0.02 * extra[0]


def test_gradient_buffer_is_one_unit() -> None:
    config = make_config(model={"n_layers": 8}).model
    engine = LayerwiseEngine(config, make_units(config), Recorder(), ROOMS, EngineSettings(2, torch.float32))
    pointers = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for g in engine._grads.values()
        for t in g.values()
    }
    layer = sum(spec.numel for spec in unit_specs(config)[1].tensors)
    assert list(pointers.values()) == [4 * layer]


@pytest.mark.parametrize("engine_type", [LayerwiseEngine, AutogradEngine])
def test_logits_and_evaluation_do_not_need_an_optimizer(engine_type: type) -> None:
    units = make_units(SMALL)
    engine = engine_type(SMALL, units, None, ROOMS, EngineSettings(4, torch.float32))
    batch = make_batch()
    logits = engine.logits(batch[:, :-1])
    assert logits.shape == (7, 300) and logits.dtype == torch.float32
    total, count = engine.evaluate(batch[:, -2:])
    alone = engine.logits(batch[:, -2:-1])
    wanted = torch.nn.functional.cross_entropy(alone, batch[:, -1], reduction="sum")
    assert count == 7 and abs(total - float(wanted)) < 1e-3


SCORED: dict[str, tuple[type, str, dict[str, Any], float]] = {
    "layerwise": (LayerwiseEngine, "fp32", {}, 1e-5),
    "fused": (LayerwiseEngine, "fp32", {"fused": True}, 1e-5),
    "INT8 products": (LayerwiseEngine, "int8", {"fused": True, "int8": True}, 0.05),
    "bf16": (LayerwiseEngine, "bf16", {"compute": torch.bfloat16}, 0.05),
    "autograd": (AutogradEngine, "int8", {}, 1e-5),
}


@pytest.mark.parametrize("name", SCORED)
def test_log_probabilities_are_those_of_float64(name: str) -> None:
    """And their sum is the loss of the evaluation."""
    make, kind, more, tolerance = SCORED[name]
    config, batch = SMALL.model_copy(update={"tie_embeddings": True}), make_batch()
    batch[3, 10:] = IGNORED
    units = make_units(config, kind)
    settings = replace(EngineSettings(3, torch.float32, loss_chunk=50), **more)
    engine = make(config, units, None, ROOMS, settings)
    oracle = Llama(config).double()
    oracle.load_state_dict(dense_copy(units))
    with torch.no_grad():
        logs = oracle(batch[:, :-1].clamp(min=0)).log_softmax(2)
    batch[:3, -1] = logs[:3, -1].argmax(1)  # what the model would say
    targets = batch[:, 1:]
    each, likeliest = engine.log_probabilities(batch)
    assert each.dtype == torch.float32 and each.shape == targets.shape == likeliest.shape
    wanted = logs.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0].masked_fill(targets == IGNORED, 0.0)
    torch.testing.assert_close(each.double(), wanted, rtol=0, atol=tolerance)
    assert torch.equal(likeliest, logs.argmax(2) == targets) and likeliest.sum() >= 3
    total, count = engine.evaluate(batch)
    assert count == 6 * 32 + 9 and float(-each.double().sum()) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("method", ["evaluate", "log_probabilities"])
def test_full_logits_never_exist(method: str) -> None:
    config = SMALL.model_copy(update={"vocab_size": 20000})
    settings = EngineSettings(8, torch.float32, loss_chunk=16)
    engine = LayerwiseEngine(config, make_units(config), Recorder(), ROOMS, settings)
    with LiveTensors() as live:
        getattr(engine, method)(make_batch(32))
    assert 0 < live.peak["gpu"] < 0.2 * 32 * 32 * 20000 * 4


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "apollo-mini", "galore"])
def test_a_step_is_enqueued_without_asking_the_device(name: str) -> None:
    """Reading a number from a tensor without memory raises, so a wait for the device is found. GaLore reads
    which projection its state holds in the first step of a process."""
    config = make_config(
        optim={"name": name, "grad_clip": 1.0, "weight_decay": 0.1}, memory={"weights": "int8", "band": 2}
    )
    homes = Homes(frozenset(("layers.1",)), frozenset(("layers.0", "head")), 1, True)
    with planned_for("cuda"), FakeTensorMode():
        rooms = Rooms(CPU)
        units = empty_units(config.model, "int8", "bf16", rooms, homes.weights)
        optimizer = make_optimizer(config, units, rooms, homes.state)
        engine = make_engine(config, units, optimizer, rooms, Choice(2, 2, homes))
        assert isinstance(engine, LayerwiseEngine)
        batch = torch.zeros(4, 32, dtype=torch.int64)
        if name == "galore":
            with pytest.raises(DataDependentOutputException):
                engine.enqueue(batch, batch, 64, 0, 1.0, rehearsal=False)
        else:
            limits = Limits(1.0, 10.0)
            found = engine.enqueue(batch, batch, 64, 0, 1.0, rehearsal=False, limits=limits)
            assert len(found) == 3 + len(units)
