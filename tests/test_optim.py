"""Update rules against independent implementations, and the traps of the published ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowres.config import OPTIMIZER_DEFAULTS, OPTIMIZERS, ModelConfig, parse_config
from lowres.errors import UserError
from lowres.model import unit_specs
from lowres.optim import AdamMini, AdamW, Apollo, Clock, make_rule
from lowres.optim.base import Rule
from tests.helpers import CPU, SMALL, make_config, make_optimizer, make_units
from tests.rules import BETAS, new_state, random_grads, run_rule, spec_of, state_bytes


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay: float) -> None:
    start, grads = torch.randn(30, 20), random_grads((30, 20))
    parameter = torch.nn.Parameter(start.clone())
    oracle = torch.optim.AdamW([parameter], lr=1e-2, betas=BETAS, eps=1e-8, weight_decay=decay)
    for grad in grads:
        parameter.grad = grad
        oracle.step()
    ours, _, _ = run_rule(AdamW(BETAS, 1e-8), start, grads, 1e-2, decay)
    assert float((ours - parameter.detach()).norm() / (parameter.detach() - start).norm()) < 1e-5


class InjectedApollo(Apollo):
    """With the oracle's projection in the place of our own."""

    injected: Tensor

    def projection(self, name: str, shape: tuple[int, ...], step: int, device: torch.device) -> Tensor:
        return self.injected


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(
    "scale_type, rank, scale", [("tensor", 1, 128.0), ("channel", 4, 1.0), ("channel", 4, 3.0)]
)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=["tall", "wide", "square"])
def test_apollo_equals_its_reference(
    shape: tuple[int, int], scale_type: str, rank: int, scale: float, front: bool
) -> None:
    reference = pytest.importorskip("apollo_torch", reason="pip install lowres[oracles]")
    start, grads = torch.randn(shape) * 0.02, random_grads(shape)
    parameter = torch.nn.Parameter(start.clone())
    group = {
        "params": [parameter],
        "rank": rank,
        "proj": "random",
        "scale_type": scale_type,
        "scale": scale,
        "update_proj_gap": 200,
        "proj_type": "std",
    }
    oracle = reference.APOLLOAdamW(
        [group], lr=1e-2, betas=BETAS, eps=1e-6, weight_decay=0.0, scale_front=front
    )
    ours = InjectedApollo(BETAS, 1e-6, rank, scale, 200, scale_type == "channel", front)
    for grad in grads:
        parameter.grad = grad.clone()
        oracle.step()
    ours.injected = oracle.state[parameter]["projector"].ortho_matrix.clone()
    value, _, _ = run_rule(ours, start, grads, 1e-2)
    moved = float((parameter.detach() - start).norm())
    assert moved > 1e-3
    assert float((value - parameter.detach()).norm()) / moved < 1e-5


def mini(**changed: Any) -> Apollo:
    arguments: dict[str, Any] = {"rank": 1, "scale": 128.0, "refresh_every": 200, "per_channel": False}
    return Apollo(BETAS, 1e-6, **(arguments | changed))


def test_a_zero_gradient_does_not_hold_back_the_next_updates() -> None:
    """The published limiter needs more than a thousand steps to regain half of its norm."""
    grads = [g * 0 + random_grads((32, 16), 1)[0] for g in random_grads((32, 16), 60)]
    _, _, normal = run_rule(mini(), torch.zeros(32, 16), grads, 1e-2)
    for small in (0.0, 1e-6):
        disturbed = [g * (small if i == 20 else 1) for i, g in enumerate(grads)]
        _, _, changes = run_rule(mini(), torch.zeros(32, 16), disturbed, 1e-2)
        assert changes[22] > 0.4 * normal[22]


def test_a_spike_is_limited_to_one_percent_growth() -> None:
    grads = [random_grads((32, 16), 1)[0] * (1000 if i == 10 else 1) for i in range(12)]
    rule = mini()
    kept = []
    state = new_state(rule, spec_of((32, 16)))
    for step, grad in enumerate(grads):
        rule.directions(
            [spec_of((32, 16))],
            [grad.clone()],
            [state],
            1e-2,
            Clock(step, torch.tensor(step + 1), torch.tensor(True), 0),
        )
        kept.append(float(state["norm"]))
    assert kept[10] <= kept[9] * 1.01001


