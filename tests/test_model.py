"""The model against transformers, and its table of tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lowres.config import PRESETS, ModelConfig
from lowres.engine import Choice, make_engine
from lowres.model import Llama, empty_units, initialize, unit_specs
from lowres.rooms import Rooms
from tests.helpers import ROOMS, make_batch, make_config, make_optimizer, make_units, save_checkpoint

CPU = torch.device("cpu")
VARIANTS = {
    "plain": ModelConfig(dim=64, n_layers=3, n_heads=4, ffn_dim=172, vocab_size=300),
    "grouped": ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=100, vocab_size=300),
    "tied": ModelConfig(dim=48, n_layers=2, n_heads=4, ffn_dim=100, vocab_size=300, tie_embeddings=True),
    "long": ModelConfig(
        dim=32,
        n_layers=1,
        n_heads=2,
        ffn_dim=64,
        vocab_size=300,
        rope_theta=500000.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_length=64,
        norm_eps=1e-6,
    ),
    "qwen2": ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=100, vocab_size=300, qkv_bias=True
    ),
    "qwen3": ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, ffn_dim=100, vocab_size=300, qk_norm=True
    ),
}


def reference(config: ModelConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    make, make_config, more = LlamaForCausalLM, LlamaConfig, {}
    if config.qkv_bias:
        make, make_config = Qwen2ForCausalLM, Qwen2Config
    if config.qk_norm:
        make, make_config, more = Qwen3ForCausalLM, Qwen3Config, {"head_dim": config.head_width}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    return make(
        make_config(
            **more,
            vocab_size=config.vocab,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
    ).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    config = VARIANTS[variant]
    theirs, ours = reference(config), Llama(config)
    with torch.no_grad():
        for p in theirs.parameters():  # also norms that are not 1
            p.add_(torch.randn_like(p) * 0.1)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and set(unexpected) <= {"lm_head.weight"}
    tokens = torch.randint(0, config.vocab, (2, 130))
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max()
    assert float(difference) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_transformers(variant: str) -> None:
    config = VARIANTS[variant]
    theirs, ours = reference(config).double(), Llama(config).double()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    batch = torch.randint(0, config.vocab, (2, 33))
    ours(batch[:, :-1], batch[:, 1:], chunk=7).backward()
    logits = theirs(batch[:, :-1]).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
    ).backward()
    for name, p in ours.named_parameters():
        wanted = theirs.get_parameter(name).grad
        assert p.grad is not None and wanted is not None
        # transformers rotates with fp32 tables too, but rounds elsewhere
        assert float((p.grad - wanted).norm() / wanted.norm()) < 1e-6, name


@pytest.mark.parametrize("variant", ["grouped", "tied", "qwen2", "qwen3"])
def test_a_trained_checkpoint_is_that_of_transformers(variant: str, tmp_path: Path) -> None:
    """Some steps of the layer-major engine, a checkpoint on the disk, and the other implementation."""
    model = VARIANTS[variant].model_dump(exclude_none=True)
    config = make_config(
        model=model, memory={"weights": "fp32"}, optim={"name": "adamw", "lr": 0.01, "norm_lr": 0.1}
    )
    units = make_units(config.model)
    engine = make_engine(config, units, make_optimizer(config, units), ROOMS, Choice(3, 2))
    for step in range(3):
        engine.step(make_batch(seed=step), step, 1.0)
    stored = ((unit.spec.name, unit.weight_tensors()) for unit in engine.units())
    saved = save_checkpoint(tmp_path, 3, stored, 1)
    weights = {n: t for file in saved.glob("*.safetensors") for n, t in load_file(file).items()}
    theirs = reference(config.model)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    # all of it was trained
    assert all(bool((t != 1).any()) and bool((t != 0).any()) for t in weights.values())
    tokens = make_batch(2)[:, :20]
    with torch.no_grad():
        difference = (engine.logits(tokens) - theirs(tokens).logits[:, -1]).abs().max()
    assert float(difference) < 1e-4


def test_the_table_covers_the_module_exactly() -> None:
    for config in VARIANTS.values():
        specs = [spec for unit in unit_specs(config) for spec in unit.tensors]
        names = [spec.name for spec in specs]
        parameters = dict(Llama(config).named_parameters())
        assert sorted(names) == sorted(parameters)
        assert all(tuple(parameters[s.name].shape) == s.shape for s in specs)


@pytest.mark.parametrize(
    "preset, millions", [("60m", 58.1), ("130m", 134.1), ("350m", 367.9), ("7b", 6738.4)]
)
def test_preset_sizes(preset: str, millions: float) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    count = sum(spec.numel for unit in unit_specs(config) for spec in unit.tensors)
    assert abs(count / 1e6 - millions) < 0.1
    assert preset in PRESETS


def test_initial_values_are_named_by_seed_and_tensor() -> None:
    config = VARIANTS["plain"]

    def values(seed: int, kind: str = "fp32") -> dict[str, torch.Tensor]:
        units = empty_units(config, kind, "fp32", Rooms(CPU))
        initialize(units.values(), seed, CPU)
        return {n: s.dense(torch.float32).clone() for u in units.values() for n, s in u.weights.items()}

    first, again, other = values(0), values(0), values(1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if value.dim() == 1:
            assert value.eq(1).all()
        else:
            assert abs(float(value.std()) - 0.02) < 0.002 and not torch.equal(value, other[name])
    assert not torch.equal(
        first["model.layers.0.mlp.gate_proj.weight"], first["model.layers.0.mlp.up_proj.weight"]
    )
    int8 = values(0, "int8")
    for name, value in first.items():
        assert (int8[name] - value).abs().max() < 0.02 * 6 / 120
