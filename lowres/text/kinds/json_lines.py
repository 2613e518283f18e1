"""A JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from lowres.errors import first_line
from lowres.text.columns import Repeated, kinds_of, text_of
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else Repeated(pairs)


def _integer(digits: str) -> float:
    # Python refuses to read thousands of digits
    return int(digits) if len(digits) < 4000 else math.inf


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def read(file: File, source: Source) -> Iterator[str]:
    assert file.column is not None
    for place, row in _rows(file):
        yield "" if row is None else text_of(row, file.column, place)


def read_from(file: File, source: Source, start: int) -> Iterator[str | None]:
    assert file.column is not None
    for place, row in _rows(file, start):
        # a blank line and one that is left out are both rows without text
        yield None if row is None else text_of(row, file.column, place)


def columns(file: File) -> dict[str, str] | None:
    for _, row in _rows(file):
        if row is not None:
            return kinds_of(row)
    return None


def _rows(file: File, start: int = 0) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(file:line, object; None for a blank line and for those before `start`, which are not parsed)"""
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if number <= start:
                yield "", None
                continue
            place = f"{file.path}:{number}"
            if line.isspace():
                yield place, None
                continue
            try:
                row = DECODER.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise BadFileError(f"{place}: not UTF-8 text; convert the file") from None
            except (ValueError, RecursionError) as error:
                raise BadFileError(
                    f"{place}: not valid JSON ({first_line(error)}); correct that line"
                ) from None
            if not isinstance(row, dict):
                remedy = "; an array in one piece is a .json file" if isinstance(row, list) else ""
                raise BadFileError(f'{place}: a line must be a JSON object with a "text" column{remedy}')
            yield place, row


register(Kind("JSON lines", (".jsonl", ".ndjson"), Rank.ROWS, read, columns, read_from=read_from))
