"""A JSON object per line."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from typing import Any, cast

from lowres.errors import first_line
from lowres.text.columns import Repeated, document_of, kinds_of
from lowres.text.kinds.plain import decoded, utf_8
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import CHATS, PAIRS, TEXT, BadFileError, File, Source

NAME = "JSON lines"
# lines of a file whose name does not say what it is, most of them blank
_LOOKED_AT = 16
_WANTED = {
    TEXT: 'a "text" column',
    CHATS: 'a "messages" column',
    PAIRS: 'the columns "chosen" and "rejected"',
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else Repeated(pairs)


def _integer(digits: str) -> float:
    # Python refuses to read thousands of digits
    return int(digits) if len(digits) < 4000 else math.inf


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def read(file: File, source: Source) -> Iterator[str]:
    return cast(Iterator[str], _texts(file, 0, ""))


def read_from(file: File, source: Source, start: int) -> Iterator[str | None]:
    return _texts(file, start, None)


def _texts(file: File, start: int, nothing: str | None) -> Iterator[str | None]:
    """nothing: for a blank line and those before `start`."""
    for place, row in _rows(file, start):
        text = [nothing if row is None else document_of(row, file, place)]
        del row  # it has the text too
        yield text.pop()


def columns(file: File) -> dict[str, str] | None:
    for _, row in _rows(file):
        if row is not None:
            return kinds_of(row)
    return None


def _remedy(line: bytes) -> str:
    if line.strip() in (b"{", b"["):
        return "JSON over several lines is a .json file"
    return "correct that line, or leave the file out with data.exclude"


def columns_in(head: bytes) -> dict[str, str] | None:
    """The columns of the first row if the beginning of a file without a telling name is JSON lines: the first
    two lines are objects, or the only one with more than one key."""
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n", _LOOKED_AT) if line.strip()]
    if not lines or not lines[0].startswith(b"{"):
        return None
    try:
        rows = [DECODER.decode(line.decode()) for line in lines[:2]]
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(row, dict) for row in rows):
        return None
    return kinds_of(rows[0]) if len(rows) > 1 or len(rows[0]) > 1 else None


def _rows(file: File, start: int = 0) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(file:line, object; None for a blank line and for those before `start`, which are not parsed)"""
    with opened(file) as stream:
        number = 0
        for line in stream:
            number += 1
            if number <= start:
                yield "", None
                continue
            place = f"{file.path}:{number}"
            if line.isspace():
                yield place, None
                continue
            text = (decoded if number == 1 else utf_8)(file.path, line, f":{number}", file.encoding)
            try:
                row = DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                raise BadFileError(
                    f"{place}: not valid JSON ({first_line(error)}); {_remedy(line)}"
                ) from None
            if not isinstance(row, dict):
                remedy = "; an array in one piece is a .json file" if isinstance(row, list) else ""
                wanted = f"a line must be a JSON object with {_WANTED[file.form]}"
                raise BadFileError(f"{place}: {wanted}{remedy}")
            given = [(place, row)]
            del line, text, row  # they may be large, and nothing here needs them any longer
            yield given.pop()


register(Kind(NAME, (".jsonl", ".ndjson", ".jsonlines"), Rank.ROWS, read, columns, read_from=read_from))
