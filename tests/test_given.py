"""What a user gives where a config is expected: a run to resume, or something else that lowres knows."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowres import checkpoint, metrics, trainer
from lowres.config_file import changed_config, load_config, load_resolved
from tests.helpers import lowres_here

SHORT = ["--set", "train.steps=6", "--set", "train.eval_every=0", "--set", "train.checkpoint_every=2"]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(run / "metrics.jsonl") if "loss" in record]


def commands_in(text: str) -> list[list[str]]:
    """The commands that a message says, as the words after `lowres`."""
    return [shlex.split(part)[1:] for part in text.replace("`", "").split(": ") if part.startswith("lowres ")]


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, in a folder whose name has a space."""
    home = tmp_path_factory.mktemp("my runs")
    config = home / "config of mine.toml"
    config.write_text(
        "[model]\ndim = 32\nn_layers = 2\nn_heads = 2\nffn_dim = 64\n"
        f'[data]\nsource = "{prepared}"\nseq_len = 64\n[optim]\nlr = 0.004\n'
        "[train]\nbatch_tokens = 256\n[log]\nprogress = false\n"
        '[memory]\ncompute = "fp32"\nkernels = "plain"\n'  # so that nothing is measured
    )
    lowres_here("train", config, *SHORT, "--run", home / "run")
    return home / "run"


def interrupted(finished: Path, run: Path) -> Path:
    """As a kill after step 5 leaves it."""
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    return run


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_goes_on_without_its_config(finished: Path, tmp_path: Path, lost: bool) -> None:
    run = interrupted(finished, tmp_path / "run")
    if lost:
        (run / "config.toml").unlink()
    said = lowres_here("train", run, "--resume").stderr
    assert "at step 4" in said and "is not used" not in said
    assert losses(run) == losses(finished)
    name = "checkpoints/step_00000006/layers.1.safetensors"
    assert (run / name).read_bytes() == (finished / name).read_bytes()
    # with other settings too, of which notes are said
    more = ("--set", "train.steps=8", "--set", "optim.lr=0.002", "--set", "schedule.cooldown_steps=3")
    said = lowres_here("train", run, "--resume", *more).stderr
    assert "note: schedule.cooldown_steps is not used by cosine" in said
    assert "optim.lr: 0.004 -> 0.002" in said
    assert len(losses(run)) == 8
    refused = lowres_here("train", run, "--resume", "--run", tmp_path / "other", code=2).stderr
    assert refused == f"lowres: --run: {run} is the run to resume; leave --run out, or give a config\n"
    assert "--init-from" in lowres_here("train", run, "--resume", "--init-from", finished, code=2).stderr


@pytest.mark.parametrize(
    "changed",
    [
        "",
        "train.steps=7",
        "train.tokens=999424 schedule.cooldown_steps=3",
        "train.batch_tokens=32768",
        "optim.lr=0.5",
        "optim.lr_over_batch=0.001 optim.batch_policy=fixed",  # what a run has resolved stays
        "optim.batch_policy=sqrt train.batch_tokens=65536",
        "optim.lr=0.02 train.batch_tokens=65536",
        "data.source=stdlib",
        "health.spikes=rollback train.micro_batch=1",
    ],
)
def test_what_a_run_wrote_changes_as_its_config_does(changed: str) -> None:
    """--set on a resolved config, in which all keys are explicit."""
    paths = sorted(Path("configs").glob("*.toml"))
    assert len(paths) > 10
    for path in paths:
        written, _ = load_config(path)
        found = changed_config(written, changed.split(), "")[0]
        assert found == load_config(path, changed.split())[0], path


