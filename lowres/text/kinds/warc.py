"""Web archives of text: the "conversion" records of WET files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.kinds.plain import decoded
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

_TEXT, _PAGES = "conversion", ("response", "resource", "revisit", "continuation")


def read(file: File, source: Source) -> Iterator[str]:
    for place, record in _records(file):
        if record.rec_type in _PAGES:
            raise BadFileError(f"{place}: {_no_text(record.rec_type)}")
        size = record.rec_headers.get_header("Content-Length")
        data = record.content_stream().read()
        # warcio gives what there is of a record that is cut short
        if size is None or not size.isdecimal() or len(data) != int(size):
            raise BadFileError(
                f"{place}: damaged or truncated (a record of another size); get the file again"
            )
        yield decoded(file.path, data, place.removeprefix(str(file.path))) if record.rec_type == _TEXT else ""


def refused(file: File) -> str | None:
    """By the first record that is no description."""
    for _, record in _records(file):
        if record.rec_type in (_TEXT, *_PAGES):
            return None if record.rec_type == _TEXT else _no_text(record.rec_type)
    return None


def _no_text(kind: str) -> str:
    return f'web pages as they came ("{kind}" records); extract their text first, or take .wet files'


def _records(file: File) -> Iterator[tuple[str, Any]]:
    """(file and number of the record, record). What decompresses here takes any number of gzip members;
    `warcio` itself wants one for each record."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise UserError(
            f"{file.path}: .warc and .wet files need the package warcio: pip install warcio"
        ) from None
    with opened(file) as stream:
        number = 0
        try:
            for record in ArchiveIterator(stream, no_record_parse=True):
                number += 1
                yield f"{file.path} record {number}", record
        except ArchiveLoadFailed as error:
            raise BadFileError(
                f"{file.path} record {number + 1}: damaged ({first_line(error)}); get the file again"
            ) from None


register(Kind("WARC", (".warc", ".wet"), Rank.ROWS, read, refused=refused))
