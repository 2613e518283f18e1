"""What each file of a source is. This is the only place that decides it; all that is left out has a reason.

1. data.include and data.exclude, and the card of a data set if it says which files it has.
2. The kind: by suffix, and by content where the suffix does not say it.
3. Where there are tables, rows or token files, markdown, source code and other text beside them describe or
   make them, and are left out. Cards, licences and checksums are no text where other files are.
4. The part: training, validation or test (`splits`).

A tar or zip file is a folder like any other (`archives`).

What is left out and looks like data is said; if it is more than data.max_left_out of the bytes, it is an
error.
"""

from __future__ import annotations

import glob
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from lowres.errors import UserError
from lowres.text import archives, card, splits, walk
from lowres.text.descriptions import describes, without_descriptions
from lowres.text.globs import matches
from lowres.text.kinds import KINDS, Rank, kind_of_name, names, plain
from lowres.text.left_out import LeftOut, some
from lowres.text.opening import faults_of
from lowres.text.parts import of_cards, of_split, with_parts
from lowres.text.recognition import NO_TEXT, UNKNOWN, is_asked, recognised
from lowres.text.source import (
    TEXT,
    TRAIN,
    VALIDATION,
    BadFileError,
    File,
    Source,
    as_source,
    hub_name,
    is_stream,
)
from lowres.text.walk import Found

