"""Update rules compared with independent implementations, and the traps of the published ones."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowres.optim as optim_package
from lowres.catalogue import KEYS, RULES
from lowres.config import OptimConfig
from lowres.config_file import parse_config
from lowres.errors import UserError
from lowres.meter import LiveTensors
from lowres.model import empty_units, unit_specs
from lowres.optim import Clock, make_rule
from lowres.rules.adam_mini import AdamMiniRule
from lowres.rules.adamw import AdamWRule
from lowres.rules.apollo import ApolloRule
from lowres.rules.base import Rule, State
from lowres.rules.fira import FiraRule
from lowres.rules.galore import GaLoreRule
from lowres.rules.lowrank import RandomProjection, SvdProjection, singular_vectors
from lowres.rules.muon import MuonRule
from lowres.rules.racs import RacsRule
from lowres.rules.scale import ScaleRule
from lowres.rules.sgd import SgdRule
from lowres.rules.sinkgd import SinkGdRule
from lowres.storage import TensorSpec
from tests.helpers import CPU, ROOMS, SMALL, make_config, make_optimizer, make_units
from tests.rules import BETAS, Waits, new_state, random_grads, run_rule, spec_of


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay: float) -> None:
    start, grads = torch.randn(30, 20), random_grads((30, 20))
    parameter = torch.nn.Parameter(start.clone())
    oracle = torch.optim.AdamW([parameter], lr=1e-2, betas=BETAS, eps=1e-8, weight_decay=decay)
    for grad in grads:
        parameter.grad = grad
        oracle.step()
    ours, _, _ = run_rule(AdamWRule(BETAS, 1e-8), start, grads, 1e-2, decay)
    assert float((ours - parameter.detach()).norm() / (parameter.detach() - start).norm()) < 1e-5


class Injected(RandomProjection):
    """Uses the oracle's projection instead of our own."""

    injected: Tensor

    def matrix(self, spec: TensorSpec, grad: Tensor, state: State, clock: Clock) -> Tensor:
        return self.injected


@pytest.mark.parametrize("source", ["random", "svd"])
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(
    "scale_type, rank, scale", [("tensor", 1, 128.0), ("channel", 4, 1.0), ("channel", 4, 3.0)]
)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=["tall", "wide", "square"])
def test_apollo_equals_its_reference(
    shape: tuple[int, int], scale_type: str, rank: int, scale: float, front: bool, source: str
) -> None:
    reference = pytest.importorskip("apollo_torch", reason="pip install lowres[oracles]")
    start, grads = torch.randn(shape) * 0.02, random_grads(shape)
    parameter = torch.nn.Parameter(start.clone())
    group = {
        "params": [parameter],
        "rank": rank,
        "proj": source,
        "scale_type": scale_type,
        "scale": scale,
        "update_proj_gap": 200 if source == "random" else 7,
        "proj_type": "std",
    }
    oracle = reference.APOLLOAdamW(
        [group], lr=1e-2, betas=BETAS, eps=1e-6, weight_decay=0.0, scale_front=front
    )
    injected = Injected(rank, 200)
    projection = injected if source == "random" else SvdProjection(rank, 7)
    ours = ApolloRule(BETAS, 1e-6, projection, scale, scale_type == "channel", front)
    for grad in grads:
        parameter.grad = grad.clone()
        oracle.step()
    injected.injected = oracle.state[parameter]["projector"].ortho_matrix.clone()
    value, _, _ = run_rule(ours, start, grads, 1e-2)
    moved = float((parameter.detach() - start).norm())
    assert moved > 1e-3
    assert float((value - parameter.detach()).norm()) / moved < 1e-5


SHAPES = pytest.mark.parametrize(
    "shape", [(40, 24), (24, 40), (32, 32), (40, 6)], ids=["tall", "wide", "square", "less than the rank"]
)


