"""The DeepSpeed engine on real DeepSpeed: it follows our AdamW, on one or two ranks, in every stage, and its
checkpoints are those of the other engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowres import metrics
from lowres.cli import main
from lowres.config import Config
from lowres.engine import AutogradEngine, EngineSettings, StepReport, zero
from lowres.engine.zero import ZeroEngine
from lowres.errors import UserError
from lowres.model import Units, empty_units, initialize, starting_with
from lowres.optim import make_optimizer as optimizer_of
from lowres.storage import DENSE_DTYPES
from tests.helpers import CPU, LLAMA3, ROOMS, make_batch, make_config, make_optimizer

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and what it calls
LIMIT = 900  # seconds: a machine may be slow
# partitions instead of whole small tensors, so that tests of small models see them
PARTED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """DeepSpeed's operators, compiled without a limit of time."""
    zero.deepspeed(CPU)
    zero.compile_operators(offloaded=True)


# ---- the step, in this process


def config_of(engine: str, tmp_path: Path, formats: dict[str, str], clip: float = 0.0, **keys: Any) -> Config:
    """8 sequences in 4 micro-batches."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps(PARTED))
    optim = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "embed_lr": 1e-3, "grad_clip": clip}
    sections: dict[str, dict[str, Any]] = {"deepspeed": {"config_file": str(own)} | keys} if keys else {}
    return make_config(
        memory={"engine": engine} | formats,
        optim=optim,
        model={"tie_embeddings": clip > 0, "n_layers": 1},
        train={"batch_tokens": 8 * 32, "micro_batch": 2},
        **sections,
    )


def zero_engine(config: Config) -> ZeroEngine:
    engine = ZeroEngine(config, optimizer_of(config), 2, ROOMS)
    initialize(engine.units(write=True), 0, CPU)
    return engine


def reference(config: Config) -> tuple[AutogradEngine, Units]:
    kept = config.memory
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, ROOMS)
    initialize(units.values(), 0, CPU)
    dtype, clip = DENSE_DTYPES[kept.compute], config.optim.grad_clip
    optimizer = make_optimizer(config, units)
    return AutogradEngine(
        config.model, units, optimizer, ROOMS, EngineSettings(2, dtype, grad_clip=clip)
    ), units


def tensors_of(engine: ZeroEngine | AutogradEngine) -> dict[str, Tensor]:
    return {name: t.clone() for unit in engine.units() for name, t in unit.tensors().items()}


def run_steps(engine: ZeroEngine | AutogradEngine, steps: range) -> list[StepReport]:
    return [engine.step(make_batch(8, seed=s % 3), s, min(1.0, s / 4)) for s in steps]


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, over its largest element."""
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype == wanted[n].dtype for n in wanted)
    pairs = [(found[n].double(), w.double()) for n, w in wanted.items()]
    return max(float((f - w).abs().max() / w.abs().max().clamp(min=1e-12)) for f, w in pairs)


FP32 = {"weights": "fp32", "compute": "fp32"}
BF16 = {"weights": "fp32", "compute": "bf16"}
LEAN = {"weights": "bf16", "moments": "bf16", "compute": "bf16"}
# what the numbers are kept in, clipping, [deepspeed], steps, how close the losses must be
CASES: dict[str, tuple[dict[str, str], float, dict[str, Any], int, float]] = {
    "ZeRO-2": (FP32, 0.0, {"stage": 2}, 20, 1e-4),
    "ZeRO-3": (FP32, 0.0, {"stage": 3, "offload_param": "cpu"}, 20, 1e-4),
    "ZeRO-2 in bf16": (BF16, 0.0, {"stage": 2}, 20, 1e-2),
    "ZeRO-3 in bf16": (BF16, 0.0, {"stage": 3}, 20, 1e-2),
    "ZeRO-2, bf16 master weights": (LEAN, 0.0, {"stage": 2}, 20, 1e-2),
    "ZeRO-1": (FP32, 0.0, {"stage": 1}, 6, 1e-4),
    "ZeRO-3, tied and clipped": (FP32, 0.5, {"stage": 3}, 6, 1e-4),
    "ZeRO-2 without offload": (FP32, 0.0, {"stage": 2, "offload_optimizer": "none"}, 6, 1e-4),
    "ZeRO-3 without offload": (FP32, 0.0, {"stage": 3, "offload_optimizer": "none"}, 6, 1e-4),
}


