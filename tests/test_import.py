"""Models of other programs: config.json, the files of a folder, `lowres import`, `--init-from`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowres import checkpoint
from lowres.config import Config, ModelConfig
from lowres.config_file import load_config, load_resolved
from lowres.engine import EngineSettings, LayerwiseEngine
from lowres.errors import UserError
from lowres.exchange import initialize_from, open_model
from lowres.exchange.families import FAMILIES, describe
from lowres.model import empty_units, rope_frequencies, unit_specs
from lowres.runs import identities, open_run
from lowres.start import begin
from lowres.storage import ADAPTER, LORA_A
from tests.helpers import CPU, ROOMS, Recorder, lowres_here, make_batch, make_units, new_storage

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
    "initializer_range": 0.2,
}
# the kinds of models that people have, small: class of the config, its keys, and the format of the files
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], torch.dtype]] = {
    "llama": (LlamaConfig, {}, torch.float16),
    "llama3": (LlamaConfig, {"num_key_value_heads": 2, "rope_parameters": LLAMA3}, torch.bfloat16),
    "linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        torch.float32,
    ),
    "smollm2": (
        LlamaConfig,
        {"tie_word_embeddings": True, "vocab_size": 49152, "num_key_value_heads": 1, "hidden_size": 32},
        torch.bfloat16,
    ),
    "tinyllama": (LlamaConfig, {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}, torch.float32),
    "mistral": (
        MistralConfig,
        {"sliding_window": None, "num_key_value_heads": 2, "head_dim": 24},
        torch.bfloat16,
    ),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}, torch.bfloat16),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32}, torch.float16),
}


def random_model(name: str) -> tuple[PreTrainedModel, torch.dtype]:
    """A model of transformers with the numbers of its files, in fp32."""
    make, keys, dtype = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(**SIZES | keys, max_position_embeddings=512)).eval()
    with torch.no_grad():
        for p in model.parameters():  # also norms that are not 1, and biases that are not 0
            p.add_(torch.randn_like(p) * 0.1)
            p.copy_(p.to(dtype))
    return model, dtype


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders as `save_pretrained` leaves them, of several shards, with a tokenizer.json of 257 ids."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            model, dtype = random_model(name)
            model.to(dtype).save_pretrained(root / name, max_shard_size="60KB")
            assert (root / name / "model.safetensors.index.json").exists()
            tokenizer().save(str(root / name / "tokenizer.json"))
            ends = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
            (root / name / "tokenizer_config.json").write_text(json.dumps(ends))
        return root / name

    return folder


@pytest.fixture
def llama3(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return shutil.copytree(folders("llama3"), tmp_path / "model")


def tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, and what ends a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def edit(folder: Path, **keys: Any) -> None:
    """Change config.json; a key that is ... is removed."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_model(folder)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600
    return str(error.value)


