"""Text of ids that come one by one: complete characters as soon as they are, and all together what `decode`
makes of all ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class Stream(Protocol):
    def begin(self, ids: Iterable[int]) -> str:
        """The text of ids that stand before the others, as far as it is complete."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that the next ids complete; it never ends inside a character."""

    def end(self) -> str:
        """What is left when no more come."""


class ByTable:
    """Of ids that stand for bytes. prefix, suffix: are taken off the whole text, if it begins or ends so; one
    character at most."""

    def __init__(self, table: Sequence[bytes], prefix: str = "", suffix: str = "") -> None:
        self._table, self._prefix, self._suffix = table, prefix, suffix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waits = ""  # what may be the suffix

    def begin(self, ids: Iterable[int]) -> str:
        return self.add(ids)

    def add(self, ids: Iterable[int]) -> str:
        table = self._table
        return self._decoded(b"".join(table[i] for i in ids if 0 <= i < len(table)))

    def end(self) -> str:
        return self._decoded(b"", final=True)

    def _decoded(self, content: bytes, final: bool = False) -> str:
        text = self._decoder.decode(content, final)
        if text:
            text, self._prefix = text.removeprefix(self._prefix), ""
        if not text or not self._suffix:
            return text
        text = self._waits + text
        self._waits = self._suffix if text.endswith(self._suffix) else ""
        return text.removesuffix(self._suffix)


class Late:
    """Of ids whose text may depend on all that follow: nothing before the end."""

    def __init__(self, decode: Callable[[Iterable[int]], str]) -> None:
        self._decode, self._ids, self._begun = decode, list[int](), ""

    def begin(self, ids: Iterable[int]) -> str:
        self._ids += ids
        self._begun = self._decode(self._ids)
        return self._begun

    def add(self, ids: Iterable[int]) -> str:
        self._ids += ids
        return ""

    def end(self) -> str:
        return self._decode(self._ids).removeprefix(self._begun)


class Each:
    """Of ids that stand for a text each."""

    def __init__(self, decode: Callable[[Iterable[int]], str]) -> None:
        self._decode = decode

    def begin(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    def add(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    def end(self) -> str:
        return ""
