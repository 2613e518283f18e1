"""The documents of a source, by row.

    stdlib                              the .py files of the running Python's standard library
    a file, a folder or a glob          what `listing` makes of it
    hf:<dataset>[:<config>[:<split>]]   a data set on the Hugging Face hub (see `hub`), or a local folder;
                                        default split: train

A document is identified by its *row*: its number in its part of the source. Blank rows and unreadable files
of the library count too, so reading can continue from any row.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowres.errors import UserError
from lowres.text import columns, hub
from lowres.text.connection import reached, watched
from lowres.text.kinds import KINDS
from lowres.text.listing import list_files, recognised
from lowres.text.source import TRAIN, VALIDATION, BadFileError, File, Source, as_source, hub_name, is_stream
from lowres.text.splits import part_of_word
from lowres.text.walk import Found

_SURROGATE = re.compile("[\ud800-\udfff]")
Skipped = dict[str, str]  # name of a damaged file -> what is wrong with it


def documents(source: Source | str, part: str = TRAIN) -> Iterator[str]:
    """Every document of a part of the source that is not blank, in a fixed order, without lone surrogates.

    Raises UserError, with one line that names the file, for anything that cannot be read, and at the end if
    there was no text at all.
    """
    for _, text in numbered_documents(source, part=part):
        yield text


@dataclass(frozen=True)
class Pinned:
    """A source whose documents no longer change on the hub. validation: the name of its validation split, if
    it has one. notes: for the user."""

    source: Source
    validation: str | None = None
    notes: tuple[str, ...] = ()


def pinned(source: Source) -> Pinned:
    """A stream as it is now; other sources as they are. Raises UserError."""
    if not is_stream(source):
        return Pinned(source)
    name = hub_name(source.name)
    if source.on_hub:
        with watched(source.name, 0):
            opened = hub.DataSet(source)
            splits, notes = opened.splits, opened.notes()
        source = replace(source, commit=opened.commit)
    else:
        listed = list_files(source)
        splits, notes = [file.part for file in listed.files], listed.warnings()
    validation = next((each for each in splits if part_of_word(each) == VALIDATION), None)
    if validation is not None and part_of_word(name.split or TRAIN) == TRAIN:
        return Pinned(source, f"hf:{name.dataset}:{name.config or ''}:{validation}", tuple(notes))
    return Pinned(source, None, tuple(notes))


class Marks:
    """Where files of a source begin, so that reading goes on in the middle without those before. Given first:
    one such place, or the beginning."""

    def __init__(self, row: int = 0, file: int = 0) -> None:
        self._places = [(row, file)]

    def add(self, row: int, file: int) -> None:
        """File number `file` begins at a row."""
        self._places.append((row, file))

    def before(self, row: int) -> tuple[int, int]:
        """(first row, number) of the file that a row is in. Forgets the files before."""
        place = bisect_right(self._places, row, key=lambda place: place[0])
        self._places = self._places[max(0, place - 1) :]
        return self._places[0]


def numbered_documents(
    source: Source | str,
    start: int = 0,
    part: str = TRAIN,
    skipped: Skipped | None = None,
    marks: Marks | None = None,
) -> Iterator[tuple[int, str]]:
    """(row, document), beginning with row `start`; see `documents`. skipped: gets the files whose rest is
    left out with damaged = "skip". marks: what an earlier reader of the same source and part has found of its
    files; gets more."""
    source = as_source(source)
    empty = True
    for row, text in _rows(source, start, part, {} if skipped is None else skipped, marks or Marks()):
        if row >= start and text and not text.isspace():
            empty = False
            yield row, without_surrogates(text)
    if empty and start == 0:
        raise UserError(f"{source.name}: contains no text; set data.source to files with text")


def fingerprint(source: Source | str) -> str:
    """A string that changes whenever the documents of the source may have changed.

    For local files it covers names, sizes and modification times, not the content, so it is fast for any
    size.
    """
    source = as_source(source)
    settings = json.dumps(source.settings()) if source.settings() else ""
    if source.on_hub:
        return source.name + settings
    listed = list_files(source)
    if source.name == "stdlib":
        size = sum(file.size for file in listed.files)
        return f"python {platform.python_version()}, {len(listed.files)} files, {size} bytes"
    return _digest([*map(_stamp, listed.files), settings] if settings else list(map(_stamp, listed.files)))


def _stamp(file: File) -> str:
    status = file.path.stat()
    part = "" if file.part == TRAIN else f"\0{file.part}"
    return f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}{part}"


def _digest(lines: list[str]) -> str:
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _rows(
    source: Source, start: int, part: str, skipped: Skipped, marks: Marks
) -> Iterator[tuple[int, str | None]]:
    """(row, text or "" or None). Rows before `start` may be left out."""
    if not source.on_hub:
        yield from _in_files(source, _listed(source, part), start, skipped, marks)
        return
    with watched(source.name, start) as watch:
        opened = hub.DataSet(source)
        if start:
            reached(source.name)
        if opened.files is None:
            yield from enumerate(_typed_rows(source, watch.over(opened.rows(start))), start)
        else:
            yield from watch.over(_in_files(source, opened.files, start, skipped, marks))


def _listed(source: Source, part: str) -> list[File]:
    listed = list_files(source)
    listed.check()
    if listed.tokens:
        raise UserError(f"{source.name}: holds ids of a tokenizer, not text; give it as data.source")
    return listed.part(part)


def _in_files(
    source: Source, files: Sequence[File | Found], start: int, skipped: Skipped, marks: Marks
) -> Iterator[tuple[int, str | None]]:
    row, first = marks.before(start)
    for number in range(first, len(files)):
        marks.add(row, number)
        # a file of which the rest is left out has fewer rows than it seems
        inside = start - row if number == first or source.damaged == "refuse" else 0
        try:
            for text in _texts(source, files[number], inside):
                yield row, text
                row += 1
        except BadFileError as error:
            if source.name == "stdlib":
                yield row, ""
                row += 1
            elif source.damaged == "refuse":
                raise
            else:
                skipped[files[number].name] = str(error)


def _texts(source: Source, file: File | Found, start: int) -> Iterator[str | None]:
    """The text of every row; those before `start` may be None."""
    if isinstance(file, Found):
        made = recognised(file, source)  # a remote file, which is not opened before it is needed
        if not isinstance(made, File):
            raise BadFileError(f"{file.path}: {made.reason}")
        file = made
    kind = KINDS[file.kind]
    if kind.read_from and start > 0:
        return kind.read_from(file, source, start)
    return kind.read(file, source)


def _typed_rows(source: Source, rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    column: str | None = None
    for row in rows:
        if column is None:
            column = columns.choose(columns.kinds_of(row), source.text_key)
            if column is None:
                raise UserError(f"{source.name}: {columns.no_column(row, source.text_key)}")
        yield columns.text_of(row, column, source.name)
