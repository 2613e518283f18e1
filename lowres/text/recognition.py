"""What kind of file a file is: by its suffix, and by its content where that does not say it."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePath

from lowres.disk import LFS_POINTER
from lowres.text import columns
from lowres.text.descriptions import describes
from lowres.text.globs import matches
from lowres.text.kinds import Kind, NotData, Rank, json_lines, kind_of_name, plain
from lowres.text.left_out import LeftOut
from lowres.text.opening import opened
from lowres.text.source import CHATS, PAIRS, TEXT, BadFileError, File, Source
from lowres.text.walk import Found

_HEAD = 1 << 20
# neither text nor tokens, however large: pictures, sound, films, weights, programs, fonts
_OTHER_MEDIA = (
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".ico", ".tif", ".tiff", ".mp3", ".wav", ".flac",
    ".ogg", ".m4a", ".mp4", ".mkv", ".avi", ".mov", ".webm", ".safetensors", ".pt", ".pth", ".ckpt", ".onnx",
    ".gguf", ".h5", ".so", ".dll", ".dylib", ".o", ".a", ".exe", ".pyc", ".class", ".jar", ".ttf", ".otf",
    ".woff", ".woff2", ".model", ".index", ".crc",
)  # fmt: skip
# text, but hardly the text of a corpus
_OTHER_TEXT = (".svg", ".lock", ".log")
# what editors and downloads leave
_UNFINISHED = (
    ".bak", ".orig", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".incomplete",
    ".aria2", ".swp", ".old",
)  # fmt: skip
_LARGEST_POINTER = 1024
_POINTER = re.compile(re.escape(LFS_POINTER) + rb"(?:.*\n)*size (\d+)\n")
UNKNOWN, NO_TEXT = "unknown type", "no text"


def is_asked(found: Found, source: Source) -> bool:
    """Whether data.include names a file."""
    return any(matches(found.name, pattern) for pattern in source.include)


def recognised(found: Found, source: Source) -> File | LeftOut:
    """What a file is. Raises BadFileError for a damaged one, unless these are left out."""
    try:
        separated, asked = source.separator is not None, is_asked(found, source)
        return _sniffed(
            found, source.text_key, source.token_dtype, separated, asked, source.form, source.encoding
        )
    except BadFileError as error:
        if source.damaged == "refuse":
            raise
        return LeftOut(found.name, found.size, str(error).removeprefix(f"{found.path}: "), data=True)


@lru_cache(maxsize=1 << 16)
def _sniffed(
    found: Found,
    text_key: str | None,
    token_dtype: str | None,
    separated: bool,
    asked: bool,
    form: str,
    encoding: str | None,
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
        form=form,
        encoding=encoding,
    )
    if nothing := _no_content(file, kind, asked):
        return nothing
    if not kind or kind.rank == Rank.TEXT:
        file, reason = _by_content(file, kind, text_key, separated)
        if reason:
            return LeftOut(found.name, found.size, reason, data=not isinstance(reason, NotData))
        return file
    if kind.rank == Rank.TOKENS and found.archive:
        return LeftOut(found.name, found.size, "token ids in an archive; unpack it", data=True)
    reason = kind.refused(file) if kind.refused else None
    if form != TEXT and not kind.columns:
        reason = _no_rows(file, kind)
    elif kind.look:
        seen = kind.look(replace(file, token_dtype=token_dtype))
        file, reason = (seen, None) if isinstance(seen, File) else (file, seen)
    elif not reason and kind.columns:
        # a table without a row has no columns
        there = kind.columns(file) or columns.assumed(form, text_key)
        if form == TEXT and kind.ids and (ids := columns.ids(there, text_key)):
            file = replace(file, kind=kind.ids, column=ids)
            packed = "a compressed file; decompress it" if compression else "an archive; unpack it"
            reason = f"token ids in {packed}" if compression or found.archive else None
        else:
            chosen = columns.chosen(file, there)
            file, reason = chosen or file, None if chosen else columns.no_column(there, text_key, form)
    if reason:
        no_data = isinstance(reason, NotData) or describes(found.name)
        return LeftOut(found.name, found.size, reason, data=not no_data)
    return file


def _no_rows(file: File, kind: Kind | None) -> str:
    """Why a file that is no table holds no chats or pairs."""
    what = f"{kind.name if kind else plain.OTHER}, which holds no {file.form}"
    aside = kind is None or kind.rank == Rank.PROSE or describes(file.name)
    return NotData(what) if aside else what


def _by_content(
    file: File, kind: Kind | None, text_key: str | None, separated: bool
) -> tuple[File, str | None]:
    """What a file is that is text, or has a suffix that says nothing; and why it is left out."""
    head = _head(file)
    if not plain.is_text(head) and (not kind or kind.by_content):
        return file, UNKNOWN
    if reason := plain.dump(head):
        return file, reason
    if not separated and (there := json_lines.columns_in(head)):
        of_lines = replace(file, kind=json_lines.NAME, column=text_key)
        if chosen := columns.chosen(of_lines, there):
            return chosen, None
        if any(columns.fields(there, None, form) for form in (CHATS, PAIRS)):
            return file, columns.no_column(there, text_key, file.form)
    if file.form != TEXT:
        return file, _no_rows(file, kind)
    return (replace(file, separator=plain.marker_in(head)) if kind else file), None


def _no_content(file: File, kind: Kind | None, asked: bool) -> LeftOut | None:
    """Why a file holds nothing, whatever its kind; None if it may."""
    suffix = PurePath(file.name.lower()).suffix
    if not kind and not asked and suffix in _OTHER_MEDIA:
        return LeftOut(file.name, file.size, NO_TEXT)
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
        head = stream.read(len(LFS_POINTER))
        pointer = _POINTER.match(head + stream.read(_LARGEST_POINTER)) if head == LFS_POINTER else None
    return int(pointer[1]) if pointer else None


def _head(file: File) -> bytes:
    with opened(file) as stream:
        return stream.read(_HEAD)