# tests are a third of the library, and mostly data
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Listing:
    """files: those that are read, or are a test split; sorted by name, inside an archive as they come."""

    source: Source
    files: tuple[File, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()

    def part(self, part: str) -> list[File]:
        return [file for file in self.files if file.part == part]

    @property
    def tokens(self) -> bool:
        """Whether the source holds ids of a tokenizer instead of text."""
        return any(KINDS[file.kind].rank == Rank.TOKENS for file in self.files)

    def check(self) -> None:
        """Raises UserError if too much that looks like data is left out."""
        lost = [each for each in self.left_out if each.data]
        size = sum(each.size for each in lost)
        share = size / max(1, size + sum(file.size for file in self.files))
        if share > self.source.max_left_out:
            raise UserError(
                f"{self.source.name}: {share:.2f} of its bytes would be left out: {some(lost)}; set "
                "data.include or data.exclude to say what to read, or data.max_left_out to allow it"
            )

    def warnings(self) -> list[str]:
        """A line for each reason why files that look like data are not read, and `notes`."""
        by_reason: dict[str, list[LeftOut]] = {}
        for each in self.left_out:
            if each.data:
                by_reason.setdefault(each.reason, []).append(each)
        return [f"left out: {some(group)}" for group in by_reason.values()] + list(self.notes)


def list_files(source: Source | str) -> Listing:
    """The files of a local source. Raises UserError if none can be read."""
    source = as_source(source)
    assert not source.on_hub
    if source.name == "stdlib":
        if source.form != TEXT:
            raise UserError(
                f"stdlib: source code, which holds no {source.form}; set data.source to files with "
                f"{source.form}"
            )
        root = Path(sysconfig.get_path("stdlib"))
        found = [f for f in walk.in_folder(root, _NOT_LIBRARY) if f.path.suffix == ".py" and not f.reason]
        code = (File(f.name, f.path, f.size, plain.SOURCE_CODE) for f in found)
        return Listing(source, tuple(code), ())
    path = source.path

    def excluded(folder: str) -> bool:
        return any(matches(folder, pattern) for pattern in source.exclude)

    if path.is_dir():
        return _of_many(source, walk.in_folder(path, excluded=excluded), "in this folder")
    if path.exists():
        return _of_one(source, path)
    if is_stream(source):
        raise UserError(
            f"{source.name}: no such file or folder, and no name on the hub; "
            "to train on local text instead: --set data.source=PATH, or make ... DATA=PATH"
        )
    if glob.has_magic(source.name):
        found = walk.in_glob(str(path), excluded)
        return _of_many(source, found, "among the files that it matches", walk.above(str(path)))
    raise UserError(
        f"{source.name}: no such file or folder; data.source is stdlib, a path, a glob or hf:<dataset>"
    )


def part_to_evaluate(source: Source) -> str:
    """The part of a source that is read where a loss is measured: its own validation split, or all."""
    own = not is_stream(source) and list_files(source).part(VALIDATION)
    return VALIDATION if own else TRAIN


def _of_one(source: Source, path: Path) -> Listing:
    found = walk.one(path.name, path)
    if found.reason:
        raise UserError(f"{source.name}: {found.reason}; give a file, a folder or a glob")
    if archives.is_archive(found.name):
        return _of_many(source, [found], "in this archive")
    made = recognised(found, source)
    if isinstance(made, LeftOut):
        known = f"; known are {names()}" if made.reason in (UNKNOWN, NO_TEXT) else ""
        raise UserError(f"{source.name}: {made.reason}{known}")
    files = of_split(source, [made], {}, []) if is_stream(source) else [made]
    return Listing(source, tuple(files), ())


def _of_many(source: Source, found: list[Found], where: str, above: str = "") -> Listing:
    """above: the folders at the beginning of every name that are none of the source's."""
    left_out, notes = list[LeftOut](), list[str]()
    wanted, cards_there = _wanted(found, source, left_out)
    wanted = _once(wanted, left_out)
    cards = of_cards(source, cards_there, [f.name for f in wanted], notes)
    known = cards.known
    files = list[File]()
    for f in wanted:
        if f.name in cards.below and not source.include and f.name not in known:
            aside = describes(f.name)
            reason = "describes the data" if aside else "not in the card's configs"
            chosen = f.name in cards.elsewhere and is_stream(source) and hub_name(source.name).config
            reason = cards.elsewhere.get(f.name, reason)
            left_out.append(LeftOut(f.name, f.size, reason, data=not (aside or chosen)))
            continue
        if archives.is_archive(f.name):
            of_it = _in_archive(f, source)
            known |= {each.name: known[f.name] for each in of_it if f.name in known}
        else:
            of_it = (recognised(f, source),)
        for made in of_it:
            files.append(made) if isinstance(made, File) else left_out.append(made)
    files = without_descriptions(files, left_out, source)
    if not files:
        reasons = [each for each in left_out if each.reason not in ("hidden", walk.EXCLUDED)]
        raise UserError(
            f"{source.name}: no file of a known type ({where}{'' if found else ': none'}); "
            f"known are {names()}" + (f"; left out: {some(reasons)}" if reasons else "")
        )
    notes += _twice(files)
    files = with_parts(files, known, above)
    if is_stream(source):
        files = of_split(source, files, known, left_out)
    return Listing(source, tuple(files), tuple(left_out), tuple(notes))


def _wanted(found: list[Found], source: Source, left_out: list[LeftOut]) -> tuple[list[Found], list[Found]]:
    """(what data.include and data.exclude leave and can be read, the cards among all that is not excluded)"""
    wanted, cards = list[Found](), list[Found]()
    for f in found:
        if any(matches(f.name, pattern) for pattern in source.exclude):
            left_out.append(LeftOut(f.name, f.size, walk.EXCLUDED))
            continue
        if not f.reason and PurePath(f.name.lower()).name == card.CARD:
            cards.append(f)
        if source.include and not archives.is_archive(f.name) and not is_asked(f, source):
            left_out.append(LeftOut(f.name, f.size, "not in data.include"))
        elif f.reason:
            # a link to nothing was something once
            left_out.append(LeftOut(f.name, f.size, f.reason, data=f.reason.startswith("a link to nothing")))
        else:
            wanted.append(f)
    return wanted, cards


def _once(found: list[Found], left_out: list[LeftOut]) -> list[Found]:
    """Each file by one of its names. Where only links tell the parts, they do: a folder of links for each."""
    own = [f.name for f in found if not f.is_link]
    split = not any(map(splits.says_part, own)) and any(
        splits.has_word(f.name, TRAIN) for f in found if f.is_link
    )
    found = walk.once(
        found,
        known=lambda name: kind_of_name(name)[0] is not None or archives.is_archive(name),
        says_part=lambda name: split and splits.says_part(name),
    )
    left_out += [LeftOut(f.name, f.size, f.reason) for f in found if f.reason]
    return [f for f in found if not f.reason]


@lru_cache(maxsize=1 << 10)
def _in_archive(archive: Found, source: Source) -> tuple[File | LeftOut, ...]:
    """What is in an archive, each member looked at where the reading stands. The globs are for members, or
    for the archive as a whole."""
    include = source.include
    if is_asked(archive, source):
        include = ()
    made = dict[str, File | LeftOut]()
    replaced = list[File | LeftOut]()
    try:
        with faults_of(archive.path):
            for f in archives.members(archive):
                if (earlier := made.pop(f.name, None)) is not None:
                    replaced.append(
                        LeftOut(earlier.name, earlier.size, "replaced by a later member of the same name")
                    )
                if any(matches(f.name, pattern) for pattern in source.exclude):
                    made[f.name] = LeftOut(f.name, f.size, walk.EXCLUDED)
                elif include and not is_asked(f, source):
                    made[f.name] = LeftOut(f.name, f.size, "not in data.include")
                elif f.reason:
                    looks_so = f.reason != "hidden" and "link" not in f.reason
                    made[f.name] = LeftOut(f.name, f.size, f.reason, data=looks_so)
                else:
                    made[f.name] = recognised(f, source)
    except BadFileError as error:
        if source.damaged == "refuse":
            raise
        rest = max(0, archive.size - sum(each.size for each in made.values()))
        reason = f"the rest of the archive: {str(error).removeprefix(f'{archive.path}: ')}"
        replaced.append(LeftOut(archive.name, rest, reason, data=True))
    return (*made.values(), *replaced)


def _twice(files: list[File]) -> list[str]:
    """Notes on files that are there compressed and decompressed, or in an archive and unpacked."""
    names = {f.name.lower() for f in files}
    compressed = [
        f.name for f in files if f.compression and f.name.lower().removesuffix(f.compression) in names
    ]
    packed = [f.name for f in files if f.archive and not names.isdisjoint(_unpacked(f))]
    return [
        f"{both[0]}{f' and {len(both) - 1:,} more' if len(both) > 1 else ''}: also there {how}, and both are "
        "read; is that the same text?"
        for both, how in ((compressed, "without the compression"), (packed, "outside its archive"))
        if both
    ]


def _unpacked(file: File) -> set[str]:
    """The names that a file in an archive has if that is unpacked where it is, or in a folder of its name."""
    assert file.archive
    end = f"{file.archive.name}/".lower()
    folder, _, inner = file.name.lower().partition(end)
    suffix = next(suffix for suffix in archives.SUFFIXES if end[:-1].endswith(suffix))
    return {folder + inner, f"{folder}{end[:-1].removesuffix(suffix)}/{inner}"}
