"""What each file of a source is. This is the only place that decides it; all that is left out has a reason.

1. data.include and data.exclude, and the card of a data set if it says which files it has.
2. The kind: by suffix, and by content where the suffix does not say it.
3. Where there are tables, rows or token files, markdown, source code and other text beside them describe or
   make them, and are left out. Cards, licences and checksums are no text where other files are.
4. The part: training, validation or test (`splits`).

What is left out and looks like data is said; if it is more than data.max_left_out of the bytes, it is an
error.
"""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath

from lowres.errors import UserError
from lowres.text import card, columns, splits, walk
from lowres.text.globs import matches
from lowres.text.kinds import KINDS, Rank, kind_of_name, names, plain
from lowres.text.opening import opened
from lowres.text.source import TEST, TRAIN, BadFileError, File, Source, as_source, hub_name, is_stream
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
_EXAMPLES = 3


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read. data: whether it looks as if it should be."""

    name: str
    size: int
    reason: str
    data: bool = False


@dataclass(frozen=True)
class Listing:
    """files: those that are read, or are a test split; sorted by name."""

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


def _of_one(source: Source, path: Path) -> Listing:
    found = walk.one(path.name, path)
    if found.reason:
        raise UserError(f"{source.name}: {found.reason}; give a file, a folder or a glob")
    made = recognised(found, source)
    if isinstance(made, LeftOut):
        raise UserError(f"{source.name}: {made.reason}; known are {names()}")
    files = _of_split(source, [made], {}, []) if is_stream(source) else [made]
    return Listing(source, tuple(files), ())


def _of_many(source: Source, found: list[Found], where: str, folder: Path | None) -> Listing:
    left_out, notes = list[LeftOut](), list[str]()
    wanted = list[Found]()
    for f in found:
        if any(matches(f.name, pattern) for pattern in source.exclude):
            left_out.append(LeftOut(f.name, f.size, "data.exclude"))
        elif source.include and not any(matches(f.name, pattern) for pattern in source.include):
            left_out.append(LeftOut(f.name, f.size, "not in data.include"))
        elif f.reason:
            # a link to nothing was something once
            left_out.append(LeftOut(f.name, f.size, f.reason, data=f.reason.startswith("a link to nothing")))
        else:
            wanted.append(f)
    known = _of_card(source, wanted, left_out, notes) if folder else {}  # name -> split
    files = list[File]()
    for f in wanted:
        if known and not source.include and f.name not in known:
            if not any(each.name == f.name for each in left_out):
                left_out.append(
                    LeftOut(f.name, f.size, "not in the card's configs", data=not _describes(f.name))
                )
            continue
        made = recognised(f, source)
        files.append(made) if isinstance(made, File) else left_out.append(made)
    files = _without_descriptions(files, left_out, source)
    if not files:
        reasons = [each for each in left_out if each.reason not in ("hidden", "data.exclude")]
        raise UserError(
            f"{source.name}: no file of a known type ({where}); known are {names()}"
            + (f"; left out: {_some(reasons)}" if reasons else "")
        )
    files = _with_parts(files, known)
    if is_stream(source):
        files = _of_split(source, files, known, left_out)
    return Listing(source, tuple(files), tuple(left_out), tuple(notes))


# ---------------------------------------------------------------------------- the kind


def recognised(found: Found, source: Source) -> File | LeftOut:
    """What a file is. Raises BadFileError for a damaged one, unless these are left out."""
    try:
        return _sniffed(found, source.text_key)
    except BadFileError as error:
        if source.damaged == "refuse":
            raise
        return LeftOut(found.name, found.size, str(error).removeprefix(f"{found.path}: "), data=True)


@lru_cache(maxsize=1 << 16)
def _sniffed(found: Found, text_key: str | None) -> File | LeftOut:
    """What a file is. The same file is looked at once."""
    kind, compression = kind_of_name(found.name)
    file = File(
        found.name,
        found.path,
        found.size,
        kind.name if kind else "other text",
        compression,
        remote=found.remote,
    )
    if not kind and PurePath(found.name.lower()).suffix in _OTHER_MEDIA:
        return LeftOut(found.name, found.size, "no text")
    if not found.size and (compression or not kind or kind.rank <= Rank.ROWS):
        failed = bool(compression) or kind is not None
        return LeftOut(found.name, 0, "empty: a download that failed?" if failed else "empty", data=failed)
    if not kind:
        text = plain.is_text(_head(file))
        return file if text else LeftOut(found.name, found.size, "unknown type", data=True)
    reason = kind.refused(file) if kind.refused else None
    if not reason and kind.columns:
        # a table without a row has no columns
        there = kind.columns(file) or {text_key or columns.COLUMNS[0]: columns.STRING}
        file = replace(file, column=columns.choose(there, text_key))
        reason = None if file.column else columns.no_column(there, text_key)
    elif kind.rank == Rank.TEXT:
        file = replace(file, separator=plain.marker_in(_head(file)))
    return LeftOut(found.name, found.size, reason, data=not _describes(found.name)) if reason else file


def _head(file: File) -> bytes:
    with opened(file) as stream:
        return stream.read(_HEAD)


def _describes(name: str) -> bool:
    return any(matches(name, pattern) for pattern in _DESCRIBES)


def looks_like_data(name: str) -> bool:
    """Whether a file would be data by its name alone."""
    kind, _ = kind_of_name(name)
    return kind is not None and kind.rank < Rank.PROSE and not _describes(name)


def _without_descriptions(files: list[File], left_out: list[LeftOut], source: Source) -> list[File]:
    """The files without those that only describe or make the others."""
    if source.include:
        return files
    ranks = {KINDS[f.kind].rank for f in files if not _describes(f.name)}
    best = min(ranks, default=Rank.PROSE)
    kept = list[File]()
    for f in files:
        rank = KINDS[f.kind].rank
        if _describes(f.name) and rank >= Rank.TEXT and best < Rank.PROSE:
            left_out.append(LeftOut(f.name, f.size, "describes the data"))
        elif rank == Rank.PROSE and best <= Rank.ROWS:
            reason = f"{f.kind} beside data files; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        elif rank == Rank.TOKENS and ranks & {Rank.ROWS, Rank.TEXT}:
            reason = "token ids beside text; data.include takes one of them"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        else:
            kept.append(f)
    return kept


# ---------------------------------------------------------------------------- the part


def _of_card(source: Source, found: list[Found], left_out: list[LeftOut], notes: list[str]) -> dict[str, str]:
    """name -> split of the files that the card lists; nothing if there is no card that does."""
    cards = [f for f in found if f.name.lower() == card.CARD]
    listed = [
        (config, config.splits([f.name for f in found]))
        for each in cards
        for config in card.configs(each.path)
    ]
    there = [(config, splits) for config, splits in listed if splits]
    asked = hub_name(source.name).config if is_stream(source) else None
    if asked is not None and asked not in [config.name for config, _ in there]:
        names_of = ", ".join(config.name for config, _ in there)
        raise UserError(
            f'{source.name}: no config "{asked}"; '
            + (f"its card has {names_of}" if there else "it has no card with configs: leave it out")
        )
    if not there:
        return {}
    chosen, known = next(
        ((c, s) for c, s in there if (c.default if asked is None else c.name == asked)), there[0]
    )
    if len(there) > 1 and not source.include:
        others = [config.name for config, _ in there if config is not chosen]
        if asked is None:
            notes.append(
                f'the card has several configs: "{chosen.name}" is read, not {", ".join(others)}; '
                "data.include takes the files of another"
            )
        sizes = {f.name: f.size for f in found}
        elsewhere = {name: config.name for config, splits in there for name in splits if name not in known}
        left_out += [
            LeftOut(name, sizes[name], f'of the card\'s config "{config}"')
            for name, config in elsewhere.items()
        ]
    return known


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
    names_of = {f.name: known.get(f.name, f.part) for f in files}
    if asked is None:
        return files
    if asked not in names_of.values():
        there = ", ".join(dict.fromkeys(names_of.values()))
        raise UserError(f'{source.name}: no split "{asked}"; it has {there}')
    kept = list[File]()
    for f in files:
        if names_of[f.name] == asked:
            kept.append(replace(f, part=TRAIN))
        elif f.part == TRAIN:
            left_out.append(LeftOut(f.name, f.size, f'of the split "{names_of[f.name]}"'))
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
