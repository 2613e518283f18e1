"""The `torch.optim.Optimizer` classes: the engine's rules, in any training loop."""

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowres.catalogue import RULES
from lowres.model import unit_specs
from lowres.optim import RACS, Apollo, ApolloMini, Fira, GaLore, Muon, Scale
from lowres.optim.torch_optim import ADAMW
from lowres.optim.torch_optim import CLASSES as REGISTERED
from tests.helpers import SMALL, make_config, make_optimizer, make_units
from tests.rules import Make, Waits, adam_mini

# few steps between two projections, so that the tests see new ones
CLASSES: dict[str, tuple[Make, dict[str, Any]]] = {
    **{made.definition.name: (made, {}) for made in REGISTERED.values()},
    "apollo": (Apollo, {"refresh_every": 3, "rank": 8}),
    "apollo svd": (Apollo, {"refresh_every": 3, "projection": "svd"}),
    "apollo-mini": (ApolloMini, {"refresh_every": 3}),
    "galore": (GaLore, {"refresh_every": 3}),
    "fira": (Fira, {"refresh_every": 3}),
    "adam-mini": (adam_mini, {}),
}
EVERY = pytest.mark.parametrize("name", CLASSES)


def llama(**changed: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install lowres[dev]")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"vocab_size": 100} | changed,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, scheduler: Any = None
) -> list[float]:
    """A training loop as users of transformers write it, over four batches."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step % 4)
        tokens = torch.randint(0, 100, (4, 24), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@EVERY
def test_same_result_as_the_engines_rule(name: str, kind: str) -> None:
    """Bit for bit: there is one implementation, and one name for every random number."""
    make, keywords = CLASSES[name]
    optim: dict[str, Any] = {"name": name.removesuffix(" svd"), "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-7}
    if "eps" not in RULES[optim["name"]].reads:
        optim["adamw_eps"] = optim["eps"]
    if name == "adam-mini":
        keywords = {"n_kv_heads": 4}
    else:
        optim |= keywords
    config = make_config(optim=optim)
    units = make_units(config.model, kind)
    engine = make_optimizer(config, units)
    parameters = {
        name: nn.Parameter(
            storage.dense(
                torch.bfloat16 if kind == "bf16" and len(storage.shape) == 2 else torch.float32
            ).clone()
        )
        for unit in units.values()
        for name, storage in unit.weights.items()
    }
    optimizer = make(parameters.items(), lr=1e-3, weight_decay=0.1, eps=1e-7, **keywords)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        grads = {key: torch.randn(p.shape, generator=generator) * 1e-3 for key, p in parameters.items()}
        for key, p in parameters.items():
            p.grad = grads[key].to(p.dtype)
        kept = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
        for unit in units.values():
            own = {spec.name: kept[spec.name].to(torch.float32, copy=True) for spec in unit.spec.tensors}
            engine.update(unit, own, step, 1.0, torch.tensor(True))
        optimizer.step()
        for key, p in parameters.items():
            assert p.grad is not None and torch.equal(p.grad, kept[key]), "gradients are left as they are"
    for unit in units.values():
        for key, storage in unit.weights.items():
            value = parameters[key].detach()
            assert torch.equal(storage.dense(value.dtype), value), key


@EVERY
def test_trains_a_transformers_model(name: str) -> None:
    make, keywords = CLASSES[name]
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(model.named_parameters(), lr=3e-3, **keywords)
        losses = train(model, optimizer, 40)
    assert losses[0] > 4.4 and losses[-1] < losses[0] - 1
    own = [spec.name for part in optimizer._parts for spec in part.specs if spec.role != ADAMW]
    others = [spec.name for part in optimizer._parts for spec in part.specs if spec.role == ADAMW]
    if name == "adam-mini":
        assert others == [] and "v" in adam_mini(model.named_parameters()).describe_partition()
    else:
        both = {"lm_head.weight", "model.embed_tokens.weight"}
        assert both < set(own if name == "scale" else others) and len(own + others) == 21
        assert sum("_proj." in key for key in own) == 14 == len(set(own) - both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_a_saved_state_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Tensors and numbers only, which `weights_only` asks for. fp32 moments must stay so: torch casts
    what it loads to the parameter's dtype, and a bf16 second moment never decays."""
    make, keywords = CLASSES[name]
    straight = llama().to(dtype)
    optimizer = make(straight.named_parameters(), lr=1e-3, **keywords)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(straight, optimizer, 5, scheduler=scheduler)
    buffer = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    losses = train(straight, optimizer, 5, 5, scheduler)

    buffer.seek(0)
    weights, state, schedule = torch.load(buffer, weights_only=True)
    resumed = llama().to(dtype)
    resumed.load_state_dict(weights)
    again = make(resumed.named_parameters(), lr=5.0, **keywords)
    again.load_state_dict(state)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(again, 10)
    scheduler.load_state_dict(schedule)
    dtypes = {t.dtype for s in again.state.values() for t in s.values() if isinstance(t, Tensor)}
    assert dtypes <= {torch.float32, torch.int64}
    assert train(resumed, again, 5, 5, scheduler) == losses
    for here, there in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(here, there)
    for here, there in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(here[k]), torch.as_tensor(there[k])) for k in there)