@pytest.mark.parametrize("refresh_every", [200, 7])
@SHAPES
def test_galore_equals_its_reference(shape: tuple[int, int], refresh_every: int) -> None:
    reference = pytest.importorskip("galore_torch", reason="pip install lowres[oracles]")
    start, grads = torch.randn(shape) * 0.02, random_grads(shape)
    parameter = torch.nn.Parameter(start.clone())
    group = {
        "params": [parameter],
        "rank": 8,
        "update_proj_gap": refresh_every,
        "scale": 0.25,
        "proj_type": "std",
    }
    oracle = reference.GaLoreAdamW([group], lr=1e-2, betas=BETAS, eps=1e-6, no_deprecation_warning=True)
    for grad in grads:
        parameter.grad = grad.clone()
        oracle.step()
    value, _, _ = run_rule(GaLoreRule(BETAS, 1e-6, SvdProjection(8, refresh_every), 0.25), start, grads, 1e-2)
    assert distance(value, parameter, start) < 1e-5


@pytest.mark.parametrize("refresh_every, scale", [(200, 0.25), (7, 0.25), (200, 0.6)])
@SHAPES
def test_fira_equals_its_reference(shape: tuple[int, int], refresh_every: int, scale: float) -> None:
    reference = pytest.importorskip("fira", reason="pip install lowres[oracles]")
    start, grads = torch.randn(shape) * 0.02, random_grads(shape)
    parameter = torch.nn.Parameter(start.clone())
    group = {
        "params": [parameter],
        "rank": 8,
        "update_proj_gap": refresh_every,
        "alpha": scale,
        "proj_type": "std",
    }
    oracle = reference.FiraAdamW([group], lr=1e-2, betas=BETAS, eps=1e-6, no_deprecation_warning=True)
    for grad in grads:
        parameter.grad = grad.clone()
        oracle.step()
    rule = FiraRule(BETAS, 1e-6, SvdProjection(8, refresh_every), scale)
    value, _, _ = run_rule(rule, start, grads, 1e-2)
    assert distance(value, parameter, start) < 1e-5


def distance(value: Tensor, parameter: Tensor, start: Tensor) -> float:
    """Distance of two results, relative to the whole change."""
    moved = float((parameter.detach() - start).norm())
    assert moved > 1e-3
    return float((value - parameter.detach()).norm()) / moved


def mini() -> ApolloRule:
    return ApolloRule(BETAS, 1e-6, RandomProjection(1, 200), scale=128.0, per_channel=False)


def apollo() -> ApolloRule:
    return ApolloRule(BETAS, 1e-6, RandomProjection(4, 200), scale=1.0, per_channel=True)


def galore() -> GaLoreRule:
    return GaLoreRule(BETAS, 1e-6, SvdProjection(4, 3), 0.25)


def fira() -> FiraRule:
    return FiraRule(BETAS, 1e-6, SvdProjection(4, 3), 0.25)


def scale() -> ScaleRule:
    return ScaleRule(BETAS, 1e-8)


def apollo_svd() -> ApolloRule:
    return ApolloRule(BETAS, 1e-6, SvdProjection(4, 3), scale=1.0, per_channel=True)


@pytest.mark.parametrize("make", [galore, fira, apollo_svd])
def test_a_refused_refresh_is_made_up_for(make: Callable[[], Rule]) -> None:
    """If the first of three steps in a period is refused or has no gradient, the second finds the vectors."""
    spec, good = spec_of((24, 16)), random_grads((24, 16), 2)
    for accepted, bad in ((False, torch.zeros(24, 16)), (True, torch.zeros(24, 16))):
        rule = make()
        state = new_state(rule, spec)
        updates = torch.zeros((), dtype=torch.int64)
        for step, grad in enumerate([good[0], good[0], good[0], bad, good[1]]):
            updates += 1
            clock = Clock(step, updates, torch.tensor(accepted or step != 3), 0)
            before = state["projection"].clone()
            rule.directions([spec], [grad.clone()], [state], 1e-2, clock)
            assert torch.equal(state["projection"], before) == (step not in (0, 4))
        assert torch.equal(state["projection"], singular_vectors(good[1], 4))


