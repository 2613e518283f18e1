"""config.json of a model of ours, as transformers 4 and 5 read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowres.config import ModelConfig
from lowres.exchange.families import FAMILIES, NAMES, ROPE_NAMES, Family
from lowres.model import INIT_STD


def family_of(model: ModelConfig) -> Family:
    """The family that can be this model."""
    if model.qk_norm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if model.qkv_bias else "llama"]


def config_json(model: ModelConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5. more: what the model does not say."""
    family = family_of(model)
    found = {name: getattr(model, key) for key, name in NAMES.items()}
    if model.max_positions is None:
        del found[NAMES["max_positions"]]
    found |= {"num_key_value_heads": model.kv_heads, "head_dim": model.head_width, "vocab_size": model.vocab}
    found |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": INIT_STD,
        "use_cache": True,
    }
    if family.model_type != "qwen2":
        found["attention_bias"] = needs_zero_biases(model)
    if family.model_type == "llama":
        found["mlp_bias"] = False
    else:
        found |= {
            "layer_types": ["full_attention"] * model.n_layers,
            "max_window_layers": model.n_layers,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    return dict(sorted((found | _rope_of(model) | dict(more)).items()))


def needs_zero_biases(model: ModelConfig) -> bool:
    """Whether the family of a model has `zero_biases`, which the model has not."""
    return model.qkv_bias and model.qk_norm


def _rope_of(model: ModelConfig) -> dict[str, Any]:
    """The rotary embedding in both forms, that of transformers 5 and the older one."""
    scaling: dict[str, Any] | None = None
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling}
        scaling |= {theirs: getattr(model, ours) for ours, theirs in ROPE_NAMES[model.rope_scaling].items()}
    parameters = {"rope_theta": model.rope_theta, "rope_type": "default"} | (scaling or {})
    if model.rope_scaling == "linear" and scaling is not None:
        scaling["type"] = scaling.pop("rope_type")  # as in the first versions, which want no more than these
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}
