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
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePath

from lowres.errors import UserError
from lowres.text import archives, card, columns, splits, walk
from lowres.text.globs import matches
from lowres.text.kinds import KINDS, Kind, NotData, Rank, json_lines, kind_of_name, names, plain
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
    "readme", "readme[-_.]*", "license", "license[-.]*", "licence", "licence[-.]*", "unlicense",
    *(
        f"{word}{rest}"
        for word in ("copying", "copyright", "notice", "citation", "changelog", "changes", "authors",
                     "contributors", "contributing", "code_of_conduct", "security", "manifest")
        for rest in ("", ".txt", ".md", ".rst", ".lesser", ".bib", ".cff")
    ),
    "dataset_info*.json", "dataset_dict.json", "state.json", "requirements*.txt",
    "*[-_.]sha1.txt", "*[-_.]sha256.txt", "*[-_.]md5.txt", "*sha1sum*", "*sha256sum*", "*sha512sum*",
    "*md5sum*", "*checksum*", "*.md5", "*.sha1", "*.sha256", "*.sha512", "*.asc", "*.sig",
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
)  # fmt: skip
_DESCRIBES_RE = re.compile("|".join(map(fnmatch.translate, _DESCRIBES)))
# rows beside so much source code, or source code beside so much text, belong to it
_TIMES, _MUCH = 10, 1 << 16
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
        ".index",
        ".crc",
    ]
)
# text, but hardly the text of a corpus
_OTHER_TEXT = frozenset([".svg", ".lock", ".log"])
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
        known = f"; known are {names()}" if made.reason in (_UNKNOWN, _NO_TEXT) else ""
        raise UserError(f"{source.name}: {made.reason}{known}")
    files = _of_split(source, [made], {}, []) if is_stream(source) else [made]
    return Listing(source, tuple(files), ())


def _of_many(source: Source, found: list[Found], where: str, above: str = "") -> Listing:
    """above: the folders at the beginning of every name that are none of the source's."""
    left_out, notes = list[LeftOut](), list[str]()
    wanted, cards_there = _wanted(found, source, left_out)
    wanted = _once(wanted, left_out)
    cards = _of_cards(source, cards_there, [f.name for f in wanted], notes)
    known = cards.known
    files = list[File]()
    for f in wanted:
        if f.name in cards.below and not source.include and f.name not in known:
            describes = _describes(f.name)
            reason = "describes the data" if describes else "not in the card's configs"
            chosen = f.name in cards.elsewhere and is_stream(source) and hub_name(source.name).config
            reason = cards.elsewhere.get(f.name, reason)
            left_out.append(LeftOut(f.name, f.size, reason, data=not (describes or chosen)))
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
        reasons = [each for each in left_out if each.reason not in ("hidden", walk.EXCLUDED)]
        raise UserError(
            f"{source.name}: no file of a known type ({where}{'' if found else ': none'}); "
            f"known are {names()}" + (f"; left out: {_some(reasons)}" if reasons else "")
        )
    notes += _twice(files)
    files = _with_parts(files, known, above)
    if is_stream(source):
        files = _of_split(source, files, known, left_out)
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
        if source.include and not archives.is_archive(f.name) and not _is_asked(f, source):
            left_out.append(LeftOut(f.name, f.size, "not in data.include"))
        elif f.reason:
            # a link to nothing was something once
            left_out.append(LeftOut(f.name, f.size, f.reason, data=f.reason.startswith("a link to nothing")))
        else:
            wanted.append(f)
    return wanted, cards


def _is_asked(found: Found, source: Source) -> bool:
    return any(matches(found.name, pattern) for pattern in source.include)


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


# ---------------------------------------------------------------------------- the kind


