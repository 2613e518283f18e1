"""The documents of a source, by row.

    stdlib                              the .py files of the running Python's standard library
    a file, a folder or a glob          what `listing` makes of it
    hf:<dataset>[:<config>[:<split>]]   streamed by the `datasets` library; <dataset> is a name on the
                                        Hugging Face hub or a local folder; default split: train

A document is identified by its *row*: its number in its part of the source. Blank rows and unreadable files
of the library count too, so reading can continue from any row.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from lowres.errors import UserError
from lowres.text import columns, hub, walk
from lowres.text.kinds import KINDS
from lowres.text.listing import list_files
from lowres.text.source import TRAIN, BadFileError, File, Source, as_source, is_stream

_SURROGATE = re.compile("[\ud800-\udfff]")
Skipped = dict[str, str]  # name of a damaged file -> what is wrong with it


def documents(source: Source | str, part: str = TRAIN) -> Iterator[str]:
    """Every document of a part of the source that is not blank, in a fixed order, without lone surrogates.

    Raises UserError, with one line that names the file, for anything that cannot be read, and at the end if
    there was no text at all.
    """
    for _, text in numbered_documents(source, part=part):
        yield text


def numbered_documents(
    source: Source | str, start: int = 0, part: str = TRAIN, skipped: Skipped | None = None
) -> Iterator[tuple[int, str]]:
    """(row, document), beginning with row `start`; see `documents`. skipped: gets the files whose rest is
    left out with damaged = "skip"."""
    source = as_source(source)
    empty = True
    row = start if is_stream(source) else 0
    rows = _stream_rows(source, start) if is_stream(source) else _rows(source, part, skipped)
    for text in rows:
        if row >= start and text and not text.isspace():
            empty = False
            given = [without_surrogates(text)]
            del text  # it may be large, and nothing here needs it any longer
            yield row, given.pop()
        row += 1
    if empty and start == 0:
        raise UserError(no_text(source))


def no_text(source: Source) -> str:
    return f"{source.name}: contains no text; set data.source to files with text"


def fingerprint(source: Source | str) -> str:
    """A string that changes whenever the documents of the source may have changed.

    For local files it covers names, sizes and modification times, not the content, so it is fast for any
    size.
    """
    source = as_source(source)
    settings = json.dumps(source.settings()) if source.settings() else ""
    if is_stream(source):
        folder = Path(source.name.removeprefix("hf:").split(":")[0]).expanduser()
        found = walk.in_folder(folder) if folder.is_dir() else []
        files = _digest([f"{f.name}\0{f.size}\0{f.mtime_ns}" for f in found if f.reason != "hidden"])
        return source.name + (f" {files}" if found else "") + settings
    listed = list_files(source)
    if source.name == "stdlib":
        size = sum(file.size for file in listed.files)
        return f"python {platform.python_version()}, {len(listed.files)} files, {size} bytes"
    return _digest([*map(_stamp, listed.files), settings] if settings else list(map(_stamp, listed.files)))


def _stamp(file: File) -> str:
    status = file.on_disk.stat()
    part = "" if file.part == TRAIN else f"\0{file.part}"
    return f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}{part}"


def _digest(lines: list[str]) -> str:
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def files_of(source: Source, part: str) -> list[File]:
    """The files of a part of a local source. Raises UserError if too much is left out, or it is no text."""
    listed = list_files(source)
    listed.check()
    if listed.tokens:
        raise UserError(
            f"{source.name}: holds token ids already, so there is no text to prepare; train on it as it "
            "is, as data.source"
        )
    return listed.part(part)


def _rows(source: Source, part: str, skipped: Skipped | None) -> Iterator[str]:
    for file in files_of(source, part):
        yield from rows_of(file, source, skipped)


def rows_of(file: File, source: Source, skipped: Skipped | None = None) -> Iterator[str]:
    """The text of every row of a file, "" for one without; see `numbered_documents`."""
    try:
        yield from KINDS[file.kind].read(file, source)
    except BadFileError as error:
        if source.name == "stdlib":
            yield ""
        elif source.damaged == "refuse":
            raise
        elif skipped is not None:
            skipped[file.name] = str(error)


def _stream_rows(source: Source, start: int) -> Iterator[str]:
    column: str | None = None
    for row in hub.rows(source.name, start):
        if column is None:
            column = columns.choose(columns.kinds_of(row), source.text_key)
            if column is None:
                raise UserError(f"{source.name}: {columns.no_column(row, source.text_key)}")
        yield columns.text_of(row, column, source.name)
