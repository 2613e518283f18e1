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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lowres.errors import UserError
from lowres.text import columns, hub
from lowres.text.connection import reached, watched
from lowres.text.kinds import KINDS, Rank
from lowres.text.listing import list_files
from lowres.text.recognition import recognised
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
        self.rows: int | None = None  # of all files, when their reader has come to the end

    def add(self, row: int, file: int) -> None:
        """File number `file` begins at a row."""
        self._places.append((row, file))

    def of(self, row: int) -> tuple[int, int]:
        """(first row, number) of the file that a row is in."""
        return self._places[max(0, bisect_right(self._places, row, key=lambda place: place[0]) - 1)]

    def before(self, row: int) -> tuple[int, int]:
        """The same. Forgets the files before."""
        place = bisect_right(self._places, row, key=lambda place: place[0])
        del self._places[: max(0, place - 1)]  # in place, as a thread may add to it
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
    marks = marks or Marks()
    row, texts = _rows(source, start, part, {} if skipped is None else skipped, marks)
    for text in texts:
        if row >= start and text and not text.isspace():
            empty = False
            given = [without_surrogates(text)]
            del text  # it may be large, and nothing here needs it any longer
            yield row, given.pop()
        row += 1
    marks.rows = row
    if empty and start == 0:
        raise UserError(no_text(source))


def places(source: Source, part: str, marks: Marks) -> Callable[[int], str]:
    """Where a row is, for messages: its file and its number there, from 1. marks: of its reader."""
    files: list[File] = []

    def place(row: int) -> str:
        if source.on_hub:
            return f"{source.name} row {row + 1:,}"
        files[:] = files or files_of(source, part)
        first, number = marks.of(row)
        return f"{files[number].path} row {row - first + 1:,}"

    return place


def no_text(source: Source) -> str:
    return f"{source.name}: contains no {source.form}; set data.source to files with {source.form}"


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


def _rows(
    source: Source, start: int, part: str, skipped: Skipped, marks: Marks
) -> tuple[int, Iterator[str | None]]:
    """A row, and the texts from it on: "" or None for one without. Rows before `start` may be None."""
    if source.on_hub:
        return _rows_on_hub(source, start, skipped, marks)
    files = files_of(source, part)
    row, _ = marks.before(start)
    return row, _in_files(source, files, start, skipped, marks)


def _rows_on_hub(
    source: Source, start: int, skipped: Skipped, marks: Marks
) -> tuple[int, Iterator[str | None]]:
    if start:
        reached(source.name)
    with watched(source.name, 0):
        opened = hub.DataSet(source)
    if opened.files is None:
        return start, _watched(source, start, _typed_rows(source, opened.rows(start)))
    row, _ = marks.before(start)
    return row, _watched(source, start, _in_files(source, opened.files, start, skipped, marks))


def _watched(source: Source, start: int, texts: Iterator[str | None]) -> Iterator[str | None]:
    with watched(source.name, start) as watch:
        yield from watch.over(texts)


def _in_files(
    source: Source, files: Sequence[File | Found], start: int, skipped: Skipped, marks: Marks
) -> Iterator[str | None]:
    """The texts from the file on in which row `start` is, by what the marks know."""
    row, first = marks.before(start)
    for number in range(first, len(files)):
        marks.add(row, number)
        # a file of which the rest is left out has fewer rows than it seems; the one that a mark leads to was
        # read up to there
        inside = start - row if number == first > 0 or source.damaged == "refuse" else 0
        for text in _rows_in(source, files[number], inside, skipped):
            given = [text]
            del text  # it may be large
            yield given.pop()
            row += 1


def _rows_in(source: Source, file: File | Found, start: int, skipped: Skipped) -> Iterator[str | None]:
    if isinstance(file, File):
        yield from _rows_from(file, source, start, skipped)
        return
    made = recognised(file, source)  # a remote file, which is not opened before it is needed
    if isinstance(made, File):
        if KINDS[made.kind].rank == Rank.TOKENS:
            dataset = hub_name(source.name).dataset
            raise UserError(
                f"{file.path}: holds token ids already; download the data set (hf download {dataset} "
                "--repo-type dataset --local-dir DIR) and set data.source=DIR"
            )
        yield from _rows_from(made, source, start, skipped)
    elif source.damaged == "refuse":
        raise BadFileError(f"{file.path}: {made.reason}")
    else:
        skipped[file.name] = f"{file.path}: {made.reason}"


def rows_of(file: File, source: Source, skipped: Skipped | None = None) -> Iterator[str]:
    """The text of every row of a file, "" for one without; see `numbered_documents`."""
    return cast(Iterator[str], _rows_from(file, source, 0, skipped))


def _rows_from(file: File, source: Source, start: int, skipped: Skipped | None) -> Iterator[str | None]:
    """The same; None for those before `start`, where that is faster."""
    kind = KINDS[file.kind]
    try:
        if kind.read_from and start > 0:
            yield from kind.read_from(file, source, start)
        else:
            yield from kind.read(file, source)
    except BadFileError as error:
        if source.name == "stdlib":
            yield ""
        elif source.damaged == "refuse":
            raise
        elif skipped is not None:
            skipped[file.name] = str(error)


def _typed_rows(source: Source, rows: Iterator[dict[str, Any]]) -> Iterator[str | None]:
    file: File | None = None
    for row in rows:
        if file is None:
            every = File("", Path(source.name), 0, "", column=source.text_key, form=source.form)
            file = columns.chosen(every, columns.kinds_of(row))
            if file is None:
                reason = columns.no_column(row, source.text_key, source.form)
                raise UserError(f"{source.name}: {reason}")
        yield columns.document_of(row, file, source.name)
