"""The checkpoints of a run: which one is used, and which ones stay.

A checkpoint counts only if this process has written it and read it back, or has verified it. What is not
known to be good takes no place of one that is: damaged ones are set aside under another name. Nothing is
deleted through a symbolic link, because it may belong to another run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lowres.checkpoint.folder import (
    DAMAGED,
    DELETED,
    PREFIX,
    UNFINISHED,
    State,
    clear,
    load,
    step_folder,
    step_of,
)
from lowres.errors import DoesNotFit, UserError
from lowres.records import CHECKPOINTS
from lowres.sealed import Damaged


def find(checkpoints: Path) -> list[Path]:
    """All checkpoint folders, oldest first, valid or not."""
    with suppress(OSError):
        found = [(step_of(path), path) for path in checkpoints.iterdir() if path.is_dir()]
        return [path for step, path in sorted((s, p) for s, p in found if s is not None)]
    return []


def require_outside(path: Path, option: str) -> None:
    """Raise UserError if a path is inside a run's folder of checkpoints, where old ones are deleted. option:
    which gave it."""
    for folder in path.absolute().parents:
        if folder.name == CHECKPOINTS and find(folder):
            raise UserError(
                f"{option}: {path} is inside {folder}, where a run keeps its checkpoints; give another place"
            )


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest valid checkpoint, and each newer one that is damaged, with what is wrong with it."""
    found, damaged = newest_state(checkpoints)
    return (found[0] if found else None), damaged


def newest_state(
    checkpoints: Path, ours: Collection[str] = ()
) -> tuple[tuple[Path, State] | None, list[tuple[Path, str]]]:
    """`newest_valid` with its state. ours: identities of the run, if they are known; a checkpoint of another
    run is not used either."""
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(find(checkpoints)):
        try:
            state = load(folder)
            if not ours or state.run is None or state.run in ours:
                return (folder, state), damaged
            damaged.append((folder, "it is of another run"))
        except (OSError, Damaged) as error:
            damaged.append((folder, str(error)))
    return None, damaged


@dataclass
class Kept:
    """The checkpoints of a run in progress, and the rule which of them stay.

    newest: how many of the newest; 0 = all. every: those at multiples of this step stay for ever; 0 = none.
    best: whether the one with the lowest validation loss stays. good: steps of checkpoints that this process
    has written and read back, or has verified.
    """

    checkpoints: Path
    newest: int
    every: int = 0
    best: bool = False
    good: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    best_step: int | None = None

    def set_aside(self, folder: Path) -> Path:
        """Give a folder a name that is not a checkpoint's; returns it. A link itself is renamed."""
        number, target = 1, folder.with_name(folder.name + DAMAGED)
        while os.path.lexists(target):
            number += 1
            target = folder.with_name(f"{folder.name}{DAMAGED}-{number}")
        folder.rename(target)
        return target

    def make_way(self, step: int) -> Path:
        """The folder for a new checkpoint of a step; what is there is set aside, and remains of interrupted
        saves and deletions are removed. Raises OSError."""
        target = step_folder(self.checkpoints, step)
        if os.path.lexists(target):
            if step in self.written:
                self._delete(target)
            else:
                self.set_aside(target)
        for rest in self._rests():
            clear(rest)
        return target

    def add(self, step: int) -> None:
        """Count the checkpoint of a step, which was written and read back, and delete what the rule does not
        keep."""
        self.good.add(step)
        self.written.add(step)
        for folder in self._superfluous():
            self._delete(folder)

    def make_room(self) -> bool:
        """Delete what would be deleted after the next save, if another good checkpoint stays; whether there
        was something."""
        spare = self._superfluous(coming=1)
        for folder in spare:
            self._delete(folder)
        return bool(spare)

    def _superfluous(self, coming: int = 0) -> list[Path]:
        """Folders that the rule does not keep. coming: checkpoints that will be written next."""
        if not self.newest:
            return []
        kept = sorted(self.good)[-max(1, self.newest - coming) :]
        if len(kept) + coming < self.newest or not kept:  # too few are known to be good
            return []
        stay = {*kept, self.best_step if self.best else None}
        return [
            folder
            for folder in find(self.checkpoints)
            if (step := step_of(folder)) is not None
            and step < kept[-1]
            and step not in stay
            and not (self.every and step % self.every == 0)
            and self._is_ours(folder, step)
        ]

    def _is_ours(self, folder: Path, step: int) -> bool:
        """Whether a folder may be deleted: it is in this run's folder itself, or was written by this
        process."""
        return not folder.is_symlink() and (not self.checkpoints.is_symlink() or step in self.written)

    def _delete(self, folder: Path) -> None:
        # renamed first: a half-deleted folder is not a checkpoint
        gone = folder.with_name(folder.name + DELETED)
        with suppress(OSError):
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        self.good.discard(step_of(folder) or -1)

    def _rests(self) -> list[Path]:
        if self.checkpoints.is_symlink():
            return []
        return [
            path
            for suffix in (UNFINISHED, DELETED)
            for path in self.checkpoints.glob(f"{PREFIX}*{suffix}")
            if not path.is_symlink()
        ]


def require_disk(checkpoints: Path, bytes_per_checkpoint: int, keep: int, more: int = 0) -> None:
    """Raise DoesNotFit if the disk of a folder, which need not exist yet, cannot hold the checkpoints.

    A run that keeps K checkpoints needs room for K + 1, because the new one is complete before the oldest is
    deleted. more: checkpoints that stay besides. Those that exist already are subtracted. With keep = 0
    (never delete) only the next one is checked.
    """
    # the next save first deletes the remains of an interrupted one
    free = free_bytes(checkpoints) + _bytes_in(Kept(checkpoints, keep)._rests())
    all_kept = (keep + 1 + more) * bytes_per_checkpoint - _bytes_in(find(checkpoints)) if keep else 0
    needed = max(bytes_per_checkpoint, all_kept)
    if free < needed:
        # not for keep = 1: the next lower value, 0, keeps all
        helps = keep > 1 and all_kept == needed
        fewer = f" or lower train.keep_checkpoints = {keep}" if helps else ""
        raise DoesNotFit(
            f"checkpoints {checkpoints}: the disk has {_size(free)} free, but "
            f"{_size(needed)} are needed; make room, choose another --run DIR{fewer}"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 28 else f"{nbytes / 2**20:.2f} MiB"


def _bytes_in(folders: Iterable[Path]) -> int:
    total = 0
    for folder in folders:
        with suppress(OSError):
            total += sum(path.lstat().st_size for path in folder.iterdir())
    return total
