"""The config: defaults, presets, overrides, the frozen surface."""

from pathlib import Path

import pytest

from lowres.catalogue import RULES
from lowres.config import PRESETS, Config
from lowres.config_file import adjusted_keys, changed_keys, follow_batch, load_config, parse_config, to_toml
from lowres.errors import UserError
from lowres.reference import choices, describe, markdown
from lowres.storage import FORMATS


def test_the_surface_is_frozen() -> None:
    """docs/reference.md has every key, default and choice: whatever changes is announced there."""
    assert markdown() == Path("docs/reference.md").read_text("utf-8"), "run python scripts/write_docs.py"
    for field in Config.model_fields.values():
        for key, info in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert info.description, key


@pytest.mark.parametrize(
    "setting",
    [f"model.{key}={10**23}" for key in ("dim", "ffn_dim", "n_heads", "n_kv_heads", "vocab_size")]
    + ["model.n_layers=100_000", f"data.seq_len={2**63}", f"train.batch_tokens={2**63}"]
    + [f"train.micro_batch={10**23}", f"memory.band={10**23}", f"memory.loss_chunk={10**23}"]
    + [f"train.steps={10**23}", "memory.budget_gib=1e300", "memory.host_budget_gib=1e300"],
)
def test_absurd_sizes_are_refused_by_name(tmp_path: Path, setting: str) -> None:
    """They overflow what PyTorch counts bytes with, or would be planned for minutes."""
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(UserError, match=f"{setting.partition('=')[0]}: .*less than or equal to"):
        load_config(tmp_path / "c.toml", [setting])


@pytest.mark.parametrize("name", [".", "..", "a/b", ""])
def test_the_name_of_a_run_is_a_folder_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name"):
        parse_config({"run": {"name": name}})
    assert parse_config({"run": {"name": "a.b-1"}})[0].run.name == "a.b-1"


def test_choices_are_listed() -> None:
    """Also of keys whose names are registered elsewhere, and inside unions and lists."""
    fields = {s: f.annotation.model_fields for s, f in Config.model_fields.items()}  # type: ignore[union-attr]
    assert choices(fields["memory"]["weights"]) == list(FORMATS)
    assert set(choices(fields["optim"]["name"])) == set(RULES)
    assert choices(fields["memory"]["embeddings"]) == ["auto", "fp32", "bf16"]
    assert choices(fields["optim"]["projection"]) == ["random", "svd"]
    assert choices(fields["model"]["preset"]) == list(PRESETS)
    assert choices(fields["relora"]["targets"]) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert choices(fields["memory"]["rehearse"]) == ["true", "false", "auto"]
    assert choices(fields["optim"]["lr"]) == []
    assert 'engine = "layerwise" (layerwise | autograd | deepspeed): ' in describe()


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
    assert adjusted_keys(config, free) == []
    other, _ = parse_config(
        {"optim": {"lr": 0.5, "limiter": 0, "betas": [0.9, 0.95]}, "data": {"seq_len": 64}}
    )
    assert changed_keys(config, other) == ["data.seq_len", "optim.betas", "optim.adamw_betas"]
    # these may, from the next step on, and are recorded
    assert adjusted_keys(config, other) == ["optim.lr", "optim.lr_over_batch", "optim.limiter"]


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


def tied(config: Config) -> tuple[float | None, int, float | None, str | None]:
    optim = config.optim
    return optim.lr, config.batch_sequences, optim.lr_over_batch, optim.batch_policy


@pytest.mark.parametrize(
    "optim, train, wanted",
    [
        ({}, {}, (0.01, 32, 0.01 / 32, "fixed")),
        ({"name": "adamw"}, {"batch_tokens": 4096}, (0.001, 16, 0.001 / 16, "fixed")),
        ({"lr": 0.004}, {"batch_tokens": 2048}, (0.004, 8, 0.0005, "fixed")),
        ({"lr_over_batch": 0.0005}, {"batch_tokens": 2048}, (0.004, 8, 0.0005, "linear")),
        ({"lr_over_batch": 0.0005}, {}, (0.016, 32, 0.0005, "linear")),
        ({"lr": 0.004, "lr_over_batch": 0.0005}, {}, (0.004, 8, 0.0005, "fixed")),
        ({"lr": 0.004, "lr_over_batch": 0.0005}, {"batch_tokens": 2048}, (0.004, 8, 0.0005, "fixed")),
    ],
)
def test_two_of_lr_batch_and_their_ratio_determine_the_third(
    optim: dict[str, object],
    train: dict[str, object],
    wanted: tuple[float, int, float, str],
    tmp_path: Path,
) -> None:
    config, notes = parse_config({"optim": optim, "train": train})
    assert tied(config) == wanted and notes == []
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config))
    assert load_config(path)[0] == config


