"""`lowres doctor`: every kind of machine that it tells apart."""

import json
import re
import shutil
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowres import doctor, memory
from lowres.doctor import MEND, NOTE, OK, Finding
from lowres.kernels import native, product
from tests.helpers import lowres_here

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


def states(check: str) -> dict[str, Finding]:
    return {finding.what: finding for finding in getattr(doctor, f"_{check}")()}


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    good = lowres_here("doctor", "--json").stdout
    assert {one["what"] for one in json.loads(good)} >= {"Python", "PyTorch", "CPU", "memory", "disk"}
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    printed = lowres_here("doctor", code=1).stdout.splitlines()
    assert len([line for line in printed if line.startswith("mend")]) >= len(doctor.REQUIRED)
    assert re.fullmatch(r"\d+ to mend", printed[-1])
    for line in printed[:-1]:  # everything that is not well has a remedy
        assert line.startswith("ok ") or "; " in line


def least_of(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)\W+([\d.]+)", text) for text in requirements)
    return {match[1]: match[2] for match in found if match}


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert least_of(project["dependencies"]) == doctor.REQUIRED
    extras = project["optional-dependencies"]
    own = [text for name in extras if name not in ("dev", "oracles") for text in extras[name]]
    least = least_of(own)
    assert {name: least[name] for name in doctor.OPTIONAL} == {n: v for n, (v, _) in doctor.OPTIONAL.items()}


@pytest.mark.parametrize(
    "version, least, older",
    [
        *(("2.13.0+cpu", "2.8", False), ("2.7.1", "2.8", True), ("0.4.13", "0.4.12", False)),
        *(("6.0.4", "6", False), ("2.8.0rc1", "2.8", False), ("0.9", "0.49", True)),
    ],
)
def test_versions_compare_by_number(version: str, least: str, older: bool) -> None:
    assert doctor.is_older(version, least) == older


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.13.0", "numpy": "1.20", "datasets": "5.0.0", "pyarrow": "26"}
    monkeypatch.setattr(doctor, "version_of", have.get)
    lines = [finding.line for finding in doctor._packages()]
    assert any("numpy 1.20 is too old; pip install -U 'numpy>=1.26'" in line for line in lines)
    assert any("pydantic is not installed" in line for line in lines) and "torch 2.13.0" in lines[-1]
    optional = list(doctor._optional())
    assert [f.state for f in optional if "datasets" in f.text] == [MEND]
    assert [f.state for f in optional if "gguf" in f.text] == [NOTE]


def torch_of(cuda: str | None, *cards: tuple[str, int, tuple[int, int]]) -> Any:
    devices = [
        SimpleNamespace(name=name, total_memory=gib * GIB, major=at[0], minor=at[1])
        for name, gib, at in cards
    ]
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(cards),
            device_count=lambda: len(cards),
            get_device_properties=lambda index: devices[index],
        ),
    )


@pytest.mark.parametrize(
    "torch, card, driver, what, state, words",
    [
        (torch_of(None), False, None, "card", NOTE, "on this CPU; begin with a small model"),
        (torch_of("12.8"), True, None, "driver", MEND, "no driver; install NVIDIA's driver"),
        (torch_of(None), True, "570.1", "PyTorch", MEND, "no CUDA; pip install"),
        (torch_of("12.8"), True, "470.1", "driver", MEND, "driver 470.1; install a newer driver"),
        (
            torch_of("12.8", ("NVIDIA GeForce RTX 4090", 24, (8, 9))),
            *(True, "570.1", "card", OK, "its data sheet is known"),
        ),
        (torch_of("12.8", ("Tesla T4", 16, (7, 5))), True, "570.1", "card", NOTE, "memory.compute=fp32"),
        (torch_of("12.8", ("Tesla P40", 24, (6, 1))), True, "570.1", "card", MEND, "too old"),
    ],
)
def test_cards_and_drivers(
    torch: Any,
    card: bool,
    driver: str | None,
    what: str,
    state: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: torch)
    monkeypatch.setattr(doctor, "has_nvidia_card", lambda: card)
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    found = states("card")
    assert found[what].state == state and words in found[what].line
    if torch.cuda.is_available():
        monkeypatch.setattr(doctor, "version_of", lambda package: None)
        assert states("card")["Triton"].remedy == "pip install triton"
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
        assert states("card")["page-locking"].state == NOTE


def test_the_rest_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unavailable() -> None:
        raise native.UnavailableError("there is no C++ compiler (g++ or clang++)")

    monkeypatch.setattr(native, "load", unavailable)
    found = states("compilers")["C++ compiler"]
    assert found.state == MEND and "install g++" in found.line
    monkeypatch.setattr(product, "is_exact", lambda: False)
    assert states("cpu")["CPU"].state == NOTE
    monkeypatch.setattr(product, "is_exact", lambda: True)
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2", "avx512_vnni", "amx_int8"})
    assert states("cpu")["CPU"].state == OK and states("cpu")["CPU"].text.endswith("AVX2, VNNI, AMX")
    for free, state in ((None, NOTE), (GIB, NOTE), (30 * GIB, OK)):
        monkeypatch.setattr(memory, "host_bytes", lambda free=free: free)
        assert states("memory")["memory"].state == state
    for free, state in ((GIB // 2, MEND), (5 * GIB, NOTE), (50 * GIB, OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free, 0, free))
        assert states("disk")["disk"].state == state