@lru_cache(maxsize=1 << 10)
def _in_archive(archive: Found, source: Source) -> tuple[File | LeftOut, ...]:
    """What is in an archive, each member looked at where the reading stands. The globs are for members, or
    for the archive as a whole."""
    include = source.include
    if _is_asked(archive, source):
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
                elif include and not _is_asked(f, source):
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
        separated = source.separator is not None
        return _sniffed(found, source.text_key, source.token_dtype, separated, _is_asked(found, source))
    except BadFileError as error:
        if source.damaged == "refuse":
            raise
        return LeftOut(found.name, found.size, str(error).removeprefix(f"{found.path}: "), data=True)


@lru_cache(maxsize=1 << 16)
def _sniffed(
    found: Found, text_key: str | None, token_dtype: str | None, separated: bool, asked: bool
) -> File | LeftOut:
    """What a file is. The same file is looked at once. separated: data.separator is set. asked: the file is
    in data.include."""
    kind, compression = kind_of_name(found.name)
    file = File(
        *(found.name, found.path, found.size, kind.name if kind else plain.OTHER, compression),
        column=text_key if kind and kind.columns else None,
        archive=found.archive,
        at=found.at,
        remote=found.remote,
    )
    if nothing := _no_content(file, kind, asked):
        return nothing
    if not kind or kind.rank == Rank.TEXT:
        file, reason = _by_content(file, kind, text_key, separated)
        return LeftOut(found.name, found.size, reason, data=True) if reason else file
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
    if reason:
        no_data = isinstance(reason, NotData) or _describes(found.name)
        return LeftOut(found.name, found.size, reason, data=not no_data)
    return file


def _by_content(
    file: File, kind: Kind | None, text_key: str | None, separated: bool
) -> tuple[File, str | None]:
    """What a file is that is text, or has a suffix that says nothing; and why it is left out."""
    head = _head(file)
    if not plain.is_text(head) and (not kind or kind.by_content):
        return file, _UNKNOWN
    if reason := plain.dump(head):
        return file, reason
    if not separated and (column := json_lines.column_in(head, text_key)):
        return replace(file, kind=json_lines.NAME, column=column), None
    return (replace(file, separator=plain.marker_in(head)) if kind else file), None


def _no_content(file: File, kind: Kind | None, asked: bool) -> LeftOut | None:
    """Why a file holds nothing, whatever its kind; None if it may."""
    suffix = PurePath(file.name.lower()).suffix
    if not kind and not asked and suffix in _OTHER_MEDIA:
        return LeftOut(file.name, file.size, _NO_TEXT)
    if not kind and not asked and suffix in _OTHER_TEXT:
        return LeftOut(file.name, file.size, "logs, locks and drawings; data.include takes them")
    if not asked and (suffix in _UNFINISHED or suffix.endswith("~")):
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
    data = [f for f in files if not _describes(f.name)]
    ranks = {KINDS[f.kind].rank for f in data}
    size = {rank: sum(f.size for f in files if KINDS[f.kind].rank == rank) for rank in Rank}
    code = sum(f.size for f in data if f.kind == plain.SOURCE_CODE)
    # a few ids among much text are its, like the expected values of a test
    beside = ranks & {Rank.ROWS, Rank.TEXT} or size[Rank.TOKENS] < size[Rank.PROSE]
    of_code = code >= _MUCH and 0 < _TIMES * size[Rank.ROWS] < code
    of_text = size[Rank.TEXT] >= _MUCH and _TIMES * code < size[Rank.TEXT]
    less = ({Rank.TOKENS} if beside else set()) | ({Rank.ROWS} if of_code else set())
    best = min(ranks - less, default=Rank.PROSE)
    # in a program, or where all is prose, a README is text like any other
    described = best < Rank.PROSE or (not code and any(f.kind == plain.OTHER for f in data))
    kept = list[File]()
    for f in files:
        rank = KINDS[f.kind].rank
        if _describes(f.name) and rank >= Rank.TEXT and described:
            left_out.append(LeftOut(f.name, f.size, "describes the data"))
        elif rank == Rank.ROWS and of_code:
            reason = f"{f.kind} beside much more source code; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        elif f.kind == plain.SOURCE_CODE and best == Rank.TEXT and of_text:
            reason = "source code beside much more text; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
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


