"""config.json of Hugging Face models: which of them is a model of ours, and what it says.

A family is a kind of model that `transformers` knows (`model_type`), with the values that a config.json
leaves out. What changes the arithmetic and is not supported is refused by its name: reading on would give
another model without a word. Where versions of `transformers` read a file differently, it is read as by 5.24.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lowres import disk
from lowres.config import ModelConfig
from lowres.errors import UserError
from lowres.model import HEAD_NAME
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
_TIED = (HEAD_NAME,)
# families that know this key give a bias to the output of attention too; only zeros are supported there
BIASED = "attention_bias"
_MOST_BYTES = 1 << 24
_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Family:
    """architecture: the class in transformers. ours: keys of ModelConfig that every model of the family has.
    defaults: what a config.json of the family means if it leaves a key out. knows: which of the features in
    `_FAMILY_FEATURES`, and BIASED, its class has; the others do nothing, whatever a file says of them."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    knows: tuple[str, ...] = ()


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {"max_position_embeddings": 2048},
            knows=("attention_bias", "mlp_bias"),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            knows=("sliding_window",),
        ),
        Family("qwen2", "Qwen2ForCausalLM", _QWEN, {"qkv_bias": True}, ("use_sliding_window",)),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _QWEN | {"head_dim": 128},
            {"qk_norm": True},
            ("use_sliding_window", "attention_bias"),
        ),
    )
}


@dataclass(frozen=True)
class Described:
    """What a config.json says. unused: endings of the names of tensors that the model does not need.
    has_zero_biases: whether there are `zero_biases`. values: all of it. notes: what the user should know."""

    model: ModelConfig
    family: Family
    unused: tuple[str, ...]
    has_zero_biases: bool
    values: Mapping[str, Any]
    notes: list[str]


class _Read(BaseModel):
    """Base of what is read: exact types; keys that are not named here do not matter."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class _ConfigJson(_Read):
    """The keys of a config.json that say what a model computes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    hidden_act: str = "silu"
    is_causal: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    layer_types: list[str] | None = None


class _RopeJson(_Read):
    """`rope_parameters`, or the older `rope_scaling`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


def describe(folder: Path) -> Described:
    """The model of a Hugging Face folder. Raises UserError, which names what is not supported."""
    _refuse_other_forms(folder)
    path = folder / CONFIG_JSON
    raw = _parsed(path)
    family = _family(path, raw)
    raw = {**family.defaults, **raw}
    try:
        values = _ConfigJson.model_validate(raw)
        _refuse_unsupported(path, family, values, raw)
        rope, notes = _rope(path, values)
        own = {ours: value for ours, name in NAMES.items() if (value := getattr(values, name)) is not None}
        biased = values.attention_bias and BIASED in family.knows
        if biased:
            own["qkv_bias"] = True  # and those of o are zero, see `zero_biases`
        model = ModelConfig.model_validate({**own, **family.ours, **rope})
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}; get the file again") from None
    return Described(model, family, _COMPUTED + _TIED * model.tie_embeddings, biased, raw, notes)


def zero_biases(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases that a family with `attention_bias` has besides those of query, key and value."""
    return {f"model.layers.{i}.self_attn.o_proj.bias": (model.dim,) for i in range(model.n_layers)}


def _refuse_other_forms(folder: Path) -> None:
    """Raise UserError unless a folder has a config.json and is a whole model."""
    if os.path.lexists(folder / "adapter_config.json"):
        raise UserError(
            f"{folder}: holds adapters of another model (adapter_config.json), not a model; merge them into "
            "it (peft: merge_and_unload, then save_pretrained)"
        )
    if os.path.lexists(folder / CONFIG_JSON):
        return
    if snapshots := sorted(folder.glob("snapshots/*")):
        raise UserError(f"{folder}: is a model in the cache of the hub; give its folder {snapshots[-1]}")
    for pattern, form in (
        ("params.json", "the original form of its maker"),
        ("*.gguf", "GGUF"),
        ("*.safetensors", f"files without their {CONFIG_JSON}"),
        ("*.bin", f"files without their {CONFIG_JSON}"),
    ):
        if any(folder.glob(pattern)):
            raise UserError(
                f"{folder}: holds a model as {form}, which is not read; get it in the form of transformers, "
                f"with {CONFIG_JSON} and safetensors files"
            )
    raise UserError(
        f"{folder}: holds no model: neither a run (config.toml) nor a Hugging Face folder ({CONFIG_JSON})"
    )


def _parsed(path: Path) -> dict[str, Any]:
    with disk.named(path, "read"):
        text = disk.read_whole(path, limit=_MOST_BYTES)
    try:
        return parse(text)
    except Damaged as error:
        raise UserError(f"{path}: {error}; {disk.instead(text) or 'get the file again'}") from None


def _family(path: Path, raw: Mapping[str, Any]) -> Family:
    kind = raw.get("model_type")
    known = ", ".join(FAMILIES)
    if kind is None:
        raise UserError(f"{path}: has no model_type; get the file again, or give one of {known}")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        inside = "; it has a text model inside another (text_config)" if raw.get("text_config") else ""
        raise UserError(f"{path}: model_type {_shown(kind)} is not supported; these are: {known}{inside}")
    classes = raw.get("architectures")
    if classes and not (
        isinstance(classes, list)
        and family.architecture.lower() in (str(name).lower() for name in classes)  # LLaMAForCausalLM is old
    ):
        raise UserError(
            f"{path}: architectures = {_shown(classes)} is not supported; a {family.architecture} is"
        )
    return family


