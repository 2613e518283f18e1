"""SentencePiece models with byte fallback, in one of two forms.

exact   decode(encode(text)) == text for every text without lone surrogates. SentencePiece alone is not
        lossless: it can normalise text, remove or add spaces, and it stores a space as U+2581, so this
        character becomes a space after decoding. So normalisation is off, and U+2581 in a text is encoded as
        its three bytes.
own     the ids of SentencePiece's own `encode`, with the dummy prefix and the normaliser that the model was
        trained with

The file says its form. Serialised protobuf messages can be concatenated, and the last value of a field
counts: a model that normalises is exact if the override below follows it. So a copy needs no record, and a
model that does not normalise is exact as it is.

A text is cut between two characters that stand next to each other in no piece: then nothing that BPE merges
spans the cut. A unigram model's scores are summed in 32 bits from the beginning of a text, so its ids depend
on rounding in texts of millions of characters; it is cut only there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from lowres.data.tokenizer.base import SPACE, Special, Tokenizer, threads
from lowres.errors import UserError

Form = Literal["exact", "own"]
# a `normalizer_spec` without character map, dummy prefix and removal of spaces, but with escaping of spaces
_NO_NORMALISATION = bytes([0x1A, 8, 0x12, 0, 0x18, 0, 0x20, 0, 0x28, 1])
_UNIGRAM, _BPE = 1, 2
_CHUNK_CHARS = {_BPE: 1 << 12, _UNIGRAM: 1 << 20}
_PROBE = f" a  b\n{SPACE} \u00e9"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. `form`: how it is used."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path, model: bytes, form: Form | None, remedy: str | None = None) -> None:
        """form: None as "exact", with a note if the model has another one. remedy: what the user should do if
        the file is damaged. Raises UserError if the file is no such model or would lose text."""
        try:
            spec = _Spec(model)
            overridden = form != "own" and spec.normalises
            if overridden:
                model += _NO_NORMALISATION
                spec = _Spec(model)
            super().__init__(path, model)
            self._spec = spec
            self.form: Form = "own" if spec.normalises else "exact"
            self._processor = sentencepiece.SentencePieceProcessor()
            # SentencePiece accepts an empty file as a model without pieces
            if not model or not self._processor.LoadFromSerializedProto(model + self._override):
                raise RuntimeError
            self.vocab_size = self._processor.get_piece_size()
            bos, eos = self._processor.bos_id(), self._processor.eos_id()
            self._bytes_of = [self._piece_bytes(i) for i in range(self.vocab_size)]
            self.specials = {
                self._processor.id_to_piece(i): Special(i)
                for i in range(self.vocab_size)
                if self._is_special(i)
            }
        except (RuntimeError, ValueError, IndexError, TypeError, OSError):
            raise UserError(
                f"tokenizer {path}: not a SentencePiece model, or damaged; {remedy or 'give another file'}"
            ) from None
        byte_ids = {self._bytes_of[i]: i for i in range(self.vocab_size) if self._processor.is_byte(i)}
        if len(byte_ids) < 256:
            raise UserError(
                f"tokenizer {path}: it has no byte pieces and would lose text; train it with byte_fallback"
            )
        if bos < 0 or eos < 0:
            raise UserError(f"tokenizer {path}: it has no bos or eos piece; train it with both")
        self.bos_id, self.eos_id = bos, eos
        self._space_character = np.array([byte_ids[bytes([byte])] for byte in SPACE.encode()], np.int32)
        self.chunk_chars = _CHUNK_CHARS.get(spec.model_type) if self._splits else None
        probe = _PROBE if self.form == "exact" else "a b"
        if self.decode(self.encode(probe)) != probe:
            raise UserError(
                f"tokenizer {path}: it has no usable piece for the space and would lose it; train it on text"
            )
        if self.form == "own":
            self.note_loss()
        elif overridden and form is None:
            self.notes.append(
                f"tokenizer {path}: used without its dummy prefix and normaliser, so that no text changes; "
                'data.tokenizer_form = "own" gives the ids that the model was trained with'
            )

    @property
    def _splits(self) -> bool:
        """Whether a text is normalised here, if at all, and cut; or SentencePiece gets it as a whole."""
        return self.form == "exact" or self._spec.only_adds_prefix

    @property
    def _override(self) -> bytes:
        """What follows the model when it is opened."""
        return _NO_NORMALISATION if self._splits else b""

    def decode(self, ids: Any) -> str:
        text = super().decode(ids)
        if not self._spec.adds_prefix:
            return text
        return text.removesuffix(" ") if self._spec.is_suffix else text.removeprefix(" ")

    def _encode(self, parts: list[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = self._processor.encode(parts, num_threads=threads(), return_type="numpy")
        return found

    def _parts(self, text: str, after_token: bool) -> Iterator[str | np.ndarray]:
        if self.form == "own":
            prefix = " " if text and self._spec.adds_prefix and self._splits else ""
            for chunk in self._chunks(text):
                yield prefix + chunk
                prefix = ""
            return
        start = 0
        while (end := text.find(SPACE, start)) >= 0:
            yield from self._chunks(text[start:end])
            yield self._space_character
            start = end + 1
        yield from self._chunks(text[start:] if start else text)

    def _cut(self, text: str, start: int) -> int | None:
        pairs = self._pairs
        for place in range(start, len(text)):
            if text[place - 1 : place + 1] not in pairs:
                return place
        return None

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """All pairs of characters that stand next to each other in a piece, with spaces as in a text."""
        pairs = set()
        for i in range(self.vocab_size):
            processor = self._processor
            if not (self._is_special(i) or processor.is_byte(i)):
                piece = processor.id_to_piece(i)
                pairs |= {piece[j : j + 2] for j in range(len(piece) - 1)}
        # in its own form a model may read U+2581 in a text as a space
        return frozenset(pairs | {pair.replace(SPACE, " ") for pair in pairs} | set(_mixed(pairs)))

    def _is_special(self, i: int) -> bool:
        return bool(self._processor.is_control(i) or self._processor.is_unknown(i))

    def _piece_bytes(self, i: int) -> bytes:
        processor = self._processor
        if self._is_special(i):
            return b""
        piece: str = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes([int(piece[1:-1], 16)])  # written <0x41>
        return piece.replace(SPACE, " ").encode()


def _mixed(pairs: set[str]) -> Iterator[str]:
    """Pairs of two spaces, each written in either way."""
    if SPACE * 2 in pairs:
        yield from (" " + SPACE, SPACE + " ")


class _Spec:
    """What a model's file says about normalisation. Raises ValueError if it is no protobuf message."""

    def __init__(self, model: bytes) -> None:
        normaliser: dict[int, Any] = {}
        trainer: dict[int, Any] = {}
        for field, value in _fields(model):
            if field in (2, 3):
                if isinstance(value, int):
                    raise ValueError("not a message")
                (trainer if field == 2 else normaliser).update(_fields(value))
        self.model_type = trainer.get(3, _UNIGRAM)
        self.adds_prefix = bool(normaliser.get(3, 1))
        removes, escapes = bool(normaliser.get(4, 1)), bool(normaliser.get(5, 1))
        others = bool(normaliser.get(2)) or removes or not escapes
        self.normalises = self.adds_prefix or others
        self.is_suffix = bool(trainer.get(24, 0))  # whether the prefix goes to the end
        self.only_adds_prefix = not others and not self.is_suffix  # LLaMA's form


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a serialised protobuf message, at its first level."""
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
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind, -1) if kind != 2 else varint()
        if size < 0 or place + size > len(message):
            raise ValueError("not a protobuf message")
        yield key >> 3, message[place : place + size]
        place += size
