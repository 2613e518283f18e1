"""Steps that multiply INT8 codes: their gradients, their laws, and runs from the command line."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.config import Config
from lowres.engine import Choice, EngineSettings, LayerwiseEngine, StepReport, make_engine
from lowres.kernels import forms, product
from lowres.model import Units, empty_units, initialize
from tests.helpers import (
    CPU,
    LLAMA3,
    ROOMS,
    Recorder,
    make_batch,
    make_config,
    make_optimizer,
    stored_tensors,
    with_adapters,
)

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "qwen2": {"n_kv_heads": 2, "qkv_bias": True},
    "qwen3": {"n_kv_heads": 2, "qk_norm": True} | LLAMA3,
    "tied": {"tie_embeddings": True},
}


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled", "plain"])
def form(request: pytest.FixtureRequest) -> Iterator[bool]:
    with forms.using("cpu", request.param):
        yield request.param


def config_of(model: dict[str, Any], **memory: Any) -> Config:
    return make_config(model=MODEL | model, memory={"weights": "int8", "compute": "int8"} | memory)


MODEL = {"dim": 64, "n_layers": 3, "n_heads": 4, "ffn_dim": 172, "vocab_size": 300}


def units_of(config: Config, seed: int = 0) -> Units:
    kept = config.memory
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, ROOMS)
    initialize(units.values(), seed, CPU)
    return units


def step(
    config: Config, units: Units, batch: Tensor, micro_batch: int = 3, **changes: Any
) -> tuple[StepReport, dict[str, Tensor]]:
    recorder = Recorder()
    settings = replace(EngineSettings.of(config, Choice(micro_batch), CPU, False), **changes)
    report = LayerwiseEngine(config.model, units, recorder, ROOMS, settings).step(batch, 0, 1.0)
    return report, recorder.grads


def exact(config: Config, units: Units, batch: Tensor) -> tuple[StepReport, dict[str, Tensor]]:
    """The same weights with fp64 activations and products."""
    return step(config, units, batch, 3, compute=torch.float64, int8=False, fused=False)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("wgrad", ["int8", "dense"])
@pytest.mark.parametrize("activations", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_have_the_error_of_quantisation(model: str, activations: str, wgrad: str) -> None:
    """Codes of 8 bits have an error of about 1/127 of the largest number of a row, a hundredth to a fiftieth
    of its norm; a gradient passes several such products. Its length stays: errors have no preferred sign."""
    config = config_of(MODELS[model], activations=activations, compute_wgrad=wgrad)
    units, batch = units_of(config), make_batch()
    report, grads = step(config, units, batch)
    wanted_report, wanted = exact(config, units, batch)
    assert report.loss == pytest.approx(wanted_report.loss, rel=2e-3)
    assert report.grad_norm == pytest.approx(wanted_report.grad_norm, rel=1e-2)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert cosine(grad, wanted[name]) > 0.997, f"{name}: {cosine(grad, wanted[name])}"
        assert float(grad.norm() / wanted[name].norm()) == pytest.approx(1, abs=0.03), name


def test_it_is_int8_that_is_multiplied(form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of a block, and no dequantised copy of a layer."""
    shapes = []
    real = product.int32_product

    def counted(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        shapes.append((len(a), len(b), a.shape[1]))
        return real(a, b)

    monkeypatch.setattr(product, "int32_product", counted)
    config = config_of({})
    units = units_of(config)
    settings = EngineSettings.of(config, Choice(7), CPU, False)
    engine = LayerwiseEngine(config.model, units, Recorder(), ROOMS, settings)
    engine.step(make_batch(), 0, 1.0)
    assert engine.layout.copies().bytes == 300 * 64 * 4  # of the head, which is stored in bf16
    # 7 matrices: forward, recomputation without the last, input and weight gradient
    assert len(shapes) == 3 * (7 + 6 + 7 + 7)
    tokens = 7 * 32
    assert {(tokens, 64, 64), (tokens, 172, 64), (tokens, 64, 172), (64, 64, tokens)} <= set(shapes)


def test_gradients_are_unbiased_over_seeds() -> None:
    """The mean over seeds of the error, measured along the gradient: quantisation neither shrinks nor grows
    it by more than its own standard error."""
    config = config_of({})
    slopes: dict[str, list[float]] = {}
    for seed in range(8):
        units, batch = units_of(config, seed), make_batch(seed=seed)
        found, wanted = step(config, units, batch)[1], exact(config, units, batch)[1]
        for name, grad in found.items():
            along = wanted[name].flatten()
            slopes.setdefault(name, []).append(float((grad.double().flatten() @ along) / (along @ along)) - 1)
    every = torch.tensor([value for values in slopes.values() for value in values])
    assert every.mean().abs() < 4 * every.std() / len(every) ** 0.5 + 2e-4
    assert every.mean().abs() < 2e-3


@pytest.mark.parametrize("wgrad, bound", [("dense", 3e-5), ("int8", 2e-2)])
def test_the_split_into_micro_batches_hardly_matters(wgrad: str, bound: float) -> None:
    """Scales belong to tokens, so a split changes no code; for a weight's gradient in INT8 it changes which
    tokens share a scale. Each of the two then has its own error, of about 1 %."""
    config = config_of({}, compute_wgrad=wgrad)
    units, batch = units_of(config), make_batch()
    whole_report, whole = step(config, units, batch, 7)
    for micro_batch in (1, 3):
        report, grads = step(config, units, batch, micro_batch)
        assert report.loss == pytest.approx(whole_report.loss, rel=1e-6)
        for name, grad in grads.items():
            assert float((grad - whole[name]).norm() / whole[name].norm()) < bound, name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_ends_the_updates(bad: float) -> None:
    """INT8 has no NaN, but the step sees it all the same."""
    config = config_of({})
    units = units_of(config)
    optimizer = make_optimizer(config, units)
    units["layers.1"].weights["model.layers.1.input_layernorm.weight"].tensors()[""][5] = bad
    before = stored_tensors(units)
    report = make_engine(config, units, optimizer, ROOMS, Choice(3)).step(make_batch(), 0, 1.0)
    assert report.loss != report.loss or report.loss == torch.inf
    assert report.skipped == len(units)
    for name, tensor in stored_tensors(units).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_one_token_and_odd_widths() -> None:
    config = config_of({"dim": 36, "ffn_dim": 77, "n_heads": 2, "vocab_size": 301})
    units = units_of(config)
    for shape in ((1, 1), (5, 3)):
        batch = make_batch(*shape, vocab=301)
        report, grads = step(config, units, batch, 2)
        wanted_report, wanted = exact(config, units, batch)
        assert report.loss == pytest.approx(wanted_report.loss, rel=5e-3)
        for name, grad in grads.items():
            # one token: its scores do not depend on query and key
            if float(wanted[name].norm()) > 1e-9:
                assert cosine(grad, wanted[name]) > 0.98, name


def test_padding_and_transposes_change_nothing() -> None:
    """What happens on a GPU: copies padded to a multiple of 16, and transposed codes."""
    config = config_of({"ffn_dim": 173})
    units, batch = units_of(config), make_batch()
    report, grads = step(config, units, batch)
    padded_report, padded = step(config, units, batch, pad=16)
    assert padded_report.loss == pytest.approx(report.loss, rel=1e-6)
    for name, grad in grads.items():
        assert float((padded[name] - grad).norm() / grad.norm()) < 1e-5, name


@pytest.mark.parametrize("band", [1, 2])
@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
def test_bands_and_clipping(band: int, grad_clip: float) -> None:
    config = config_of({})
    units, batch = units_of(config), make_batch()
    report, _ = step(config, units, batch)
    other, _ = step(config, units, batch, band=band, grad_clip=0.0)
    assert other.loss == report.loss and other.grad_norm == pytest.approx(report.grad_norm, rel=1e-9)
    if grad_clip:
        optimizer = make_optimizer(config, units)
        settings = replace(EngineSettings.of(config, Choice(3), CPU, False), band=band, grad_clip=grad_clip)
        engine = LayerwiseEngine(config.model, units, optimizer, ROOMS, settings)
        assert engine.step(batch, 0, 1.0).grad_norm == pytest.approx(report.grad_norm, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_on_a_frozen_base(dropout: float) -> None:
    """The base multiplies its codes; adapters read activations as they are."""
    relora: dict[str, object] = {"enabled": True, "rank": 4, "start_step": 0, "dropout": dropout}
    found = {}
    for compute in ("fp32", "int8"):
        config = make_config(model=MODEL, relora=relora, memory={"weights": "int8", "compute": compute})
        units, _, _ = with_adapters(config)
        for unit in units.values():
            for spec in unit.spec.adapters.values():  # B too, which starts at zero
                value = unit.weights[spec.name].dense(torch.float32)
                value.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        recorder = Recorder()
        settings = EngineSettings.of(config, Choice(3), CPU, True)
        engine = LayerwiseEngine(config.model, units, recorder, ROOMS, settings)
        found[compute] = engine.step(make_batch(), 4, 1.0), recorder.grads
    assert found["int8"][0].loss == pytest.approx(found["fp32"][0].loss, rel=3e-3)
    assert found["int8"][1].keys() == found["fp32"][1].keys()
    for name, grad in found["int8"][1].items():
        assert cosine(grad, found["fp32"][1][name]) > 0.99, name


@pytest.mark.parametrize("activations", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_fused_kernels_compute_the_same_step(weights: str, activations: str) -> None:
    """memory.kernels = fused without INT8 products."""
    found = {}
    for kernels in ("plain", "fused"):
        config = make_config(memory={"weights": weights, "compute": activations, "kernels": kernels})
        units = units_of(config)
        found[kernels] = step(config, units, make_batch())
    tolerance = 1e-5 if activations == "fp32" else 2e-2
    assert found["fused"][0].loss == pytest.approx(found["plain"][0].loss, rel=tolerance / 10)
    for name, grad in found["fused"][1].items():
        wanted = found["plain"][1][name]
        assert float((grad - wanted).norm() / wanted.norm()) < tolerance, name
