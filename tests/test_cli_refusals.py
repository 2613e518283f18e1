"""What the command line refuses: one line that names the key or file, before anything is written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lowres.cli import main
from tests.helpers import lowres_here

BAD_CONFIGS = {
    "unknown key": ("model.dimm=3", "model.dimm: unknown key; did you mean dim?"),
    "unknown section": ("modle.dim=3", "modle: unknown key; did you mean model?"),
    "wrong type": ("model.dim=wide", "model.dim: Input should be a valid integer"),
    "heads do not divide": ("model.n_heads=5", "model.n_heads: 5 heads do not divide dim 32"),
    "kv heads do not divide": ("model.n_kv_heads=3", "model.n_kv_heads: 3 does not divide"),
    "odd head": ("model.n_heads=32", "rotary embedding needs an even number"),
    "batch not divisible": (
        "train.batch_tokens=1000",
        "train.batch_tokens: 1000 is not a multiple of data.seq_len 64",
    ),
    "NaN": ("optim.lr=nan", "optim.lr: Input should be a finite number"),
    "infinite": ("optim.lr=inf", "optim.lr: Input should be a finite number"),
    "negative": ("optim.lr=-0.1", "optim.lr: Input should be greater than 0"),
    "negative steps": ("train.steps=-3", "train.steps: Input should be greater than or equal to 1"),
    "zero micro-batch": ("train.micro_batch=0", "train.micro_batch"),
    "unknown preset": ("model.preset=8b", "model.preset: '8b' is not known"),
    "unknown optimizer": ("optim.name=adam", "optim.name: 'adam' is not known; use one of"),
    "no such policy": (
        "optim.batch_policy=cube",
        "optim.batch_policy: Input should be 'fixed', 'linear' or 'sqrt'",
    ),
    "one beta": ("optim.betas=[0.9]", "optim.betas: must be two numbers, such as [0.9, 0.95] (got [0.9])"),
    "a bare beta": ("optim.betas=0.9,0.95", "optim.betas: must be two numbers"),
    "a beta of one": ("optim.betas=[0.9,1.0]", "optim.betas: Input should be less than 1"),
    "negative decay": ("optim.weight_decay=-0.1", "optim.weight_decay: Input should be greater than or"),
    "no growth": ("optim.limiter=0.5", "optim.limiter: 0.5 is too small"),
    "negative clip": ("optim.grad_clip=-1", "optim.grad_clip: Input should be greater than or equal to 0"),
    "no rank": ("optim.rank=0", "optim.rank: Input should be greater than or equal to 1"),
    "no projection": ("optim.projection=gauss", "optim.projection: Input should be 'random' or 'svd'"),
    "unknown schedule": (
        "schedule.name=triangle",
        "schedule.name: Input should be 'cosine', 'linear', 'sawtooth', 'wsd' or",
    ),
    "a high floor": ("schedule.min_ratio=2", "schedule.min_ratio: Input should be less than or equal to 1"),
    "negative warm-up": ("schedule.warmup_steps=-1", "schedule.warmup_steps: Input should be greater than"),
    "nothing of a cycle": (
        "schedule.name=sawtooth schedule.cycle_steps=10 schedule.rewarmup_steps=10",
        "schedule.rewarmup_steps: 10 steps fill the whole cycle of 10 steps; lower it or raise",
    ),
    "not built": ("deepspeed.offload_optimizer=nvme", "deepspeed.offload_optimizer: 'nvme' is not built yet"),
    "no host in autograd": (
        "memory.stash_on=host memory.engine=autograd",
        "memory.stash_on: the autograd engine does not move units; use gpu or engine=layerwise",
    ),
    "no such source": ("data.source=nowhere.txt", "nowhere.txt"),
    "no CUDA device": (
        "run.device=cuda",
        "run.device: this config is for a GPU and no CUDA device is available",
    ),
    "sequence longer than the data": (
        "data.seq_len=1048576",
        "data.seq_len: 1048576 is longer than the data",
    ),
    "vocabulary too small": ("model.vocab_size=300", "model.vocab_size: 300 is less than the 500 pieces"),
    "not an override": ("steps", "--set steps: write it as section.key=value"),
    "tokenizer is missing": ("data.tokenizer=none.model", "none.model"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_input(case: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    override, message = BAD_CONFIGS[case]
    overrides = override.split()
    if case.startswith("sequence longer"):
        # with a rate; otherwise a note says how the batch changes the rate
        overrides += ["train.batch_tokens=1048576", "optim.lr=0.01"]
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments = [
        "train",
        str(config),
        *(o for key in overrides for o in ("--set", key)),
        "--run",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 2
    error = capfd.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1, error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


TOO_SMALL = {
    "no room for a layer": (["memory.budget_gib=0.0001"], "memory.budget_gib: the run needs"),
    "no room for the stash": (
        ["memory.stash_on=host", "memory.host_budget_gib=0.00001"],
        "the largest part is the stash",
    ),
    "not in this machine": (
        ["model.dim=32768", "model.n_heads=64", "model.ffn_dim=131072", "memory.budget_gib=1000"],
        "of host memory, this machine has",
    ),
}


@pytest.mark.parametrize("case", TOO_SMALL)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    case: str, config: Path, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, message = TOO_SMALL[case]
    keys = [*keys, f"data.source={corpus}", f"data.cache={tmp_path / 'cache'}"]
    before = sorted(p.name for p in tmp_path.iterdir())
    options = [o for key in keys for o in ("--set", key)]
    assert main(["train", str(config), *options, "--run", str(tmp_path / "run")]) == 3
    error = capfd.readouterr().err.strip()
    assert message in error and "GiB" in error
    assert len(error.splitlines()) == 1, error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_full_disk_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["train", str(config), "--run", str(tmp_path / "run")]) == 3
    error = capfd.readouterr().err.strip()
    assert "the disk has 0.00 MiB free, but 0." in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_plan_says_what_does_not_fit(config: Path) -> None:
    done = lowres_here("plan", config, "--set", "memory.budget_gib=0.0001", code=3)
    assert "activations inside a layer" in done.stdout and "memory.budget_gib" in done.stderr
    plan = json.loads(
        lowres_here("plan", config, "--set", "memory.budget_gib=0.0001", "--json", code=3).stdout
    )
    assert plan["fits"] is False
    assert json.loads(lowres_here("plan", config, "--json").stdout)["fits"] is True


def test_a_large_config_without_a_gpu_names_what_works(tmp_path: Path) -> None:
    done = lowres_here("train", "configs/llama_7b_8gb.toml", "--run", tmp_path / "run", code=2)
    assert "make smoke-7b-cpu" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_bad_files(config: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, saying: str, run: bool = True) -> None:
        more = ("--run", tmp_path / "run") if run else ()
        said = lowres_here(*arguments, *more, code=2).stderr.splitlines()
        [error] = [line for line in said if not line.startswith("data: ")]  # what is about to be read
        assert saying in error
        assert not (tmp_path / "run").exists()

    fails("train", tmp_path / "none.toml", saying="none.toml: no such file")
    (tmp_path / "broken.toml").write_text("[model\n")
    fails("train", tmp_path / "broken.toml", saying="not valid TOML")
    shard = tmp_path / "copy" / "train_00000.bin"
    shutil.copytree(prepared, shard.parent)
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    fails("train", config, "--set", f"data.source={shard.parent}", saying=str(shard))
    for name, content_of in (("empty.txt", b""), ("binary.txt", bytes(range(256)))):
        (tmp_path / name).write_bytes(content_of)
        fails(
            "train",
            config,
            "--set",
            f"data.source={tmp_path / name}",
            "--set",
            f"data.cache={tmp_path / 'c'}",
            saying=name,
        )
        fails("data", "prepare", tmp_path / name, tmp_path / "out", saying=name, run=False)
        assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("")
    refused = lowres_here("train", config, "--run", tmp_path / "file", code=2).stderr
    assert "file is a file; give a folder" in refused
    refused = lowres_here("train", config, "--run", tmp_path / "file" / "run", code=2).stderr
    assert refused == f"lowres: --run: {tmp_path / 'file'} is a file; give a folder\n"
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "link", tmp_path / "link" / "run"):
        refused = lowres_here("train", config, "--run", folder, code=2).stderr
        assert refused.startswith(
            f"lowres: --run: {tmp_path / 'link'} is a link to something that does not exist"
        )
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
        refused = lowres_here("train", config, "--run", tmp_path / "new", code=2).stderr
    assert refused == f"lowres: --run: {tmp_path} may not be written to; make it writable, or give another\n"
    fails("sample", tmp_path / "nothing", "--prompt", "x", saying="is not a run", run=False)
    fails("checkpoint", "verify", tmp_path / "nothing", saying="neither a checkpoint nor a run", run=False)
