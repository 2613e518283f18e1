"""What SECURITY.md promises, seen from outside: a training run is watched by Python's audit events."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowres.errors import UserError
from lowres.text import Source, documents
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[1]
# Python imports a module of this name before the program begins
WATCH = """
import os
import sys

events = os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
watching = True

def tell(*words):
    os.write(events, ("\\t".join(map(str, words)) + "\\n").encode())

def sockets():
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            tell("socket", target)

def hook(event, arguments):
    global watching
    if not watching:
        return
    watching = False
    try:
        if event == "open":
            path, _, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            if isinstance(flags, int) and flags & writes and not isinstance(path, int):
                tell("write", os.path.abspath(os.fsdecode(path)))
        elif event == "os.mkdir":
            tell("write", os.path.abspath(os.fsdecode(arguments[0])))
        elif event == "os.rename":
            tell("write", os.path.abspath(os.fsdecode(arguments[1])))
            sockets()  # also those that C++ has opened
        elif event.startswith("socket.") and event != "socket.gethostname" or event == "pickle.find_class":
            tell(event, *arguments)
    finally:
        watching = True

sys.addaudithook(hook)
"""
CONFIG = """
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64

[data]
source = "text"
vocab_size = 300
seq_len = 64

[train]
steps = 4
batch_tokens = 512
eval_every = 2
eval_tokens = 1024
checkpoint_every = 2
"""
# several commands in one process, which saves the seconds to import torch
COMMANDS = """
import sys
from lowres.cli import main

for command in sys.argv[1:]:
    assert main(command.split()) == 0
"""
# a module that leaves a mark if anything imports or runs it
TRAP = """
import os
open(os.environ["TRAP"], "w").close()
"""


@dataclass
class Watched:
    home: Path
    work: Path
    temporary: Path
    trap: Path
    events: list[list[str]]

    def of(self, *kinds: str) -> list[list[str]]:
        return [event for event in self.events if event[0].startswith(kinds)]


@pytest.fixture(scope="module")
def watched(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A run from text to loss curve, then a resumed one, with a home and a working folder of its own."""
    place = tmp_path_factory.mktemp("watched")
    home, work, temporary, hooks = (place / name for name in ("home", "work", "tmp", "hooks"))
    for folder in (home, work, temporary, hooks):
        folder.mkdir()
    (hooks / "sitecustomize.py").write_text(WATCH)
    shutil.copytree(corpus, work / "text")
    for name in ("text.py", "conftest.py", "__init__.py", "setup.py"):
        (work / "text" / name).write_text(TRAP)
    (work / "c.toml").write_text(CONFIG)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "EVENTS": str(place / "events"),
        "TRAP": str(place / "trap"),
        "PYTHONPATH": f"{hooks}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    commands = ["train c.toml --run runs/a", "train c.toml --run runs/a --resume --set train.steps=6"]
    command = [sys.executable, "-c", COMMANDS, *commands, "eval runs/a"]
    subprocess.run(command, check=True, capture_output=True, cwd=work, env=environment)
    events = [line.split("\t") for line in (place / "events").read_text().splitlines()]
    return Watched(home, work, temporary, place / "trap", events)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_writes_into_the_run_the_data_and_caches_only(watched: Watched) -> None:
    written = {Path(path) for _, path in watched.of("write")}
    assert watched.work / "runs/a/config.toml" in written, "the watching does not work"
    allowed = [watched.work / "runs/a", watched.work / "data", watched.home / ".cache/lowres"]
    # not ours: fonts of matplotlib, and a folder that PyTorch makes for its compiler
    allowed += [watched.home / name for name in (".cache/matplotlib", ".config/matplotlib")]
    allowed += [watched.temporary]
    parents = {parent for folder in allowed for parent in folder.parents}
    odd = [p for p in written if p not in parents and not any(p.is_relative_to(a) for a in allowed)]
    assert [path for path in odd if path != Path(os.devnull)] == []


def test_nothing_else_is_left_behind(watched: Watched) -> None:
    """What C++ writes has no audit event, but it would be in a folder of the user."""
    here = files_in(watched.work)
    ours = {name for name in here if name.startswith(("runs/a/", "data/"))}
    assert here - ours == {"c.toml", *(f"text/{name}" for name in files_in(watched.work / "text"))}
    assert ours
    assert {name for name in files_in(watched.home) if not name.startswith(".cache/")} == set()
    assert {path.name for path in (watched.home / ".cache").glob("*")} <= {"lowres", "matplotlib"}
    assert files_in(watched.temporary) == set()


def test_it_uses_no_network(watched: Watched) -> None:
    assert watched.of("socket") == []


def test_it_reads_no_pickle(watched: Watched) -> None:
    assert watched.of("pickle") == []


def test_files_of_a_run_are_of_formats_without_code(watched: Watched) -> None:
    endings = {Path(name).suffix for name in files_in(watched.work) if not name.startswith("text/")}
    assert endings <= {
        ".toml",
        ".json",
        ".jsonl",
        ".safetensors",
        ".model",
        ".bin",
        ".png",
        ".log",
        ".lock",
        ".hashes",
    }


def test_scripts_among_the_text_are_text(watched: Watched) -> None:
    assert not watched.trap.exists()


def test_the_watching_sees_what_is_forbidden(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    script = """
import os, pickle, socket
socket.socket().bind(("127.0.0.1", 0))
kept = socket.socket()
pickle.loads(pickle.dumps(os.path.join))
open("elsewhere", "w").close()
os.rename("elsewhere", "there")
"""
    environment = os.environ | {"EVENTS": str(tmp_path / "events"), "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    seen = [line.split("\t") for line in (tmp_path / "events").read_text().splitlines()]
    kinds = {event[0] for event in seen}
    assert {"socket.bind", "socket", "pickle.find_class", "write"} <= kinds
    assert ["write", str(tmp_path / "there")] in seen


def test_the_script_of_a_data_set_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install lowres[hub]")
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n')
    assert list(documents(f"hf:{folder}")) == ["one"]
    (folder / "scripted.py").write_text(TRAP)
    assert list(documents(Source(f"hf:{folder}", max_left_out=1))) == ["one"]
    hub = FakeHub()
    hub.use(monkeypatch, tmp_path)
    hub.put("x/scripted", {"scripted.py": TRAP.encode(), "train.jsonl": b'{"text": "one"}\n'})
    with pytest.raises(UserError, match="scripts are no longer supported"):
        list(documents("hf:x/scripted"))
    hub.close()
    assert not (tmp_path / "trap").exists()

    asked: list[object] = []  # version 3 of datasets still runs scripts, unless it is told not to

    def load(name: str, config: str, revision: str, trust_remote_code: bool = True) -> None:
        asked.append(trust_remote_code)
        raise RuntimeError("not in this test")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(UserError, match="not in this test"):
        list(documents("hf:x/scripted"))
    assert asked == [False]
