"""The files of a folder or a glob. A folder is entered once, by whatever links lead to it."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lowres.disk import read_whole
from lowres.errors import UserError, first_line
from lowres.sealed import Damaged, parse
from lowres.text.remote import RemoteFile

UNKNOWN = -1  # size of a remote file


@dataclass(frozen=True)
class Found:
    """name: relative to the folder, with /. reason: why it cannot be read; "" if it may. archive, at,
    remote: see `source.File`."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    reason: str = ""
    archive: Path | None = None
    at: int = 0
    remote: RemoteFile | None = None


def in_folder(root: Path, leave_out: frozenset[str] = frozenset()) -> list[Found]:
    """Every file below a folder, sorted by name. leave_out: names of folders that are not entered.

    Hidden files and folders have a reason, the folders as one entry. Raises UserError if a folder cannot be
    read.
    """
    return sorted(_below(root, "", leave_out, {os.path.realpath(root)}), key=lambda f: f.name)


def in_glob(pattern: str) -> list[Found]:
    """Every file that a glob matches, and what is in the folders that it matches."""
    found = list[Found]()
    folders = {os.path.realpath(p) for p in glob.glob(pattern, recursive="**" in pattern) if os.path.isdir(p)}
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        if not path.is_dir():
            found.append(one(name, path))
        elif "**" not in pattern:
            found += _below(path, f"{name}/", frozenset(), set(folders))
    return sorted(found, key=lambda f: f.name)


def one(name: str, path: Path) -> Found:
    try:
        status = path.stat()
    except OSError as error:
        linked = path.is_symlink() and isinstance(error, FileNotFoundError)
        return Found(name, path, 0, 0, "a link to nothing" if linked else first_line(error))
    ordinary = path.is_file()
    reason = "" if ordinary else "not an ordinary file"
    return Found(name, path, status.st_size if ordinary else 0, status.st_mtime_ns, reason)


def _below(folder: Path, prefix: str, leave_out: frozenset[str], entered: set[str]) -> Iterator[Found]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({first_line(error)}); make it readable, or leave it out with "
            f"data.exclude"
        ) from None
    for name in names:
        path = folder / name
        if path.is_dir():
            if name in leave_out:
                continue
            if name.startswith("."):
                yield Found(f"{prefix}{name}/", path, 0, 0, "hidden")
                continue
            real = os.path.realpath(path)
            if real in entered:
                yield Found(f"{prefix}{name}/", path, 0, 0, "a link to a folder that is read already")
                continue
            entered.add(real)
            if _is_ours(path):
                yield Found(f"{prefix}{name}/", path, 0, 0, "made by lowres")
                continue
            yield from _below(path, f"{prefix}{name}/", leave_out, entered)
        elif name.startswith("."):
            yield Found(f"{prefix}{name}", path, 0, 0, "hidden")
        else:
            yield one(f"{prefix}{name}", path)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is prepared data or a run: the output may lie inside the source."""
    if (folder / "config.toml").exists() and (folder / "metrics.jsonl").exists():
        return True
    for name in ("data.json", "progress.json"):
        with contextlib.suppress(OSError, Damaged):
            if parse(read_whole(folder / name)).keys() >= {"format", "arguments"}:
                return True
    return False


def once(found: list[Found], known: Callable[[str], bool]) -> list[Found]:
    """The same, but a file with several names is read once: by one whose type is known (the hub's cache has
    links with names to files without), and by its own rather than a link's."""
    names: dict[str, list[Found]] = {}
    for f in found:
        if not f.reason:
            names.setdefault(os.path.realpath(f.path), []).append(f)
    best = {
        real: min(each, key=lambda f: (not known(f.name), f.path.is_symlink(), f.name)).name
        for real, each in names.items()
    }
    other = {f.name: best[real] for real, each in names.items() for f in each if f.name != best[real]}
    return [
        replace(f, reason=f"the same file as {other[f.name]}, which is read") if f.name in other else f
        for f in found
    ]