@pytest.mark.parametrize(
    "optim, train, message",
    [
        (
            {"lr": 0.004, "lr_over_batch": 0.0005},
            {"batch_tokens": 4096},
            "config: optim.lr: 0.004 divided by train.batch_tokens 4096 (16 sequences) is 0.00025, but "
            "optim.lr_over_batch is 0.0005; leave one of the three out",
        ),
        (
            {"lr": 0.0041, "lr_over_batch": 0.0005},
            {},
            "config: train.batch_tokens: optim.lr 0.0041 / optim.lr_over_batch 0.0005 gives 8.2 "
            "sequences, not a whole number; the nearest is 8, with optim.lr_over_batch = 0.0005125",
        ),
        ({"lr_over_batch": 0.0}, {}, "config: optim.lr_over_batch: Input should be greater than 0 (got 0.0)"),
        (
            {"lr_over_batch": "x"},
            {},
            "config: optim.lr_over_batch: Input should be a valid number (got 'x')",
        ),
    ],
)
def test_what_disagrees_is_refused(optim: dict[str, object], train: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config({"optim": optim, "train": train})
    assert str(error.value) == message


LR = "[optim]\nlr = 0.004\n[train]\nbatch_tokens = 2048\n"
RATIO = "[optim]\nlr_over_batch = 0.0005\n[train]\nbatch_tokens = 2048\n"
PAIR = "[optim]\nlr = 0.004\nlr_over_batch = 0.0005\n"
ALL = "[optim]\nlr = 0.004\nlr_over_batch = 0.0005\n[train]\nbatch_tokens = 2048\n"


@pytest.mark.parametrize(
    "file, overrides, wanted, noted",
    [
        # what is set replaces what the file says instead
        (LR, "optim.lr_over_batch=0.001", (0.008, 8, 0.001, "linear"), False),
        (RATIO, "optim.lr=0.008", (0.008, 8, 0.001, "fixed"), False),
        (PAIR, "optim.lr=0.008", (0.008, 8, 0.001, "fixed"), False),
        (ALL, "optim.lr=0.008", (0.008, 8, 0.001, "fixed"), False),
        (LR, "optim.lr=0.008 optim.lr_over_batch=0.0005", (0.008, 16, 0.0005, "fixed"), False),
        (LR, "optim.lr=0.008 train.batch_tokens=4096", (0.008, 16, 0.0005, "fixed"), False),
        (LR, "optim.lr_over_batch=0.001 train.batch_tokens=4096", (0.016, 16, 0.001, "linear"), False),
        ("", "train.batch_tokens=4096", (0.01, 16, 0.01 / 16, "fixed"), False),
        # a batch that is set: lr follows the policy
        (LR, "train.batch_tokens=8192", (0.004, 32, 0.000125, "fixed"), True),
        (LR, "train.batch_tokens=8192 optim.batch_policy=linear", (0.016, 32, 0.0005, "linear"), True),
        (LR, "train.batch_tokens=8192 optim.batch_policy=sqrt", (0.008, 32, 0.00025, "sqrt"), True),
        (RATIO, "train.batch_tokens=8192", (0.016, 32, 0.0005, "linear"), True),
        (RATIO, "train.batch_tokens=8192 optim.batch_policy=fixed", (0.004, 32, 0.000125, "fixed"), True),
        (PAIR, "train.batch_tokens=8192", (0.004, 32, 0.000125, "fixed"), True),
        (ALL, "train.batch_tokens=8192 optim.batch_policy=sqrt", (0.008, 32, 0.00025, "sqrt"), True),
        (ALL, "data.seq_len=128", (0.004, 16, 0.00025, "fixed"), True),
        (LR, "train.batch_tokens=4096 data.seq_len=512", (0.004, 8, 0.0005, "fixed"), False),
        ("[train]\nbatch_tokens = 2048", "train.batch_tokens=4096", (0.01, 16, 0.01 / 16, "fixed"), True),
    ],
)
def test_overrides_of_tied_keys(
    file: str, overrides: str, wanted: tuple[float, int, float, str], noted: bool, tmp_path: Path
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(file)
    for order in (overrides.split(), overrides.split()[::-1]):
        config, notes = load_config(path, order)
        assert tied(config) == (
            pytest.approx(wanted[0]),
            wanted[1],
            pytest.approx(wanted[2]),
            wanted[3],
        )
        assert len(notes) == noted
        if noted:
            assert f"optim.batch_policy is {wanted[3]}" in notes[0] and f"to {wanted[1]} seq" in notes[0]


def test_the_rate_of_norms_follows_too(tmp_path: Path) -> None:
    """A rate that the optimizer has by default changes as one that the file gives."""
    path = tmp_path / "c.toml"
    for given, keys, wanted in (
        ("", "", 0.001),
        ("", "optim.norm_lr=0.5", 0.5),
        ("", "train.batch_tokens=8192", 0.001),
        ("", "train.batch_tokens=8192 optim.batch_policy=linear", 0.002),
        ("", "train.batch_tokens=16384 optim.batch_policy=sqrt", 0.002),
        ("norm_lr = 0.004", "train.batch_tokens=8192 optim.batch_policy=linear", 0.008),
        ("", "train.batch_tokens=8192 optim.batch_policy=linear optim.norm_lr=0.5", 0.5),
        ("", "optim.lr=0.5", 0.001),
        ("", "train.batch_tokens=8192 optim.batch_policy=linear optim.name=muon", None),
    ):
        path.write_text(f'[optim]\nname = "scale"\n{given}\n[train]\nbatch_tokens = 4096')
        config, _ = load_config(path, keys.split())
        assert config.optim.norm_lr == (wanted and pytest.approx(wanted)), (given, keys)
    scale = parse_config({"optim": {"name": "scale", "batch_policy": "linear"}})[0]
    start = {"batch_tokens": scale.train.batch_tokens, "lr": 0.001, "embed_lr": None, "norm_lr": 0.001}
    train = scale.train.model_copy(update={"batch_tokens": 2 * scale.train.batch_tokens})
    resumed, _, _ = follow_batch(scale.model_copy(update={"train": train}), scale, start)
    assert (resumed.optim.lr, resumed.optim.norm_lr) == (0.002, 0.002)


def test_rates_follow_the_batch_of_a_resumed_run() -> None:
    def of(lr: float, batch: int, policy: str = "linear", embed_lr: float | None = None) -> Config:
        optim = {"lr": lr, "batch_policy": policy} | ({"embed_lr": embed_lr} if embed_lr else {})
        return parse_config({"optim": optim, "train": {"batch_tokens": batch}})[0]

    first = of(0.01, 2048, embed_lr=0.002)
    start = {"batch_tokens": 2048, "lr": 0.01, "embed_lr": 0.002}
    assert follow_batch(first, first, start) == (first, [], start)
    # the file has another batch and the same rates, or --set has scaled them already
    for asked in (of(0.01, 4096, embed_lr=0.002), of(0.02, 4096, embed_lr=0.004)):
        config, (note,), _ = follow_batch(asked, first, start)
        assert tied(config) == (0.02, 16, 0.00125, "linear") and config.optim.embed_lr == 0.004
        assert "from 8 to 16 sequences" in note and "lr 0.01 -> 0.02" in note
        # and once more: nothing new
        assert follow_batch(asked, config, start) == (config, [], start)
    # back, and with another policy: always from the start
    assert follow_batch(first, config, start)[0] == first
    assert tied(follow_batch(of(0.01, 8192, "sqrt", 0.002), config, start)[0])[0] == 0.02
    # other rates than those are a new start, from which later rates follow
    optim = {"lr": 0.01, "embed_lr": 0.002, "norm_lr": 0.1}
    norms = parse_config({"optim": optim, "train": {"batch_tokens": 2048}})[0]
    whole = start | {"norm_lr": 0.1}
    assert follow_batch(norms, first, start) == (norms, [], whole)
    other = of(0.03, 4096, embed_lr=0.002)
    config, notes, again = follow_batch(other, first, start)
    assert (config, notes) == (other, [])
    assert again == {"batch_tokens": 4096, "lr": 0.03, "embed_lr": 0.002, "norm_lr": None}
    assert tied(follow_batch(of(0.03, 8192, embed_lr=0.002), config, again)[0])[0] == 0.06


def of_deepspeed(**sections: dict[str, object]) -> Config:
    memory = {"engine": "deepspeed"} | sections.pop("memory", {})
    return parse_config(sections | {"memory": memory})[0]


def test_defaults_of_deepspeed(tmp_path: Path) -> None:
    """The engine has AdamW and no INT8, so what the config leaves open is AdamW on fp32 master weights."""
    config = of_deepspeed()
    assert (config.optim.name, config.optim.lr, config.optim.eps, config.optim.limiter) == (
        "adamw",
        1e-3,
        1e-8,
        0.0,
    )
    assert config.memory.weights == config.memory.embeddings_kept_in == "fp32"
    assert parse_config({})[0].optim.name == "apollo-mini"
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config))
    assert load_config(path)[0] == config
    # with --set alone, and a batch that the learning rate of AdamW follows
    path.write_text("[train]\nbatch_tokens = 2048")
    overrides = ["memory.engine=deepspeed", "train.batch_tokens=4096", "optim.batch_policy=linear"]
    assert load_config(path, overrides)[0].optim.lr == 0.002
    lean = of_deepspeed(memory={"weights": "bf16", "moments": "bf16"}).memory
    assert (lean.embeddings_kept_in, lean.compute) == ("bf16", "auto")