@pytest.mark.parametrize("case", CASES)
def test_it_follows_our_adamw(case: str, tmp_path: Path) -> None:
    formats, clip, keys, steps, precision = CASES[case]
    ours, _ = reference(config_of("autograd", tmp_path, formats, clip))
    theirs = zero_engine(config_of("deepspeed", tmp_path, formats, clip, **keys))
    exact = formats is FP32
    # the first weights of every engine are the same
    first = (tensors_of(theirs), tensors_of(ours))
    assert furthest(*first) == 0
    curves = zip(run_steps(theirs, range(steps)), run_steps(ours, range(steps)), strict=True)
    for found, wanted in curves:
        assert found.loss == pytest.approx(wanted.loss, rel=precision) and found.skipped == 0
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4 if exact else 0.1)
    found_score, wanted_score = (engine.evaluate(make_batch(7, seed=9)) for engine in (theirs, ours))
    assert found_score == (pytest.approx(wanted_score[0], rel=precision), wanted_score[1])
    tokens = make_batch(2, 9)
    assert theirs.logits(tokens).shape == (2, 300)
    if exact:
        assert (theirs.logits(tokens) - ours.logits(tokens)).abs().max() < 1e-4
        assert furthest(tensors_of(theirs), tensors_of(ours)) < 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_options_of_the_model_follow_our_adamw(stage: int, tmp_path: Path) -> None:
    """Biases, whose gradients and updates are 1-D, norms inside attention, and heads of another width."""
    model = {"qkv_bias": True, "qk_norm": True, "n_kv_heads": 2} | LLAMA3

    def changed(engine: str, **keys: Any) -> Config:
        config = config_of(engine, tmp_path, FP32, **keys)
        return config.model_copy(update={"model": config.model.model_copy(update=model)})

    ours, _ = reference(changed("autograd"))
    theirs = zero_engine(changed("deepspeed", stage=stage))
    for found, wanted in zip(run_steps(theirs, range(4)), run_steps(ours, range(4)), strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
    assert furthest(tensors_of(theirs), tensors_of(ours)) < 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_documents_apart_follow_our_adamw(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """data.document_mask: in training, evaluation and sampling."""
    starts, (ours, units) = starting_with(1), reference(config_of("autograd", tmp_path, FP32))
    config = config_of("deepspeed", tmp_path, FP32, stage=stage)
    config = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": True})})
    settings = replace(ours.settings, starts=starts)
    apart = AutogradEngine(config.model, units, ours.optimizer, ROOMS, settings)
    theirs = ZeroEngine(config, optimizer_of(config), 2, ROOMS, starts)
    initialize(theirs.units(write=True), 0, CPU)
    for step in range(3):
        batch = make_batch(8, seed=step)
        batch[torch.rand(batch.shape, generator=torch.Generator().manual_seed(step)) < 0.2] = 1
        assert theirs.step(batch, step, 1.0).loss == pytest.approx(
            apart.step(batch, step, 1.0).loss, rel=1e-5
        )
    assert furthest(tensors_of(theirs), tensors_of(apart)) < 1e-4
    wanted = apart.evaluate(batch)
    assert theirs.evaluate(batch) == (pytest.approx(wanted[0], rel=1e-5), wanted[1])
    assert wanted[1] == int((batch[:, 1:] != 1).sum())
    assert (theirs.logits(batch) - apart.logits(batch)).abs().max() < 1e-4
    assert (theirs.logits(batch) - ours.logits(batch)).abs().max() > 1e-3
    (each, likeliest), odd = apart.log_probabilities(batch), batch[:7]
    found = theirs.log_probabilities(batch)
    torch.testing.assert_close(found[0], each, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], likeliest) and likeliest.any()
    # as one of two ranks; without the other one, the sum over the ranks is its own part
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        part, _ = theirs.log_probabilities(odd)
        torch.testing.assert_close(part[rank::2], each[:7][rank::2], rtol=1e-4, atol=1e-4)
        assert part.shape == (7, batch.shape[1] - 1) and not part[1 - rank :: 2].any()


@pytest.mark.parametrize("keys", [{"stage": 2}, {"stage": 3}, {"stage": 2, "offload_optimizer": "none"}])
def test_state_goes_in_and_out_exactly(keys: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of a run too: moments and the count of updates, which corrects their bias."""
    config = config_of("deepspeed", tmp_path, FP32, **keys)
    first = zero_engine(config)
    run_steps(first, range(3))
    kept = tensors_of(first)
    wanted = run_steps(first, range(3, 8))

    second = zero_engine(config)
    run_steps(second, range(1))  # what was there before is replaced
    for unit in second.units(write=True):
        for name, tensor in unit.tensors().items():
            tensor.copy_(kept[name])
    again = tensors_of(second)
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert int(again["layers.0.updates"]) == 3
    for found, report in zip(run_steps(second, range(3, 8)), wanted, strict=True):
        assert found.loss == pytest.approx(report.loss, rel=1e-6)
    assert furthest(tensors_of(second), tensors_of(first)) < 1e-5


@pytest.mark.parametrize("keys", [{"stage": 2}, {"stage": 3}, {"stage": 2, "offload_optimizer": "none"}])
def test_what_is_not_finite_changes_nothing(keys: dict[str, Any], tmp_path: Path) -> None:
    """Nor does a rehearsal, or a loss above its limit. The steps that follow are those of a run without."""
    config = config_of("deepspeed", tmp_path, FP32, **keys)
    engine, straight = zero_engine(config), zero_engine(config)
    run_steps(engine, range(2))
    run_steps(straight, range(2))
    before = tensors_of(engine)
    report = engine.step(make_batch(4, seed=5), 2, 1.0, rehearsal=True)
    assert report.skipped == 3 and 5 < report.loss < 6 and not report.norms
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(engine).items())
    report = engine.step(make_batch(4, seed=5), 2, 1.0, loss_limit=report.loss - 1e-3)
    assert report.skipped == 3 and 5 < report.loss < 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(engine).items())

    norm = "model.norm.weight"
    for value in (float("inf"), None):  # breaks the loss, then as it was
        for unit in engine.units(write=True):
            for name, tensor in unit.tensors().items():
                tensor.copy_(before[name])
                if name == norm and value is not None:
                    tensor[0] = value
        if value is not None:
            broken = tensors_of(engine)
            report = engine.step(make_batch(8), 2, 1.0)
            assert report.skipped == 3 and not report.loss < 1e9
            after = tensors_of(engine)
            assert all(torch.equal(tensor, broken[name]) for name, tensor in after.items())
    for found, wanted in zip(run_steps(engine, range(2, 5)), run_steps(straight, range(2, 5)), strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6) and found.skipped == 0


# ---- what is refused


def test_a_json_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"

    def read(values: object) -> dict[str, Any]:
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        config = make_config(memory={"engine": "deepspeed"}, deepspeed={"config_file": str(path)})
        return zero.settings(config, 2, CPU)

    found = read({"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True})
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000 and found["wall_clock_breakdown"]
    assert found["zero_optimization"]["stage"] == 2
    for values, message in (
        ({"train_batch_size": 8}, "sets train_batch_size; remove it and use train.batch_tokens"),
        ({"optimizer": {"type": "Muon"}}, "sets optimizer; remove it and use the section [optim]"),
        (
            {"zero_optimization": {"stage": 3}},
            "sets zero_optimization.stage; remove it and use deepspeed.stage",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "remove it and use deepspeed.offload_param",
        ),
        ([], "does not contain a JSON object"),
        ("{", "cannot be read as JSON"),
    ):
        with pytest.raises(UserError, match=r"deepspeed.config_file: ") as error:
            read(values)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    config = make_config(memory={"engine": "deepspeed"}, train={"batch_tokens": 8 * 32})

    def load(self: object, verbose: bool = True) -> None:
        raise RuntimeError("Error building extension 'cpu_adam'\nand so on")

    with monkeypatch.context() as patch:
        patch.setattr(CPUAdamBuilder, "load", load)
        with pytest.raises(UserError, match=r"memory.engine: .*cpu_adam.*g\+\+.*ninja"):
            zero.require(config, CPU)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        with pytest.raises(UserError, match=r"train.batch_tokens: 8 sequences .* 3 ranks; 288 tokens can"):
            zero.require(config, CPU)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"memory.engine: .*pip install deepspeed ninja"):
        zero.require(config, CPU)


def test_a_compilation_that_was_killed_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(zero, "LEFT_OVER", 0.5)
    locks = [tmp_path / place / "lock" for place in ("py/cpu_adam", "py/deepspeed_shm_comm", "py/others")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    began = time.time()
    with zero._alone():
        assert [lock.exists() for lock in locks] == [False, False, True]  # the last is not ours
    assert time.time() - began > 0.4  # it might have been held


# ---- whole runs


@pytest.fixture(scope="module")
def small(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "own.json").write_text(json.dumps(PARTED))
    path = folder / "small.toml"
    path.write_text(
        f"""
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64
[data]
source = "{prepared}"
seq_len = 64
[optim]
weight_decay = 0.1
[schedule]
name = "constant"
warmup_steps = 0
[train]
steps = 12
batch_tokens = 1024
micro_batch = 3
eval_every = 6
eval_tokens = 2048
checkpoint_every = 4
keep_checkpoints = 0
[memory]
engine = "deepspeed"
[deepspeed]
config_file = "{folder / "own.json"}"
[log]
progress = false
"""
    )
    return path


def train(config: Path, run: Path, *arguments: str) -> None:
    assert main(["train", str(config), "--run", str(run), *arguments]) == 0


@pytest.fixture(scope="module")
def straight(small: Path) -> Path:
    """12 steps of ZeRO-2 on one rank, in this process."""
    run = small.parent / "straight"
    train(small, run, "--set", "memory.rehearse=true")
    return run


def curve(run: Path) -> dict[int, float]:
    return {
        record["step"]: record["loss"] for record in metrics.read(run / "metrics.jsonl") if "loss" in record
    }


def scores(run: Path) -> dict[int, float]:
    found = metrics.read(run / "metrics.jsonl")
    return {record["step"]: record["val_loss"] for record in found if "val_loss" in record}


def tensors_in(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {n: t for path in checkpoint.glob("*.safetensors") for n, t in load_file(path).items()}


def launch(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lowres", "launch", *map(str, arguments), "--gpus", "2"]


@pytest.fixture(scope="module")
def killed(small: Path) -> Iterator[Path]:
    """A run of ZeRO-3 on two ranks, all killed after their second checkpoint."""
    run = small.parent / "killed"
    log = (small.parent / "killed.log").open("w")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = launch(small, "--run", run, "--set", "deepspeed.stage=3", "--set", "train.steps=10000")
    started = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + LIMIT
        while max(curve(run), default=0) < 10:
            assert started.poll() is None and time.monotonic() < end, Path(log.name).read_text()
            time.sleep(0.05)
    finally:
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        for process in (started.pid, *map(int, children)):
            os.kill(process, signal.SIGKILL)
        started.wait()
        while any(
            Path(f"/proc/{child}").exists() for child in children
        ):  # each holds the lock till it is gone
            assert time.monotonic() < end
            time.sleep(0.05)
    yield run


def test_two_ranks_are_one(straight: Path, killed: Path) -> None:
    found, wanted = curve(killed), curve(straight)
    for step in range(1, 11):
        assert found[step] == pytest.approx(wanted[step], rel=1e-5)
    assert scores(killed)[6] == pytest.approx(scores(straight)[6], rel=1e-5)
    both = (tensors_in(run / "checkpoints" / "step_00000008") for run in (killed, straight))
    assert furthest(*both) < 1e-4


def test_a_killed_run_goes_on_with_another_number_of_ranks(straight: Path, killed: Path, small: Path) -> None:
    """From two ranks of ZeRO-3 to one of ZeRO-2, as if nothing had happened."""
    assert not (killed / "summary.json").exists()
    train(small, killed, "--resume")
    found, wanted = curve(killed), curve(straight)
    assert sorted(found) == sorted(wanted) == list(range(1, 13))
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=1e-5)
    both = (tensors_in(run / "checkpoints" / "step_00000012") for run in (killed, straight))
    assert furthest(*both) < 1e-4


def test_resumed_is_straight(straight: Path, small: Path) -> None:
    run = small.parent / "resumed"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    (run / "summary.json").unlink()
    train(small, run, "--resume")
    for step, loss in curve(straight).items():
        assert curve(run)[step] == pytest.approx(loss, rel=1e-6)


def test_one_rank_becomes_two(straight: Path, killed: Path, small: Path) -> None:
    """The other way round, through `lowres launch`, which prints as a run of one rank does."""
    one, two = small.parent / "one", small.parent / "two"
    for run in (one, two):
        shutil.copytree(straight, run)
    more = ("--resume", "--set", "train.steps=14")
    train(small, one, *more)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = launch(small, "--run", two, *more)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation: ") == 1 and len(done.stdout.splitlines()) == 2, done.stdout
    assert done.stderr.count(f"continuing {two} at step 12") == 1
    assert curve(two)[14] == pytest.approx(curve(one)[14], rel=1e-5)
    both = (tensors_in(run / "checkpoints" / "step_00000014") for run in (one, two))
    assert furthest(*both) < 1e-4


def test_a_checkpoint_is_like_any_other(
    straight: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It verifies, samples, evaluates, and gives its weights to a layerwise run, whose weights it takes."""
    assert main(["checkpoint", "verify", str(straight)]) == 0
    assert main(["sample", str(straight), "--prompt", "def ", "--tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["eval", str(straight), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] > 0
    last = scores(straight)[12]
    layerwise = small.parent / "layerwise"
    formats = (
        "--set",
        "memory.engine=layerwise",
        "--set",
        "memory.weights=fp32",
        "--set",
        "optim.name=adamw",
    )
    train(small, layerwise, *formats, "--set", "train.steps=2", "--init-from", str(straight))
    assert scores(layerwise)[0] == pytest.approx(last, rel=1e-6)
    back = small.parent / "back"
    train(small, back, "--set", "train.steps=1", "--init-from", str(layerwise))
    assert scores(back)[0] == pytest.approx(scores(layerwise)[2], rel=1e-6)
    names = [
        set(tensors_in(run / "checkpoints" / step))
        for run, step in ((straight, "step_00000012"), (layerwise, "step_00000002"))
    ]
    assert names[0] == names[1]


def test_an_error_comes_through_the_launcher_once(small: Path, tmp_path: Path) -> None:
    """Also one that only the first rank meets, while the other waits for it."""
    command = launch(small, "--run", tmp_path / "run", "--set", "data.source=nowhere.txt")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "lowres: nowhere.txt: no such file" in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command, keys, message",
    [
        (
            "launch",
            "memory.engine=layerwise memory.weights=fp32",
            "memory.engine: layerwise uses one GPU; set it",
        ),
        (
            "train",
            "memory.engine=layerwise memory.weights=fp32",
            "layerwise runs in one process and 2 were start",
        ),
        (
            "train",
            "data.source=hf:allenai/c4",
            "data.source: hf:allenai/c4 is a stream, and several ranks need",
        ),
        ("plan --probe", "train.steps=1", "--probe: measures the layer-major step; leave it out"),
    ],
)
def test_what_cannot_be_launched(
    command: str,
    keys: str,
    message: str,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "train":
        monkeypatch.setenv("WORLD_SIZE", "2")
    name, *options = command.split()
    arguments = [name, str(small), *options, *(part for key in keys.split() for part in ("--set", key))]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