@pytest.mark.parametrize("name", ["apollo-mini", "fira", "adam-mini"])
def test_the_trainer_of_transformers_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="pip install lowres[dev]")
    import transformers

    make, keywords = CLASSES[name]
    tokens = torch.randint(0, 100, (16, 24), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        model = llama()
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            optimizers=(make(model.named_parameters(), lr=1e-2, **keywords), None),
        )
        assert trainer.train(resume_from_checkpoint=checkpoint).global_step == 6
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_loaded_state_is_a_copy() -> None:
    """With torch's own behaviour, two optimizers in one process would write to the same moments."""
    weight = nn.Parameter(torch.randn(8, 4))
    optimizer = ApolloMini([("w", weight)])
    weight.grad = torch.randn(8, 4)
    optimizer.step()
    other = ApolloMini([("w", nn.Parameter(weight.detach().clone()))])
    other.load_state_dict(optimizer.state_dict())
    (mine,), (theirs,) = optimizer.state.values(), other.state.values()
    assert mine["exp_avg"].data_ptr() != theirs["exp_avg"].data_ptr()


def test_the_state_of_another_optimizer_is_refused_and_changes_nothing() -> None:
    model = nn.Linear(8, 8)
    saved = torch.optim.AdamW(model.named_parameters())
    other = Apollo(model.named_parameters(), rank=3)
    optimizer = Apollo(model.named_parameters(), rank=2, lr=0.5)
    model(torch.ones(8)).sum().backward()
    for each in (saved, other, optimizer):
        each.step()
    wrong = other.state_dict()
    wrong["param_groups"][0]["rank"] = 4
    before = copy.deepcopy(optimizer.state_dict())
    for state, message in (
        (saved.state_dict(), r"param group 0: has no limiter, .*rank.* so it is not from Apollo"),
        (wrong, "weight: the saved state is from another rule, rank or shape"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["params"][0] is model.weight
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        kept = optimizer.state[model.weight]
        assert all(
            torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(t)) for k, t in before["state"][0].items()
        )
    optimizer.step()


@EVERY
def test_a_copy_goes_on_alike(name: str) -> None:
    make, keywords = CLASSES[name]
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-3, **keywords)
    train(model, optimizer, 4)
    pair = copy.deepcopy((model, optimizer))
    assert train(*pair, 4, 4) == train(model, optimizer, 4, 4)


