"""Adam-mini against a restatement in float64 and against its authors' package."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.config import Config
from lowres.model import unit_specs
from lowres.optim import Optimizer
from lowres.rules.adam_mini import describe_partition, partition
from lowres.storage import TensorSpec
from tests.helpers import LLAMA3, dense_copy, make_config, make_optimizer, make_units

LR, BETAS, EPS, DECAY, STEPS = 1e-2, (0.9, 0.95), 1e-8, 0.1, 20
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"tie_embeddings": True},
}


def config_of(model: dict[str, Any]) -> Config:
    return make_config(
        optim={"name": "adam-mini", "lr": LR, "betas": BETAS, "weight_decay": DECAY}, model=model
    )


def gradients(config: Config) -> list[dict[str, Tensor]]:
    """For every step, rows of unlike size, so that it matters which share a second moment."""
    generator = torch.Generator().manual_seed(3)
    specs = [spec for unit in unit_specs(config.model) for spec in unit.tensors]
    sizes = {s.name: torch.exp(torch.randn(s.shape[0], generator=generator)) for s in specs}
    return [
        {
            s.name: 1e-3
            * torch.randn(s.shape, generator=generator)
            * sizes[s.name].view(-1, *[1] * (len(s.shape) - 1))
            for s in specs
        }
        for _ in range(STEPS)
    ]


def ours(config: Config) -> dict[str, Tensor]:
    units = make_units(config.model)
    optimizer = make_optimizer(config, units)
    for step, grads in enumerate(gradients(config)):
        for unit in units.values():
            own = {spec.name: grads[spec.name].clone() for spec in unit.spec.tensors}
            optimizer.update(unit, own, step, 1.0, torch.tensor(True))
    return dense_copy(units)


def assert_same(config: Config, step_all: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    start = dense_copy(make_units(config.model))
    wanted = step_all({name: value.clone() for name, value in start.items()})
    value = ours(config)
    assert value.keys() == wanted.keys()
    for name in value:
        moved = float((wanted[name] - start[name]).norm())
        assert moved > 0
        assert float((value[name] - wanted[name]).norm()) < 1e-5 * moved, name


# the authors' package knows no width of heads
WITH_OTHER_HEADS = MODELS | {"grouped": MODELS["grouped"] | LLAMA3}


@pytest.mark.parametrize("model", WITH_OTHER_HEADS)
def test_equals_the_formulas_in_float64(model: str) -> None:
    config = config_of(WITH_OTHER_HEADS[model])
    width = {"grouped": 24}.get(model, 16)
    roles = {spec.name: spec.role for unit in unit_specs(config.model) for spec in unit.tensors}

    def restated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        first = {name: torch.zeros_like(w) for name, w in weights.items()}
        second: dict[tuple[str, int], Tensor] = {}
        for t, grads in enumerate(gradients(config), 1):
            for name, w in weights.items():
                g, norm = grads[name].double(), w.dim() == 1
                if not norm:
                    w.mul_(1 - LR * DECAY)
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
                m = first[name] / (1 - BETAS[0] ** t)
                rows = len(w) if norm else width if roles[name] in ("q", "k") else 1
                for i in range(0, len(w), rows):
                    block = slice(i, i + rows)
                    old = second.get((name, i), torch.zeros((), dtype=torch.float64))
                    v = BETAS[1] * old + (1 - BETAS[1]) * (g[block] ** 2).mean()
                    second[name, i] = v
                    w[block] -= LR * m[block] / ((v / (1 - BETAS[1] ** t)) ** 0.5 + EPS)
        return weights

    assert_same(config, restated)


@pytest.mark.parametrize("model", MODELS)
def test_equals_the_authors_package(model: str) -> None:
    package = pytest.importorskip("adam_mini", reason="pip install lowres[oracles]")
    config = config_of(MODELS[model])

    def theirs(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: torch.nn.Parameter(w.float()) for name, w in weights.items()}
        oracle = package.Adam_mini(
            list(parameters.items()),
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            dim=config.model.dim,
            n_heads=config.model.n_heads,
            n_kv_heads=config.model.kv_heads,
            verbose=False,
        )
        for grads in gradients(config):
            for name, parameter in parameters.items():
                parameter.grad = grads[name].clone()
            oracle.step()
        return {name: parameter.detach().double() for name, parameter in parameters.items()}

    assert_same(config, theirs)


def test_blocks_are_those_of_the_paper() -> None:
    config = config_of({"n_kv_heads": 2})
    specs = {spec.role: spec for unit in unit_specs(config.model) for spec in unit.tensors}
    head_dim = config.model.head_width
    assert {role: partition(spec, head_dim) for role, spec in specs.items()} == {
        "embedding": (300, 1),
        "attn_norm": (1, 64),
        "q": (4, 16),
        "k": (2, 16),
        "v": (32, 1),
        "o": (64, 1),
        "mlp_norm": (1, 64),
        "gate": (172, 1),
        "up": (172, 1),
        "down": (64, 1),
        "norm": (1, 64),
        "head": (300, 1),
    }
    text = describe_partition(
        (spec for unit in unit_specs(config.model) for spec in unit.tensors), head_dim
    ).splitlines()
    assert len(text) == 12
    assert [line.split() for line in text if line.startswith("k ")] == [
        ["k", "2", "blocks", "of", "16", "rows", "in", "each", "of", "3", "tensors"]
    ]


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.lora_a.*'lora'"):
        partition(TensorSpec("model.layers.0.lora_a", (8, 64), "lora"), 16)


def test_every_tensor_takes_the_rule_and_half_the_state() -> None:
    config = config_of({"dim": 256, "ffn_dim": 688})
    specs = [spec for unit in unit_specs(config.model) for spec in unit.tensors]
    sizes = {}
    for name in ("adamw", "adam-mini"):
        other = config.optim.model_copy(update={"name": name})
        optimizer = Optimizer(other, config.model, 0)
        fields = [field for spec in specs for field in optimizer.state_fields(spec).values()]
        sizes[name] = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in fields)
    assert sizes["adam-mini"] / sizes["adamw"] < 0.502
