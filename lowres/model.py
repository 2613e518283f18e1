"""LLaMA in one file: the table of its tensors, their first values, and the mathematics of a block.

The functions here take weights as arguments. The layer-major engine calls them with one layer's
weights at a time; `Llama`, the ordinary module, calls the same functions with its parameters and is
the reference for the engine, and the form for wrappers that want an `nn.Module`. Tensor names are
those of Hugging Face LLaMA checkpoints, so weights go in and out without a translation.

Source: Touvron et al., "LLaMA" (arXiv 2302.13971). RMSNorm: arXiv 1910.07467. RoPE: arXiv 2104.09864,
in the rotate-half form. SwiGLU: arXiv 2002.05202. Grouped-query attention: arXiv 2305.13245.

Shape letters: B sequences, T positions, D dim, H query heads, K key/value heads, E head_dim,
F ffn_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowres import rng
from lowres.config import ModelConfig, ReloraConfig
from lowres.rooms import GPU, HOST, Rooms
from lowres.storage import (
    ADAPTER_ROLES,
    LORA_A,
    LORA_B,
    MATRIX_ROLES,
    TensorSpec,
    Unit,
    UnitSpec,
    field_bytes,
    row_chunks,
    weight_fields,
)

# standard deviation of every matrix at the start, as in the LLaMA, GaLore and APOLLO code
INIT_STD = 0.02

EMBEDDING = "model.embed_tokens.weight"
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a block by role; matrices are [out, in]."""
    d, f = config.dim, config.ffn_dim
    kv = config.kv_heads * config.head_dim
    return {
        "attn_norm": (d,),
        "q": (d, d),
        "k": (kv, d),
        "v": (kv, d),
        "o": (d, d),
        "mlp_norm": (d,),
        "gate": (f, d),
        "up": (f, d),
        "down": (d, f),
    }


def unit_specs(config: ModelConfig, adapters: ReloraConfig | None = None) -> list[UnitSpec]:
    """Every tensor of the model, in the order of the forward pass; with adapters, those too."""
    vocab = (config.vocab, config.dim)
    found = [UnitSpec("embed", (TensorSpec(EMBEDDING, vocab, "embedding"),))]
    shapes = block_shapes(config)
    for i in range(config.n_layers):
        tensors = (
            TensorSpec(f"model.layers.{i}.{path}.weight", shapes[role], role)
            for role, path in BLOCK_TENSORS.items()
        )
        if adapters is not None:
            tensors = (own for spec in tensors for own in _adapted(spec, adapters))
        found.append(UnitSpec(f"layers.{i}", tuple(tensors)))
    head = [TensorSpec("model.norm.weight", (config.dim,), "norm")]
    if not config.tie_embeddings:
        head.append(TensorSpec("lm_head.weight", vocab, "head"))
    return [*found, UnitSpec("head", tuple(head))]


def _adapted(spec: TensorSpec, adapters: ReloraConfig) -> Iterator[TensorSpec]:
    """A tensor of a block as it is beside adapters: a target is frozen and has its A and B after it."""
    if spec.role not in adapters.targets:
        yield spec
        return
    (rows, columns), rank = spec.shape, min(adapters.rank, *spec.shape)
    path = spec.name.removesuffix(".weight")  # the names of the adapters are those of PEFT
    yield replace(spec, frozen=True)
    yield TensorSpec(f"{path}.lora_A.weight", (rank, columns), spec.role + LORA_A)
    yield TensorSpec(f"{path}.lora_B.weight", (rows, rank), spec.role + LORA_B)


def storage_kind(spec: TensorSpec, matrices: str, embeddings: str) -> str:
    """Number format a tensor is kept in: its own for matrices and embeddings, fp32 for norms and adapters."""
    if spec.role in MATRIX_ROLES:
        return matrices
    return embeddings if spec.role in ("embedding", "head") else "fp32"


Units = dict[str, Unit]  # by name, in the order of the forward pass


def storage_kinds(units: Iterable[UnitSpec], matrices: str, embeddings: str) -> dict[str, str]:
    """Number format of every tensor of some units by name."""
    specs = (spec for unit in units for spec in unit.tensors)
    return {spec.name: storage_kind(spec, matrices, embeddings) for spec in specs}


def is_adapted(units: Units) -> bool:
    """Whether the model has adapters."""
    return any(unit.spec.adapters for unit in units.values())


