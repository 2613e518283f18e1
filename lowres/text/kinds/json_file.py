"""A .json file. Its content says which of these it is:

    {...} {...}          objects one after the other, on lines of their own or not: a row each
    [{...}, "...", ...]  an array of objects or strings: a row each
    {"any": [...], ...}  an object with one such array: the same
    {"text": "...", ...} one object: a row, if it has a column of text; otherwise settings, which are no data

It is read piece by piece, with one row in memory. `ijson` does the same, but puts "?" for a lone surrogate.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any

from lowres.errors import first_line
from lowres.text.columns import COLUMNS, STRING, by_name_only, chosen, document_of, no_column
from lowres.text.globs import matches
from lowres.text.kinds.json_lines import DECODER
from lowres.text.kinds.registry import Kind, NotData, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

_PIECE = 1 << 20
# what of a file is read to see which form it has
_HEAD = 1 << 22
# the longest token that may be cut by the end of a piece: \ud800, false, -Infinity
_TOKEN = 16
_SPACE = re.compile(r"[ \t\n\r]*")
# an array with a row, or without an element
_ROWS = re.compile(r'\[[ \t\n\r]*(null|[{"\]]|$)')
_KEY = re.compile(r'[ \t\n\r]*("(?:[^"\\]|\\.)*")[ \t\n\r]*:[ \t\n\r]*')
# what JSON does not have and settings do: comments, and commas before a bracket
_SETTINGS = re.compile(r"[ \t\n\r]*(//|/\*|[}\]])")
_SETTINGS_NAMES = (
    "dataset_info*.json", "dataset_dict.json", "state.json", "tokenizer*.json", "special_tokens_map.json",
    "vocab.json", "config.json", "*_config.json", "*.index.json", "package*.json", "tsconfig*.json",
)  # fmt: skip
# characters; settings have no longer strings
_LONG = 200
_NO_ROWS = NotData("one JSON object without rows: settings?")


def read(file: File, source: Source) -> Iterator[str]:
    with opened(file) as stream:
        for place, row in _rows(_Text(stream, file.path), file):
            if isinstance(row, str) and not file.fields:
                yield row
            elif isinstance(row, dict):
                yield document_of(row, file, place)
            elif row is None:
                yield ""
            else:
                or_string = "" if file.fields else " or a string"
                raise BadFileError(f"{place}: a row must be a JSON object{or_string}; correct it")


def columns(file: File) -> dict[str, str] | None:
    with opened(file) as stream:
        for _, row in _rows(_Text(stream, file.path), file):
            if isinstance(row, str):
                return {COLUMNS[0]: STRING}
            if isinstance(row, dict):
                return by_name_only(row, file.column)
    return None


def refused(file: File) -> str | None:
    if any(matches(file.path.name, pattern) for pattern in _SETTINGS_NAMES):
        return NotData("settings")
    with opened(file) as stream:
        text = _Text(stream, file.path)
        if text.next() not in ("{", "["):
            return NotData("JSON without rows") if text.next() else None
        form = _form(text, file)
    if isinstance(form, _Single):
        return None if _has_document(form.row, file) else _without_document(form.row, file)
    return form if isinstance(form, str) else None


# ---------------------------------------------------------------------------- the form


@dataclass(frozen=True)
class _Single:
    """One object that is all there is."""

    row: dict[str, Any]


@dataclass(frozen=True)
class _Array:
    """at: where it begins in the text."""

    at: int


def _form(text: _Text, file: File) -> _Single | _Array | str | None:
    """Which form a text has that begins with a bracket; a string for why it has no rows; None for objects
    one after the other. Nothing of the text is consumed."""
    head = text.head(_HEAD)
    if head[0] == "[":
        return _Array(0) if _ROWS.match(head) or len(head) < 2 else "a JSON array without objects or strings"
    try:
        first, end = DECODER.raw_decode(head)
    except (ValueError, RecursionError) as error:
        if text.ended and isinstance(error, JSONDecodeError) and _SETTINGS.match(head, error.pos):
            return NotData("JSON with comments: settings")
        return _unfinished_array(head, file)
    while not text.ended and _SPACE.fullmatch(head, end):
        head = text.head(len(head) + 1)
    if not _SPACE.fullmatch(head, end):
        return None
    arrays = [key for key, value in first.items() if _is_rows(value)]
    if not arrays or _has_document(first, file):
        return _Single(first)
    place = next(at for name, at, _ in _members(head) if name == arrays[0])
    return _Array(place) if len(arrays) == 1 else _several(arrays)


def _has_document(names: Iterable[str], file: File) -> bool:
    return chosen(file, by_name_only(names, file.column)) is not None


def _without_document(row: dict[str, Any], file: File) -> str:
    if any(isinstance(value, str) and len(value) >= _LONG for value in row.values()):
        return no_column(row, file.column, file.form)
    return _NO_ROWS


def _several(arrays: list[str]) -> str:
    return f"one JSON object with several arrays ({', '.join(arrays)}); give each a file of its own"


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | str)


def _members(head: str) -> Iterator[tuple[str, int, Any]]:
    """(key, where its value begins, value; None if that does not end in the head) of the object that it is"""
    at = 1
    while match := _KEY.match(head, at):
        at = match.end()
        try:
            value, end = DECODER.raw_decode(head, at)
        except (ValueError, RecursionError):
            yield json.loads(match[1]), at, None
            return
        yield json.loads(match[1]), at, value
        at = _SPACE.match(head, end).end()  # type: ignore[union-attr]
        if not head.startswith(",", at):
            return
        at += 1


def _unfinished_array(head: str, file: File) -> _Array | str | None:
    """The array in a large object that does not end in the head; None if that does not end in an array."""
    found = list(_members(head))
    if not found or found[-1][2] is not None or not _ROWS.match(head, found[-1][1]):
        return None
    if _has_document([key for key, _, _ in found], file):
        return None
    arrays = [key for key, _, value in found if _is_rows(value)]
    return _several([*arrays, found[-1][0]]) if arrays else _Array(found[-1][1])


# ---------------------------------------------------------------------------- rows


def _rows(text: _Text, file: File) -> Iterator[tuple[str, Any]]:
    """(file, line and row; value)"""
    if not text.next():
        return
    form = _form(text, file)
    if isinstance(form, str):
        raise BadFileError(f"{text.path}: {form}")
    if isinstance(form, _Array):
        in_object = form.at != text.at
        text.at = form.at + 1
        yield from _elements(text)
        if in_object:
            _rest_of_object(text, file)
        if text.next():
            raise text.invalid("something follows the end of the JSON")
        return
    while text.next():
        yield text.value()


def _elements(text: _Text) -> Iterator[tuple[str, Any]]:
    """Those of the array whose bracket is behind."""
    if text.next() == "]":
        text.at += 1
        return
    while True:
        yield text.value()
        mark = text.next()
        if mark not in (",", "]"):
            raise text.invalid("no comma and no end after an element" if mark else "the array has no end")
        text.at += 1
        if mark == "]":
            return


def _rest_of_object(text: _Text, file: File) -> None:
    """What follows the array inside its object: nothing that would be lost."""
    while text.next() == ",":
        text.at += 1
        if text.next() != '"':
            raise text.invalid("no key after a comma")
        _, key = text.value()
        if text.next() != ":":
            raise text.invalid("no colon after a key")
        text.at += 1
        if _is_rows(text.value()[1]) or _has_document([key], file):
            raise text.invalid(f'"{key}" beside an array of rows')
    if text.next() != "}":
        raise text.invalid("the object has no end")
    text.at += 1


class _Text:
    """A JSON text, of which a piece is in memory."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.path = path
        self.buffer, self.at, self.ended = "", 0, False
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._fault: Exception | None = None  # comes after what is in memory
        self._line, self._counted, self._row = 1, 0, 0

    def head(self, size: int) -> str:
        """As many of the next characters, or more; fewer at the end, or before a fault."""
        self._drop()
        while len(self.buffer) < size and not self.ended and not self._fault:
            self._more()
        return self.buffer

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def value(self) -> tuple[str, Any]:
        """(file, line and row; the next value)"""
        self._row += 1
        self.next()
        while True:
            try:
                found, end = DECODER.raw_decode(self.buffer, self.at)
            except JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - _TOKEN
                if not cut or not self._more():
                    raise self.invalid(first_line(error)) from None
            except (ValueError, RecursionError) as error:
                raise self.invalid(first_line(error)) from None
            else:
                place = self._place()
                self.at = end
                return place, found

    def invalid(self, why: str) -> BadFileError:
        return BadFileError(
            f"{self._place()}: not valid JSON ({why}); correct it, or leave it out with data.exclude"
        )

    def _place(self) -> str:
        self._line += self.buffer.count("\n", self._counted, self.at)
        self._counted = self.at
        return f"{self.path}:{self._line}" + (f" row {self._row}" if self._row else "")

    def _drop(self) -> None:
        """What is behind."""
        self._place()
        self.buffer, self.at, self._counted = self.buffer[self.at :], 0, 0

    def _more(self) -> bool:
        """Whether there was more. As much again as there is, so that a long value is not decoded often."""
        if self._fault:
            raise self._fault
        if self.ended:
            return False
        data = self._read(max(_PIECE, len(self.buffer) - self.at))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            text = bytes(error.object[: error.start]).decode("utf-8", "replace").removeprefix("\ufeff")
            self._fault = BadFileError(f"{self.path}: not UTF-8 text; convert the file")
        self.ended = not data
        self._drop()
        self.buffer += text
        return bool(text) or (not self.ended and self._more())

    def _read(self, size: int) -> bytes:
        pieces, left = list[bytes](), size
        while left > 0:
            try:
                piece = self._stream.read1(left)  # type: ignore[attr-defined]
            except Exception as error:
                if not pieces:
                    raise
                self._fault = error
                break
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


register(Kind("JSON", (".json",), Rank.ROWS, read, columns, refused))
