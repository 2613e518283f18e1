"""The command line end to end, as a user runs it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lowres import metrics
from lowres.catalogue import RULES
from lowres.cli import main
from lowres.storage import EMBEDDING, MATRIX, NORM
from tests.helpers import lowres, lowres_here, train_and_kill

STEP_KEYS = {
    "step",
    "tokens",
    "loss",
    "lr",
    "lr_over_batch",
    "grad_norm",
    "tokens_per_s",
    "wall_s",
    "peak_mem_gib",
    "host_mem_gib",
    "peak_rss_gib",
    "skipped",
}
VAL_KEYS = {"step", "val_loss", "val_ppl", "val_bits_per_byte"}


def test_prepare_train_sample_eval_checkpoint(config: Path, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = lowres("train", config, "--run", run)
    assert "validation: " in printed.stdout and str(run) in printed.stdout
    assert "30 steps of 1,024 tokens (16 sequences" in printed.stderr
    assert "lr 0.01, lr/batch 0.000625;" in printed.stderr

    records = metrics.read(run / "metrics.jsonl")
    steps, evaluations = ([r for r in records if key in r] for key in ("loss", "val_loss"))
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert [r["step"] for r in evaluations] == [0, 10, 20, 30]
    updates = {f"update/{unit}" for unit in ("embed", "layers.0", "layers.1", "head")}
    assert all(r.keys() == STEP_KEYS | (set() if r["step"] % 10 else updates) for r in steps)
    assert all(r.keys() == VAL_KEYS for r in evaluations)
    assert steps[-1]["tokens"] == 30 * 1024
    assert all(abs(r["lr_over_batch"] - r["lr"] / 16) < 1e-12 for r in steps)
    assert all(r["skipped"] == 0 for r in steps)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.3
    # 500 pieces, so about ln 500 before anything is learnt
    assert abs(evaluations[0]["val_loss"] - 6.21) < 0.2

    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 30 and summary["val_loss"] == evaluations[-1]["val_loss"]
    assert summary["first_val_loss"] == evaluations[0]["val_loss"]
    assert {"python", "torch", "lowres"} <= summary["versions"].keys()
    assert (run / "loss.png").stat().st_size > 1000

    text = lowres("sample", run, "--prompt", "def ", "--tokens", 20, "--seed", 3).stdout
    assert text.startswith("def ") and len(text) > 10
    assert text == lowres_here("sample", run, "--prompt", "def ", "--tokens", 20, "--seed", 3).stdout
    assert text != lowres_here("sample", run, "--prompt", "def ", "--tokens", 20, "--seed", 4).stdout

    scores = json.loads(lowres_here("eval", run, "--json").stdout)
    assert abs(scores["val_loss"] - evaluations[-1]["val_loss"]) < 0.3  # all of the data, not 2,048 tokens
    assert json.loads(lowres_here("eval", run, "--data", prepared, "--json").stdout) == scores
    source, table = shutil.copy(prepared / "data.json", tmp_path / "text.txt"), tmp_path / "table.jsonl"
    other = json.loads(lowres_here("eval", run, "--data", source, "--json").stdout)
    assert other["val_loss"] > scores["val_loss"]
    said, tokens = lowres_here("eval", run), f"{scores['val_tokens']:,}"
    assert re.fullmatch(rf"[\d.]+ bits per byte, loss .*, over {tokens} tokens\n", said.stdout)
    assert f"all {tokens} validation tokens; in training train.eval_tokens = 2,048 limited" in said.stderr
    # how another source is read
    table.write_text("".join(json.dumps({"id": "x", "words": f"words {i}"}) + "\n" for i in range(40)))
    assert "data.text_key" in lowres_here("eval", run, "--data", table, code=2).stderr
    given = ("--set", "data.text_key=words")
    assert lowres_here("eval", run, "--data", table, *given).stdout.count(" bits per byte, loss ") == 1
    assert "--data" in lowres_here("eval", run, *given, code=2).stderr

    assert "step_00000030" in lowres_here("checkpoint", "list", run).stdout
    assert lowres_here("checkpoint", "verify", run).stdout.count("ok") == 2  # keep_checkpoints
    victim = run / "checkpoints" / "step_00000030" / "layers.0.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert "layers.0.safetensors" in lowres_here("checkpoint", "verify", run, code=1).stdout
    lowres_here("checkpoint", "verify", victim.parent, code=1)
    lowres_here("checkpoint", "verify", run / "checkpoints" / "step_00000020")
    assert "damaged" in lowres_here("sample", run, "--prompt", "x", "--tokens", 2).stderr


@pytest.fixture(scope="session")
def short(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose epoch is 7 steps of 2,048 tokens."""
    out = tmp_path_factory.mktemp("short") / "data"
    lowres_here("data", "prepare", corpus, out, "--vocab-size", 500, "--max-tokens", 15_000)
    return out