def empty_units(
    config: ModelConfig,
    matrices: str,
    embeddings: str,
    rooms: Rooms,
    on_host: Collection[str] = (),
    adapters: ReloraConfig | None = None,
) -> Units:
    """Storage for the whole model; matrices and embeddings are int8, bf16 or fp32. The units named in
    `on_host` have their home there."""
    found = {}
    for unit in unit_specs(config, adapters):
        own = storage_kinds([unit], matrices, embeddings)
        size = sum(field_bytes(weight_fields(unit, own)).values())
        slab = rooms.slab("weights", HOST if unit.name in on_host else GPU, size)
        found[unit.name] = Unit(unit, own, slab)
    return found


def initialize(units: Iterable[Unit], seed: int, device: torch.device) -> None:
    """First values: norms 1, everything else normal with standard deviation INIT_STD; A of an adapter
    Kaiming-uniform and B zero."""
    for unit in units:
        for spec in unit.spec.tensors:
            unit.fill(spec.name, _initial_rows(spec, seed, device))


def _initial_rows(spec: TensorSpec, seed: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    if len(spec.shape) == 1:
        yield 0, torch.ones(spec.shape, device=device)
        return
    if spec.role in ADAPTER_ROLES:
        yield 0, fresh_adapter(spec, seed, 0, device)
        return
    key = rng.make_key(seed, "initial weight", spec.name)
    length = spec.shape[1]
    for rows in row_chunks(spec.shape, device):
        count = (rows.stop - rows.start) * length
        values = rng.normal(key, rows.start * length, count, device).mul_(INIT_STD)
        yield rows.start, values.view(-1, length)


def fresh_adapter(spec: TensorSpec, seed: int, step: int, device: torch.device) -> Tensor:
    """fp32 values of an adapter's A or B that starts after `step` steps: A is uniform in +- 1 / sqrt(n) for
    n columns (Kaiming with a = sqrt(5), as in LoRA), B zero, so that the model's function is unchanged."""
    if spec.role.endswith(LORA_B):
        return torch.zeros(spec.shape, device=device)
    key = rng.make_key(seed, "adapter", spec.name, step)
    uniform = rng.uniform(key, 0, spec.numel, device).mul_(2).sub_(1)
    return uniform.div_(math.sqrt(spec.shape[1])).view(spec.shape)


class Dropout:
    """Dropout on the inputs of adapters. A mask is named by weight, step and sequence, so that the
    recomputation of a layer has the mask of its forward, whatever the micro-batches are.

    Whoever runs the model says what is running: `step` (None is evaluation: no dropout), and `first`, the
    index in the batch of the first sequence that passes a layer.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.seed = rate, seed
        self.step: int | None = None
        self.first = 0

    def mask(self, name: str, x: Tensor) -> Tensor | None:
        """What to multiply x [B, T, in] by, 0 or 1 / (1 - rate); None if nothing is dropped."""
        if not self.rate or self.step is None:
            return None
        key = rng.make_key(self.seed, "dropout", name, self.step)
        kept = rng.uniform(key, self.first * x[0].numel(), x.numel(), x.device) >= self.rate
        return kept.view_as(x).to(x.dtype).div_(1 - self.rate)


# A weight in use: a tensor, or anything that applies it and knows how to collect its gradient.
Weight = Tensor | Callable[[Tensor], Tensor]


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times the transpose of a matrix [out, in]."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight(x)


def norm(x: Tensor, weight: Weight, config: ModelConfig) -> Tensor:
    """RMSNorm of x [..., D] with a weight [D]."""
    return rms_norm(x, weight, config.norm_eps) if isinstance(weight, Tensor) else weight(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, in fp32 or better."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row for the backward; autograd would keep fp32 copies of x beside bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, dy = _wide(x) * scale, _wide(dy)
        d_weight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        d_normed = dy * weight
        along = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.sub_(normed.mul_(along)).mul_(scale)
        return dx.to(x.dtype), d_weight, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def rope_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, fp32 [length, head_dim]. They are computed, never saved."""
    even = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (even / config.head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x [B, H, T, E]; computed in fp32 or better."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def attention(x: Tensor, w: Mapping[str, Any], rope: tuple[Tensor, Tensor], config: ModelConfig) -> Tensor:
    """Causal self-attention of normalised x [B, T, D], without the residual."""
    b, t, _ = x.shape
    q = linear(x, w["q"]).view(b, t, config.n_heads, config.head_dim).transpose(1, 2)  # [B, H, T, E]
    k = linear(x, w["k"]).view(b, t, config.kv_heads, config.head_dim).transpose(1, 2)  # [B, K, T, E]
    v = linear(x, w["v"]).view(b, t, config.kv_heads, config.head_dim).transpose(1, 2)
    grouped = config.kv_heads != config.n_heads
    y = F.scaled_dot_product_attention(
        rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=grouped
    )
    return linear(y.transpose(1, 2).reshape(b, t, -1), w["o"])


def block_body(
    x: Tensor, w: Mapping[str, Any], rope: tuple[Tensor, Tensor], config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """A block up to its down projection: the residual stream [B, T, D] and the SwiGLU product [B, T, F].

    The block's output is `residual + down(product)`. Its backward needs both, but not the output:
    recomputation stops here.
    """
    x = x + attention(norm(x, w["attn_norm"], config), w, rope, config)
    h = norm(x, w["mlp_norm"], config)
    return x, F.silu(linear(h, w["gate"])) * linear(h, w["up"])


def block(x: Tensor, w: Mapping[str, Any], rope: tuple[Tensor, Tensor], config: ModelConfig) -> Tensor:
    """One transformer block, x [B, T, D] to [B, T, D]. `w` holds its weights by role."""
    x, product = block_body(x, w, rope, config)
    return x + linear(product, w["down"])


class Norm(nn.Module):
    """RMSNorm and its weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """A matrix [out, in]; with `lora_A` and `lora_B` added to it, a frozen one and its adapter."""

    def __init__(self, shape: tuple[int, ...], trained: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class AdaptedLinear(Linear):
    """x W^T + (alpha / r) dropout(x) A^T B^T (Hu et al., LoRA, arXiv 2106.09685)."""

    lora_A: Linear  # noqa: N815 - the names of PEFT
    lora_B: Linear  # noqa: N815

    def __init__(self, spec: TensorSpec, scaling: float, dropout: Dropout | None) -> None:
        super().__init__(spec.shape, trained=False)
        self.name, self.scaling, self.dropout = spec.name, scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        mask = self.dropout.mask(self.name, x) if self.dropout is not None else None
        dropped = x if mask is None else x * mask
        return super().forward(x) + self.scaling * self.lora_B(self.lora_A(dropped))


class Embedding(Linear):
    """Rows of a matrix [V, D] for tokens; for anything else the products with it, as a tied head needs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_floating_point() else F.embedding(x, self.weight)


class Llama(nn.Module):
    """The whole model as an ordinary module, for reference, tests and wrappers. Every weight belongs to a
    module that uses it in its `forward`, so that wrappers can fetch weights just before (ZeRO-3 does).

    Its `state_dict` has the names and shapes of `transformers.LlamaForCausalLM`; with adapters, also those
    of PEFT's LoRA.
    """

    def __init__(
        self, config: ModelConfig, adapters: ReloraConfig | None = None, dropout: Dropout | None = None
    ) -> None:
        super().__init__()
        self.config, self.scaling, self.dropout = config, adapters.scaling if adapters else 1.0, dropout
        for unit in unit_specs(config, adapters):
            for spec in unit.tensors:
                *path, last = spec.name.removesuffix(".weight").split(".")
                parent: nn.Module = self
                for part in path:
                    if part not in dict(parent.named_children()):
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                parent.add_module(last, self._module(spec))
        head = EMBEDDING if config.tie_embeddings else "lm_head.weight"
        self._head = head.removesuffix(".weight")

    def _module(self, spec: TensorSpec) -> nn.Module:
        if len(spec.shape) == 1:
            return Norm(spec.shape[0], self.config.norm_eps)
        if spec.role == "embedding":
            return Embedding(spec.shape)
        return AdaptedLinear(spec, self.scaling, self.dropout) if spec.frozen else Linear(spec.shape)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normalised output of the last block [B, T, D] for tokens [B, T]; checkpoints every block."""
        rope = rope_tables(self.config, tokens.shape[1], tokens.device)
        x = self.get_submodule("model.embed_tokens")(tokens)
        for i in range(self.config.n_layers):
            layer = self.get_submodule(f"model.layers.{i}")
            w = {role: layer.get_submodule(path) for role, path in BLOCK_TENSORS.items()}
            x = checkpoint(block, x, w, rope, self.config, use_reentrant=False)
        return self.get_submodule("model.norm")(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, chunk: int = 1024) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]; or the sum of the cross-entropy (nats) over targets [B, T]
        other than -100, in chunks of tokens."""
        x, head = self.hidden(tokens), self.get_submodule(self._head)
        if targets is None:
            return head(x)
        pieces = zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
        losses = [checkpoint(_chunk_loss, h, head, t, use_reentrant=False) for h, t in pieces]
        return torch.stack(losses).sum()


def _chunk_loss(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(x)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, targets, reduction="sum")
