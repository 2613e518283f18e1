"""The house: a file imports only from floors below its own, or from its own package."""

import ast
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import lowres

ROOT = Path(lowres.__file__).parent
# room -> floor; a package is one room
FLOORS = {
    "errors": 0,
    "catalogue": 1,
    "rng": 0,
    "rates": 0,
    "marks": 0,
    "pace": 0,
    "wording": 0,
    "scores": 0,
    "terminal": 0,
    "disk": 1,
    "sealed": 1,
    "rooms": 1,
    "ranks": 1,
    "target": 0,
    "kernels": 1,
    "storage": 2,
    "lock": 2,
    "meter": 2,
    "text": 2,
    "rules": 3,
    "config": 4,
    "config_file": 5,
    "reference": 6,
    "model": 5,
    "optim": 5,
    "objective": 5,
    "data": 5,
    "checkpoint": 5,
    "records": 2,
    "view": 3,
    "trackers": 2,
    "report": 4,
    "watch": 4,
    "events": 3,
    "stopping": 2,
    "health": 7,
    "running": 9,
    "resuming": 9,
    "summary": 10,
    "progress": 2,
    "exchange": 9,
    "metrics": 5,
    "device": 6,
    "engine": 6,
    "relora": 6,
    "memory": 7,
    "outlook": 6,
    "evaluate": 7,
    "baseline": 8,
    "sample": 7,
    "samples": 6,
    "conversation": 8,
    "plots": 7,
    "probe": 8,
    "runs": 8,
    "sweep": 8,
    "harness": 8,
    "start": 10,
    "session": 10,
    "scoring": 11,
    "speed": 9,
    "explain": 9,
    "presets": 2,
    "doctor": 8,
    "trainer": 11,
    "cli": 12,
    "__main__": 13,
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] for name in found if name.startswith("lowres.")}
    return rooms - {"__version__"}


def test_imports_point_down() -> None:
    files = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    assert len(files) > 15
    for path in files:
        here = room(path)
        for other in imported_rooms(path) - {here}:
            assert FLOORS[other] < FLOORS[here], (
                f"{path.relative_to(ROOT)} imports {other}, which is not below it"
            )


def test_every_room_has_a_floor() -> None:
    rooms = {room(p) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"}
    assert rooms == FLOORS.keys()


def test_nothing_of_ours_is_a_pickle() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "import pickle" not in text and "torch.save" not in text and "torch.load(" not in text, path


def test_every_package_is_installed() -> None:
    """Also without -e, where only the packages that pyproject.toml finds are copied."""
    found = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    packages = {".".join(p.parent.relative_to(ROOT.parent).parts) for p in ROOT.rglob("__init__.py")}
    assert {"lowres", "lowres.rules"} < packages
    assert packages == {p for p in packages if any(fnmatchcase(p, one) for one in found["find"]["include"])}
    assert {p.parent for p in ROOT.rglob("*.py")} == {p.parent for p in ROOT.rglob("__init__.py")}
