"""Tables as text, with a line of column names: CSV, and TSV.

What divides the columns is a comma or a tab, or what the line of names shows where a comma finds no text. A
column of text is taken by its name only: a table without a line of names would lose its first row to it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from lowres.errors import first_line
from lowres.text.columns import by_name_only, chosen, document_of, taken
from lowres.text.kinds.plain import decoded, utf_8
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

_DIVIDERS = {"CSV": ",;\t|", "TSV": "\t"}
# a quote that is never closed would take the rest of the file
_LONGEST = 1 << 28


def read(file: File, source: Source) -> Iterator[str]:
    with opened(file) as stream:
        names, divider = _names(file)
        for column in taken(file):
            if (count := names.count(column)) > 1:
                raise BadFileError(f'{file.path}: has {count} columns "{column}"; rename all but one')
        at = [(column, names.index(column)) for column in taken(file) if column in names]
        rows = _rows(stream, divider, file)
        for _, row in rows:
            if row:
                break
        for line, row in rows:
            if len(row) == len(names):
                yield document_of({column: row[i] for column, i in at}, file, f"{file.path}:{line}")
            elif not row:
                yield ""
            else:
                raise BadFileError(
                    f"{file.path}:{line}: has {len(row)} columns instead of {len(names)}; correct that row"
                )


def columns(file: File) -> dict[str, str] | None:
    names, _ = _names(file)
    return by_name_only(names, file.column)


def _names(file: File) -> tuple[list[str], str]:
    """(names of the columns, what divides them). file: says what to look for."""
    found = list[tuple[list[str], str]]()
    for divider in _DIVIDERS[file.kind]:
        with opened(file) as stream:
            row = next((row for _, row in _rows(stream, divider, file) if row), [])
        names = [name.strip() for name in row]
        if chosen(file, by_name_only(names, file.column)):
            return names, divider
        found.append((names, divider))
    return found[0]


def _rows(stream: IO[bytes], divider: str, file: File) -> Iterator[tuple[int, list[str]]]:
    """(line on which a row begins, its fields); no field for a blank line."""
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(_lines(stream, file), delimiter=divider, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadFileError(
                f"{file.path}:{line}: no valid row ({first_line(error)}); a field that begins with a quote "
                "ends with one, and doubles those inside"
            ) from None
        yield line, row


def _lines(stream: IO[bytes], file: File) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        yield (decoded if number == 1 else utf_8)(file.path, line, f":{number}", file.encoding)


register(Kind("CSV", (".csv",), Rank.ROWS, read, columns))
register(Kind("TSV", (".tsv", ".tab"), Rank.ROWS, read, columns))