@pytest.mark.parametrize("make", [galore, fira, apollo_svd])
def test_a_resumed_rule_keeps_its_singular_vectors(make: Callable[[], Rule]) -> None:
    """A new process has only the state; in the middle of a period it must not compute new vectors."""
    spec, grads = spec_of((24, 16)), random_grads((24, 16), 8)
    results = []
    for stop in (None, 4, 7):
        rule = make()
        state = new_state(rule, spec)
        out = []
        for step, grad in enumerate(grads):
            if step == stop:
                rule, state = make(), {key: t.clone() for key, t in state.items()}
                # a rehearsal is a refused first step
                refused = Clock(0, torch.tensor(step), torch.tensor(False), 0)
                rule.directions([spec], [torch.zeros(24, 16)], [state], 0.0, refused)
            direction = grad.clone()
            clock = Clock(step, torch.tensor(step + 1), torch.tensor(True), 0)
            (factor,) = rule.directions([spec], [direction], [state], 1e-2, clock)
            out.append(factor * direction)
        results.append(out)
    assert all(torch.equal(a, c) for one in results[1:] for a, c in zip(results[0], one, strict=True))


@pytest.mark.parametrize("shape", [(512, 256), (256, 512)])
@pytest.mark.parametrize("make", [galore, fira])
def test_the_back_projection_takes_the_gradients_memory(
    make: Callable[[], Rule], shape: tuple[int, int]
) -> None:
    rule, spec = make(), spec_of(shape)
    state, grad = new_state(rule, spec), torch.randn(shape)
    pointer = grad.data_ptr()
    for step in range(2):
        with LiveTensors() as live:
            rule.directions(
                [spec], [grad], [state], 1e-3, Clock(step, torch.tensor(1), torch.tensor(True), 0)
            )
    assert grad.data_ptr() == pointer
    assert 0 < live.peak["gpu"] < 0.2 * 4 * spec.numel


class Launches(TorchDispatchMode):
    """Counts operations that compute; views do not count."""

    count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and the default calls torch._dynamo for every operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make, each", [(mini, 5), (apollo, 6), (galore, 2), (fira, 15), (scale, 5)])
def test_a_layers_update_is_a_few_launches(make: Callable[[], Rule], each: int) -> None:
    """Small tensors are processed together: one more matrix adds only its products and norms."""
    counts = []
    for tensors in (1, 8):
        rule, specs = make(), [TensorSpec(f"w{i}", (24, 16), "up") for i in range(tensors)]
        states = [new_state(rule, spec) for spec in specs]
        for step in range(2):
            grads = [torch.randn(24, 16) for _ in specs]
            clock = Clock(step, torch.tensor(step + 1), torch.tensor(True), 0)
            with Launches() as launches:
                rule.directions(specs, grads, states, 1e-2, clock)
        counts.append(launches.count)
    assert counts[0] < 80
    assert counts[1] - counts[0] <= 7 * each


