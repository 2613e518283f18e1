"""A LLaMA block in one place: the table of its tensors, and its arithmetic.

The functions take weights as arguments, by role. The layer-major engine passes the weights of one layer at a
time; `lowres.model.llama`, the ordinary module, passes its submodules. An option of the model is a row of the
table with a condition, and a line of arithmetic that checks whether that role exists.

Source: Touvron et al., "LLaMA" (arXiv 2302.13971). RMSNorm: arXiv 1910.07467. RoPE: arXiv 2104.09864, in
the rotate-half form. SwiGLU: arXiv 2002.05202. Grouped-query attention: arXiv 2305.13245. Biases of query,
key and value: Qwen2 (arXiv 2407.10671). Normalised query and key: Qwen3 (arXiv 2505.09388). Tensors have the
same names as in Hugging Face checkpoints of these models, so weights are imported and exported without
renaming.

Shape letters: B sequences, T positions, D dim, H query heads, K key/value heads, E head width, F ffn_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lowres.config import ModelConfig
from lowres.model.cached import CachedPositions
from lowres.model.documents import Positions
from lowres.storage import BIAS, MATRIX, NORM

Shape = Callable[[ModelConfig], tuple[int, ...]]
# where the tokens of x are, and what they attend to
Places = Positions | CachedPositions


@dataclass(frozen=True)
class Row:
    """A tensor of every block. path: its name in the layer. kind: decides format, optimizer group and initial
    values (`lowres.model.tensors`). wanted: whether the model of a config has it. inner: see `TensorSpec`."""

    role: str
    path: str
    shape: Shape
    kind: str = MATRIX
    wanted: Callable[[ModelConfig], bool] = lambda config: True
    inner: int | None = None


def _width(config: ModelConfig) -> tuple[int, ...]:
    return (config.dim,)


def _head(config: ModelConfig) -> tuple[int, ...]:
    return (config.head_width,)


def _queries(config: ModelConfig) -> int:
    return config.n_heads * config.head_width


def _keys(config: ModelConfig) -> int:
    return config.kv_heads * config.head_width


TABLE = (
    Row("attn_norm", "input_layernorm.weight", _width, NORM),
    Row("q", "self_attn.q_proj.weight", lambda c: (_queries(c), c.dim)),
    Row("k", "self_attn.k_proj.weight", lambda c: (_keys(c), c.dim)),
    Row("v", "self_attn.v_proj.weight", lambda c: (_keys(c), c.dim)),
    Row("q_bias", "self_attn.q_proj.bias", lambda c: (_queries(c),), BIAS, lambda c: c.qkv_bias),
    Row("k_bias", "self_attn.k_proj.bias", lambda c: (_keys(c),), BIAS, lambda c: c.qkv_bias),
    Row("v_bias", "self_attn.v_proj.bias", lambda c: (_keys(c),), BIAS, lambda c: c.qkv_bias),
    Row("q_norm", "self_attn.q_norm.weight", _head, NORM, lambda c: c.qk_norm),
    Row("k_norm", "self_attn.k_norm.weight", _head, NORM, lambda c: c.qk_norm),
    Row("o", "self_attn.o_proj.weight", lambda c: (c.dim, _queries(c))),
    Row("mlp_norm", "post_attention_layernorm.weight", _width, NORM),
    Row("gate", "mlp.gate_proj.weight", lambda c: (c.ffn_dim, c.dim), inner=0),
    Row("up", "mlp.up_proj.weight", lambda c: (c.ffn_dim, c.dim), inner=0),
    Row("down", "mlp.down_proj.weight", lambda c: (c.dim, c.ffn_dim), inner=1),
)


def block_table(config: ModelConfig) -> tuple[Row, ...]:
    """The tensors that a block of this model has."""
    return tuple(row for row in TABLE if row.wanted(config))


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a block by role; matrices are [out, in]."""
    return {row.role: row.shape(config) for row in block_table(config)}


# A weight in use: a tensor, or a callable that applies the weight and collects its gradient.
Weight = Tensor | Callable[[Tensor], Tensor]
Weights = Mapping[str, Any]  # by role


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times the transposed matrix [out, in]."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight(x)


def biased(y: Tensor, w: Weights, role: str) -> Tensor:
    """The product y plus the bias [out], if the model has one and the weight has not added it itself."""
    bias = w.get(f"{role}_bias")
    return y if bias is None else _AddBias.apply(y, bias)


