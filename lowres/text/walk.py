"""The files of a folder or a glob. Links are followed once, so no file is read twice."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowres.disk import read_whole
from lowres.errors import UserError, first_line
from lowres.sealed import Damaged, parse
from lowres.text.remote import RemoteFile

UNKNOWN = -1  # size of a remote file


@dataclass(frozen=True)
class Found:
    """name: relative to the folder, with /. reason: why it cannot be read; "" if it may. remote: see
    `source.File`."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    reason: str = ""
    remote: RemoteFile | None = None


def in_folder(root: Path, leave_out: frozenset[str] = frozenset()) -> list[Found]:
    """Every file below a folder, sorted by name. leave_out: names of folders that are not entered.

    Hidden files and folders have a reason, the folders as one entry. Raises UserError if a folder cannot be
    read.
    """
    return _once(sorted(_below(root, "", leave_out, {os.path.realpath(root)}), key=lambda f: f.name))


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
    return _once(sorted(found, key=lambda f: f.name))


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


def _once(found: list[Found]) -> list[Found]:
    """The same, but a file that has several names through links is read once, by its own name if it has one
    here."""
    own = {os.path.realpath(f.path): f.name for f in found if not f.reason and not f.path.is_symlink()}
    seen, result = dict(own), list[Found]()
    for f in found:
        if f.reason or not f.path.is_symlink():
            result.append(f)
            continue
        first = seen.setdefault(os.path.realpath(f.path), f.name)
        again = "" if first == f.name else f"a link to {first}, which is read"
        result.append(Found(f.name, f.path, f.size, f.mtime_ns, again))
    return result
