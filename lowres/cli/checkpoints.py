"""`lowres checkpoint list` and `verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowres import checkpoint, memory
from lowres.errors import CheckFailed, UserError
from lowres.runs import CHECKPOINTS


def _folders(path: Path) -> list[Path]:
    """The checkpoints that a path means: itself, or those of a run."""
    if (path / checkpoint.MANIFEST).exists() or path.name.startswith(checkpoint.PREFIX):
        return [path]
    found = checkpoint.find(path / CHECKPOINTS)
    if not found:
        raise UserError(f"{path} is neither a checkpoint nor a run that has one")
    return found


def run_list(parsed: argparse.Namespace) -> None:
    for folder in _folders(parsed.folder):
        size = sum(f.lstat().st_size for f in folder.iterdir()) / memory.GIB
        print(f"{folder}  {size:.3f} GiB")


def run_verify(parsed: argparse.Namespace) -> None:
    damaged = 0
    for folder in _folders(parsed.folder):
        problems = checkpoint.verify(folder)
        damaged += bool(problems)
        print(f"{folder}: {'; '.join(problems) or 'ok'}")
    if damaged:
        raise CheckFailed(
            f"damaged checkpoints in {parsed.folder}: {damaged}; --resume uses the newest valid one"
        )