# ---- families


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, folders: Callable[[str], Path]) -> None:
    theirs, _ = random_model(name)
    origin = open_model(folders(name))
    units = empty_units(origin.model, "fp32", "fp32", ROOMS)
    initialize_from(units.values(), origin)
    engine = LayerwiseEngine(origin.model, units, Recorder(), ROOMS, EngineSettings(2, torch.float32))
    batch = make_batch(3, 130)
    with torch.no_grad():
        wanted = theirs(batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    assert (engine.logits(batch[:, :-1]) - wanted[:, -1]).abs().max() < 1e-4
    assert (engine.logits(batch[:, :17]) - wanted[:, 16]).abs().max() < 1e-4
    assert engine.evaluate(batch)[0] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_gradients_equal_transformers(name: str, folders: Callable[[str], Path]) -> None:
    theirs = random_model(name)[0].double()
    origin, recorder = open_model(folders(name)), Recorder()
    units = make_units(origin.model, dtype=torch.float64)
    initialize_from(units.values(), origin)
    settings = EngineSettings(2, torch.float64)
    batch = make_batch(3, 80)
    LayerwiseEngine(origin.model, units, recorder, ROOMS, settings).step(batch, 0, 1.0)
    logits = theirs(batch[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    assert recorder.grads.keys() == dict(theirs.named_parameters()).keys()
    for parameter, grad in recorder.grads.items():
        wanted = theirs.get_parameter(parameter).grad
        assert wanted is not None
        # transformers rotates with fp32 tables too, but rounds elsewhere
        assert float((grad - wanted).norm() / wanted.norm()) < 1e-6, parameter


L3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
NO_LENGTH = {key: value for key, value in L3.items() if key != "original_max_position_embeddings"}
# keys of config.json for the rotary embedding, new and old
ROPE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 500000},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    "parameters without theta": {"rope_parameters": {"rope_type": "default"}},
    "theta beside parameters without": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4},
    "old type": {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2}},
    "both types": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    "no type": {"rope_theta": 7e4, "rope_scaling": {"factor": 2.0}},
    "empty": {"rope_theta": 7e4, "rope_scaling": {}, "rope_parameters": None},
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 512},
    "old llama3": {"rope_theta": 500000.0, "rope_scaling": L3, "max_position_embeddings": 512},
    "the same twice": {"rope_theta": 500000.0, "rope_scaling": L3, "rope_parameters": LLAMA3},
    "llama3 without original": {"rope_scaling": NO_LENGTH, "max_position_embeddings": 128},
    "llama3 without any length": {"rope_scaling": NO_LENGTH},
    "original beside": {"rope_scaling": L3, "original_max_position_embeddings": 32},
    "theta in scaling": {"rope_scaling": LLAMA3, "rope_theta": 7e4},
}
# where the two forms disagree
DISAGREEING: dict[str, dict[str, Any]] = {
    "two thetas": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 7e4},
    "another scaling": {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "no scaling": {"rope_parameters": LLAMA3, "rope_scaling": None, "rope_theta": 500000.0},
}


@pytest.mark.parametrize("name", [*ROPE, *DISAGREEING])
def test_rotary_embeddings_are_read_as_transformers_does(name: str, tmp_path: Path) -> None:
    keys = {**ROPE, **DISAGREEING}[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **keys}))
    found = describe(tmp_path)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(
        rope_frequencies(found.model, CPU), theirs.inv_freq, rtol=1e-6, atol=0, check_dtype=True
    )
    assert theirs.attention_scaling == 1.0
    assert [("say different things" in note) for note in found.notes] == [True] * (name in DISAGREEING)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(family: str, tmp_path: Path) -> None:
    required = {**SIZES, "hidden_size": 4096, "num_attention_heads": 32}
    off = {"sliding_window": None} if family == "mistral" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **required, **off}))
    found, theirs = describe(tmp_path).model, AutoConfig.from_pretrained(tmp_path)
    assert found.kv_heads == theirs.num_key_value_heads
    assert found.head_width == getattr(theirs, "head_dim", 128) == 128
    assert found.max_positions == theirs.max_position_embeddings
    assert (found.norm_eps, found.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]