def losses(run: Path) -> list[Any]:
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte")
    return [{k: r[k] for k in keys if k in r} for r in metrics.read(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    "changed",
    [
        ["memory.weights=int8"],
        ["memory.weights=fp32", "optim.name=adamw", "optim.limiter=1.01"],
        ["memory.weights=bf16", "optim.name=fira", "optim.refresh_every=5"],
    ],
)
def test_a_run_resumed_twice_across_an_epoch_is_the_same_run(
    config: Path, short: Path, tmp_path: Path, changed: list[str]
) -> None:
    """Interrupted in the first and in the second epoch; it ends in the third."""
    longer = [
        f"data.source={short}",
        "train.batch_tokens=2048",
        "train.micro_batch=11",
        "train.steps=16",
        "train.checkpoint_every=5",
    ]
    options: list[object] = [config]
    for override in longer + changed:
        options += ["--set", override]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    lowres_here("train", *options, "--run", straight)
    train_and_kill([*options, "--run", broken], after=6)
    train_and_kill([*options, "--run", broken, "--resume"], after=11)
    resumed = lowres_here("train", *options, "--run", broken, "--resume")
    assert "continuing" in resumed.stderr and "at step 10" in resumed.stderr
    assert losses(broken) == losses(straight)
    epoch = json.loads((short / "data.json").read_text())["train_tokens"]
    assert 5 * 2048 < epoch < 10 * 2048 and 2 * epoch < 16 * 2048
    last = Path("checkpoints") / "step_00000016"
    for file in sorted((straight / last).glob("*.safetensors")):
        here, there = load_file(file), load_file(broken / last / file.name)
        assert here.keys() == there.keys()
        assert all(here[name].equal(there[name]) for name in here), file.name


def test_resume_refusals_and_restarts(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = ["--set", "train.steps=6", "--set", "train.eval_every=0", "--set", "train.checkpoint_every=2"]
    assert "is not a run" in lowres_here("train", config, "--run", run, "--resume", code=2).stderr
    (tmp_path / "other").mkdir()
    assert (
        "is not a run" in lowres_here("train", config, "--run", tmp_path / "other", "--resume", code=2).stderr
    )
    lowres_here("train", config, *few, "--run", run)
    before = (run / "metrics.jsonl").read_bytes()
    assert "already holds a run" in lowres_here("train", config, *few, "--run", run, code=2).stderr
    assert "is finished" in lowres_here("train", config, *few, "--run", run, "--resume").stdout
    for key in (
        "optim.betas=[0.5,0.5]",
        "run.seed=5",
        "model.dim=64",
        "memory.weights=bf16",
    ):
        refused = lowres_here(
            "train", config, *few, "--set", "train.steps=8", "--set", key, "--run", run, "--resume", code=2
        )
        assert key.split("=")[0] in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert (run / "metrics.jsonl").read_bytes() == before
    # steps, intervals and logging may change
    lowres_here(
        "train",
        config,
        *few,
        "--set",
        "train.steps=8",
        "--set",
        "train.eval_every=4",
        "--run",
        run,
        "--resume",
    )
    assert [r["step"] for r in losses(run) if "loss" in r] == list(range(1, 9))
    # it is never shortened or started over without being asked
    (run / "summary.json").unlink()
    short = lowres_here("train", config, *few, "--set", "train.steps=7", "--run", run, "--resume", code=2)
    assert "train.steps" in short.stderr and "has done 8 steps" in short.stderr
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    for more in ([], ["--set", "train.steps=20"]):
        refused = lowres_here("train", config, *few, *more, "--run", run, "--resume", code=2)
        assert "was trained to step 8, but has no checkpoint" in refused.stderr
    assert (run / "metrics.jsonl").read_bytes() == before
    restarted = lowres_here("train", config, *few, "--set", "train.eval_every=6", "--run", run, "--restart")
    assert "is in" in restarted.stderr and (run / "old-1" / "metrics.jsonl").read_bytes() == before
    assert [r["step"] for r in losses(run) if "loss" in r] == list(range(1, 7))
    assert [r["step"] for r in losses(run) if "val_loss" in r] == [0, 6]
    # before its first checkpoint it simply starts again
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(run / "config.toml", early)
    (early / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:500])
    assert "starting at step 0" in lowres_here("train", config, *few, "--run", early, "--resume").stderr


def test_resume_refuses_other_data(config: Path, corpus: Path, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(corpus, text)
    keys = (
        f"data.source={text}",
        f"data.cache={tmp_path / 'cache'}",
        "data.vocab_size=400",
        "train.eval_every=0",
    )
    options = [o for key in keys for o in ("--set", key)]
    lowres_here("train", config, *options, "--set", "train.steps=2", "--run", run)
    (text / "argparse.py").write_text("x = 1\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = lowres_here(
        "train", config, *options, "--set", "train.steps=3", "--run", run, "--resume", code=2
    )
    assert "data.source" in refused.stderr and "is not what the run" in refused.stderr
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_passed_over(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lowres_here("train", config, "--run", run)
    wanted = losses(run)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step_00000030" / "state.json").unlink()
    resumed = lowres_here("train", config, "--run", run, "--resume")
    assert "is damaged" in resumed.stderr and "at step 20" in resumed.stderr
    assert losses(run) == wanted


def test_resuming_needs_no_more_memory_than_starting(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    large = [
        "model.preset=60m",
        "optim.name=adamw",
        "memory.weights=fp32",
        "data.seq_len=32",
        "train.batch_tokens=64",
    ]
    options = [
        o for key in [*large, "train.eval_every=0", "train.checkpoint_every=2"] for o in ("--set", key)
    ]
    lowres("train", config, *options, "--set", "train.steps=2", "--run", run)
    lowres("train", config, *options, "--set", "train.steps=4", "--run", run, "--resume")
    peaks = [r["peak_rss_gib"] for r in metrics.read(run / "metrics.jsonl")]
    assert len(peaks) == 4 and peaks[0] > 0.4
    assert peaks[3] < peaks[1] * 1.03


def test_sources_without_preparation(corpus: Path, config: Path, tmp_path: Path) -> None:
    """A path as data.source, a tied grouped model, the other engine and bf16 compute."""
    options = [
        o
        for key in (
            f"data.source={corpus}",
            f"data.cache={tmp_path / 'cache'}",
            "data.vocab_size=400",
            "model.n_kv_heads=1",
            "model.tie_embeddings=true",
            "memory.compute=bf16",
            "memory.engine=autograd",
            "train.steps=3",
        )
        for o in ("--set", key)
    ]
    lowres_here("train", config, *options, "--run", tmp_path / "run")
    assert len([r for r in losses(tmp_path / "run") if "loss" in r]) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_shipped_tiny_config_takes_a_prepared_folder(prepared: Path, tmp_path: Path) -> None:
    options = ["--set", f"data.source={prepared}", "--set", "train.steps=2", "--set", "log.sample_tokens=5"]
    printed = lowres_here("train", "configs/tiny.toml", *options, "--run", tmp_path / "run")
    assert "a sample after 2 steps" in printed.stdout


def test_a_run_on_the_host_is_the_run_on_the_gpu(config: Path, tmp_path: Path) -> None:
    """Everything in host memory, layers in bands, rehearsed, and resumed with other homes."""
    plain, hosted = tmp_path / "plain", tmp_path / "hosted"
    keys = [f"memory.{part}_on=host" for part in ("weights", "state", "stash", "carry")]
    options = [o for key in [*keys, "memory.band=2", "memory.rehearse=true"] for o in ("--set", key)]
    lowres_here("train", config, "--run", plain)
    done = lowres_here("train", config, "--run", hosted, *options, "--set", "train.steps=30")
    assert "rehearsed a step" in done.stderr
    assert losses(hosted) == losses(plain)
    records = [r for r in metrics.read(hosted / "metrics.jsonl") if "loss" in r]
    assert all(r["host_mem_gib"] > 0 and 0 < r["peak_mem_gib"] < r["peak_rss_gib"] for r in records)
    shutil.rmtree(hosted / "checkpoints" / "step_00000030")
    (hosted / "summary.json").unlink()
    lowres_here("train", config, "--run", hosted, "--resume", "--set", "memory.stash_on=host")
    assert losses(hosted) == losses(plain)


def test_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {
        "gpu_peak_bytes",
        "host_peak_bytes",
        "disk_bytes_per_checkpoint",
        "components",
        "fits",
    } <= plan.keys()
    assert plan["fits"] and plan["tokens_per_step"] == 1024
    assert main(["plan", str(config), "--set", "memory.budget_gib=0.0001"]) == 3
    captured = capsys.readouterr()
    assert "gpu peak" in captured.out and "memory.budget_gib" in captured.err


@pytest.mark.parametrize("name", RULES)
def test_plan_shows_what_every_tensor_gets(
    name: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"optim.name={name}", "model.n_kv_heads=1", "optim.weight_decay=0.1", "optim.embed_lr=0.25"]
    keys += ["optim.decay_embeddings=false"]
    command = ["plan", str(config), "--optimizer", *(part for key in keys for part in ("--set", key))]
    assert main(command) == 0
    before, _, after = capsys.readouterr().out.partition("\nrole ")
    assert "gpu peak" in before
    *listed, last = after.splitlines()[1:]
    lines = {line.split()[0]: line for line in listed}
    assert list(lines) == [
        *("embedding", "attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down", "norm", "head")
    ]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = {row["role"]: row for row in plan["optimizer"]}
    assert rows.keys() == lines.keys()
    for role, row in rows.items():
        embedding, matrix = role in ("embedding", "head"), len(row["shape"]) == 2
        assert row["tensors"] == (1 if embedding or role == "norm" else 2)
        kind = EMBEDDING if embedding else MATRIX if matrix else NORM
        assert row["optimizer"] == (name if kind in RULES[name].kinds else "adamw")
        own_rate = RULES[name].norm_lr if kind == NORM else None
        assert row["lr"] == (0.25 if embedding else own_rate or RULES[name].lr)
        assert row["weight_decay"] == (0.1 if matrix and not embedding else 0)
        assert row["optimizer"] in lines[role] and lines[role].endswith(row["state"])
    flops = sum(row["tensors"] * row["product_flops"] for row in rows.values())
    assert last.startswith("in all: ") and (f"updates: {flops / 1e12:.3g} TFLOP" in last) == (flops > 0)
    assert (flops > 0) == (name == "muon")
    # all of the state, except the count of updates of each unit
    state = sum(c["bytes"] for c in plan["components"] if c["name"] == "optimizer state")
    assert sum(row["tensors"] * row["state_bytes"] for row in rows.values()) + 4 * 256 == state
    wanted = {
        "adamw": "exp_avg fp32, exp_avg_sq fp32",
        "adamw8bit": "exp_avg int8, exp_avg_sq int8",
        "adam-mini": "exp_avg fp32, exp_avg_sq for 1 block of 16 rows",
        "sgd": "momentum fp32",
        "apollo": "exp_avg [8, 32], exp_avg_sq [8, 32], norm, random projection [16, 8] (no state)",
        "apollo-mini": "exp_avg [1, 32], exp_avg_sq [1, 32], norm, random projection [16, 1] (no state)",
        "galore": "exp_avg [8, 32], exp_avg_sq [8, 32], projection [16, 8], refreshes",
        "fira": "exp_avg [8, 32], exp_avg_sq [8, 32], norm, projection [16, 8], refreshes",
        "scale": "none",
        "muon": "momentum fp32",
        "sinkgd": "none",
        "racs": "rows [16, 1], columns [1, 32], norm",
    }
    assert rows["head"]["state"] == ("momentum fp32" if name in ("scale", "sgd") else rows["head"]["state"])
    assert rows["k"]["shape"] == [16, 32] and rows["k"]["state"] == wanted.get(name, rows["k"]["state"])


def test_set_replaces_what_it_contradicts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(config), "--set", "model.preset=20m", "--set", "train.tokens=100000"]) == 0
    printed = capsys.readouterr().out
    assert "dim = 256" in printed and "tokens = 100000" in printed and "\nsteps" not in printed
    assert main(["config", str(config), "--set", "optim.name=adamw", "--set", "optim.rank=4"]) == 0
    assert "note: optim.rank is not used by adamw" in capsys.readouterr().err


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["config", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for key in ("batch_tokens", "keep_checkpoints", "tie_embeddings", "loss_chunk", "refresh_every"):
        assert f"  {key}" in printed
    assert "(may change on resume)" in printed and ": None" not in printed
