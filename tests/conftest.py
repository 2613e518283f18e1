"""Fixtures for the end-to-end tests: a small corpus, prepared once through the command line."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from lowres import disk, summary
from lowres.cli import main
from lowres.device import prepare_cuda
from lowres.stopping import Stopper
from tests.helpers import lowres_here

# pytest runs as several processes
torch.set_num_threads(1)
prepare_cuda()  # tests that need a GPU have the settings of the program


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # tests/test_gpu.py can be rehearsed on a CPU
    if not torch.cuda.is_available() and os.environ.get("LOWRES_GPU_TESTS_ON") != "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Runs in this process draw no loss curve, which takes as long as their steps do. Runs in processes of
    their own draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "draw_loss", lambda run: disk.store(run / "loss.png", b"a picture"))
        yield


MODULES = [
    "argparse",
    "ast",
    "bdb",
    "calendar",
    "cmd",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "enum",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten modules of the standard library, 400 KB of text."""
    folder = tmp_path_factory.mktemp("corpus")
    for module in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{module}.py", folder)
    return folder


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as `lowres data prepare` leaves it."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    lowres_here("data", "prepare", corpus, out, "--vocab-size", 500)
    return out


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has version 4 of transformers, installed for the slow tests."""
    there = tmp_path_factory.mktemp("transformers")
    packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(there)]
    subprocess.run([*pip, *packages], check=True, timeout=600)
    return os.environ | {"PYTHONPATH": f"{there}{os.pathsep}{Path.cwd()}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    """A config that takes seconds; its epoch is about 60 steps."""
    path = tmp_path / "small.toml"
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

[train]
steps = 30
batch_tokens = 1024
micro_batch = 5
eval_every = 10
eval_tokens = 2048
checkpoint_every = 10

[log]
progress = false
"""
    )
    return path


@pytest.fixture
def points_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The points of a sweep are trained in this process, which saves the seconds to import torch for each."""

    def run(self: Stopper, command: list[str], log: BinaryIO, output: BinaryIO | None = None) -> int:
        assert command[:3] == [sys.executable, "-m", "lowres"]
        text = io.TextIOWrapper(log, "utf-8", write_through=True)
        said = io.TextIOWrapper(output, "utf-8", write_through=True) if output else text
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(text):
            code = main(command[3:])
        for one in {text, said}:
            one.detach()
        return code

    monkeypatch.setattr(Stopper, "run", run)
