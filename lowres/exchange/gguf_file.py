"""GGUF: one file with model and tokenizer, as llama.cpp and what is built on it read it.

The architecture follows from the options of the model. The tensors are those of a Hugging Face folder under
other names. In "llama" the two numbers that RoPE turns together are neighbours in a head, so the rows of q
and k change places; the other architectures pair them as here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowres.config import ModelConfig
from lowres.data import open_tokenizer
from lowres.errors import UserError
from lowres.exchange.gguf_tokenizer import vocabulary_of
from lowres.exchange.gguf_weights import (
    BLOCK,
    CODES,
    LARGEST_LOSS,
    Form,
    choose,
    forms,
    library,
    relative,
    row_bytes,
    sums,
)
from lowres.exchange.stored import StoredModel, TrainedModel, answer_ends, is_tuned
from lowres.exchange.target import whole
from lowres.model import rope_frequencies, unit_specs
from lowres.storage import TensorSpec

# number formats of the matrices, and their names in GGUF
_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
DTYPES = tuple(_TYPES)
# the names of tensors by role; those of a block follow its number
_NAMES = {
    "embedding": "token_embd",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "norm": "output_norm",
    "head": "output",
}
_ROPE = "rope_freqs.weight"
# about: the header without the tokenizer; a token with its score, type and merge
_HEADER_BYTES, _TOKEN_BYTES = 1 << 16, 64
# llama.cpp knows models with such names, and opens no file of that name without their control tokens
_NO_NAMES = ("phi3", "phi-3", "modern-bert")
# of a folder that does not say it, as in transformers
_POSITIONS = 2048


def export_gguf(model: StoredModel, out: Path, dtype: str) -> list[str]:
    """Write a model and its tokenizer to the file `out`, with one tensor in memory at a time. dtype: of the
    matrices, one of DTYPES; norms and biases are always fp32.

    Returns what the user should know, a line each. Raises UserError if llama.cpp cannot use such a model, and
    as `target.whole`.
    """
    gguf = library()
    architecture = _architecture(model.model)
    vocabulary = vocabulary_of(model.tokenizer, model.model.vocab, model.trained_on_text)
    if model.tokenizer is not None and is_tuned(model):
        vocabulary.answer_end = next(iter(answer_ends(model, open_tokenizer(model.tokenizer, "own"))), None)
    specs = [spec for unit in unit_specs(model.model) for spec in unit.tensors]
    nbytes = _HEADER_BYTES + _TOKEN_BYTES * len(vocabulary.tokens)
    nbytes += sum(_nbytes(spec, forms(dtype, "fp32", spec.shape)[0][0]) for spec in specs)
    with whole(out, nbytes) as path:
        chosen = _chosen(model, dtype)
        writer = gguf.GGUFWriter(path, architecture)
        try:
            _describe(writer, model, out.stem, dtype)
            vocabulary.write(writer)
            cost = _write(writer, model, chosen)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()
    about = f"{out}: {architecture}, {sum(spec.numel for spec in specs):,} numbers in {dtype}"
    return [about, *_cost_lines(dtype, specs, chosen, cost), *(f"note: {note}" for note in vocabulary.notes)]


def _architecture(config: ModelConfig) -> str:
    """The name of the model in llama.cpp. Raises UserError if it has none."""
    scaled = config.rope_scaling == "llama3"
    for without, given in (("model.qkv_bias", config.qkv_bias), ('model.rope_scaling = "llama3"', scaled)):
        if config.qk_norm and given:
            raise UserError(f"model.qk_norm: llama.cpp has no model with it and {without}; use --format hf")
    if config.qk_norm:
        return "qwen3"
    # "llama" has biases too, where "qwen2" has neither a head_dim of its own nor such scaling
    plain = config.n_heads * config.head_width == config.dim and not scaled
    return "qwen2" if config.qkv_bias and plain else "llama"


def _chosen(model: StoredModel, dtype: str) -> dict[str, Form]:
    """The form of every tensor, by our name."""
    found: dict[str, Form] = {}
    for unit in unit_specs(model.model):
        if all(len(forms(dtype, "fp32", spec.shape)) == 1 for spec in unit.tensors):
            found |= {spec.name: forms(dtype, "fp32", spec.shape)[0][0] for spec in unit.tensors}
            continue
        for spec, weight in model.weights(unit):
            found[spec.name] = choose(spec.name, weight, forms(dtype, weight.kind, spec.shape))
    return found


def _describe(writer: Any, model: StoredModel, name: str, dtype: str) -> None:
    """Add the keys of the model."""
    gguf, config = library(), model.model
    writer.add_type("model")
    if not any(known in name.lower() for known in _NO_NAMES):
        writer.add_name(name)
    kind = f"{'ALL' if dtype == 'fp32' else 'MOSTLY'}_{_TYPES[dtype]}"
    writer.add_file_type(int(gguf.LlamaFileType[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(_positions(model))
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def _positions(model: StoredModel) -> int:
    """The longest sequence for which a model is meant."""
    given = model.config.data.seq_len if isinstance(model, TrainedModel) else _POSITIONS
    return model.model.max_positions or given


def _write(writer: Any, model: StoredModel, chosen: dict[str, Form]) -> dict[str, tuple[float, float]]:
    """Write the header and all tensors. Returns the squared error and norm of each, by our name."""
    gguf, config = library(), model.model
    # how much slower each rotation is than without scaling
    factors = rope_frequencies(config.model_copy(update={"rope_scaling": "none"}), torch.device("cpu"))
    factors = factors / rope_frequencies(config, torch.device("cpu"))
    if config.rope_scaling == "llama3":
        writer.add_tensor_info(_ROPE, factors.shape, np.dtype(np.float32), factors.nbytes)
    for unit in unit_specs(config):
        for spec in unit.tensors:
            form = chosen[spec.name]
            kind = gguf.GGMLQuantizationType[form.type]
            writer.add_tensor_info(_name(spec), spec.shape, np.dtype(np.float32), _nbytes(spec, form), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if config.rope_scaling == "llama3":
        _append(writer, factors.numpy())
    cost = {}
    for unit in unit_specs(config):
        for spec, weight in model.weights(unit):
            form = chosen[spec.name]
            data = np.empty((spec.shape[0], _nbytes(spec, form) // spec.shape[0]), np.uint8)
            cost[spec.name] = sums(spec.name, form.encode(weight), into=data)
            order = _order(config, spec)
            _append(writer, data if order is None else data[order.numpy()])
    return cost


def _append(writer: Any, data: np.ndarray) -> None:
    """Write the next tensor. The writer's own function leaves it to numpy, whose errors do not say why a disk
    takes no more."""
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    file.write(data.data)
    writer.write_padding(file, data.nbytes)


def _name(spec: TensorSpec) -> str:
    """The name of a tensor in GGUF."""
    parts = spec.name.split(".")
    block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{block}{_NAMES[spec.role.removesuffix('_bias')]}.{parts[-1]}"


def _order(config: ModelConfig, spec: TensorSpec) -> Tensor | None:
    """The row of ours that is each row of the tensor in GGUF; None if they are in order."""
    if spec.role not in ("q", "k", "q_bias", "k_bias") or _architecture(config) != "llama":
        return None
    rows = torch.arange(spec.shape[0]).view(-1, 2, config.head_width // 2)  # head, number of a pair, pair
    return rows.transpose(1, 2).reshape(-1)


def _nbytes(spec: TensorSpec, form: Form) -> int:
    if len(spec.shape) == 1:
        return row_bytes(form.type, spec.shape[0])
    return spec.shape[0] * row_bytes(form.type, spec.shape[1])


def _cost_lines(
    dtype: str, specs: list[TensorSpec], chosen: dict[str, Form], cost: dict[str, tuple[float, float]]
) -> Iterator[str]:
    """What the formats cost, and which tensors have another one than the user asked for."""
    matrices = [spec for spec in specs if len(spec.shape) > 1]
    losses = {spec.name: relative(*cost[spec.name]) for spec in matrices}
    overall = relative(*(math.fsum(cost[spec.name][i] for spec in matrices) for i in (0, 1)))
    if overall:
        worst = max(losses, key=lambda name: losses[name])
        most = f"at most {losses[worst]:.2g} ({worst})"
        yield f"{dtype} changes the matrices by {overall:.2g} of their norm, {most}"
    kept = sum(chosen[spec.name] is CODES for spec in matrices)
    if kept:
        yield f"{kept} of {len(matrices)} matrices keep their INT8 codes, with scales rounded to fp16"
    others: dict[tuple[str, str], list[str]] = {}
    for spec in matrices:
        wanted, found = _TYPES[dtype], chosen[spec.name].type
        if found != wanted:
            why = f"{wanted} would change them by {LARGEST_LOSS:.0%} or more"
            if wanted == "Q8_0" and spec.shape[1] % BLOCK:
                why = f"their rows are no multiple of {BLOCK}"
            others.setdefault((found, why), []).append(spec.name)
    for (found, why), names in others.items():
        yield f"note: {len(names)} matrices, such as {names[0]}, are stored as {found}: {why}"