def test_what_is_printed_can_be_typed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names with spaces are quoted."""
    said = lowres_here("train", finished, "--resume").stdout
    [words] = commands_in(said)
    assert words == ["train", str(finished), "--resume", "--set", "train.steps=N"]
    refused = lowres_here("train", finished, code=2).stderr
    [words] = commands_in(refused)
    assert f"{finished} is a run, not a config" in refused and words == ["train", str(finished), "--resume"]


KINDS: dict[str, tuple[str, str]] = {
    "run/checkpoints/step_00000006": ("a checkpoint", "--init-from"),
    "data": ("a folder with prepared data", "data.source="),
    "texts": ("a folder", "data.source="),
    "my text.txt": ("text or data", "data.source="),
    "model": ("a Hugging Face folder", "--init-from"),
}


@pytest.mark.parametrize("command", ["train", "plan", "config", "bench"])
@pytest.mark.parametrize("name", KINDS)
def test_something_else_than_a_config(
    name: str, command: str, finished: Path, prepared: Path, tmp_path: Path
) -> None:
    home = finished.parent
    (home / "texts").mkdir(exist_ok=True)
    (home / "model").mkdir(exist_ok=True)
    for made, content in (
        ("my text.txt", "Some words = of text.\n"),
        ("model/config.json", "{}"),
        ("model/model.safetensors", ""),
    ):
        (home / made).write_text(content)
    path = prepared if name == "data" else home / name
    what, option = KINDS[name]
    refused = lowres_here(command, path, code=2).stderr
    assert refused.startswith(f"lowres: {path} is {what}, not a config; ") and refused.count("\n") == 1
    assert option in refused and not any("--init-from" in words[:2] for words in commands_in(refused))
    assert str(path) in shlex.split(refused.partition("; ")[2].replace("data.source=", ""))


def test_a_config_without_the_suffix_is_one(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "config"
    shutil.copy(finished / "config.toml", copy)
    assert "dim = 32" in lowres_here("config", copy).stdout


def test_the_config_of_a_run_begins_with_another_model(finished: Path, tmp_path: Path) -> None:
    """Its keys are all explicit, which is no wish of the user."""
    other = tmp_path / "other"
    turned = ("--set", "model.rope_theta=500.0")
    lowres_here("train", finished.parent / "config of mine.toml", *SHORT, *turned, "--run", other)
    start = ("train", finished / "config.toml", "--init-from", other, "--run", tmp_path / "new")
    said = lowres_here(*start, *SHORT).stderr
    assert "note: [model] of" in said and f"weights from {other}" in said
    made = load_resolved(tmp_path / "new" / "config.toml")
    assert (made.model.rope_theta, made.optim.lr) == (500.0, 0.004)
    # what the user asks for still contradicts
    refused = lowres_here(*start[:-1], tmp_path / "no", *SHORT, "--set", "model.dim=64", code=2).stderr
    assert "model.dim: 64 here" in refused and not (tmp_path / "no").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_at_the_start_says_what_there_is(
    begun: bool, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted(finished, tmp_path / "run") if begun else tmp_path / "run"

    def leave(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "begin", leave)
    config = finished.parent / "config of mine.toml"
    said = lowres_here("train", config, "--run", run, *["--resume"] * begun, code=130).stderr
    remedy = f"to go on: lowres train {run} --resume" if begun else "nothing of the run was written"
    assert said == f"lowres: interrupted; {remedy}\n"


@pytest.mark.parametrize("place", ["checkpoints/model", "checkpoints/step_00000006/model.gguf"])
def test_nothing_is_exported_among_checkpoints(place: str, finished: Path) -> None:
    before = checkpoint.find(finished / "checkpoints")
    refused = lowres_here("export", finished, finished / place, code=2).stderr
    assert "is inside" in refused and "keeps its checkpoints" in refused
    config = finished.parent / "config of mine.toml"
    for others in (("import", finished), ("data", "prepare", config), ("train", config, "--run")):
        assert "is inside" in lowres_here(*others, finished / place, code=2).stderr
    assert before == checkpoint.find(finished / "checkpoints") and not (finished / place).exists()


WRITTEN = {
    "memory.rehearse=True": "; write true",
    "train.keep_best=yes": "; write true",
    "train.keep_best=0": "; write false",
    "train.steps=1e3": "; write 1000",
    "train.steps=10,000": "; write 10000",
    "train.steps=1.5": "(got 1.5)",
    "train.eval_tasks=hellaswag": "a list (got 'hellaswag'); write [\"hellaswag\"]",
    "train.eval_tasks=a,b": 'write ["a", "b"]',
    "run.name=a b": "letters, digits, _, - and ., with a letter in it (got 'a b')",
    "train.steps=[1, 2]": "(got [1, 2])",
    "train.steps={a = 1}": "(got {'a': 1})",
}


@pytest.mark.parametrize("override", WRITTEN)
def test_how_toml_writes_it(override: str) -> None:
    refused = lowres_here("config", "configs/tiny.toml", "--set", override, code=2).stderr
    assert refused.rstrip().endswith(WRITTEN[override])
