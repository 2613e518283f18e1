"""A source in words: what is read, and what is left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowres.text.kinds import KINDS, Rank
from lowres.text.listing import Listing
from lowres.text.source import TEST, TRAIN, File
from lowres.wording import counted


@dataclass(frozen=True)
class Group:
    """Files of one kind, part and column, or columns of a chat."""

    kind: str
    part: str
    column: str | None
    separator: str | None
    files: tuple[File, ...]
    fields: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def how(self) -> str:
        """How the text is found in the files."""
        if KINDS[self.kind].rank == Rank.TOKENS:
            return "token ids" + (f" in column {self.column}" if self.column else "")
        if self.fields:
            return f"{self.files[0].form} in {', '.join(self.fields)}"
        if self.column is not None:
            return f"column {self.column}"
        return f"between {self.separator!r}" if self.separator else "a document per file"


def groups(listed: Listing) -> list[Group]:
    """The files that are read, or are a test split; those for training first."""
    found: dict[tuple[str, str, str | None, str | None, tuple[str, ...]], list[File]] = {}
    for file in listed.files:
        asked = listed.source.separator
        separator = file.separator if asked is None else asked or None
        column = file.column
        cut = None if column or file.fields else separator
        found.setdefault((file.kind, file.part, column, cut, file.fields), []).append(file)
    made = [Group(*key[:4], tuple(files), key[4]) for key, files in found.items()]
    return sorted(made, key=lambda group: (group.part != TRAIN, group.part == TEST, -group.size))


def summary(listed: Listing) -> str:
    """The source in one line, before anything is read."""
    parts = list[str]()
    for group in groups(listed):
        part = {TRAIN: "", TEST: "; test, never read: "}.get(group.part, f"; {group.part}: ")
        how = "" if group.part == TEST else f", {group.how}"
        parts.append(f"{part or ('; ' if parts else '')}{_files(len(group.files))} of {group.kind}{how}")
    out = [each for each in listed.left_out if each.reason != "hidden"]
    left = f"; left out: {_files(len(out))}, {size(sum(each.size for each in out))}" if out else ""
    total = size(sum(file.size for file in listed.files))
    return f"{listed.source.name}: {''.join(parts)}; {total}{left}"


def left_out(listed: Listing) -> list[str]:
    """A line for each reason, with the names of some files."""
    by_reason: dict[str, list[str]] = {}
    bytes_of: dict[str, int] = {}
    for each in listed.left_out:
        by_reason.setdefault(each.reason, []).append(each.name)
        bytes_of[each.reason] = bytes_of.get(each.reason, 0) + each.size
    return [
        f"{some(names)}: {reason}" + (f" ({size(bytes_of[reason])})" if bytes_of[reason] else "")
        for reason, names in by_reason.items()
    ]


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def size(count: int) -> str:
    """Bytes in the unit that people use for files."""
    for unit, divisor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= divisor:
            return f"{count / divisor:.1f} {unit}"
    return f"{count} bytes"


def _files(count: int) -> str:
    return counted(count, "file")