# edits of a config.json, and what the one line says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model_type": ({"model_type": ...}, "has no model_type"),
    "other": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "model_type 'gemma3' .*text_config",
    ),
    "deep": ({"model_type": [[[]]]}, r"model_type \[\.\.\.\] is not"),
    "class": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures = .*a LlamaForCausalLM is",
    ),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config: .*\('fp8'\)"),
    "mlx": ({"quantization": {"bits": 4}}, "quantization: quantised weights are"),
    "code": ({"auto_map": {"AutoModelForCausalLM": "m.Model"}}, "auto_map: .* code of its own"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' .* silu is"),
    "both ways": ({"is_causal": False}, "is_causal = False"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "mistral": ({"model_type": "mistral", "architectures": ...}, "sliding_window = 4096 .* null"),
    "qwen window": (
        {"model_type": "qwen2", "architectures": ..., "use_sliding_window": True, "max_window_layers": 1},
        "use_sliding_window = True",
    ),
    "layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = .*only full_attention is",
    ),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    "nested": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "parameters.'full_attention'"),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters has no factor; get"),
    "small factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
        "factor = 0.5: .*greater than or equal to 1; get",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "text": ({"hidden_size": "64"}, "hidden_size = '64': .*valid integer; get the file again"),
    "null": ({"vocab_size": None}, "vocab_size = None: .*valid integer"),
    "missing": ({"num_attention_heads": ...}, "has no num_attention_heads; get"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    "fraction": ({"intermediate_size": 96.5}, "intermediate_size = 96.5"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    "endless": ({"rope_theta": float("inf"), "rope_parameters": ...}, "rope_theta = inf"),
    "null theta": ({"rope_theta": None, "rope_parameters": ...}, "rope_theta = None"),
    "text theta": ({"rope_parameters": {"rope_theta": "1e4"}}, r"rope_parameters\.rope_theta = '1e4'"),
    "type of type": ({"rope_parameters": {"rope_type": ["default"]}}, r"rope_type = \['default'\]"),
    "list": ({"rope_scaling": [1]}, r"rope_scaling = \[1\]: .*dict"),
    "huge": ({"vocab_size": 1 << 40}, "vocab_size = 1099511627776: .*less than or equal"),
    "huge float": ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta = 1000"),
    "heads": ({"num_attention_heads": 3, "head_dim": ...}, "3 heads do not divide"),
    "shape": ({"hidden_size": 128}, "has the shape .* but config.json means"),
    "qk_norm": ({"model_type": "qwen3", "architectures": ...}, "q_norm.weight is missing; get the folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for file in folders("llama3").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "model" / "config.json").unlink()
    shutil.copy(folders("llama3") / "config.json", tmp_path / "model")
    keys, pattern = REFUSED[name]
    edit(tmp_path / "model", **keys)
    found = refusal(tmp_path / "model")
    assert re.search(pattern, found), found
    assert str(tmp_path / "model") in found


def test_a_bias_of_the_output_of_attention_has_to_be_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, attention_bias=True)).eval()
    for name, p in theirs.named_parameters():
        p.data.normal_(std=0.2)
        if name.endswith("o_proj.bias"):
            p.data.zero_()
    theirs.save_pretrained(tmp_path / "zero")
    origin = open_model(tmp_path / "zero")
    assert origin.model.qkv_bias
    units = empty_units(origin.model, "fp32", "fp32", ROOMS)
    initialize_from(units.values(), origin)
    engine = LayerwiseEngine(origin.model, units, None, ROOMS, EngineSettings(2, torch.float32))
    tokens = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        wanted = theirs(tokens).logits[:, -1]
    assert float((engine.logits(tokens) - wanted).abs().max()) < 1e-4
    theirs.model.layers[1].self_attn.o_proj.bias.data[3] = 0.5
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"layers.1.self_attn.o_proj.bias is not zero"):
        open_model(tmp_path / "other")


# ---- the files of a folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def indexed(folder: Path, **files: str) -> None:
    """Change the index: tensor -> file."""
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"] |= {name.replace("__", "."): file for name, file in files.items()}
    path.write_text(json.dumps(values))


def changed(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor in its file."""
    for file in shards(folder):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name]).contiguous()}, file)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def pickled(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q.")


def fused(folder: Path) -> None:
    tensors = {name: tensor for file in shards(folder) for name, tensor in load_file(file).items()}
    renamed = {name.replace("q_proj", "qkv_proj"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")


def another_tensor(folder: Path) -> None:
    save_file({"model.extra": torch.zeros(2)}, folder / "extra.safetensors")
    indexed(folder, model__extra="extra.safetensors")


def broken_link(folder: Path) -> None:
    indexed(folder, model__norm__weight="x.safetensors")
    (folder / "x.safetensors").symlink_to("../../blobs/gone")


def cached(folder: Path) -> None:
    """The folder becomes one of a cache, in which snapshots link to blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(folder.iterdir()) if path.is_file()):
        file.rename(blobs / f"{number:x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:x}")


def leaving(folder: Path, path: str) -> None:
    indexed(folder, model__norm__weight=path)


def emptied(folder: Path, name: str = "") -> None:
    """Leave nothing but an empty file."""
    shutil.rmtree(folder)
    folder.mkdir()
    if name:
        (folder / name).touch()