@EVERY
def test_learning_rate_schedulers_decide(name: str) -> None:
    make, keywords = CLASSES[name]
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-3, **keywords)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 2 else 1.0)
    train(model, optimizer, 2, scheduler=scheduler)
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, 1, 2, scheduler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, optimizer, 1, 3, scheduler)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_schedulers_may_change_beta() -> None:
    """As OneCycleLR does: an update uses the current rate and beta."""
    results, seen = [], []
    for scheduled in (True, False):
        weights = {"x.weight": nn.Parameter(torch.ones(6, 4)), "norm": nn.Parameter(torch.ones(4))}
        optimizer = Apollo(weights.items(), rank=2)
        group = optimizer.param_groups[0]
        if scheduled:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
        for step in range(8):
            if scheduled:
                seen.append((group["lr"], group["betas"]))
            else:
                group["lr"], group["betas"] = seen[step]
            for p in weights.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if scheduled:
                scheduler.step()
        results.append([p.detach() for p in weights.values()])
    assert len(set(seen)) == 8 and min(betas[0] for _, betas in seen) < 0.9
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_scaler_changes_nothing() -> None:
    """It skips a step whose gradients overflowed; the others are unscaled, and zeroed in place."""
    results = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = ApolloMini(model.named_parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for value in (1.0, 2.0, torch.inf, 3.0):
            scaler.scale(model(torch.full((1, 8), value)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update(scale)
            optimizer.zero_grad(set_to_none=False)
        assert optimizer.state[model.weight]["step"] == 3
        results.append(model.weight.detach())
    assert torch.equal(*results)


@EVERY
def test_tied_weights_and_frozen_ones(name: str) -> None:
    make, keywords = CLASSES[name]
    model = llama(tie_word_embeddings=True)
    frozen = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    before = frozen.clone()
    optimizer = make(model.named_parameters(), lr=3e-3, weight_decay=0.1, **keywords)
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0] - 0.5
    assert torch.equal(frozen, before) and frozen not in optimizer.state
    names = [spec.name for part in optimizer._parts for spec in part.specs]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@EVERY
def test_a_group_that_joins_late(name: str) -> None:
    make, keywords = CLASSES[name]
    model = llama()
    (first, head) = (
        [(key, p) for key, p in model.named_parameters() if (key == "lm_head.weight") == last]
        for last in (False, True)
    )
    optimizer = make(first, lr=1e-3, **keywords)
    train(model, optimizer, 2)
    for wrong, message in (
        ({"lr": -1.0}, "lr: -1.0 must be at least 0"),
        ({"role": "x"}, "'x' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": head, **wrong})
    optimizer.add_param_group({"params": head, "lr": 2e-3})
    train(model, optimizer, 2, 2)
    assert [optimizer.state[p]["step"] for _, p in (first[0], head[0])] == [4, 2]
    again = make([{"params": first}, {"params": head}], **keywords)
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [1e-3, 2e-3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_a_step_waits_for_the_device_once(name: str, dtype: torch.dtype) -> None:
    """It waits once for "are all gradients finite", and not for each parameter."""
    make, keywords = CLASSES[name]
    model = llama().to(dtype)
    optimizer = make(model.named_parameters(), weight_decay=0.1, **keywords)
    train(model, optimizer, 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with Waits() as waits:
        optimizer.step()
    assert waits.count == 1


def test_a_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(8, 4))
    optimizer = Fira([("w", weight)], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[0] == 32 and losses[-1] < 20


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@EVERY
def test_one_gradient_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    """In the published limiter one inf damages the weights and its stored norm forever."""
    make, keywords = CLASSES[name]
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-3, **keywords)
    train(model, optimizer, 3)
    pair = copy.deepcopy((model, optimizer))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    next(iter(model.parameters())).grad[0, 0] = bad  # type: ignore[index]
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(pair[0].parameters(), model.parameters(), strict=True))
    assert train(model, optimizer, 3, 3) == train(*pair, 3, 3)


def test_small_updates_of_bf16_parameters_are_not_lost() -> None:
    """An update of 1e-3 of a weight is less than half a bf16 step; rounding to nearest would lose it."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = ApolloMini([("embed", weight)], lr=1e-3)  # AdamW: each update is lr
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert abs(weight.double().mean().item() - 0.9) < 0.002
    nearest = torch.ones((), dtype=torch.bfloat16)
    assert float(nearest - 1e-3) == 1.0


def test_weights_of_one_shape_have_projections_of_their_own() -> None:
    """The references give them the same seed."""
    weights = {name: nn.Parameter(torch.zeros(16, 8)) for name in ("a", "b")}
    optimizer = Apollo(weights.items(), rank=2)
    for p in weights.values():
        p.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert not torch.equal(weights["a"], weights["b"])


@pytest.mark.parametrize("make", [Apollo, Fira, RACS])
def test_the_limiter_is_true_false_or_a_growth(make: Callable[..., Any]) -> None:
    results = []
    for limiter in (True, 1.01, 1.2, False):
        weight = nn.Parameter(torch.zeros(16, 8))
        optimizer = make([("x.weight", weight)], betas=(0.0, 0.999), limiter=limiter)
        for size in (1.0, 1.0, 100.0):
            generator = torch.Generator().manual_seed(0)
            weight.grad = torch.randn(16, 8, generator=generator) * size
            optimizer.step()
        assert ("norm" in optimizer.state[weight]) == bool(limiter)
        results.append(weight.detach())
    assert torch.equal(results[0], results[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results[1:], 2))
    with pytest.raises(ValueError, match=r"limiter: 0\.5 must be True, False or at least 1"):
        make([("x.weight", nn.Parameter(torch.zeros(16, 8)))], limiter=0.5)


@pytest.mark.parametrize(
    "make, kinds",
    [(adam_mini, {torch.uint8}), (Muon, {torch.uint8, torch.int8}), (Scale, {torch.int8})],
)
def test_eight_bit_moments_resume(make: Make, kinds: set[torch.dtype]) -> None:
    if torch.uint8 in kinds:
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    model = llama()
    optimizer = make(model.named_parameters(), lr=3e-3, moments="int8")
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    again = make(other.named_parameters(), lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    tensors = [t for s in again.state.values() for t in s.values() if isinstance(t, Tensor)]
    assert {t.dtype for t in tensors if t.itemsize == 1} == kinds
    assert train(model, optimizer, 3, 3) == train(other, again, 3, 3)


Named = list[tuple[str, nn.Parameter]]
# the same parameters in another order, and in other groups
ARRANGEMENTS: dict[str, Callable[[Named], Any]] = {
    "reversed": lambda named: named[::-1],
    "in groups": lambda named: [{"params": named[5:]}, {"params": named[4::-1]}],
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(
    "name, moments",
    # sinkgd and racs have no element-wise moments
    [(n, m) for n in CLASSES for m in ("fp32", "bf16", "int8") if m == "fp32" or n not in ("sinkgd", "racs")],
)
def test_a_state_follows_the_names(name: str, moments: str, arrangement: str) -> None:
    """Most parameters of a model have the shape of another, so by position they would get its moments."""
    if moments == "int8":
        pytest.importorskip("bitsandbytes", reason="pip install lowres[eightbit]")
    make, keywords = CLASSES[name]
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-3, moments=moments, **keywords)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    again = make(ARRANGEMENTS[arrangement](list(other.named_parameters())), lr=1.0, **keywords)
    again.load_state_dict(optimizer.state_dict())
    for (key, there), here in zip(model.named_parameters(), other.parameters(), strict=True):
        wanted, found = optimizer.state[there], again.state[here]
        assert wanted.keys() == found.keys()
        same = [torch.equal(torch.as_tensor(found[k]), torch.as_tensor(t)) for k, t in wanted.items()]
        assert all(same), key
    assert train(other, again, 3, 3) == train(model, optimizer, 3, 3)


def pair(*names: str, lr: float = 0.1) -> list[dict[str, Any]]:
    """A group of its own for each of these parameters, [4, 6]."""
    return [
        {"params": [(name, nn.Parameter(torch.randn(4, 6)))], "lr": lr * i} for i, name in enumerate(names)
    ]


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_groups_follow_their_names_with_their_options() -> None:
    saved = stepped(ApolloMini(pair("a", "b"))).state_dict()
    optimizer = ApolloMini(pair("b", "a"))
    optimizer.load_state_dict(saved)
    assert [(g["param_names"], g["lr"]) for g in optimizer.param_groups] == [(["b"], 0.1), (["a"], 0.0)]


@EVERY
def test_what_does_not_match_by_name_is_named_and_changes_nothing(name: str) -> None:
    make, keywords = CLASSES[name]
    named = list(llama().named_parameters())
    *most, (last, head) = named
    assert last == "lm_head.weight"
    own = stepped(make(named, lr=0.5, **keywords))
    before = copy.deepcopy(own.state_dict())
    groups = [{"params": most, "lr": 0.25}, {"params": [(last, head)]}]
    for saved, message in (
        (most, "lm_head.weight: is not in the saved state"),
        ([*most, ("model.lm_head.weight", head)], "lm_head.weight: is not in the saved state"),
        (groups, "lm_head.weight: was saved with lr 1.0, but model.embed_tokens.weight, .* with 0.25; group"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            own.load_state_dict(stepped(make(saved, lr=1.0, **keywords)).state_dict())
        after = own.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for index, kept in before["state"].items():
            found = after["state"][index]
            assert all(torch.equal(torch.as_tensor(found[k]), torch.as_tensor(t)) for k, t in kept.items())
    with pytest.raises(
        ValueError, match=r"^lm_head\.weight: is in the saved state, but this optimizer has no"
    ):
        make(most, **keywords).load_state_dict(before)


@EVERY
def test_another_shape_under_the_same_name_is_named(name: str) -> None:
    make, keywords = CLASSES[name]
    wide, narrow = (llama(vocab_size=vocab) for vocab in (120, 100))
    saved = make(wide.named_parameters(), **keywords)
    train(wide, saved, 1)
    optimizer = make(list(narrow.named_parameters())[::-1], **keywords)
    with pytest.raises(
        ValueError, match=r"^lm_head\.weight: the saved state is from another rule, rank or shape"
    ):
        optimizer.load_state_dict(saved.state_dict())


def test_without_names_the_order_counts() -> None:
    """As in torch; also if one side has names, or a name is there twice."""
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    cases: list[tuple[list[Any], list[Any]]] = [
        (params, params[::-1]),
        ([("a", params[0]), ("b", params[1])], params[::-1]),
        ([("a", params[0]), ("a", params[1])], [("a", params[1]), ("a", params[0])]),
    ]
    for given, other in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved, optimizer = stepped(ApolloMini(given)), ApolloMini(other)
            optimizer.load_state_dict(saved.state_dict())
        assert torch.equal(optimizer.state[params[0]]["exp_avg"], saved.state[params[1]]["exp_avg"])


def test_a_hook_may_rename() -> None:
    """The way that torch documents: it gets the whole saved state, before names are compared."""
    saved = stepped(ApolloMini(pair("module.a", "module.b"))).state_dict()
    optimizer = ApolloMini(pair("b", "a"))

    def rename(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        assert len(state["state"]) == 2
        groups = [
            group | {"param_names": [name.removeprefix("module.") for name in group["param_names"]]}
            for group in state["param_groups"]
        ]
        doubled = {i: {k: 2 * t for k, t in own.items()} for i, own in state["state"].items()}
        return {"state": doubled, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(saved)
    (b,), (a,) = (group["params"] for group in optimizer.param_groups)
    assert torch.equal(optimizer.state[b]["exp_avg"], 2 * saved["state"][1]["exp_avg"])
    assert torch.equal(optimizer.state[a]["exp_avg"], 2 * saved["state"][0]["exp_avg"])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["b"]


def test_named_as_the_engine_names() -> None:
    """Names of transformers and of the engine are the same, so seeds and roles are."""
    names = {
        spec.name
        for unit in unit_specs(SMALL)
        for spec in unit.tensors
        if not spec.name.startswith("model.layers.2")
    }
    assert {name for name, _ in llama().named_parameters()} == names
