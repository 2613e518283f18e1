"""SentencePiece models with byte fallback, in one of two forms.

exact   decode(encode(text)) == text for every text without lone surrogates. SentencePiece alone is not
        lossless: it can normalise text, remove or add spaces, and it stores a space as U+2581, so this
        character becomes a space after decoding. So normalisation is off, and U+2581 in a text is encoded as
        its three bytes.
own     the ids of SentencePiece's own `encode`, with the dummy prefix and the normaliser that the model was
        trained with

The file says its form: a model that normalises is exact if NO_NORMALISATION follows it. So a copy needs no
record of it, and a model that does not normalise is exact as it is.

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
from lowres.data.tokenizer.companions import CONFIG, TEMPLATE, Companions, read_beside
from lowres.data.tokenizer.sentencepiece_file import (
    BPE,
    NO_NORMALISATION,
    UNIGRAM,
    Spec,
    split_record,
    with_record,
)
from lowres.data.tokenizer.streaming import ByTable, Stream
from lowres.errors import UserError
from lowres.sealed import seal, unseal

Form = Literal["exact", "own"]
_CHUNK_CHARS = {BPE: 1 << 12, UNIGRAM: 1 << 20}
_PROBE = f" a  b\n{SPACE} \u00e9"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. `form`: how it is used."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path, content: bytes, form: Form | None, remedy: str | None = None) -> None:
        """form: None as "exact", with a note if the model has another one. remedy: what the user should do if
        the file is damaged. Raises UserError if the file is no such model or would lose text."""
        try:
            model, record = split_record(content)
            spec = Spec(model)
            overridden = form != "own" and spec.normalises
            if overridden:
                model += NO_NORMALISATION
                spec = Spec(model)
            beside, notes = (unseal(record, Companions), []) if record else read_beside(path)
            companions = _what_comes_along(beside)
            content = with_record(model, seal(companions.model_dump())) if companions.files else model
            super().__init__(path, content, model, companions)
            self.notes += notes
            self.spec = spec
            self.form: Form = "own" if spec.normalises else "exact"
            self.processor = sentencepiece.SentencePieceProcessor()
            # SentencePiece accepts an empty file as a model without pieces
            if not model or not self.processor.LoadFromSerializedProto(model + self._override):
                raise RuntimeError
            self.vocab_size = self.processor.get_piece_size()
            bos, eos = self.processor.bos_id(), self.processor.eos_id()
            self._bytes_of = [self._piece_bytes(i) for i in range(self.vocab_size)]
            self.specials = {
                self.processor.id_to_piece(i): Special(i)
                for i in range(self.vocab_size)
                if self._is_special(i)
            }
            if not record:
                self._note_missing(beside)
        except (RuntimeError, ValueError, IndexError, TypeError, OSError):
            raise UserError(
                f"tokenizer {path}: not a SentencePiece model, or damaged; {remedy or 'give another file'}"
            ) from None
        byte_ids = {self._bytes_of[i]: i for i in range(self.vocab_size) if self.processor.is_byte(i)}
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
        return self.form == "exact" or self.spec.only_adds_prefix

    @property
    def _override(self) -> bytes:
        """What follows the model when it is opened."""
        return NO_NORMALISATION if self._splits else b""

    def decode(self, ids: Any) -> str:
        text = super().decode(ids)
        if not self.spec.adds_prefix:
            return text
        return text.removesuffix(" ") if self.spec.is_suffix else text.removeprefix(" ")

    def stream(self) -> Stream:
        added = " " if self.spec.adds_prefix else ""
        prefix, suffix = ("", added) if self.spec.is_suffix else (added, "")
        return ByTable(self._bytes_of, prefix, suffix)

    def content_with(self, companions: Companions) -> bytes:
        return with_record(self.core, seal(companions.model_dump()))

    def _encode(self, parts: list[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.processor.encode(parts, num_threads=threads(), return_type="numpy")
        return found

    def _parts(self, text: str, after_token: bool) -> Iterator[str | np.ndarray]:
        if self.form == "own":
            prefix = " " if text and self.spec.adds_prefix and self._splits else ""
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
            processor = self.processor
            if not (self._is_special(i) or processor.is_byte(i)):
                piece = processor.id_to_piece(i)
                pairs |= {piece[j : j + 2] for j in range(len(piece) - 1)}
        # in its own form a model may read U+2581 in a text as a space
        return frozenset(pairs | {pair.replace(SPACE, " ") for pair in pairs} | set(_mixed(pairs)))

    def _is_special(self, i: int) -> bool:
        return bool(self.processor.is_control(i) or self.processor.is_unknown(i))

    def _note_missing(self, beside: Companions) -> None:
        """Note the tokens that others have added to the vocabulary of the model."""
        added = beside.content_of(CONFIG).get("added_tokens_decoder") or {}
        names = [token.get("content") for token in added.values() if isinstance(token, dict)]
        names += beside.content_of("added_tokens.json")
        pieces = self.processor
        missing = [name for name in names if name and pieces.id_to_piece(pieces.piece_to_id(name)) != name]
        if missing:
            self.notes.append(
                f"tokenizer {self.path}: the model has no {missing[0]!r}, which files in the same folder "
                "add; a tokenizer.json would have it"
            )

    def _piece_bytes(self, i: int) -> bytes:
        processor = self.processor
        if self._is_special(i):
            return b""
        piece: str = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes([int(piece[1:-1], 16)])  # written <0x41>
        return piece.replace(SPACE, " ").encode()


def _what_comes_along(beside: Companions) -> Companions:
    """The files that may have a chat template, if they do; all else is in the model."""
    kept = {CONFIG, TEMPLATE} if beside.chat_template else set()
    return Companions(files={name: text for name, text in beside.files.items() if name in kept})


def _mixed(pairs: set[str]) -> Iterator[str]:
    """Pairs of two spaces, each written in either way."""
    if SPACE * 2 in pairs:
        yield from (" " + SPACE, SPACE + " ")
