"""What takes the place of a tokenizer where a corpus has only ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lowres.data.manifest import hash_of
from lowres.data.tokenizer import Tokenizer
from lowres.disk import DiskError, read_whole
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, seal, unseal

VOCABULARY = "vocabulary.json"
_ID = re.compile(r"<(\d+)>")


class _Record(Record):
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    bos_id: Annotated[int, Field(ge=0)] | None
    eos_id: Annotated[int, Field(ge=0)] | None


class IdsOnly(Tokenizer):
    """A vocabulary whose pieces are not known: text is written as ids, <17><3>.

    bos_id: what begins a document, or else separates documents; None if that is not known. eos_id: what ends
    one, if it is another id.
    """

    file_name = VOCABULARY

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None) -> None:
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = bos_id, eos_id  # type: ignore[assignment]
        self.path = Path(VOCABULARY)
        record = _Record(vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id)
        self.content = seal(record.model_dump())
        self.fingerprint = hash_of("ids only", vocab_size, bos_id, eos_id)

    @classmethod
    def opened(cls, path: Path) -> IdsOnly:
        """From the file in a run or a checkpoint. Raises UserError."""
        try:
            found = unseal(read_whole(path), _Record)
        except OSError as error:
            raise DiskError(path, error, "read") from None
        except Damaged as error:
            raise UserError(f"{path}: damaged ({error}); put the original back") from None
        return cls(found.vocab_size, found.bos_id, found.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that is written as ids. Raises UserError for any other."""
        ids = [int(found) for found in _ID.findall(text)]
        if _ID.sub("", text).strip() or any(i >= self.vocab_size for i in ids):
            raise UserError(
                f"a text of ids is needed, such as <17><3>, each below {self.vocab_size:,}: the model was "
                "trained on ids without a tokenizer"
            )
        return ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    def token_bytes(self) -> Tensor:
        """int64 [vocab_size] of zeros: it is not known what bytes a token stands for."""
        return torch.zeros(self.vocab_size, dtype=torch.int64)


def open_vocabulary(path: Path) -> Tokenizer:
    """A tokenizer, or what takes its place. Raises UserError."""
    return IdsOnly.opened(path) if path.name == VOCABULARY else Tokenizer(path)
