"""Web archives of text: the "conversion" records of WET files.

Not by `warcio`, which takes a file that is cut short for a whole one, in its decompression as in a record,
and wants one gzip member for each record. Here any number of members is right. Digests are not compared.

Source: the WARC format 1.1 (ISO 28500).
"""

from __future__ import annotations

from collections.abc import Iterator

from lowres.text.kinds.plain import utf_8
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

_TEXT, _PAGES = b"conversion", (b"response", b"resource", b"revisit", b"continuation")
_LONGEST_LINE, _LARGEST = 1 << 16, 1 << 32


def read(file: File, source: Source) -> Iterator[str]:
    for place, kind, data in _records(file):
        if kind in _PAGES:
            raise BadFileError(f"{file.path}{place}: {_no_text(kind)}")
        yield utf_8(file.path, data, place) if kind == _TEXT else ""


def refused(file: File) -> str | None:
    """By the first record that is no description."""
    for _, kind, _ in _records(file):
        if kind in (_TEXT, *_PAGES):
            return None if kind == _TEXT else _no_text(kind)
    return None


def _no_text(kind: bytes) -> str:
    return f'web pages as they came ("{kind.decode()}" records); extract their text first, or take .wet files'


def _records(file: File) -> Iterator[tuple[str, bytes, bytes]]:
    """(" record" and its number, type, content)"""
    number = 0
    with opened(file) as stream:
        while line := stream.readline(_LONGEST_LINE):
            if not line.strip():
                continue
            number += 1
            place = f" record {number}"
            if not line.startswith(b"WARC/"):
                raise BadFileError(f"{file.path}{place}: damaged (no WARC header); get the file again")
            fields = dict[bytes, bytes]()
            while (line := stream.readline(_LONGEST_LINE)).strip():
                name, _, value = line.partition(b":")
                fields[name.strip().lower()] = value.strip()
            size = fields.get(b"content-length", b"")
            wanted = int(size) if size.isdigit() and int(size) < _LARGEST else -1
            data = stream.read(wanted) if wanted >= 0 else b""
            if wanted < 0 or stream.read(4) != b"\r\n\r\n":
                raise BadFileError(
                    f"{file.path}{place}: damaged or truncated (it has another size than its header says); "
                    "get the file again"
                )
            yield place, fields.get(b"warc-type", b""), data


register(Kind("WARC", (".warc", ".wet"), Rank.ROWS, read, refused=refused))