def without_weights(folder: Path) -> None:
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()


PATHS = ("../x.safetensors", "/etc/passwd", "..", "a\0.safetensors", "\ud800.safetensors", "x.bin", "")
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda f: shards(f)[2].unlink(),
        "safetensors: is missing, but .*index.json names it; get",
    ),
    "cut shard": (
        lambda f: os.truncate(shards(f)[2], 5000),
        "is truncated at 5000 bytes; get the file again",
    ),
    "empty shard": (lambda f: os.truncate(shards(f)[2], 0), "is truncated at 0 bytes"),
    "longer shard": (lambda f: shards(f)[2].open("ab").write(b"12"), r"has \d+ bytes instead of"),
    "pointer": (
        lambda f: shards(f)[2].write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n"
        ),
        "is a Git LFS pointer: `git lfs pull` gets the file",
    ),
    "page": (
        lambda f: shards(f)[0].write_text("<!doctype html>\n<p>404"),
        "text that begins with '<!doctype",
    ),
    "config": (
        lambda f: (f / "config.json").write_text("Entry not found"),
        "config.json: is not JSON.*'Entry not",
    ),
    "cut config": (
        lambda f: os.truncate(f / "config.json", 40),
        "config.json: is not JSON; get the file again",
    ),
    "nested config": (lambda f: (f / "config.json").write_text("[" * 90000), "config.json: is not JSON"),
    "wrong index": (
        lambda f: indexed(f, model__norm__weight=shards(f)[0].name),
        "says that model.norm.weight is in .*, which does not have it; get both",
    ),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    **{
        f"path {path!r}": (partial(leaving, path=path), "which is no safetensors file of its")
        for path in PATHS
    },
    "other tensor": (another_tensor, "has a tensor 'model.extra', so it is not"),
    "fused": (fused, "has a tensor '.*qkv_proj.weight', and no .*q_proj.weight"),
    "shape": (
        lambda f: changed(f, NORM, lambda t: t[1:]),
        r"norm.weight has the shape \[63\], but .* \[64\]",
    ),
    "fp8": (
        lambda f: changed(f, UP, lambda t: t.to(torch.float8_e4m3fn)),
        "up_proj.weight is stored as F8_E4M3",
    ),
    "uint32": (
        lambda f: changed(f, UP, lambda t: t.float().view(torch.uint32)),
        "up_proj.weight is stored as U32",
    ),
    "fp64": (lambda f: changed(f, UP, lambda t: t.double()), "up_proj.weight is stored as F64"),
    "pickle": (pickled, "pytorch_model.bin: a pickle can run any program.* save_pretrained"),
    "nothing": (without_weights, "has neither model.safetensors nor model.safetensors.index.json"),
    "gone": (broken_link, "is a link to a file that is gone; get the file again"),
    "cache": (cached, "is a model in the cache of the hub; give its folder .*snapshots/0a"),
    "adapters": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "holds adapters .* merge_and_unload",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "as files without their config.json, which is not"),
    "original": (partial(emptied, name="params.json"), "as the original form of its maker, which is not"),
    "gguf": (partial(emptied, name="m.gguf"), "holds a model as GGUF, which is not read"),
    "empty": (emptied, "holds no model: neither a run .* nor a Hugging Face"),
    "tied": (
        lambda f: edit(f, tie_word_embeddings=True),
        "tie_word_embeddings is true, but lm_head.weight is not .*set it to false",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_cannot_be_used_are_one_line(name: str, llama3: Path) -> None:
    damage, pattern = DAMAGES[name]
    damage(llama3)
    found = refusal(llama3)
    assert re.search(pattern, found), found
    assert str(llama3) in found


def test_files_are_found_as_transformers_finds_them(llama3: Path, tmp_path: Path) -> None:
    wanted = {name: tensor for file in shards(llama3) for name, tensor in load_file(file).items()}

    def read(folder: Path) -> dict[str, Tensor]:
        origin = open_model(folder)
        stored = (pair for unit in unit_specs(origin.model) for pair in origin.weights(unit))
        return {spec.name: weight.tensors()[""] for spec, weight in stored}

    def same(found: dict[str, Tensor]) -> bool:
        return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    assert same(read(llama3)) and read(llama3).keys() == wanted.keys()
    # a head that is the embedding, as other programs write it; and what older versions stored
    edit(llama3, tie_word_embeddings=True)
    changed(llama3, "lm_head.weight", lambda _: wanted["model.embed_tokens.weight"])
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, llama3 / "r.safetensors")
    indexed(llama3, model__layers__0__self_attn__rotary_emb__inv_freq="r.safetensors")
    assert read(llama3).keys() == wanted.keys() - {"lm_head.weight"}
    # an old index beside one file
    edit(llama3, tie_word_embeddings=False)
    wanted[NORM] = wanted[NORM] + 1
    save_file(wanted, llama3 / "model.safetensors")
    assert same(read(llama3))
    theirs = AutoModelForCausalLM.from_pretrained(llama3, dtype=torch.bfloat16)
    assert torch.equal(theirs.model.norm.weight, wanted[NORM])
    # links into a cache
    cached(llama3)
    assert same(read(llama3 / "snapshots" / "0a"))


