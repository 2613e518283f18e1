"""The files of a folder or a glob, by every name that links give them; `once` chooses among the names."""

from __future__ import annotations

import contextlib
import glob
import os
from collections import Counter
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
    """name: relative to the folder, with /. reason: why it cannot be read; "" if it may. archive, at, remote:
    see `source.File`. link: the name of the linked folder that it was found in, "" for none."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    reason: str = ""
    archive: Path | None = None
    at: int = 0
    remote: RemoteFile | None = None
    link: str = ""

    @property
    def is_link(self) -> bool:
        return bool(self.link) or self.path.is_symlink()


ALREADY = "a link to a folder that is read already"
EXCLUDED = "data.exclude"
# what Windows puts into folders
_OF_WINDOWS = ("desktop.ini", "thumbs.db")
# links among folders can make endlessly many paths
_MOST_PATHS = 8
Test = Callable[[str], bool]


def in_folder(
    root: Path, leave_out: frozenset[str] = frozenset(), excluded: Test = lambda name: False
) -> list[Found]:
    """Every file below a folder, sorted by name. leave_out: names of folders that are not entered. excluded:
    says of a folder, with / at the end, that it is not entered.

    Hidden and excluded folders are one entry with a reason. Raises UserError if a folder cannot be read.
    """
    return sorted(_Walk(leave_out, excluded).below(root, "", (os.path.realpath(root),)), key=_name)


def in_glob(pattern: str, excluded: Test = lambda name: False) -> list[Found]:
    """Every file that a glob matches, and what is in the folders that it matches."""
    found, walk = list[Found](), _Walk(frozenset(), excluded)
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        if not path.is_dir():
            found.append(one(name, path))
        elif "**" not in pattern:
            found += walk.folder(path, f"{name.rstrip('/')}/", ())
    return sorted(found, key=_name)


def above(pattern: str) -> str:
    """The folders of a glob before its first special character: "/data/" of "/data/*.txt"."""
    plain = next(i for i in range(len(pattern) + 1) if glob.has_magic(pattern[: i + 1]) or i == len(pattern))
    return pattern[: pattern.rfind("/", 0, plain) + 1]


def _name(found: Found) -> str:
    return found.name


def one(name: str, path: Path) -> Found:
    try:
        status = path.stat()
    except OSError as error:
        linked = path.is_symlink() and isinstance(error, FileNotFoundError)
        return Found(name, path, 0, 0, "a link to nothing" if linked else first_line(error))
    ordinary = path.is_file()
    reason = "" if ordinary else "not an ordinary file"
    return Found(name, path, status.st_size if ordinary else 0, status.st_mtime_ns, reason)


class _Walk:
    def __init__(self, leave_out: frozenset[str], excluded: Test) -> None:
        self._leave_out, self._excluded = leave_out, excluded
        self._paths = Counter[str]()  # to a folder, by its real one

    def below(self, folder: Path, prefix: str, inside: tuple[str, ...], link: str = "") -> Iterator[Found]:
        """inside: the real folders that the path goes through."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be read ({first_line(error)}); make it readable, or leave it out with "
                f"data.exclude"
            ) from None
        for name in names:
            path, full = folder / name, f"{prefix}{name}"
            if not path.is_dir():
                hidden = name.startswith(".") or name.lower() in _OF_WINDOWS
                yield Found(full, path, 0, 0, "hidden") if hidden else replace(one(full, path), link=link)
            elif name not in self._leave_out:
                yield from self.folder(path, f"{full}/", inside, link)

    def folder(self, path: Path, name: str, inside: tuple[str, ...], link: str = "") -> Iterator[Found]:
        real = os.path.realpath(path)
        reason = ""
        if inside and path.name.startswith("."):
            reason = "hidden"
        elif self._excluded(name):
            reason = EXCLUDED
        elif real in inside or self._paths[real] == _MOST_PATHS:
            reason = ALREADY
        elif _is_ours(path):
            reason = "made by lowres"
        if reason:
            yield Found(name, path, 0, 0, reason)
        else:
            self._paths[real] += 1
            link = link or (name if path.is_symlink() else "")
            yield from self.below(path, name, (*inside, real), link)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is prepared data or a run: the output may lie inside the source."""
    if os.path.exists(folder / "config.toml") and os.path.exists(folder / "metrics.jsonl"):
        return True
    for name in ("data.json", "progress.json"):
        with contextlib.suppress(OSError, Damaged):
            if parse(read_whole(folder / name)).keys() >= {"format", "arguments"}:
                return True
    return False


def once(found: list[Found], known: Test, says_part: Test) -> list[Found]:
    """The same, but a file with several names is read once: by one whose type is known (the hub's cache has
    links with names to files without), by one that says its part, and by its own rather than a link's."""
    names: dict[str, list[Found]] = {}
    for f in found:
        if not f.reason:
            names.setdefault(os.path.realpath(f.path), []).append(f)
    best = {
        real: min(
            each,
            key=lambda f: (
                not known(f.name),
                not says_part(f.name),
                f.is_link,
                f.name,
            ),
        ).name
        for real, each in names.items()
    }
    other = {f.name: best[real] for real, each in names.items() for f in each if f.name != best[real]}
    # linked folders of which nothing is read by that name are an entry each
    again = {f.link for f in found if f.link} - {f.link for f in found if f.name not in other}
    made = [
        replace(f, reason=f"the same file as {other[f.name]}, which is read") if f.name in other else f
        for f in found
        if f.link not in again
    ]
    return made + [Found(link, Path(link), 0, 0, ALREADY) for link in sorted(again)]
