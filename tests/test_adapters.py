"""Adapters on frozen matrices: what trains, and both engines give the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowres.catalogue import RULES
from lowres.model import Dropout, lora
from tests.helpers import make_batch, relora_config, stored_tensors, with_adapters


def test_frozen_matrices_rest_between_merges_and_have_no_state() -> None:
    for weights in ("int8", "bf16", "fp32"):
        units, _, engine = with_adapters(relora_config(weights))
        before = stored_tensors(units)
        engine.step(make_batch(), 0, 1.0)
        after = stored_tensors(units)
        for unit in units.values():
            for spec in unit.spec.tensors:
                same = torch.equal(before[spec.name], after[spec.name])
                # A has no gradient while B is zero
                assert same == (spec.frozen or spec.role.endswith(".lora_a")), spec.name
                if spec.frozen:
                    assert not unit.state[spec.name]


def test_adapters_have_gradients_from_their_first_step() -> None:
    for engine_name in ("layerwise", "autograd"):
        units, _, engine = with_adapters(relora_config(engine=engine_name))
        for step in range(2):
            before = stored_tensors(units)
            engine.step(make_batch(seed=step), step, 1.0)
            for unit in units.values():
                for role, spec in unit.spec.adapters.items():
                    moved = not torch.equal(before[spec.name], unit.weights[spec.name].dense(torch.float32))
                    # B at once; A in the next step, because B is a factor of its gradient
                    assert moved == (role.endswith(".lora_b") or step == 1), spec.name


@pytest.mark.parametrize("masked", [False, True])
def test_the_arithmetic_equals_autograd(masked: bool) -> None:
    """Product and gradients by hand, compared with the plain formula and torch's autograd, in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 12), "frozen": (8, 12), "a": (3, 12), "b": (8, 3)}
    t = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    mask = (torch.rand(2, 5, 12, generator=generator) < 0.7).double() / 0.7 if masked else None
    leaves = {n: v.clone().requires_grad_(n != "frozen") for n, v in t.items()}
    wanted = lora.plain_product(
        leaves["x"], mask, leaves["frozen"], lora.Adapter(leaves["a"], leaves["b"], 0.3)
    )
    w = lora.Adapter(t["a"], t["b"], 0.3)
    torch.testing.assert_close(
        lora.add_product(t["x"] @ t["frozen"].T, t["x"], mask, w), wanted, rtol=1e-12, atol=1e-12
    )
    dy = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    wanted.backward(dy)
    found: dict[str, torch.Tensor] = {}
    found["x"] = lora.add_gradients(
        dy @ t["frozen"],
        dy,
        t["x"],
        mask,
        w,
        add_a=lambda dy, x: found.update(a=dy.T @ x),
        add_b=lambda dy, x: found.update(b=dy.T @ x),
    )
    for name, grad in found.items():
        torch.testing.assert_close(grad, leaves[name].grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("more", [{}, {"relora__dropout": 0.3}, {"relora__targets": ["q", "up"]}])
def test_both_engines_train_adapters_alike(more: dict[str, Any]) -> None:
    found = []
    for engine_name, micro_batch, band in (("layerwise", 3, 1), ("layerwise", 2, 2), ("autograd", 7, 1)):
        # SGD, because AdamW's first updates are the signs of numbers close to zero
        config = relora_config(engine=engine_name, optim__name="sgd", optim__lr=0.1, **more)
        units, _, engine = with_adapters(config, micro_batch, band)
        losses = [engine.step(make_batch(seed=step), step, 1.0).loss for step in range(5)]  # with a merge
        found.append((losses, {n: t for n, t in stored_tensors(units).items() if t.is_floating_point()}))
    for losses, tensors in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, tensor in tensors.items():
            if name.endswith(".weight"):
                torch.testing.assert_close(tensor, found[0][1][name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", RULES)
def test_every_optimizer_trains_adapters_alike_in_both_engines(name: str) -> None:
    """With two merges. Without the large eps, AdamW's first updates would be the signs of rounding errors."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    keys: dict[str, Any] = {"optim__name": name, "optim__lr": 0.1 if name == "sgd" else 1e-3}
    if name != "sgd":
        keys["optim__eps"] = 1e-3
    if "rank" in RULES[name].defaults:
        keys["optim__rank"] = 2
    found = []
    for engine_name in ("layerwise", "autograd"):
        units, _, engine = with_adapters(relora_config(engine=engine_name, **keys))
        start = stored_tensors(units)
        for step in range(7):
            engine.step(make_batch(seed=step), step, 1.0)
        tensors = stored_tensors(units)
        found.append({n: tensors[n] - start[n] for n in tensors if n.endswith(".weight")})
    for tensor_name, change in found[0].items():
        error = (change - found[1][tensor_name]).norm() / change.norm()
        assert change.any() and error < 1e-2, (tensor_name, float(error))


def test_dropout_masks_do_not_depend_on_the_micro_batch() -> None:
    x = torch.ones(7, 5, 64)

    def mask(name: str, step: int | None, sizes: list[int]) -> torch.Tensor | None:
        dropout, parts = Dropout(0.3, seed=1), []
        dropout.step = step
        for part in x.split(sizes):
            parts.append(dropout.mask(name, part))
            dropout.first += len(part)
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None])

    whole = mask("w", 4, [7])
    assert whole is not None and mask("w", None, [7]) is None
    for sizes in ([3, 3, 1], [1] * 7, [2, 2, 2, 1]):
        again = mask("w", 4, sizes)
        assert again is not None and torch.equal(again, whole)
    for name, step in (("v", 4), ("w", 5)):
        other = mask(name, step, [7])
        assert other is not None and not torch.equal(other, whole)
    # 2,240 draws: 5 standard deviations are 0.048
    assert abs(float((whole == 0).float().mean()) - 0.3) < 0.048
    assert whole.max() == pytest.approx(1 / 0.7)


def test_dropout_is_for_training_only() -> None:
    plain, dropping = (with_adapters(relora_config(relora__dropout=rate)) for rate in (0.0, 0.5))
    for units, _, _ in (plain, dropping):
        for name, tensor in stored_tensors(units).items():
            if name.endswith("lora_B.weight"):
                unit = next(unit for unit in units.values() if name in unit.weights)
                unit.fill(name, iter([(0, torch.ones_like(tensor) * 0.1)]))
    batch = make_batch()
    assert plain[2].evaluate(batch) == dropping[2].evaluate(batch)
    assert plain[2].step(batch, 0, 0.0).loss != dropping[2].step(batch, 0, 0.0).loss