class _AddBias(torch.autograd.Function):
    """y + bias, in place. The gradient of the bias is summed in fp32 or better."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.dtype = bias.dtype
        return y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.flatten(0, -2).sum(0, dtype=torch.promote_types(ctx.dtype, torch.float32)).to(ctx.dtype)


def norm(x: Tensor, weight: Weight, config: ModelConfig) -> Tensor:
    """RMSNorm of x [..., D] with a weight [D]."""
    return rms_norm(x, weight, config.norm_eps) if isinstance(weight, Tensor) else weight(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, in fp32 or better."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number per row for the backward; autograd would also save fp32 copies of a bf16 x."""

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


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each rotation, fp32 [head_width / 2]. Source of "llama3": the code of LLaMA 3.1
    (Grattafiori et al., arXiv 2407.21783), of "linear": Chen et al. (arXiv 2306.15595)."""
    even = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32)
    plain = 1.0 / config.rope_theta ** (even / config.head_width)
    if config.rope_scaling == "none":
        return plain
    scaled = plain / config.rope_factor
    if config.rope_scaling == "linear":
        return scaled
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length * plain / (2 * math.pi)  # in the original length
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the frequency that stays
    return scaled.lerp(plain, share)


def rope_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, fp32 [length, head_width]. Not part of a checkpoint."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(positions, rope_frequencies(config, device))
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, T, E]; computed in fp32 or better. cos, sin: see `Positions`."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def heads(y: Tensor, w: Weights, role: str, config: ModelConfig) -> Tensor:
    """Queries, keys or values of all heads [B, T, H * E] from the product y of that shape."""
    y = biased(y, w, role)
    if f"{role}_norm" not in w:
        return y
    return norm(y.unflatten(-1, (-1, config.head_width)), w[f"{role}_norm"], config).flatten(-2)


def split_heads(x: Tensor, width: int) -> Tensor:
    """x [B, T, H * width] as [B, H, T, width]."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


class Operations:
    """How the parts of a block are computed: with PyTorch's operations, which autograd differentiates. An
    engine may have others (`lowres.engine.fused`)."""

    def products(
        self, x: Tensor, w: Weights, normed_by: str, roles: tuple[str, ...], config: ModelConfig
    ) -> list[Tensor]:
        """The norm of x [B, T, D], times each of these matrices."""
        h = norm(x, w[normed_by], config)
        return [linear(h, w[role]) for role in roles]

    def product(self, x: Tensor, weight: Weight) -> Tensor:
        """x [B, T, in] times a matrix."""
        return linear(x, weight)

    def gated(self, gate: Tensor, up: Tensor, weight: Any, valued: bool) -> Tensor:
        """SwiGLU of gate and up [B, T, F], times a matrix. valued: if not, only the graph is needed."""
        product = F.silu(gate) * up
        return linear(product, weight) if valued else weight.last(product)

    def rotate(self, x: Tensor, positions: Places) -> Tensor:
        """x [B, T, H * E] with rotary position embedding, as [B, H, T, E]. x may be overwritten."""
        return rotate(split_heads(x, positions.cos.shape[-1]), positions.cos, positions.sin)


PLAIN = Operations()


def attention(
    x: Tensor, w: Weights, positions: Places, config: ModelConfig, ops: Operations = PLAIN
) -> Tensor:
    """Norm and causal self-attention of x [B, T, D], without the residual."""
    q, k, v = ops.products(x, w, "attn_norm", ("q", "k", "v"), config)
    q = ops.rotate(heads(q, w, "q", config), positions)  # [B, H, T, E]
    k = ops.rotate(heads(k, w, "k", config), positions)  # [B, K, T, E]
    v = split_heads(heads(v, w, "v", config), config.head_width)
    return ops.product(positions.attend(q, k, v), w["o"])


def block(x: Tensor, w: Weights, positions: Places, config: ModelConfig, ops: Operations = PLAIN) -> Tensor:
    """One transformer block, x [B, T, D] to [B, T, D]. `w` holds its weights by role."""
    x, y = block_terms(x, w, positions, config, ops)
    return x + y


def not_recomputed(config: ModelConfig) -> tuple[str, ...]:
    """Roles of matrices whose products a recomputation leaves out, as no gradient depends on them."""
    return ("down",)


def block_terms(
    x: Tensor,
    w: Weights,
    positions: Places,
    config: ModelConfig,
    ops: Operations = PLAIN,
    recomputed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two terms [B, T, D] whose sum is the output of a block.

    recomputed: only for the backward pass. Products of `not_recomputed` then have a graph and no value; the
    weight provides them as `last`.
    """
    x = x + attention(x, w, positions, config, ops)
    gate, up = ops.products(x, w, "mlp_norm", ("gate", "up"), config)
    valued = not (recomputed and "down" in not_recomputed(config))
    return x, ops.gated(gate, up, w["down"], valued)
