"""The keys of [model], and the sizes that have a name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lowres.config.base import Layers, OneOf, Rate, Section, Size, resumable

# dim, ffn_dim, n_layers, n_heads: the sizes of the GaLore, ReLoRA and APOLLO papers
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
PRESET_VOCAB = 32000
# keys of the file that `--set model.preset=...` removes
SHAPE_KEYS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "ffn_dim",
    "vocab_size",
    "tie_embeddings",
)


class ModelConfig(Section):
    """The shape of the LLaMA model. A preset gives all of it; explicit keys override the preset."""

    preset: Annotated[str, OneOf(PRESETS)] | None = None
    """Name of a shape from the GaLore, ReLoRA and APOLLO papers. The name counts a vocabulary of 32,000: with
    the 4,096 pieces that a small text gets, 9m has 1.85 M parameters (`lowres plan` says both)."""
    dim: Size = 128
    """Width of the residual stream."""
    n_layers: Layers = 4
    """Number of transformer blocks."""
    n_heads: Size = 4
    """Number of query heads; must divide dim unless head_dim is given."""
    n_kv_heads: Size | None = None
    """Number of key and value heads (grouped-query attention); must divide n_heads, which is the default."""
    head_dim: Size | None = None
    """Width of a head, an even number (RoPE); default dim / n_heads."""
    ffn_dim: Size = 352
    """Hidden width of the SwiGLU feed-forward layer."""
    vocab_size: Annotated[Size, Field(ge=2)] | None = None
    """Rows of the embedding; default: as many as the tokenizer of the data has pieces."""
    rope_theta: Rate = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How a model is prepared for longer texts. linear: all positions are divided by rope_factor. llama3: the
    rotations of a wave length above rope_original_length / rope_low_freq_factor are, those below
    rope_original_length / rope_high_freq_factor are not, and between the two it changes gradually, as in
    LLaMA 3.1."""
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    """Factor of rope_scaling."""
    rope_low_freq_factor: Rate = 1.0
    """See rope_scaling = "llama3"."""
    rope_high_freq_factor: Rate = 4.0
    """See rope_scaling = "llama3"; above rope_low_freq_factor."""
    rope_original_length: Size = 8192
    """Tokens in the sequences that the model was first trained on; for rope_scaling = "llama3"."""
    max_positions: Size | None = resumable(None)
    """Longest sequence for which the model is meant, told to other programs at export; default
    data.seq_len."""
    norm_eps: Rate = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    qkv_bias: bool = False
    """Biases on query, key and value, as in Qwen2."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head, as in Qwen3."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str):
            return values
        if preset not in PRESETS:
            raise ValueError(f"preset: {preset!r} is not known; use one of {', '.join(PRESETS)}")
        shape = dict(zip(("dim", "ffn_dim", "n_layers", "n_heads"), PRESETS[preset], strict=True))
        return shape | values

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"n_heads: {self.n_heads} heads do not divide dim {self.dim}; change one of them, or give "
                "head_dim"
            )
        if self.head_width % 2:
            key, given = ("n_heads", "dim / n_heads") if self.head_dim is None else ("head_dim", "it")
            raise ValueError(
                f"{key}: {given} is {self.head_width}, but rotary embedding needs an even number"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}; change one of them"
            )
        if self.rope_scaling == "llama3" and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                f"rope_high_freq_factor: {self.rope_high_freq_factor} is not above rope_low_freq_factor "
                f"{self.rope_low_freq_factor}; raise it"
            )
        return self

    @property
    def head_width(self) -> int:
        """Numbers in a query, key or value of one head."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def parameters(self, vocab: int) -> int:
        """Numbers in the weights, with so many rows of the embedding."""
        dim, queries, kv = self.dim, self.n_heads * self.head_width, self.kv_heads * self.head_width
        block = 2 * dim * queries + 2 * dim * kv + 3 * dim * self.ffn_dim + 2 * dim
        block += (queries + 2 * kv) * self.qkv_bias + 2 * self.head_width * self.qk_norm
        return self.n_layers * block + dim + vocab * dim * (1 if self.tie_embeddings else 2)

    @property
    def size(self) -> str:
        """How many parameters, in words; if a preset is named after another number, that too."""
        found = f"{self.parameters(self.vocab) / 1e6:,.2f} M parameters"
        if self.preset is None or self.vocab == PRESET_VOCAB:
            return found
        named = f"{self.parameters(PRESET_VOCAB) / 1e6:,.2f} M"
        return f"{found} (preset {self.preset} is named for {named} with a vocabulary of {PRESET_VOCAB:,})"

    @property
    def vocab(self) -> int:
        """Rows of the embedding; PRESET_VOCAB until the vocabulary of the data is known."""
        return self.vocab_size or PRESET_VOCAB
