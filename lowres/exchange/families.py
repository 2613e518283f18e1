"""config.json of Hugging Face models: which of them is a model of ours, and what it says.

A family is a kind of model that `transformers` knows (`model_type`), with the values that a config.json
leaves out. What changes the arithmetic and is not supported is refused by its name: reading on would give
another model without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowres import disk
from lowres.config import ModelConfig
from lowres.errors import UserError
from lowres.sealed import Damaged, parse

CONFIG_JSON = "config.json"
# keys of ModelConfig and their names in config.json
NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
_REQUIRED = ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size")
# families whose `attention_bias` gives a bias to the output of attention too
_ALL_BIASED = ("llama", "qwen3")
# keys of ModelConfig and their names in `rope_parameters` or `rope_scaling`, by the type of scaling
_FACTOR = {"rope_factor": "factor"}
ROPE_NAMES = {
    "linear": _FACTOR,
    "llama3": _FACTOR
    | {
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    },
}
# tensors of old files that are computed here, and the head of a model whose embeddings are tied
_COMPUTED = ("rotary_emb.inv_freq",)
_TIED = ("lm_head.weight",)


@dataclass(frozen=True)
class Family:
    """architecture: the class in transformers. ours: keys of ModelConfig that every model of the family has.
    defaults: what a config.json of the family means if it leaves a key out."""

    model_type: str
    architecture: str
    ours: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM", {}, {"num_key_value_heads": 8, "sliding_window": 4096}),
        Family("qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}, {"num_key_value_heads": 32}),
        Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, {"num_key_value_heads": 32, "head_dim": 128}),
    )
}


@dataclass(frozen=True)
class Described:
    """What a config.json says. unused: endings of the names of tensors that the model does not need.
    has_zero_biases: whether there are `zero_biases`. values: all of it."""

    model: ModelConfig
    unused: tuple[str, ...]
    values: Mapping[str, Any]
    has_zero_biases: bool


def describe(folder: Path) -> Described:
    """The model of a Hugging Face folder. Raises UserError, which names what is not supported."""
    path = folder / CONFIG_JSON
    try:
        with disk.named(path, "read"):
            values = parse(disk.read_whole(path, limit=1 << 24))
    except Damaged as error:
        raise UserError(f"{path}: {error}; get the file again") from None
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{path}: model_type {values.get('model_type')!r} is not supported; these are: {known}"
        )
    values = {**family.defaults, **values}
    for name, is_used in _UNSUPPORTED.items():
        if is_used(values):
            raise UserError(f"{path}: {name} = {values.get(name)!r} is not supported")
    try:
        model = ModelConfig.model_validate(_ours(path, family, values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(NAMES.get(str(part), part)) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{reason}; get the file again") from None
    unused = _COMPUTED + _TIED * model.tie_embeddings
    return Described(model, unused, values, _all_biased(values))


def _ours(path: Path, family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of [model]."""
    for key in _REQUIRED:
        if values.get(NAMES[key]) is None:
            raise UserError(f"{path}: has no {NAMES[key]}; get the file again")
    found = {key: values[name] for key, name in NAMES.items() if values.get(name) is not None}
    if _all_biased(values):
        found["qkv_bias"] = True  # and those of o are zero, see `zero_biases`
    return {"norm_eps": 1e-6, **found, **family.ours, **_rope(path, values)}


def _rope(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of [model] for the rotary embedding. transformers 5 writes `rope_parameters`, and takes it
    where both forms stand; older versions write `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = values.get(name) or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: {name} = {given!r} is no object; get the file again")
    kind = given.get("rope_type", given.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": given.get("rope_theta", values.get("rope_theta", 10000.0))}
    if given.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        raise UserError(f"{path}: partial_rotary_factor is not supported")
    if kind == "default":
        return {key: float(value) for key, value in found.items()}
    if kind not in ROPE_NAMES:
        known = ", ".join(ROPE_NAMES)
        raise UserError(f"{path}: rope_type {kind!r} is not supported; these are: default, {known}")
    default = {"original_max_position_embeddings": values.get("max_position_embeddings")}
    for ours, theirs in ROPE_NAMES[kind].items():
        value = given.get(theirs, default.get(theirs))
        if value is None:
            raise UserError(f"{path}: {name} has no {theirs}; get the file again")
        found[ours] = value
    return {k: float(v) if k != "rope_original_length" else v for k, v in found.items()} | {
        "rope_scaling": kind
    }


def _slides(values: Mapping[str, Any]) -> bool:
    used = values.get("use_sliding_window", values.get("model_type") == "mistral")
    return bool(used and values.get("sliding_window"))


def _all_biased(values: Mapping[str, Any]) -> bool:
    """Whether query, key, value and output have biases."""
    return bool(values.get("attention_bias")) and values.get("model_type") in _ALL_BIASED


# what changes the arithmetic, and whether a config.json asks for it
_UNSUPPORTED: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "quantization_config": lambda v: bool(v.get("quantization_config")),
    "auto_map": lambda v: bool(v.get("auto_map")),
    "hidden_act": lambda v: v.get("hidden_act", "silu") not in ("silu", "swish"),
    "sliding_window": _slides,
    "layer_types": lambda v: set(v.get("layer_types") or ()) - {"full_attention"} != set(),
    "attention_bias": lambda v: bool(v.get("attention_bias")) and not _all_biased(v),
    "mlp_bias": lambda v: bool(v.get("mlp_bias")),
}


def zero_biases(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases that families with `attention_bias` have besides those of query, key and value."""
    return {f"model.layers.{i}.self_attn.o_proj.bias": (model.dim,) for i in range(model.n_layers)}
