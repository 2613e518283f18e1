"""What the file of a SentencePiece model says, which the library does not tell.

The file is a protobuf message. Serialised messages can be concatenated, the last value of a field counts, and
readers skip fields that they do not know: so what we add to a model stands behind it, and it stays a file of
SentencePiece.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

UNIGRAM, BPE = 1, 2
# a `normalizer_spec` without character map, dummy prefix and removal of spaces, but with escaping of spaces
NO_NORMALISATION = bytes([0x1A, 8, 0x12, 0, 0x18, 0, 0x20, 0, 0x28, 1])
_PIECES, _TRAINER, _NORMALISER = 1, 2, 3
# of a field of ours, in the range that the format leaves to others
_RECORD = 20_000


class Spec:
    """What a model's file says about normalisation. Raises ValueError or IndexError if it is no protobuf
    message."""

    def __init__(self, model: bytes) -> None:
        normaliser: dict[int, Any] = {}
        trainer: dict[int, Any] = {}
        for field, value, _ in _fields(model):
            if field in (_TRAINER, _NORMALISER):
                if isinstance(value, int):
                    raise ValueError("not a message")
                of_message = {number: content for number, content, _ in _fields(value)}
                (trainer if field == _TRAINER else normaliser).update(of_message)
        self.model_type = trainer.get(3, UNIGRAM)
        self.adds_prefix = bool(normaliser.get(3, 1))
        self.removes_spaces, self.escapes_spaces = bool(normaliser.get(4, 1)), bool(normaliser.get(5, 1))
        self.character_map = normaliser.get(2) or b""
        others = bool(self.character_map) or self.removes_spaces or not self.escapes_spaces
        self.normalises = self.adds_prefix or others
        self.is_suffix = bool(trainer.get(24, 0))  # whether the prefix goes to the end
        self.only_adds_prefix = not others and not self.is_suffix  # LLaMA's form


class Type(IntEnum):
    """What a piece is. A user-defined one is found in a text before any other."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def types_of(model: bytes) -> list[Type]:
    """The type of each piece."""
    pieces = [value for field, value, _ in _fields(model) if field == _PIECES and isinstance(value, bytes)]
    return [
        Type(next((int(value) for field, value, _ in _fields(piece) if field == 3), Type.NORMAL))
        for piece in pieces
    ]


def with_record(model: bytes, record: bytes) -> bytes:
    """The model with a record of ours behind it."""
    return model + _varint(_RECORD << 3 | 2) + _varint(len(record)) + record


def core_of(content: bytes) -> bytes:
    """The content of a tokenizer.model without what came along."""
    try:
        return split_record(content)[0]
    except (ValueError, IndexError):
        return content


def split_record(content: bytes) -> tuple[bytes, bytes | None]:
    """(model, the record of ours or None). Raises as `Spec`."""
    start = 0
    for field, value, end in _fields(content):
        if field == _RECORD and isinstance(value, bytes):
            return content[:start] + content[end:], value
        start = end
    return content, None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """(number, value, where it ends) of each field of a serialised protobuf message, at its first level."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        kind, size = key & 7, 0
        if kind == 0:
            value = varint()
            yield key >> 3, value, place
            continue
        size = {1: 8, 5: 4}.get(kind, -1) if kind != 2 else varint()
        if size < 0 or place + size > len(message):
            raise ValueError("not a protobuf message")
        place += size
        yield key >> 3, message[place - size : place], place


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
