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

import fnmatch
import glob
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath

from lowres.errors import UserError
from lowres.text import archives, card, columns, splits, walk
from lowres.text.globs import matches
from lowres.text.kinds import KINDS, Kind, NotData, Rank, kind_of_name, names, plain
from lowres.text.opening import faults_of, opened
from lowres.text.source import (
    TEST,
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
_HEAD = 1 << 20
_DESCRIBES = (
    "readme*", "license*", "licence*", "copying*", "notice*", "citation*", "changelog*", "authors*",
    "contributing*", "code_of_conduct*", "dataset_info*.json", "dataset_dict.json", "state.json",
    "requirements*.txt", "*sha256sum*", "*md5sum*", "*checksum*", "*.md5", "*.sha1", "*.sha256", "*.sha512",
    "*.asc", "*.sig", "manifest.txt", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
)  # fmt: skip
_DESCRIBES_RE = re.compile("|".join(map(fnmatch.translate, _DESCRIBES)))
# neither text nor tokens, however large: pictures, sound, films, weights, programs, fonts
_OTHER_MEDIA = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".webp",
        ".bmp",
        ".ico",
        ".svg",
        ".tif",
        ".tiff",
        ".mp3",
        ".wav",
        ".flac",
        ".ogg",
        ".m4a",
        ".mp4",
        ".mkv",
        ".avi",
        ".mov",
        ".webm",
        ".safetensors",
        ".pt",
        ".pth",
        ".ckpt",
        ".onnx",
        ".gguf",
        ".h5",
        ".so",
        ".dll",
        ".dylib",
        ".o",
        ".a",
        ".exe",
        ".pyc",
        ".class",
        ".jar",
        ".ttf",
        ".otf",
        ".woff",
        ".woff2",
        ".model",
        ".lock",
        ".log",
        ".index",
        ".crc",
    ]
)
# what editors and downloads leave
_UNFINISHED = frozenset(
    [
        ".bak",
        ".orig",
        ".tmp",
        ".temp",
        ".part",
        ".partial",
        ".crdownload",
        ".download",
        ".incomplete",
        ".aria2",
        ".swp",
        ".old",
    ]
)
_LARGEST_POINTER = 1024
_POINTS = b"version https://git-lfs.github.com/spec/v1\n"
_POINTER = re.compile(re.escape(_POINTS) + rb"(?:.*\n)*size (\d+)\n")
_EXAMPLES = 3
_UNKNOWN, _NO_TEXT = "unknown type", "no text"


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read. data: whether it looks as if it should be."""

    name: str
    size: int
    reason: str
    data: bool = False


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
                f"{self.source.name}: {share:.2f} of its bytes would be left out: {_some(lost)}; set "
                "data.include or data.exclude to say what to read, or data.max_left_out to allow it"
            )

    def warnings(self) -> list[str]:
        """A line for each reason why files that look like data are not read, and `notes`."""
        by_reason: dict[str, list[LeftOut]] = {}
        for each in self.left_out:
            if each.data:
                by_reason.setdefault(each.reason, []).append(each)
        return [f"left out: {_some(group)}" for group in by_reason.values()] + list(self.notes)


def list_files(source: Source | str) -> Listing:
    """The files of a local source. Raises UserError if none can be read."""
    source = as_source(source)
    assert not source.on_hub
    if source.name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [f for f in walk.in_folder(root, _NOT_LIBRARY) if f.path.suffix == ".py" and not f.reason]
        code = (File(f.name, f.path, f.size, "source code") for f in found)
        return Listing(source, tuple(code), ())
    path = source.path
    if path.is_dir():
        return _of_many(source, walk.in_folder(path), "in this folder", path)
    if path.exists():
        return _of_one(source, path)
    if is_stream(source):
        raise UserError(
            f"{source.name}: no such file or folder, and no name on the hub; "
            "to train on local text instead: --set data.source=PATH, or make ... DATA=PATH"
        )
    if glob.has_magic(source.name):
        return _of_many(source, walk.in_glob(str(path)), "among the files that it matches", None)
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
        return _of_many(source, [found], "in this archive", None)
    made = recognised(found, source)
    if isinstance(made, LeftOut):
        known = f"; known are {names()}" if made.reason in (_UNKNOWN, _NO_TEXT) else ""
        raise UserError(f"{source.name}: {made.reason}{known}")
    files = _of_split(source, [made], {}, []) if is_stream(source) else [made]
    return Listing(source, tuple(files), ())


def _of_many(source: Source, found: list[Found], where: str, folder: Path | None) -> Listing:
    left_out, notes = list[LeftOut](), list[str]()
    found = walk.once(found, lambda name: kind_of_name(name)[0] is not None or archives.is_archive(name))
    wanted = list[Found]()
    for f in found:
        if any(matches(f.name, pattern) for pattern in source.exclude):
            left_out.append(LeftOut(f.name, f.size, "data.exclude"))
        elif (
            source.include
            and not archives.is_archive(f.name)
            and not any(matches(f.name, pattern) for pattern in source.include)
        ):
            left_out.append(LeftOut(f.name, f.size, "not in data.include"))
        elif f.reason:
            # a link to nothing was something once
            left_out.append(LeftOut(f.name, f.size, f.reason, data=f.reason.startswith("a link to nothing")))
        else:
            wanted.append(f)
    known, elsewhere = _of_card(source, wanted, notes) if folder else ({}, {})
    files = list[File]()
    for f in wanted:
        if known and not source.include and f.name not in known:
            describes = _describes(f.name)
            reason = "describes the data" if describes else "not in the card's configs"
            chosen = f.name in elsewhere and is_stream(source) and hub_name(source.name).config is not None
            left_out.append(
                LeftOut(f.name, f.size, elsewhere.get(f.name, reason), data=not (describes or chosen))
            )
            continue
        if archives.is_archive(f.name):
            of_it = _in_archive(f, source)
            known |= {each.name: known[f.name] for each in of_it if f.name in known}
        else:
            of_it = (recognised(f, source),)
        for made in of_it:
            files.append(made) if isinstance(made, File) else left_out.append(made)
    files = _without_descriptions(files, left_out, source)
    if not files:
        reasons = [each for each in left_out if each.reason not in ("hidden", "data.exclude")]
        raise UserError(
            f"{source.name}: no file of a known type ({where}); known are {names()}"
            + (f"; left out: {_some(reasons)}" if reasons else "")
        )
    notes += _twice(files)
    files = _with_parts(files, known)
    if is_stream(source):
        files = _of_split(source, files, known, left_out)
    return Listing(source, tuple(files), tuple(left_out), tuple(notes))


# ---------------------------------------------------------------------------- the kind


@lru_cache(maxsize=1 << 10)
def _in_archive(archive: Found, source: Source) -> tuple[File | LeftOut, ...]:
    """What is in an archive, each member looked at where the reading stands. The globs are for members, or
    for the archive as a whole."""
    include = source.include
    if any(matches(archive.name, pattern) for pattern in include):
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
                    made[f.name] = LeftOut(f.name, f.size, "data.exclude")
                elif include and not any(matches(f.name, pattern) for pattern in include):
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


def recognised(found: Found, source: Source) -> File | LeftOut:
    """What a file is. Raises BadFileError for a damaged one, unless these are left out."""
    try:
        return _sniffed(found, source.text_key, source.token_dtype)
    except BadFileError as error:
        if source.damaged == "refuse":
            raise
        return LeftOut(found.name, found.size, str(error).removeprefix(f"{found.path}: "), data=True)


@lru_cache(maxsize=1 << 16)
def _sniffed(found: Found, text_key: str | None, token_dtype: str | None) -> File | LeftOut:
    """What a file is. The same file is looked at once."""
    kind, compression = kind_of_name(found.name)
    file = File(
        *(found.name, found.path, found.size, kind.name if kind else "other text", compression),
        column=text_key if kind and kind.columns else None,
        archive=found.archive,
        at=found.at,
        remote=found.remote,
    )
    if nothing := _no_content(file, kind):
        return nothing
    if not kind:
        text = plain.is_text(_head(file))
        return file if text else LeftOut(found.name, found.size, _UNKNOWN, data=True)
    if kind.rank == Rank.TOKENS and found.archive:
        return LeftOut(found.name, found.size, "token ids in an archive; unpack it", data=True)
    reason = kind.refused(file) if kind.refused else None
    if kind.look:
        seen = kind.look(replace(file, token_dtype=token_dtype))
        file, reason = (seen, None) if isinstance(seen, File) else (file, seen)
    elif not reason and kind.columns:
        # a table without a row has no columns
        there = kind.columns(file) or {text_key or columns.COLUMNS[0]: columns.STRING}
        if kind.ids and (ids := columns.ids(there, text_key)):
            file = replace(file, kind=kind.ids, column=ids)
            packed = "a compressed file; decompress it" if compression else "an archive; unpack it"
            reason = f"token ids in {packed}" if compression or found.archive else None
        else:
            file = replace(file, column=columns.choose(there, text_key))
            reason = None if file.column else columns.no_column(there, text_key)
    elif kind.rank == Rank.TEXT:
        file = replace(file, separator=plain.marker_in(_head(file)))
    if reason:
        no_data = isinstance(reason, NotData) or _describes(found.name)
        return LeftOut(found.name, found.size, reason, data=not no_data)
    return file


def _no_content(file: File, kind: Kind | None) -> LeftOut | None:
    """Why a file holds nothing, whatever its kind; None if it may."""
    suffix = PurePath(file.name.lower()).suffix
    if not kind and suffix in _OTHER_MEDIA:
        return LeftOut(file.name, file.size, _NO_TEXT)
    if suffix in _UNFINISHED or suffix.endswith("~"):
        return LeftOut(file.name, file.size, "a backup copy, or an unfinished download", data=True)
    if not file.remote and file.size < _LARGEST_POINTER and (size := _pointed_to(file)):
        reason = "a Git LFS pointer; `git lfs pull` gets the file"
        return LeftOut(file.name, size, reason, data=True)
    if not file.size and (file.compression or not kind or kind.rank <= Rank.ROWS):
        failed = bool(file.compression) or kind is not None
        return LeftOut(file.name, 0, "empty: a download that failed?" if failed else "empty", data=failed)
    return None


def _pointed_to(file: File) -> int | None:
    """The size of the file that Git LFS would put in the place of this one; None if it is no pointer."""
    with opened(replace(file, compression="")) as stream:
        head = stream.read(len(_POINTS))
        pointer = _POINTER.match(head + stream.read(_LARGEST_POINTER)) if head == _POINTS else None
    return int(pointer[1]) if pointer else None


def _head(file: File) -> bytes:
    with opened(file) as stream:
        return stream.read(_HEAD)


def _describes(name: str) -> bool:
    return _DESCRIBES_RE.match(name.rsplit("/", 1)[-1].lower()) is not None


def looks_like_data(name: str) -> bool:
    """Whether a file would be data by its name alone."""
    kind, _ = kind_of_name(name)
    return kind is not None and kind.rank < Rank.PROSE and not _describes(name)


def _without_descriptions(files: list[File], left_out: list[LeftOut], source: Source) -> list[File]:
    """The files without those that only describe or make the others."""
    if source.include:
        return files
    ranks = {KINDS[f.kind].rank for f in files if not _describes(f.name)}
    size = {rank: sum(f.size for f in files if KINDS[f.kind].rank == rank) for rank in Rank}
    # a few ids among much text are its, like the expected values of a test
    beside = ranks & {Rank.ROWS, Rank.TEXT} or size[Rank.TOKENS] < size[Rank.PROSE]
    best = min(ranks - {Rank.TOKENS} if beside else ranks, default=Rank.PROSE)
    kept = list[File]()
    for f in files:
        rank = KINDS[f.kind].rank
        if _describes(f.name) and rank >= Rank.TEXT and best < Rank.PROSE:
            left_out.append(LeftOut(f.name, f.size, "describes the data"))
        elif rank == Rank.PROSE and best <= Rank.ROWS:
            reason = f"{f.kind} beside data files; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        elif rank == Rank.TOKENS and beside:
            reason = "token ids beside text; data.include takes one of them"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        else:
            kept.append(f)
    return kept


def _twice(files: list[File]) -> list[str]:
    """A note on files that are there compressed and decompressed."""
    names = {f.name.lower() for f in files}
    both = [f.name for f in files if f.compression and f.name.lower().removesuffix(f.compression) in names]
    if not both:
        return []
    more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
    return [f"{both[0]}{more}: also there without the compression, and both are read; is that the same text?"]


# ---------------------------------------------------------------------------- the part


def _of_card(source: Source, found: list[Found], notes: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(name -> split of the files that the card lists, name -> reason of those that it lists elsewhere);
    nothing without a card that lists files which are there."""
    names = [f.name for f in found]
    cards = [config for f in found if f.name.lower() == card.CARD for config in card.configs(f.path)]
    there = [(config, found_of) for config in cards if (found_of := config.splits(names))]
    asked = hub_name(source.name).config if is_stream(source) else None
    if asked is not None and asked not in [config.name for config, _ in there]:
        known_names = ", ".join(config.name for config, _ in there)
        raise UserError(
            f'{source.name}: no config "{asked}"; '
            + (f"its card has {known_names}" if there else "it has no card with configs: leave it out")
        )
    if not there:
        return {}, {}
    chosen, known = next(
        ((c, s) for c, s in there if (c.default if asked is None else c.name == asked)), there[0]
    )
    others = [each for each in there if each[0] is not chosen]
    if others and not source.include and asked is None:
        notes.append(
            f'the card has several configs: "{chosen.name}" is read, not '
            f"{', '.join(config.name for config, _ in others)}; data.include takes the files of another"
        )
    elsewhere = {
        name: f'of the card\'s config "{config.name}"' for config, found_of in others for name in found_of
    }
    return known, elsewhere


