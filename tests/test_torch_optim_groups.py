"""The `torch.optim.Optimizer` classes: which rule serves which parameter, and what is refused."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lowres.optim import RACS, AdamMini, Apollo, ApolloMini, Fira, GaLore, Muon, Scale, SinkGD
from lowres.optim.torch_optim import ADAMW
from tests.rules import Make, adam_mini


def test_groups_say_which_rule() -> None:
    matrix, embedding, bias = (nn.Parameter(torch.randn(s)) for s in ((8, 4), (10, 4), (4,)))
    named = Apollo([("x.weight", matrix), ("embed_tokens.weight", embedding), ("x.bias", bias)])
    assert [spec.role for spec in named._parts[0].specs] == ["matrix", ADAMW, ADAMW]
    groups: list[dict[str, Any]] = [
        {"params": [embedding], "role": "matrix", "lr": 0.5, "rank": 2},
        {"params": [matrix, bias], "role": ADAMW},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explicit = Apollo(groups, lr=0.1)
    assert [[spec.role for spec in part.specs] for part in explicit._parts] == [["matrix"], [ADAMW, ADAMW]]
    embedding.grad = torch.randn(10, 4)
    explicit.step()
    assert explicit.state[embedding]["exp_avg"].shape == (10, 2) and not explicit.state[matrix]
    with pytest.warns(UserWarning, match=r"parameters without names.*model.named_parameters\(\)"):
        plain = Apollo([matrix, bias])
    assert [spec.role for spec in plain._parts[0].specs] == ["matrix", ADAMW]
    with pytest.raises(ValueError, match="bias: has the shape"):
        Apollo([{"params": [("x.bias", bias)], "role": "matrix"}])
    with pytest.raises(ValueError, match="'attention' is not known"):
        Apollo([{"params": [matrix], "role": "attention"}])
    with pytest.raises(ValueError, match="float16"):
        Apollo([("h", nn.Parameter(torch.zeros(4, 4, dtype=torch.float16)))])
    with pytest.raises(ValueError, match="rank: 0 must be at least 1"):
        Apollo([matrix], rank=0)


@pytest.mark.parametrize(
    "make, key, value",
    [
        *((make, "lr", -1.0) for make in (Apollo, ApolloMini, GaLore, Fira, adam_mini)),
        (Apollo, "betas", (0.9, 1.0)),
        (Apollo, "betas", (0.9,)),
        (Apollo, "betas", 0.9),
        (Apollo, "eps", 0.0),
        *((make, key, float("inf")) for make in (Muon, Scale) for key in ("lr", "eps", "weight_decay")),
        (Apollo, "weight_decay", -0.1),
        (Apollo, "moments", "fp8"),
        (Apollo, "projection", "gauss"),
        *((make, "rank", 0) for make in (Apollo, GaLore, Fira)),
        (GaLore, "scale", 0.0),
        (Fira, "refresh_every", 0),
        (adam_mini, "n_heads", 0),
        (adam_mini, "n_heads", 3),
        *((make, "adamw_betas", (0.9,)) for make in (Muon, RACS)),
        *((Muon, "split", value) for value in ((32, 0), 64)),
        *((Muon, "newton_schulz_steps", value) for value in (0, 21, 5.0)),
        *((SinkGD, "sinkhorn_steps", value) for value in (0, 21)),
        (Scale, "tied", 1),
        *((RACS, "limiter", value) for value in (0.5, float("inf"))),
    ],
)
def test_bad_values_are_named(make: Make, key: str, value: object) -> None:
    """As a default or in a group."""
    named = [("q_proj.weight", nn.Parameter(torch.zeros(64, 64)))]
    with pytest.raises(ValueError, match=f"^{key}: .* must be "):
        make(named, **{key: value})
    if key != "n_heads":
        with pytest.raises(ValueError, match=f"^{key}: .* must be "):
            make([{"params": named, key: value}])


def test_what_cannot_be_updated_is_named() -> None:
    with pytest.raises(ValueError, match=r"c: is torch\.complex64; only fp32, bf16 and fp64"):
        Apollo([("c", nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64)))])
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4))
    optimizer = Apollo(model.named_parameters())
    model(torch.tensor([1])).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"^0\.weight: its gradient is sparse; use nn\.Embedding\(sparse=False\)"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_flattened_parameters_are_refused() -> None:
    """As ZeRO hands them on: nothing of a matrix is left to see."""
    model = nn.Linear(4, 4)
    optimizer = Apollo(model.named_parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"Apollo: parameters have other shapes than at the start.* ZeRO"):
        optimizer.step()


def test_odd_parameters_are_served() -> None:
    """Scalars, convolutions, rows that are not contiguous, one that joins late, one without a gradient."""
    odd = {
        "scalar": nn.Parameter(torch.tensor(1.0)),
        "half": nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16)),
        "kernel": nn.Parameter(torch.randn(4, 3, 5, 5)),
        "half_kernel": nn.Parameter(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)),
        "turned": nn.Parameter(torch.randn(6, 8).T),
        "late": nn.Parameter(torch.randn(8, 6)),
        "double": nn.Parameter(torch.randn(8, 6, dtype=torch.float64)),
        "frozen": nn.Parameter(torch.randn(8, 6)),
    }
    before = {key: p.detach().clone() for key, p in odd.items()}
    optimizer = ApolloMini(odd.items(), lr=0.1)
    for step in range(4):
        for key, p in odd.items():
            if key != "frozen" and (key != "late" or step > 1):
                p.grad = torch.randn_like(p)
        optimizer.step()
    for key, p in odd.items():
        assert torch.equal(before[key], p) == (key == "frozen"), key
        assert p.isfinite().all()
    assert optimizer.state[odd["late"]]["step"] == 2


@pytest.mark.parametrize("make", [Apollo, GaLore, Fira, Muon, Scale, SinkGD, RACS])
def test_a_matrix_without_elements_is_left_alone(make: Make) -> None:
    empty, other = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.zeros(4, 8))
    optimizer = make([("x.weight", empty), ("y.weight", other)])
    empty.grad, other.grad = torch.zeros(0, 8), torch.randn(4, 8)
    optimizer.step()
    assert other.any() and not optimizer.state[empty]
    make([("x.weight", empty), ("y.weight", other)]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "name, role",
    [
        ("tok_emb.weight", "embedding"),  # minGPT
        ("token_emb.emb.weight", "embedding"),  # x-transformers
        ("shared.weight", "embedding"),  # T5, BART
        ("unembed.weight", "head"),
        ("ensemble.weight", "matrix"),
    ],
)
def test_embeddings_and_heads_of_other_models(name: str, role: str) -> None:
    (part,) = Scale([(name, nn.Parameter(torch.zeros(8, 4)))])._parts
    assert part.specs[0].role == role


def test_scale_has_roles_of_its_own() -> None:
    """Embedding by column, head with a momentum; a tied embedding is a head if one says so."""
    shapes = {
        "embed_tokens.weight": (10, 4),
        "x.weight": (8, 4),
        "lm_head.weight": (10, 4),
        "norm.weight": (4,),
    }
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    optimizer = Scale(named, lr=1.0)
    assert [spec.role for spec in optimizer._parts[0].specs] == ["embedding", "matrix", "head", ADAMW]
    (tied,) = Scale(named[:1], lr=1.0, tied=True)._parts
    for name, p in named:
        p.grad = torch.randn(shapes[name])
    optimizer.step()
    kept = {name: set(optimizer.state[p]) - {"step"} for name, p in named}
    moments = {"exp_avg", "exp_avg_sq"}
    assert list(kept.values()) == [set(), set(), {"momentum"}, moments]
    assert set(tied.rules[0].state_fields(tied.specs[0])) == {"momentum"}
    for name, axis in (("embed_tokens.weight", 0), ("x.weight", 1), ("lm_head.weight", 1)):
        size = dict(named)[name].square().mean(axis)
        torch.testing.assert_close(size, torch.ones_like(size))
    by_role = Scale(
        [{"params": [named[2][1]], "role": "embedding"}, {"params": [named[0][1]], "role": "head"}]
    )
    assert [part.specs[0].role for part in by_role._parts] == ["embedding", "head"]
    with pytest.raises(ValueError, match="role: 'norm' is not known; use adamw, matrix, embedding or head"):
        Scale([{"params": [named[1][1]], "role": "norm"}])
    with pytest.raises(ValueError, match="role: 'head' is not known; use adamw or matrix"):
        Muon([{"params": [named[1][1]], "role": "head"}])


@pytest.mark.parametrize(
    "name", ["attn.qkv.weight", "attn.c_attn.weight", "mlp.gate_up_proj.weight", "in_proj_weight"]
)
def test_muon_asks_what_is_fused(name: str) -> None:
    fused = nn.Parameter(torch.zeros(32, 12))
    with pytest.raises(ValueError, match=f"^{name}: seems to be several matrices in one; .* split"):
        Muon([(name, fused)])
    with pytest.raises(ValueError, match=rf"^{name}: has 32 rows, but split \(16, 8\) is for 24"):
        Muon([{"params": [(name, fused)], "split": (16, 8)}])
    with pytest.raises(ValueError, match=r"split \(4, 4, 4\) is for 12; .* Conv1D, needs split=\(\) or role"):
        Muon([{"params": [(name, fused)], "split": (4, 4, 4)}])
    SinkGD([(name, fused)])  # to which it does not matter
    Muon([{"params": [(name, fused)], "role": ADAMW}])
    parts = [nn.Parameter(torch.zeros(rows, 12)) for rows in (16, 8, 8)]
    groups = [{"params": [(name, fused)], "split": (16, 8, 8)}, {"params": [*zip("abc", parts, strict=True)]}]
    optimizer = Muon(groups, lr=1.0, weight_decay=0.1)
    for _ in range(3):
        fused.grad = torch.randn(32, 12)
        for p, grad in zip(parts, fused.grad.split((16, 8, 8)), strict=True):
            p.grad = grad
        optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=1e-5)
    whole = Muon([{"params": [(name, fused)], "split": ()}], lr=1.0)
    before = fused.detach().clone()
    whole.step()
    wanted = nn.Parameter(before.clone())
    wanted.grad = fused.grad
    Muon([("x", wanted)], lr=1.0).step()
    assert torch.equal(fused, wanted)


@pytest.mark.parametrize(
    "make, keys",
    [
        (Muon, {"adamw_betas": (0.5, 0.6)}),
        (RACS, {"adamw_betas": (0.5, 0.6)}),
        (SinkGD, {"betas": (0.5, 0.6)}),
    ],
)
def test_the_betas_of_adamw_can_be_given(make: Make, keys: dict[str, Any]) -> None:
    """What the rule does not read is for AdamW; and no keyword is ignored."""
    start, norm = torch.randn(8, 4), nn.Parameter(torch.ones(6))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = make(
        [{"params": [("x", ours)], "role": ADAMW, **keys}, {"params": [("norm", norm)]}], eps=1e-3
    )
    oracle = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(8, 4)
        norm.grad = torch.randn(6)
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-6)
    assert optimizer._parts[1].rules[0].betas == (0.9, 0.999)


def test_adam_mini_on_any_model_goes_by_rows() -> None:
    """Against Adam-mini with one second moment per row, in float64."""
    torch.manual_seed(0)
    shapes = {
        "h.c_attn.weight": (12, 4),
        "wte.weight": (7, 4),
        "h.norm.weight": (4,),
        "conv.weight": (2, 2, 3),
    }
    params = {name: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    value = {name: p.detach().clone() for name, p in params.items()}
    with pytest.warns(UserWarning, match="one second moment per row"):
        optimizer = AdamMini(params.items(), lr=0.01)
    assert "matrix         12 blocks of 1 rows in each of 1 tensors" in optimizer.describe_partition()
    grads = [{name: torch.randn_like(p) for name, p in params.items()} for _ in range(3)]
    m, v = ({name: torch.zeros_like(p) for name, p in value.items()} for _ in range(2))
    for t, grad in enumerate(grads, 1):
        for name, p in params.items():
            p.grad = grad[name].clone()
            # AdamW for what is neither a matrix nor a norm, and one block for a norm
            square = grad[name] ** 2
            mean = square if p.dim() == 3 else square.mean(-1, keepdim=True)
            m[name] = 0.9 * m[name] + 0.1 * grad[name]
            v[name] = 0.999 * v[name] + 0.001 * mean
            value[name] -= 0.01 * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
    for name, p in params.items():
        assert torch.allclose(p.detach(), value[name], rtol=1e-4, atol=1e-6), name
    wrongs: list[dict[str, Any]] = [{"dim": 4}, {"n_heads": 2}, {"n_kv_heads": 2}, {"head_dim": 2}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: .* or left out"):
            AdamMini(params.items(), lr=0.01, **wrong)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="role: 'q' must be for a model whose"):
        AdamMini([{"params": [params["wte.weight"]], "role": "q"}])


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.self_attn.qkv_proj.weight", (128, 64)),  # fused
        ("model.layers.0.self_attn.q_proj.weight", (128, 64)),  # fused under an innocent name
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", (8, 64)),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 192)),
        ("model.layers.0.mlp.down_proj.weight", (4, 64, 96)),
        ("transformer.h.0.attn.c_attn.weight", (64, 192)),
        ("model.layers.0.scale", (64,)),
    ],
)
def test_adam_mini_names_what_it_cannot_place(name: str, shape: tuple[int, ...]) -> None:
    known = ("model.layers.0.self_attn.k_proj.weight", nn.Parameter(torch.zeros(32, 64)))
    unknown = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="AdamMini cannot place") as caught:
        adam_mini([known, (name, unknown)])
    assert f"{name} {list(shape)}" in str(caught.value) and known[0] not in str(caught.value)
    optimizer = adam_mini([{"params": [known]}, {"params": [(name, unknown)], "role": ADAMW}])
    assert [part.specs[0].role for part in optimizer._parts] == ["k", ADAMW]


def test_adam_mini_goes_by_modules_not_by_parts_of_names() -> None:
    """The reference takes "mlp_norm" for a part of the MLP."""
    shapes = {"mlp_norm.weight": (64,), "self_attn.q_proj.bias": (64,), "mlp.down_proj.weight": (64, 96)}
    optimizer = adam_mini([(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()])
    assert [spec.role for spec in optimizer._parts[0].specs] == ["norm", ADAMW, "down"]
    fields = [
        rule.state_fields(spec)
        for spec, rule in zip(optimizer._parts[0].specs, optimizer._parts[0].rules, strict=True)
    ]
    assert [f["exp_avg_sq"][1] for f in fields] == [(1,), (64,), (64,)]


def test_adam_mini_knows_head_dim() -> None:
    named = [("q_proj.weight", nn.Parameter(torch.zeros(4 * 32, 64)))]
    with pytest.raises(ValueError, match="cannot place"):
        adam_mini(named)
    optimizer = adam_mini(named, head_dim=32)
    assert optimizer.describe_partition().split()[:5] == ["q", "4", "blocks", "of", "32"]
    with pytest.raises(ValueError, match=r"cannot place 0\.0"):
        adam_mini([nn.Parameter(torch.zeros(64, 64))])
    roles = adam_mini([{"params": [nn.Parameter(torch.zeros(64, 64))], "role": "q"}])
    assert roles._parts[0].specs[0].role == "q"
    with pytest.raises(ValueError, match="'attn' is not known"):
        adam_mini([{"params": [nn.Parameter(torch.zeros(64, 64))], "role": "attn"}])
