"""config.json of a model of ours, as transformers 4 and 5 read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowres.config import ModelConfig
from lowres.exchange.families import BIASED, FAMILIES, NAMES, ROPE_NAMES, Family
from lowres.exchange.gguf_tokenizer import pre_tokenizer_of
from lowres.model import INIT_STD


def family_of(model: ModelConfig, tokenizer: bytes | None) -> Family:
    """The family that can be this model. tokenizer: the tokenizer.json beside it, if there is one."""
    if model.qk_norm:
        return FAMILIES["qwen3"]
    # beside a qwen2, transformers 5 replaces the steps of every tokenizer.json by those of Qwen2's
    fits = tokenizer is None or _is_as_of_qwen2(json.loads(tokenizer))
    return FAMILIES["qwen2" if model.qkv_bias and fits else "llama"]


def _is_as_of_qwen2(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json differs from that of Qwen2 in nothing but tokens, merges, and what is put
    around a text."""
    model = tokenizer["model"]
    plain = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    steps = [(tokenizer.get(key) or {}).get("type") for key in ("normalizer", "decoder")]
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in plain)
        and steps == ["NFC", "ByteLevel"]
        and pre_tokenizer_of(tokenizer) == "qwen2"
    )


def config_json(model: ModelConfig, family: Family, more: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5. family: see `family_of`. more: what the model
    does not say."""
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
    if BIASED in family.knows:
        found[BIASED] = needs_zero_biases(model, family)
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


def needs_zero_biases(model: ModelConfig, family: Family) -> bool:
    """Whether a model as one of this family has `zero_biases`, which it has not itself."""
    return model.qkv_bias and BIASED in family.knows


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