@dataclass(frozen=True)
class _Feature:
    """What changes the arithmetic and is not supported. is_used: whether a config.json asks for it. remedy:
    what the user can do."""

    is_used: Callable[[_ConfigJson], bool]
    remedy: str = ""


# of every family
_FEATURES = {
    "hidden_act": _Feature(lambda v: v.hidden_act not in ("silu", "swish"), "silu is"),
    "is_causal": _Feature(lambda v: not v.is_causal, "these models read from left to right"),
    "layer_types": _Feature(
        lambda v: bool(set(v.layer_types or ()) - {"full_attention"}), "only full_attention is"
    ),
    "partial_rotary_factor": _Feature(lambda v: v.partial_rotary_factor not in (None, 1.0)),
}
_NO_WINDOW = (
    "for sequences that are not longer it makes no difference: set it to null in a copy of the file if "
    "you use no others"
)
# of some
_FAMILY_FEATURES = {
    "sliding_window": _Feature(lambda v: v.sliding_window is not None, _NO_WINDOW),
    "use_sliding_window": _Feature(
        lambda v: (
            v.use_sliding_window
            and v.sliding_window is not None
            and v.layer_types is None
            and v.max_window_layers < v.num_hidden_layers
        ),
        "all layers have to see all tokens",
    ),
    "mlp_bias": _Feature(lambda v: v.mlp_bias, "the MLP has no biases here"),
}
_QUANTISED = ("quantization_config", "compression_config", "quantization")


def _refuse_unsupported(path: Path, family: Family, values: _ConfigJson, raw: Mapping[str, Any]) -> None:
    for name in _QUANTISED:
        if raw.get(name):
            how = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
            raise UserError(
                f"{path}: {name}: quantised weights{f' ({_shown(how)})' if how else ''} are not supported; "
                "give the model in bf16, fp16 or fp32"
            )
    if raw.get("auto_map"):
        raise UserError(
            f"{path}: auto_map: a model with code of its own is not supported, as it may compute anything; "
            f"if it is a {family.architecture}, remove the key in a copy of the file"
        )
    known = _FEATURES | {name: _FAMILY_FEATURES[name] for name in family.knows if name != BIASED}
    for name, feature in known.items():
        if feature.is_used(values):
            remedy = f"; {feature.remedy}" if feature.remedy else ""
            raise UserError(f"{path}: {name} = {_shown(getattr(values, name))} is not supported{remedy}")


def _rope(path: Path, values: _ConfigJson) -> tuple[dict[str, Any], list[str]]:
    """The keys of [model] for the rotary embedding, and notes.

    transformers 5 writes `rope_parameters`, 4 writes `rope_theta` and `rope_scaling`. 5.24 reads all of them:
    `rope_scaling` before `rope_parameters`, and a base in it before `rope_theta`.
    """
    name = "rope_scaling" if values.rope_scaling else "rope_parameters"
    found = _rope_of(path, name, values)
    if values.rope_parameters and (values.rope_scaling or "rope_theta" in values.model_fields_set):
        old = values.model_copy(update={"rope_parameters": None})
        new = values.model_copy(update={"rope_scaling": None})
        if not _rope_of(path, "rope_scaling", old) == _rope_of(path, "rope_parameters", new) == found:
            shown = ", ".join(f"{key.removeprefix('rope_')} {value}" for key, value in found.items())
            return found, [
                f"{path}: rope_parameters and the older keys beside it say different things; as in "
                f"transformers 5 the rotary embedding has {shown}"
            ]
    return found, []


def _rope_of(path: Path, name: str, values: _ConfigJson) -> dict[str, Any]:
    """The keys of [model] that the object `name` of a config.json means."""
    raw = getattr(values, name) or {}
    for key, value in raw.items():
        if isinstance(value, dict):
            raise UserError(
                f"{path}: {name}.{_shown(key)}: another rotary embedding for some layers is not supported"
            )
    try:
        given = _RopeJson.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {name}.{_one_line(error)}; get the file again") from None
    kind = given.rope_type or given.type or "default"
    if given.partial_rotary_factor not in (None, 1.0):
        raise UserError(f"{path}: {name}.partial_rotary_factor is not supported")
    found: dict[str, Any] = {
        "rope_theta": values.rope_theta if given.rope_theta is None else given.rope_theta
    }
    if kind == "default":
        return found
    if kind not in ROPE_NAMES:
        known = ", ".join(("default", *ROPE_NAMES))
        raise UserError(f"{path}: rope_type {_shown(kind)} is not supported; these are: {known}")
    for ours, theirs in ROPE_NAMES[kind].items():
        value = getattr(given, theirs)
        if theirs == "original_max_position_embeddings":
            first, last = values.original_max_position_embeddings, values.max_position_embeddings
            value = next((one for one in (first, value, last) if one is not None), None)
        if value is None:
            raise UserError(f"{path}: {name} has no {theirs}; get the file again")
        found[ours] = value
    return found | {"rope_scaling": kind}


def _one_line(error: ValidationError) -> str:
    """What is wrong with a config.json, with the names of its keys."""
    first = error.errors()[0]
    names = NAMES | {ours: theirs for keys in ROPE_NAMES.values() for ours, theirs in keys.items()}
    key = str(names.get(str(first["loc"][0]), first["loc"][0])) if first["loc"] else ""
    if first["type"] == "missing":
        return f"has no {key}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{key} = {_shown(first['input'])}: {reason}" if key else reason


def _shown(value: Any) -> str:
    """A value of a file in a message: not all of it, if it is long or deep."""
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return "[...]"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
