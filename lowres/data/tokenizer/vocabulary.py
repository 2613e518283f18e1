"""Ids without text: the vocabulary of a corpus that was tokenised elsewhere.

vocabulary.json is a sealed record of its size and of the ids that begin and end a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from lowres.data.tokenizer.base import Tokenizer
from lowres.data.tokenizer.streaming import Each, Stream
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, seal, unseal

_ID = re.compile(r"<(\d{1,10})>", re.ASCII)


class _Record(Record):
    vocab_size: Annotated[int, Field(ge=1, lt=1 << 31)]
    bos_id: Annotated[int, Field(ge=0)] | None = None
    eos_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_ids(self) -> _Record:
        for key in ("bos_id", "eos_id"):
            if (getattr(self, key) or 0) >= self.vocab_size:
                raise ValueError(f"{key}: outside the vocabulary")
        return self


class Vocabulary(Tokenizer):
    """Ids only: `decode` writes them as <17><4>, and `encode` reads nothing else. `bos_id` is -1 if there is
    none."""

    file_name = "vocabulary.json"
    has_text = False

    def __init__(self, path: Path, content: bytes, remedy: str | None = None) -> None:
        """Raises UserError if the content is not what `content_of` made."""
        super().__init__(path, content)
        try:
            record = unseal(content, _Record)
        except Damaged as error:
            raise UserError(f"tokenizer {path}: damaged ({error}); {remedy or 'give another file'}") from None
        self.vocab_size = record.vocab_size
        self.bos_id = -1 if record.bos_id is None else record.bos_id
        self.eos_id = record.eos_id
        self._bytes_of = [b""] * self.vocab_size
        self.notes.append(
            f"tokenizer {path}: it has ids only, so there are no bits per byte, and samples are ids"
        )

    @staticmethod
    def content_of(vocab_size: int, bos_id: int | None, eos_id: int | None) -> bytes:
        """The file of a vocabulary. Raises ValueError if an id is outside of it."""
        return seal(_Record(vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id).model_dump())

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    def stream(self) -> Stream:
        return Each(self.decode)

    def with_ends(self, ids: np.ndarray) -> np.ndarray:
        ids = super().with_ends(ids)
        return ids[1:] if self.bos_id < 0 else ids

    @property
    def delimiter(self) -> int:
        return self.eos_id if self.bos_id < 0 and self.eos_id is not None else self.bos_id

    def prompt(self, text: str) -> list[int]:
        first = [] if self.bos_id < 0 else [self.bos_id]
        # a model needs one id at least
        return [*first, *self.encode(text)] or [0]

    def _encode(self, parts: list[str]) -> list[np.ndarray]:
        return [self._ids(part) for part in parts]

    def _ids(self, text: str) -> np.ndarray:
        ids = [int(number) for number in _ID.findall(text)]
        if self.decode(ids) != text or max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"tokenizer {self.path}: it has ids only; give ids below {self.vocab_size} as <17><4>"
            )
        return np.array(ids, np.int32)