# ---------------------------------------------------------------------------- the part


@dataclass
class _Cards:
    """What the cards of data sets say of the files below their folders. known: name -> split, "" if that is
    not said. elsewhere: name -> why a file that a card lists is not read. below: the names of all the files.
    """

    known: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    below: set[str] = field(default_factory=set)


def _of_cards(source: Source, cards: list[Found], all_names: list[str], notes: list[str]) -> _Cards:
    """Of the cards that list files which are there; for a file it is the nearest that counts. Raises
    UserError if none has the config that hf:<folder>:<config> asks for."""
    made, configs_there = _Cards(), list[str]()
    asked = hub_name(source.name).config if is_stream(source) else None
    for f in sorted(cards, key=lambda f: f.name.count("/"), reverse=True):
        folder = f.name[: -len(card.CARD)]
        names = [name for name in all_names if name.startswith(folder) and name not in made.below]
        configs = card.configs(f.path)
        in_folder = [name[len(folder) :] for name in names]
        listed = [
            (config, {folder + name: split for name, split in config.splits(in_folder).items()})
            for config in configs
        ]
        there = [each for each in listed if each[1]]
        if configs and not there:
            notes.append(f"{f.name}: the card lists no file that is here, so the names of the files decide")
        if not there:
            continue
        configs_there += [config.name for config, _ in there]
        made.below |= set(names)
        chosen = next(
            (each for each in there if (each[0].default if asked is None else each[0].name == asked)),
            there[0],
        )
        others = [each for each in there if each is not chosen]
        made.known |= chosen[1]
        if source.include:  # of any configuration
            for _, found_of in others:
                made.known |= {name: split for name, split in found_of.items() if name not in made.known}
        elif others and asked is None:
            notes.append(
                f'the card has several configs: "{chosen[0].name}" is read, not '
                f"{', '.join(config.name for config, _ in others)}; data.include takes the files of another"
            )
        for config, found_of in others:
            made.elsewhere |= dict.fromkeys(found_of, f'of the card\'s config "{config.name}"')
    if asked is not None and asked not in configs_there:
        has = f"its card has {', '.join(configs_there)}"
        none = "it has no card with configs: leave it out"
        raise UserError(f'{source.name}: no config "{asked}"; {has if configs_there else none}')
    return made


def _with_parts(files: list[File], known: dict[str, str], above: str) -> list[File]:
    """Programs have no splits, nor what is written beside them: their `tests/` are no test split."""
    stated = {name: splits.part_of_word(split) for name, split in known.items() if split}
    free = [f for f in files if f.name not in stated]
    program = {f.name for f in free if KINDS[f.kind].rank == Rank.PROSE} if _is_program(files) else set()
    found = dict[str, str]()
    for rule, chosen in (
        (splits.parts_of_code, [f.name for f in free if f.name in program]),
        (splits.parts, [f.name for f in free if f.name not in program]),
    ):
        found |= zip(chosen, rule([name.removeprefix(above) for name in chosen]), strict=True)
    made = [replace(f, part=stated.get(f.name) or found[f.name]) for f in files]
    if all(f.part == TEST for f in made) or not any(f.part == TRAIN for f in made):
        made = [replace(f, part=TRAIN) for f in made]
    return made


def _is_program(files: list[File]) -> bool:
    return any(f.kind == plain.SOURCE_CODE for f in files)


def _of_split(
    source: Source, files: list[File], known: dict[str, str], left_out: list[LeftOut]
) -> list[File]:
    """The files of hf:<folder>, with those of the split that it names as TRAIN. Raises UserError if there is
    no such split."""
    asked = hub_name(source.name).split
    if asked is None:
        return files
    split_of = {f.name: known.get(f.name) or f.part for f in files}
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