@pytest.mark.parametrize("weights", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", [*RULES, "apollo svd"])
def test_an_update_does_not_wait_for_the_device(name: str, weights: str) -> None:
    """For any layer; on a CPU it reads once whether the update is accepted, on a GPU never."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    optim: dict[str, object] = {"name": name.removesuffix(" svd"), "limiter": 1.01, "weight_decay": 0.1}
    optim |= {"projection": "svd"} if name == "apollo svd" else {}
    config = make_config(optim=optim, log={"update_every": 1})
    units = make_units(config.model, weights)
    optimizer = make_optimizer(config, units)
    for step in range(2):  # singular vectors are computed in the first step
        grads = {spec.name: torch.randn(spec.shape) for spec in units["layers.0"].spec.tensors}
        with Waits() as waits:
            optimizer.update(units["layers.0"], grads, step, 1.0, torch.tensor(True))
    assert waits.count == 1


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_equals_torch(momentum: float) -> None:
    start, grads = torch.randn(30, 20), random_grads((30, 20))
    parameter = torch.nn.Parameter(start.clone())
    oracle = torch.optim.SGD([parameter], lr=0.1, momentum=momentum)
    for grad in grads:
        parameter.grad = grad
        oracle.step()
    value, state, _ = run_rule(SgdRule(momentum), start, grads, 0.1)
    assert distance(value, parameter, start) < 1e-5
    assert set(state) == ({"momentum"} if momentum else set())


@pytest.mark.parametrize("make", [mini, apollo, fira])
def test_a_zero_gradient_does_not_hold_back_the_next_updates(make: Callable[[], Rule]) -> None:
    """The published limiter needs more than a thousand steps to regain half of its norm."""
    grads = [g * 0 + random_grads((32, 16), 1)[0] for g in random_grads((32, 16), 60)]
    _, _, normal = run_rule(make(), torch.zeros(32, 16), grads, 1e-2)
    for small in (0.0, 1e-6):
        disturbed = [g * (small if i == 20 else 1) for i, g in enumerate(grads)]
        _, _, changes = run_rule(make(), torch.zeros(32, 16), disturbed, 1e-2)
        assert changes[22] > 0.4 * normal[22]


@pytest.mark.parametrize("make", [mini, apollo, fira])
def test_a_spike_is_limited_to_one_percent_growth(make: Callable[[], Rule]) -> None:
    grads = [random_grads((32, 16), 1)[0] * (1000 if i == 10 else 1) for i in range(12)]
    rule = make()
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
        *(AdamWRule(BETAS, 1e-8, kind) for kind in ("fp32", "int8")),  # bf16 is rounded by the step's number
        *(AdamMiniRule(BETAS, 1e-8, 8, kind) for kind in ("fp32", "int8")),
        *(SgdRule(0.9, kind) for kind in ("fp32", "int8")),
        SgdRule(0.0),
        mini(),
        apollo(),
        ApolloRule(BETAS, 1e-6, SvdProjection(4, 200), 1.0, per_channel=True),
        GaLoreRule(BETAS, 1e-6, SvdProjection(4, 200), 0.25),
        FiraRule(BETAS, 1e-6, SvdProjection(4, 200), 0.25),
        scale(),
        MuonRule(BETAS),
        SinkGdRule(),
        *(RacsRule(BETAS, 1e-8, limiter) for limiter in (0, 1.01)),
    ],
)
def test_a_refused_update_leaves_no_trace(rule: Rule) -> None:
    """A refused step leads to the same weight and state as no step."""
    grads = random_grads((24, 16), 10)
    with_bad = [*grads[:5], torch.full((24, 16), 7.0), *grads[5:]]
    start = torch.randn(24, 16)
    weight, state, changes = run_rule(rule, start, with_bad, 1e-2, decay=0.0, bad=(5,))
    clean_weight, clean_state, _ = run_rule(rule, start, grads, 1e-2)
    assert changes[5] == 0
    assert torch.equal(weight, clean_weight)
    assert all(torch.equal(t, clean_state[k]) for k, t in state.items())


def test_projections_are_named_by_weight_and_redrawn() -> None:
    drawn = RandomProjection(1, 200, seed=3)
    first = drawn.draw("a", (16, 8), 0, CPU)
    assert first.shape == (1, 8) and drawn.draw("a", (8, 16), 1, CPU).shape == (1, 8)
    assert drawn.draw("b", (8, 16), 0, CPU).shape == (8, 1)
    assert not torch.equal(first, drawn.draw("c", (16, 8), 0, CPU))
    assert torch.equal(first, RandomProjection(1, 200, seed=3).draw("a", (16, 8), 199, CPU))
    assert not torch.equal(first, RandomProjection(1, 200, seed=3).draw("a", (16, 8), 200, CPU))
    wide = RandomProjection(64, 200).draw("a", (4096, 1024), 0, CPU)
    assert abs(float(wide.std()) - 64**-0.5) < 0.01 * 64**-0.5


def test_state_is_fp32_and_small() -> None:
    config = make_config(model={"dim": 256, "ffn_dim": 688}, optim={"name": "apollo-mini"})
    units = make_units(config.model)
    make_optimizer(config, units)
    block = [s for s in units["layers.0"].spec.tensors if len(s.shape) == 2]
    state = [t for s in block for t in units["layers.0"].state[s.name].values()]
    assert all(t.dtype == torch.float32 for t in state)
    assert sum(t.numel() * 4 for t in state) / sum(s.numel for s in block) < 0.05


def test_state_of_a_layer_of_llama_7b() -> None:
    """Memory after an update, without the weights: the state slab, and projections that stay."""
    model = {"preset": "7b", "n_layers": 1, "vocab_size": 2}
    held = {}
    lean = ("apollo-mini", "scale", "sinkgd", "racs")
    for name in (*lean, "adam-mini", "adamw", "muon", "muon int8"):
        optim, _, moments = name.partition(" ")
        keys = {"model": model, "optim": {"name": optim}, "memory": {"moments": moments or "fp32"}}
        config, _ = parse_config(keys)
        unit = empty_units(config.model, "int8", "bf16", ROOMS)["layers.0"]
        assert sum(spec.shape == (4096, 4096) for spec in unit.spec.tensors) == 4
        with LiveTensors() as live:
            optimizer = make_optimizer(config, {"layers.0": unit})
            if name == "apollo-mini":  # others would write pages of state, or overwrite the gradients
                grads = {
                    s.name: torch.zeros(1).expand(s.shape) for s in unit.spec.tensors if len(s.shape) == 2
                }
                specs = [s for s in unit.spec.tensors if s.name in grads]
                states = [unit.state[s.name] for s in specs]
                clock = Clock(0, torch.tensor(1), torch.tensor(True), 0)
                optimizer.groups[0].rule.directions(specs, list(grads.values()), states, 1.0, clock)
                del clock
        held[name] = live.current["gpu"] / sum(spec.numel for spec in unit.spec.tensors)
    assert all(0 < held[name] < 0.01 for name in lean)
    assert abs(held["adamw"] - 8) < 0.01 and abs(held["adam-mini"] - 4) < 0.01
    assert abs(held["muon"] - 4) < 0.01 and abs(held["muon int8"] - 1 - 4 / 256) < 0.001


@pytest.mark.parametrize("decayed", [True, False])
def test_every_tensor_is_in_one_group_at_its_own_rate(decayed: bool) -> None:
    optim = {"name": "adamw", "lr": 1e-3, "embed_lr": 1e-2, "weight_decay": 0.5}
    config = make_config(optim={**optim, "decay_embeddings": decayed})
    units = make_units(config.model)
    optimizer = make_optimizer(config, units)
    specs = [spec for unit in unit_specs(config.model) for spec in unit.tensors]
    assert all(sum(group.has(spec) for group in optimizer.groups) == 1 for spec in specs)
    before = {
        s.name: u.weights[s.name].dense(torch.float32).clone() for u in units.values() for s in u.spec.tensors
    }
    for unit in units.values():
        ones = {spec.name: torch.ones(spec.shape) for spec in unit.spec.tensors}
        optimizer.update(unit, ones, 0, 1.0, torch.tensor(True))
    for unit in units.values():
        for spec in unit.spec.tensors:
            embedding = spec.role in ("embedding", "head")
            lr = 1e-2 if embedding else 1e-3
            kept = 1.0 if len(spec.shape) == 1 or (embedding and not decayed) else 1 - 0.5 * lr
            # Adam's first update of a constant gradient is the learning rate
            wanted = before[spec.name] * kept - lr
            assert torch.allclose(unit.weights[spec.name].dense(torch.float32), wanted, rtol=1e-5, atol=1e-8)


def test_adamw_for_the_rest_has_settings_of_its_own() -> None:
    """For embedding, head and norms if the optimizer is for matrices; by default its own settings."""
    optim = {"name": "apollo-mini", "lr": 1e-2, "betas": (0.5, 0.6), "eps": 1e-3}
    same, notes = parse_config({"optim": optim})
    assert not notes and (same.optim.adamw_betas, same.optim.adamw_eps) == ((0.5, 0.6), 1e-3)
    own = {"adamw_betas": [0.9, 0.95], "adamw_eps": 1e-8, "norm_lr": 0.5, "embed_lr": 0.25}
    config = make_config(optim=optim | own)
    groups = {kind: group for group in make_optimizer(config, {}).groups for kind in group.kinds}
    matrix, embedding, norm = (groups[kind] for kind in ("matrix", "embedding", "norm"))
    assert (matrix.rule.betas, matrix.rule.eps, matrix.lr) == ((0.5, 0.6), 1e-3, 1e-2)
    assert (embedding.rule.betas, embedding.rule.eps, embedding.lr) == ((0.9, 0.95), 1e-8, 0.25)
    assert norm.rule is embedding.rule and norm.lr == 0.5 and groups["bias"] is norm
    _, notes = parse_config({"optim": {"name": "sgd", "adamw_eps": 1e-3, "eps": 1e-3}})
    assert notes == [
        "optim.eps is not used by sgd",
        "optim.adamw_eps is not used, because sgd updates every tensor; use optim.eps",
    ]


def test_every_rule_describes_itself() -> None:
    """Everything that config, docs and the torch classes need is in the rule's own file."""
    fields = OptimConfig.model_fields
    for name, rule in RULES.items():
        config, _ = parse_config({"optim": {"name": name}})
        for key, value in rule.defaults.items():
            assert getattr(config.optim, key) == value, (name, key)
        assert config.optim.lr == rule.lr
        for own in rule.keys:
            assert own.about in (fields[own.name].description or "") and own.wanted
        if rule.class_name:
            made = getattr(optim_package, rule.class_name)
            assert made.definition is rule and made.__name__ in optim_package.__all__
            keys = {key.name for key in (*rule.keys, *rule.class_keys)}
            assert set(inspect.signature(made).parameters) >= {"params", "lr", *keys}
    assert set(KEYS) <= set(fields)


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "apollo-mini"])
def test_biases_are_updated_element_by_element(name: str) -> None:
    """Also in Adam-mini, where other 1-D tensors are one block; and biases have no weight decay."""
    config = make_config(
        model={"qkv_bias": True}, optim={"name": name, "lr": 1e-2, "weight_decay": 0.5, "limiter": 0}
    )
    units = make_units(config.model)
    optimizer = make_optimizer(config, units)
    unit = units["layers.0"]
    spec = next(s for s in unit.spec.tensors if s.role == "k_bias")
    value = unit.weights[spec.name].dense(torch.float32)
    value.fill_(0.5)
    grads = {s.name: torch.ones(s.shape) for s in unit.spec.tensors}
    grads[spec.name] = torch.linspace(-3, 3, spec.numel)
    wanted = value - 1e-2 * grads[spec.name].sign()  # Adam's first update, for any size of gradient
    optimizer.update(unit, grads, 0, 1.0, torch.tensor(True))
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("key, values", [("betas", (0.5, 0.6)), ("eps", 10.0)])
@pytest.mark.parametrize("name", RULES)
def test_a_key_that_is_noted_as_unused_is_unused(name: str, key: str, values: object) -> None:
    """And one that is not noted counts."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    results = []
    for given in ({}, {key: values}):
        config, notes = parse_config({"optim": {"name": name} | given, "model": SMALL.model_dump()})
        units = make_units(config.model)
        optimizer = make_optimizer(config, units)
        for unit in units.values():
            for step in range(2):
                grads = {s.name: random_grads(s.shape, 2)[step] for s in unit.spec.tensors}
                optimizer.update(unit, grads, step, 1.0, torch.tensor(True))
        results.append({n: w.dense(torch.float32) for u in units.values() for n, w in u.weights.items()})
    same = all(torch.equal(value, results[1][n]) for n, value in results[0].items())
    assert same == any(note.startswith(f"optim.{key} is not used by {name}") for note in notes)


def test_every_optimizer_is_built_or_refused_by_name() -> None:
    for name in RULES:
        config, notes = parse_config({"optim": {"name": name}})
        make_rule(config.optim, SMALL, 0)
        assert not notes
    config, notes = parse_config({"optim": {"name": "adamw8bit"}, "memory": {"moments": "bf16"}})
    assert config.memory.moments == "int8" and notes == ["memory.moments is int8 with adamw8bit"]
    with pytest.raises(UserError, match="'adagrad' is not known; use one of adamw, adamw8bit, "):
        parse_config({"optim": {"name": "adagrad"}})
