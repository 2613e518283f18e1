"""The config: defaults, presets, overrides, the frozen surface."""

from pathlib import Path

import pytest

from lowres.config import PRESETS, Config, changed_keys, describe, load_config, parse_config, to_toml

SURFACE = {
    "run": {"name", "seed", "device"},
    "model": {
        "preset",
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "ffn_dim",
        "vocab_size",
        "rope_theta",
        "norm_eps",
    }
    | {"tie_embeddings"},
    "data": {"source", "val_source", "tokenizer", "vocab_size", "seq_len", "cache"},
    "optim": {
        "name",
        "lr",
        "embed_lr",
        "betas",
        "eps",
        "weight_decay",
        "grad_clip",
        "rank",
        "scale",
        "refresh_every",
    }
    | {"scale_front", "projection"},
    "schedule": {"name", "warmup_steps", "min_ratio", "cycle_steps", "rewarmup_steps", "cooldown_steps"},
    "train": {
        "steps",
        "tokens",
        "batch_tokens",
        "micro_batch",
        "eval_every",
        "eval_tokens",
        "checkpoint_every",
    }
    | {"keep_checkpoints"},
    "memory": {"engine", "weights", "embeddings", "compute", "loss_chunk", "budget_gib", "host_budget_gib"}
    | {"weights_on", "state_on", "stash_on", "carry_on", "stash_dtype", "band", "rehearse"}
    | {"exact_forward"}
    | {"moments", "master", "master_dtype"},
    "log": {"progress", "sample_prompt", "sample_tokens"},
}


def test_the_surface_is_frozen() -> None:
    """A new key is announced here, and documented where it is defined."""
    assert {s: set(f.annotation.model_fields) for s, f in Config.model_fields.items()} == SURFACE  # type: ignore[union-attr]
    for field in Config.model_fields.values():
        for key, info in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert info.description, key


def test_docs_hold_the_generated_reference() -> None:
    assert describe() in Path("docs/config.md").read_text("utf-8")


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config, _ = parse_config(
        {
            "model": {"preset": "60m", "n_kv_heads": 4},
            "optim": {"name": "adamw", "betas": [0.9, 0.95]},
            "log": {"sample_prompt": 'a "quoted"\n\tprompt \\ é'},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    again, _ = load_config(path)
    assert again == config and changed_keys(again, config) == []


def test_presets_and_explicit_keys() -> None:
    for preset, (dim, ffn, layers, heads) in PRESETS.items():
        model = parse_config({"model": {"preset": preset}})[0].model
        assert (model.dim, model.ffn_dim, model.n_layers, model.n_heads, model.vocab) == (
            dim,
            ffn,
            layers,
            heads,
            32000,
        )
    assert parse_config({"model": {"preset": "7b", "n_layers": 2}})[0].model.n_layers == 2


def test_only_settings_that_change_no_mathematics_may_change() -> None:
    config, _ = parse_config({})
    free, _ = parse_config(
        {"train": {"steps": 7, "micro_batch": 1, "eval_every": 3}, "memory": {"budget_gib": 4.0}}
    )
    assert changed_keys(config, free) == []
    other, _ = parse_config({"optim": {"lr": 0.5}, "data": {"seq_len": 64}})
    assert changed_keys(config, other) == ["data.seq_len", "optim.lr"]


@pytest.mark.parametrize(
    "text, value", [("3", 3), ("0.5", 0.5), ("true", True), ('"x"', "x"), ("a b", "a b")]
)
def test_set_values_are_toml_or_bare_strings(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "c.toml"
    path.write_text("")
    key = {int: "run.seed", float: "optim.lr", bool: "model.tie_embeddings", str: "log.sample_prompt"}[
        type(value)
    ]
    config, _ = load_config(path, [f"{key}={text}"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value


def test_steps_from_tokens() -> None:
    config, _ = parse_config({"train": {"tokens": 100_000, "batch_tokens": 8192}})
    assert config.train.total_steps == 13
