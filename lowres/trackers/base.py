"""What a tracker is. A tracker is one file in this package that ends with `register(Kind(...))`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lowres.errors import UserError


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with. folder, name, identity: of the run. step: what is written will be of
    later steps; -1 if the run begins. again: whether this tracker has had the run before. config: sections of
    the config."""

    folder: Path
    name: str
    identity: str
    project: str
    step: int
    again: bool
    config: dict[str, Any]


class Tracker(Protocol):
    """An open tracker. Both may raise anything."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add finite numbers by name; steps never decrease."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """A tracker that the config can name. package: what to import, and install. about: a phrase for the docs.
    left: what it leaves in the folder of the run. replaces: whether steps that are done again take the place
    of those that it has; otherwise they are not written again."""

    name: str
    package: str
    about: str
    open: Callable[[Opening], Tracker]
    left: str | None = None
    replaces: bool = False


TRACKERS: dict[str, Kind] = {}


def register(found: Kind) -> None:
    """Make a tracker known under its name."""
    assert found.name not in TRACKERS, f"two trackers are called {found.name}"
    TRACKERS[found.name] = found


def require(names: Collection[str]) -> None:
    """Raise UserError if the package of a tracker is missing."""
    for name in names:
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise UserError(f"log.trackers: {name} is not installed; pip install {package}, or leave it out")