@pytest.mark.parametrize(
    "rule",
    [
        *(AdamW(BETAS, 1e-8, kind) for kind in ("fp32", "int8")),  # bf16 is rounded by the step's number
        *(AdamMini(BETAS, 1e-8, 8, kind) for kind in ("fp32", "int8")),
        mini(),
        mini(rank=4, per_channel=True, scale=1.0),
    ],
)
def test_a_refused_update_leaves_no_trace(rule: Rule) -> None:
    """A step that is refused, and one that never was, lead to the same weight and state."""
    grads = random_grads((24, 16), 10)
    with_bad = [*grads[:5], torch.full((24, 16), 7.0), *grads[5:]]
    start = torch.randn(24, 16)
    weight, state, changes = run_rule(rule, start, with_bad, 1e-2, decay=0.0, bad=(5,))
    clean_weight, clean_state, _ = run_rule(rule, start, grads, 1e-2)
    assert changes[5] == 0
    assert torch.equal(weight, clean_weight)
    assert all(torch.equal(t, clean_state[k]) for k, t in state.items())


def test_projections_are_named_by_weight_and_redrawn() -> None:
    rule = mini(seed=3)
    first = rule.projection("a", (16, 8), 0, CPU)
    assert first.shape == (1, 8) and rule.projection("a", (8, 16), 1, CPU).shape == (1, 8)
    assert rule.projection("b", (8, 16), 0, CPU).shape == (8, 1)
    assert not torch.equal(first, rule.projection("c", (16, 8), 0, CPU))
    assert torch.equal(first, mini(seed=3).projection("a", (16, 8), 199, CPU))
    assert not torch.equal(first, mini(seed=3).projection("a", (16, 8), 200, CPU))
    wide = mini(rank=64).projection("a", (4096, 1024), 0, CPU)
    assert abs(float(wide.std()) - 64**-0.5) < 0.01 * 64**-0.5


def test_state_is_fp32_and_small() -> None:
    config = make_config(model={"dim": 256, "ffn_dim": 688}, optim={"name": "apollo-mini"})
    units = make_units(config.model)
    make_optimizer(config, units)
    block = [s for s in units["layers.0"].spec.tensors if len(s.shape) == 2]
    state = [t for s in block for t in units["layers.0"].state[s.name].values()]
    assert all(t.dtype == torch.float32 for t in state)
    assert sum(t.numel() * 4 for t in state) / sum(s.numel for s in block) < 0.05
    # at the width of LLaMA-7B, counted without allocating
    model = ModelConfig.model_validate({"preset": "7b"})
    rule = make_rule(config.optim, model, 0)
    specs = [spec for spec in unit_specs(model)[1].tensors if len(spec.shape) == 2]
    assert sum(spec.shape == (4096, 4096) for spec in specs) == 4
    assert sum(state_bytes(rule, spec) for spec in specs) / sum(spec.numel for spec in specs) < 0.01


def test_every_tensor_is_in_one_group_at_its_own_rate() -> None:
    config = make_config(optim={"name": "adamw", "lr": 1e-3, "embed_lr": 1e-5, "weight_decay": 0.5})
    units = make_units(config.model)
    optimizer = make_optimizer(config, units)
    specs = [spec for unit in unit_specs(config.model) for spec in unit.tensors]
    assert all(sum(spec.role in group.roles for group in optimizer.groups) == 1 for spec in specs)
    before = {
        s.name: u.weights[s.name].dense(torch.float32).clone() for u in units.values() for s in u.spec.tensors
    }
    for unit in units.values():
        ones = {spec.name: torch.ones(spec.shape) for spec in unit.spec.tensors}
        optimizer.update(unit, ones, 0, 1.0, torch.tensor(True))
    for unit in units.values():
        for spec in unit.spec.tensors:
            lr = 1e-5 if spec.role in ("embedding", "head") else 1e-3
            kept = 1.0 if len(spec.shape) == 1 else 1 - 0.5 * lr
            # Adam's first update of a constant gradient is the learning rate
            wanted = before[spec.name] * kept - lr
            assert torch.allclose(unit.weights[spec.name].dense(torch.float32), wanted, rtol=1e-5, atol=1e-8)


def test_every_optimizer_is_built_or_refused_by_name() -> None:
    for name in OPTIMIZERS:
        if name in OPTIMIZER_DEFAULTS:
            make_rule(parse_config({"optim": {"name": name}})[0].optim, SMALL, 0)
        else:
            with pytest.raises(UserError, match=f"'{name}' is not built yet"):
                parse_config({"optim": {"name": name}})
