"""`pip install .` into an empty environment, with every supported Python that is here; and the oldest
packages that pyproject.toml allows. `make test-install` runs this.

It downloads gigabytes: PyTorch from PyPI is built for CUDA and takes 6 GB with what it needs. With
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip takes a small build. There is one environment at
a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")
# what a user may install; the others are for developers
EXTRAS = sorted(PROJECT["optional-dependencies"].keys() - {"dev", "oracles"})
# these go together at their oldest; deepspeed, lm_eval and trackio need newer ones of what they share
OLDEST = sorted(set(EXTRAS) - {"deepspeed", "harness", "trackio"})
# tests that try what these packages do for lowres
TRIED = ["config", "storage", "golden", "optim", "kinds", "watch", "tokenizers", "data_batches", "checkpoint"]
TRIED += ["gguf", "trackers"]
pytestmark = pytest.mark.install


def run(*command: object, timeout: float = 1800, cwd: Path | None = None, **more: Any) -> str:
    """What a program prints, away from the environment of the tests and, without cwd, from the repository;
    fails if the program does. more: variables of its environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [*map(str, command)],
            cwd=cwd or elsewhere,
            env=kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    assert done.returncode == 0, f"{[*map(str, command)]}\n{done.stdout[-6000:]}"
    return done.stdout


def interpreter(version: str) -> Path | None:
    """A Python of this version, if there is one."""
    there: list[Path | str | None] = [shutil.which(f"python{version}")]
    there += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in there:
        if path is None:
            continue
        asked = [str(path), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return Path(path)
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, because a folder build/ of before would add what was deleted."""
    source = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).exists():  # may be deleted and not committed yet
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("wheel")
    run(interpreter("3.11"), "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def environment(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The Python of an empty environment, which is removed afterwards. Its parameter: the version."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"there is no Python {request.param} here")
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        yield Path(folder) / "bin" / "python"


def install(python: Path, *packages: object) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages)


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    known = [Path(name) for name in run("git", "ls-files", cwd=ROOT).splitlines()]
    wanted = {str(path) for path in known if path.parts[0] == "lowres" and (ROOT / path).is_file()}
    wanted |= {f"lowres/{path}" for path in known if path.parts[0] == "configs"}
    assert found == wanted
    kinds = {Path(name).suffix for name in found}
    assert kinds >= {".py", ".cpp", ".h", ".js", ".css", ".json", ".toml"} and wheel.stat().st_size < 2e6


EVERY_MODULE = """
import importlib, pkgutil, lowres
for one in pkgutil.walk_packages(lowres.__path__, "lowres."):
    try:
        importlib.import_module(one.name)
    except ModuleNotFoundError as error:  # a package of an extra
        if error.name.startswith("lowres"):
            raise
print(lowres.__file__)
"""


@pytest.mark.parametrize("environment", PYTHONS, indirect=True)
def test_it_works_in_an_empty_environment(wheel: Path, environment: Path, tmp_path: Path) -> None:
    """Help, a plan, a run with compiled kernels, a page about it, text, an export: all without an extra."""
    python = environment
    install(python, wheel, "-c", ROOT / "requirements.txt")
    installed = Path(run(python, "-c", EVERY_MODULE).splitlines()[-1]).parent
    assert installed.is_relative_to(python.parent.parent)

    def lowres(*arguments: object, **more: Any) -> str:
        return run(python.parent / "lowres", *arguments, OMP_NUM_THREADS="1", **more)

    assert (
        "usage: lowres" in lowres("--help") and lowres("--version") == f"lowres {wheel.name.split('-')[1]}\n"
    )
    assert "[memory]" in lowres("config") and "RTX 4090" in lowres("presets")
    card = ("--card", "RTX 4090", "--json")
    plan = json.loads(lowres("plan", installed / "configs" / "llama_7b_24gb.toml", *card))
    assert plan["fits"] and plan["parameters"] > 6e9

    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"line {i} of a text, and {i * i % 97} more\n" for i in range(3000)))
    small = {
        "data.source": text,
        "data.vocab_size": 300,
        "data.cache": tmp_path / "data",
        "run.device": "cpu",
    }
    small |= {"train.steps": 8, "train.eval_every": 4, "memory.compute": "int8", "log.sample_tokens": 8}
    given = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    printed = lowres(
        "train", installed / "configs" / "tiny.toml", "--run", folder, *given, HOME=str(tmp_path)
    )
    assert "validation loss" in printed and "slower" not in printed, printed
    assert list((tmp_path / ".cache" / "lowres").rglob("*.so"))  # compiled from the sources of the wheel
    lowres("report", folder, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1e6  # with the library of the charts
    assert lowres("sample", folder, "--prompt", "line", "--tokens", 4).startswith("line")
    lowres("export", folder, tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()


@pytest.mark.parametrize("version", PYTHONS)
def test_extras_can_be_installed(wheel: Path, version: str) -> None:
    """pip finds versions of the packages of all of them that go together. Nothing is installed."""
    if (python := interpreter(version)) is None:
        pytest.skip(f"there is no Python {version} here")
    asked = f"{wheel}[{','.join(EXTRAS)}]"
    pins = ROOT / "requirements.txt"
    run(python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", asked, "-c", pins)


def lowest(requirement: str) -> str | None:
    """ "numpy>=1.26" -> "numpy==1.26" """
    found = re.match(r"([\w.-]+)(?:\[\w+\])?[^;]*>=([\d.]+)", requirement)
    return f"{found[1]}=={found[2]}" if found else None


@pytest.mark.parametrize("environment", PYTHONS[:1], indirect=True)
def test_the_oldest_packages_are_enough(environment: Path, tmp_path: Path) -> None:
    """The lower limits of pyproject.toml are versions with which the tests pass, with the oldest Python."""
    asked = [*PROJECT["dependencies"], *(one for e in OLDEST for one in PROJECT["optional-dependencies"][e])]
    install(environment, *filter(None, map(lowest, asked)), "pytest", "hypothesis")
    files = [f"tests/test_{name}.py" for name in TRIED]
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run(environment, "-m", "pytest", "-q", "-x", *files, timeout=3600, cwd=ROOT, **here)