def test_a_number_that_is_not_finite_is_refused(llama3: Path, tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        changed(llama3, UP, lambda t, value=value: t.index_fill(0, torch.tensor([95]), value))  # type: ignore[misc]
        error = lowres_here("import", llama3, tmp_path / "run", code=2).stderr
        assert f"{UP} holds a number that is not finite; get the file again" in error
        assert not list(tmp_path.glob("run*"))


# ---- lowres import


def test_an_imported_model_is_a_run_that_has_not_begun(
    llama3: Path, corpus: Path, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shown = lowres_here("import", llama3, run).stdout.splitlines()
    assert shown[0] == (
        f"{llama3}: LlamaForCausalLM, bf16; 0.10 M parameters in 2 layers, vocabulary 320; tokenizer.json "
        "with 257 ids"
    )
    # a row of 64 to 96 normal numbers has its largest near 2.5 standard deviations: 2.5 / 127 / sqrt(12)
    assert 0.004 < float(re.search(r"rounding has changed the matrices by (.*)%", shown[1])[1]) / 100 < 0.008  # type: ignore[index]
    assert not list(tmp_path.glob("*.unfinished"))
    found, _, tokenizer = open_run(run)
    assert found.memory.weights == "int8" and found.memory.embeddings_kept_in == "bf16"
    assert found.data.seq_len == 512 and found.model.rope_scaling == "llama3"
    assert tokenizer.vocab_size == 257 and Path(str(found.data.tokenizer)) == run / "tokenizer.json"
    place = run / "checkpoints" / "step_00000000"
    assert identities(run) == {checkpoint.load(place).run}
    # codes of the format itself, of rows that the library read
    stored = {name: tensor for file in shards(llama3) for name, tensor in load_file(file).items()}
    written = {
        name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    for name, tensor in stored.items():
        if tensor.dim() == 1:
            assert torch.equal(written[name], tensor.float())
        elif "layers" not in name:
            assert torch.equal(written[name], tensor)
        else:
            wanted = new_storage("int8", tuple(tensor.shape))
            wanted.fill(iter([(0, tensor.float())]))
            for suffix, part in wanted.tensors().items():
                assert torch.equal(written[name + suffix], part)
    # the folder is not needed any more
    shutil.rmtree(llama3)
    assert "ok" in lowres_here("checkpoint", "verify", run).stdout
    assert lowres_here("sample", run, "--prompt", "def ", "--tokens", 5).stdout.startswith("def ")
    scores = json.loads(lowres_here("eval", run, "--data", corpus / "cmd.py", "--json").stdout)
    assert 5 < scores["val_loss"] < 60
    assert "it has no data; give a SOURCE" in lowres_here("eval", run, code=2).stderr
    again = lowres_here("import", run, tmp_path / "again", "--set", "memory.weights=fp32").stdout
    assert "step 0 of a run, int8" in again and "the matrices by nothing" in again
    for arguments, said in (
        (("import", run, run), "exists already; move it away"),
        (
            ("import", run, tmp_path / "b", "--set", "model.dim=32"),
            "model.dim: 32 here, but the model in .* has 64",
        ),
        (
            ("import", run, tmp_path / "b", "--set", "relora.enabled=true"),
            "relora.enabled: an imported model has no",
        ),
        (("import", tmp_path / "none", tmp_path / "b"), "none: no such folder; give a run"),
        (("import", config, tmp_path / "b"), "is a file; give a run"),
        (
            ("train", config, "--run", run, "--resume"),
            "holds an imported model.* start a run from it: lowres train CONFIG --init-from",
        ),
    ):
        error = lowres_here(*arguments, code=2).stderr
        assert re.search(said, error), error
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_floating_point_weights_keep_their_bits(weights: str, llama3: Path, tmp_path: Path) -> None:
    keys = ["data.seq_len=96", f"memory.weights={weights}", "optim.name=adamw", "run.name=mine"]
    options = [part for key in keys for part in ("--set", key)]
    shown = lowres_here("import", llama3, tmp_path / "run", *options).stdout
    assert f"{weights} weights" in shown and "the matrices by nothing" in shown
    found = load_resolved(tmp_path / "run" / "config.toml")
    assert (found.run.name, found.optim.name, found.data.seq_len) == ("mine", "adamw", 96)
    place = tmp_path / "run" / "checkpoints" / "step_00000000"
    written = {
        name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    for file in shards(llama3):
        for name, tensor in load_file(file).items():
            dtype = torch.bfloat16 if weights == "bf16" and tensor.dim() > 1 else torch.float32
            assert written[name].dtype == dtype and torch.equal(written.pop(name).float(), tensor.float())
    assert not written


def test_imports_that_cannot_be_finished_leave_nothing(
    llama3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(said: str, *arguments: object, code: int = 2) -> None:
        error = lowres_here("import", llama3, tmp_path / "run", *arguments, code=code).stderr
        assert re.search(said, error) and len(error.splitlines()) == 1, error
        assert {path.name for path in tmp_path.iterdir()} == {"model"}

    with monkeypatch.context() as patched:
        patched.setattr("lowres.exchange.target.free_bytes", lambda folder: 1 << 20)
        refused("the disk has 0.00 GiB free", code=3)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.folder, "_read_back", interrupt)
        refused("interrupted; nothing is left of it; start it again", code=130)
    edit(llama3, vocab_size=320, num_hidden_layers=3)
    refused("model.layers.2.input_layernorm.weight is missing; get the folder again")
    edit(llama3, num_hidden_layers=2)
    changed(llama3, UP, lambda t: t.float().index_fill(0, torch.tensor([9]), 3.4e38))
    refused("up_proj.weight has numbers that are too large for bf16", "--set", "memory.weights=bf16")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed(llama3, name, lambda t: t[:250])
    edit(llama3, vocab_size=250)
    refused("tokenizer.json has 257 ids, but the embedding of .* has 250 rows; give the tokenizer of")
    (llama3 / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1\n"
    )
    refused("tokenizer.json: .*Git LFS pointer: `git lfs pull`")
    (llama3 / "tokenizer.json").unlink()
    refused("has no tokenizer.json and no tokenizer.model; give one with --set data.tokenizer=PATH")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# ---- --init-from


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowres.summary.draw_loss", lambda *_: None)
    monkeypatch.setattr("lowres.sweep.draw_sweep", lambda *_: [])


@pytest.fixture
def pretraining(llama3: Path, corpus: Path, tmp_path: Path) -> Path:
    """A config without a model; its text is 8 thousand tokens of the model's tokenizer."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "one.txt").write_text((corpus / "cmd.py").read_text()[:8000])
    path = tmp_path / "pretraining.toml"
    path.write_text(
        f"""
[data]
source = "{text}"
cache = "{tmp_path / "cache"}"
seq_len = 32
separator = ""
[train]
steps = 4
batch_tokens = 128
micro_batch = 4
eval_every = 0
checkpoint_every = 2
[schedule]
name = "constant"
[log]
progress = false
"""
    )
    return path


def options(*keys: str) -> list[str]:
    return [part for key in keys for part in ("--set", key)]


def tensors_of(run: Path, step: int) -> dict[str, Tensor]:
    place = checkpoint.step_folder(run / "checkpoints", step)
    return {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_run_starts_from_a_folder_and_goes_on_without_it(
    llama3: Path, pretraining: Path, tmp_path: Path
) -> None:
    straight, parted, fork = tmp_path / "straight", tmp_path / "parted", tmp_path / "fork"
    start = ("train", pretraining, "--init-from", llama3)
    shown = lowres_here(*start, "--run", straight).stderr
    assert f"weights from {llama3}" in shown and "another tokenizer" not in shown
    found = load_resolved(straight / "config.toml")
    assert found.model.vocab == 320 and found.model.rope_scaling == "llama3" and found.model.preset is None
    assert found.data.tokenizer == str(llama3 / "tokenizer.json")
    lowres_here(*start, "--run", parted, *options("train.steps=2"))
    lowres_here("import", llama3, tmp_path / "imported")
    lowres_here("train", pretraining, "--init-from", tmp_path / "imported", "--run", fork)
    llama3.rename(tmp_path / "moved")
    lowres_here("train", pretraining, "--run", parted, "--resume")
    for run in (parted, fork):
        for name, tensor in tensors_of(straight, 4).items():
            assert torch.equal(tensor, tensors_of(run, 4)[name]), name
    # its own validation text, by its own copy of the tokenizer: nothing is prepared again
    assert json.loads(lowres_here("eval", parted, "--json").stdout)["val_loss"] > 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    "keys",
    [
        "memory.engine=layerwise",
        "memory.engine=autograd memory.weights=bf16",
        "optim.name=adam-mini memory.weights=fp32",
        "relora.enabled=true relora.rank=2 relora.start_step=0",
    ],
)
def test_weights_arrive_in_every_kind_of_run(
    keys: str, llama3: Path, pretraining: Path, tmp_path: Path
) -> None:
    own = [*keys.split(), f"run.init_from={llama3}"]
    run, step = begin(load_config(pretraining, own)[0], tmp_path / "run", resume=False)
    run.release()
    assert step == 0 and run.parts.adapted is ("relora" in keys)
    expected = {name: tensor for file in shards(llama3) for name, tensor in load_file(file).items()}
    for unit in run.parts.engine.units():
        for spec in unit.spec.tensors:
            found = unit.weights[spec.name].dense(torch.float32)
            if spec.kind == ADAPTER:
                assert found.any() == spec.role.endswith(LORA_A), spec.name
                continue
            wanted = expected.pop(spec.name).float()
            if unit.kinds[spec.name] == "int8":
                stored = new_storage("int8", spec.shape)
                stored.fill(iter([(0, wanted)]))
                wanted = stored.dense(torch.float32)
            assert torch.equal(found, wanted), spec.name
    assert not expected


def test_what_contradicts_the_model_is_one_line(
    llama3: Path, pretraining: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["train", pretraining, "--init-from", llama3, "--run", tmp_path / "run"]
    for key, said in (
        ("model.n_layers=3", "model.n_layers: 3 here, but the model in .* has 2; use that value, or leave"),
        ("model.rope_theta=1e4", "model.rope_theta: 10000.0 here, .* has 500000.0"),
        ("model.preset=60m", "model.dim: 512 here"),
        ("model.vocab_size=257", "model.vocab_size: 257 here"),
    ):
        error = lowres_here(*start, "--set", key, code=2).stderr
        assert len(error.splitlines()) == 1 and re.search(said, error), error
    prepared = tmp_path / "prepared"
    lowres_here("data", "prepare", tmp_path / "text", prepared, "--vocab-size", 300)
    error = lowres_here(*start, "--set", f"data.source={prepared}", code=2).stderr
    found = re.search(
        "was prepared with another tokenizer than .*text again: lowres (.*), and set (.*)=OUT;", error
    )
    assert found and not (tmp_path / "run").exists()
    again = [str(tmp_path / "again") if word == "OUT" else word for word in shlex.split(found[1])]
    lowres_here(*again)  # the command does what it is for
    lowres_here(*start, "--set", f"{found[2]}={tmp_path / 'again'}", "--set", "train.steps=1")
    shutil.rmtree(tmp_path / "run")
    # what agrees passes
    agreeing = options("model.n_heads=4", "model.head_dim=16", "model.max_positions=64")
    plan = json.loads(lowres_here("plan", *start[1:4], *agreeing, "--json").stdout)
    assert plan["parameters"] == sum(t.numel() for file in shards(llama3) for t in load_file(file).values())
    seen: list[ModelConfig] = []

    def bench(config: Config, steps: int) -> SimpleNamespace:
        seen.append(config.model)
        return SimpleNamespace(table=str)

    monkeypatch.setattr("lowres.cli.planning.bench", bench)
    lowres_here("bench", *start[1:4])
    assert seen[0].rope_factor == 8 and seen[0].dim == 64


def test_points_of_a_sweep_start_from_a_folder(
    llama3: Path, pretraining: Path, tmp_path: Path, points_here: None
) -> None:
    keys = options(f"run.init_from={llama3}", "train.eval_every=1", "train.eval_tokens=256")
    arguments = ["sweep", pretraining, "--grid", "optim.lr=0.001,0.01", "--tokens", 128, *keys]
    first = lowres_here(*arguments, "--run", tmp_path / "sweep").stdout
    assert lowres_here(*arguments, "--run", tmp_path / "sweep").stdout == first  # finished points are kept
    names = [path.name for path in sorted((tmp_path / "sweep").iterdir()) if path.is_dir()]
    before = [tensors_of(tmp_path / "sweep" / name, 1) for name in names]
    assert len(before) == 2 and not torch.equal(*(tensors[NORM] for tensors in before))


# ---- size


def random_folder(folder: Path, keys: dict[str, Any]) -> int:
    """A LLaMA in bf16, written by pieces into shards of 4 units; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **keys}))
    tokenizer().save(str(folder / "tokenizer.json"))
    block = torch.randn(1 << 22).mul_(0.02).bfloat16()
    weight_map: dict[str, str] = {}
    units = unit_specs(describe(folder).model)
    for first in range(0, len(units), 4):
        name = f"model-{first:05d}.safetensors"
        specs = [spec for unit in units[first : first + 4] for spec in unit.tensors]
        header, end = {}, 0
        for spec in specs:
            offsets = [end, end := end + 2 * spec.numel]
            header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": offsets}
            weight_map[spec.name] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while end:
                piece = block.view(torch.uint8)[: min(end, 2 * len(block))].numpy()
                end -= file.write(piece.data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in shards(folder))


MEASURED = """
import resource, sys
from lowres.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def peak_of_import(folder: Path, run: Path, weights: str) -> int:
    """The largest resident memory of the command, in bytes."""
    command = [sys.executable, "-c", MEASURED, "import", str(folder), str(run)]
    command += options(f"memory.weights={weights}")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_seven_billion_parameters_take_the_memory_of_one_layer(tmp_path: Path) -> None:
    """It needs 21 GB of disk."""
    small, large = tmp_path / "small", tmp_path / "large"
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    random_folder(small, {**SIZES, "vocab_size": 320})
    assert random_folder(large, {**shape, "num_hidden_layers": 32}) > 13.4e9
    try:
        found = peak_of_import(large, tmp_path / "run", "int8")
        base = peak_of_import(small, tmp_path / "base", "int8")
        layer = open_model(tmp_path / "run").model.dim * 32000 * 2  # the head in bf16 is the largest unit
        print(
            f"{found / 2**20:.0f} MiB, {(found - base) / 2**20:.0f} MiB for a unit of {layer / 2**20:.0f} MiB"
        )
        assert found - base < layer + (256 << 20)
        written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
        assert 6.9e9 < written < 7.1e9
    finally:
        shutil.rmtree(large)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