def _with_parts(files: list[File], known: dict[str, str]) -> list[File]:
    """Source code and markup have no splits: `tests/` in a program is no test split."""
    free = [i for i, f in enumerate(files) if f.name not in known and KINDS[f.kind].rank < Rank.PROSE]
    found = dict(zip(free, splits.parts([files[i].name for i in free]), strict=True))
    stated = {name: splits.part_of_word(split) for name, split in known.items()}
    made = [replace(f, part=stated.get(f.name) or found.get(i, TRAIN)) for i, f in enumerate(files)]
    if all(f.part == TEST for f in made) or not any(f.part == TRAIN for f in made):
        made = [replace(f, part=TRAIN) for f in made]
    return made


def _of_split(
    source: Source, files: list[File], known: dict[str, str], left_out: list[LeftOut]
) -> list[File]:
    """The files of hf:<folder>, with those of the split that it names as TRAIN. Raises UserError if there is
    no such split."""
    asked = hub_name(source.name).split
    if asked is None:
        return files
    split_of = {f.name: known.get(f.name, f.part) for f in files}
    if asked not in split_of.values():
        there = ", ".join(dict.fromkeys(split_of.values()))
        raise UserError(f'{source.name}: no split "{asked}"; it has {there}')
    kept = list[File]()
    for f in files:
        if split_of[f.name] == asked:
            kept.append(replace(f, part=TRAIN))
        elif f.part == TRAIN:
            left_out.append(LeftOut(f.name, f.size, f'of the split "{split_of[f.name]}"'))
        else:
            kept.append(f)
    return kept


def _some(left_out: Sequence[LeftOut]) -> str:
    """What is left out in a few words: "a.bin and 3 others, 1,200 bytes (unknown type)"."""
    first = [each.name for each in left_out[:_EXAMPLES]]
    more = len(left_out) - len(first)
    reasons = list(dict.fromkeys(each.reason for each in left_out))
    size = sum(each.size for each in left_out)
    listed = ", ".join(first) + (f" and {more:,} more" if more else "")
    return f"{listed}, {size:,} bytes ({'; '.join(reasons[:_EXAMPLES])})"