@pytest.mark.parametrize(
    "section, keys, message",
    [
        ("memory", {"weights": "int8"}, "memory.weights: DeepSpeed has no INT8 weights; use fp32 or bf16,"),
        ("memory", {"weights": "bf16"}, "memory.moments: DeepSpeed keeps moments in the format of the weig"),
        ("memory", {"moments": "int8"}, "memory.moments: DeepSpeed keeps moments in the format of the weig"),
        ("memory", {"embeddings": "bf16"}, "memory.embeddings: DeepSpeed keeps all weights in one format; "),
        ("memory", {"weights": "bf16", "moments": "bf16", "compute": "fp32"}, "memory.compute: bf16 weights"),
        ("memory", {"master": "host"}, "memory.master: only for the layerwise engine"),
        (
            "memory",
            {"state_on": "host"},
            "memory.state_on: the deepspeed engine does not move units; use auto",
        ),
        (
            "optim",
            {"name": "apollo-mini"},
            "optim.name: apollo-mini does not work with DeepSpeed, which f",
        ),
        *(
            (
                "optim",
                {"name": name},
                f"optim.name: {name} does not work with DeepSpeed, which flattens weights "
                "and hides their shapes; use adamw, or memory.engine=layerwise",
            )
            for name in RULES
            if name not in ("adamw", "apollo-mini")
        ),
        ("optim", {"limiter": 1.01}, "optim.limiter: DeepSpeed has no limiter; use 0 with optim.grad_clip"),
        ("relora", {"enabled": True}, "relora.enabled: DeepSpeed cannot merge adapters"),
        ("deepspeed", {"offload_param": "cpu"}, "deepspeed.offload_param: stage 2 keeps whole weights on th"),
        (
            "deepspeed",
            {"stage": 3, "offload_param": "cpu", "offload_optimizer": "none"},
            "deepspeed.offload_param: needs an offloaded optimizer too",
        ),
        (
            "deepspeed",
            {"offload_optimizer": "nvme"},
            "deepspeed.offload_optimizer: 'nvme' is not built yet; use cpu",
        ),
        (
            "deepspeed",
            {"stage": 3, "offload_param": "nvme"},
            "deepspeed.offload_param: 'nvme' is not built yet; use cpu or none",
        ),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(section: str, keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        of_deepspeed(**{section: keys})
    assert message in str(error.value) and "\n" not in str(error.value)
