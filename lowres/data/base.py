"""What a run trains and is evaluated on: the interface of all data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lowres.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class NamedText:
    """A validation text with a name. fingerprint: changes with its tokens. windows: as `Data.validation`."""

    name: str
    fingerprint: str
    windows: Callable[[int], Tensor]


class Data(ABC):
    """Training and validation tokens.

    `tokenizer`, and `vocab_size`, the number of its pieces; `notes` for the user; `fingerprint`, which
    changes whenever the batches may change, and `validation_fingerprint` for the validation tokens;
    `train_tokens`, None until a stream has ended; `folder` of the tokens; `texts`, which are evaluated beside
    the validation tokens.
    """

    texts: Sequence[NamedText] = ()

    folder: Path
    seq_len: int
    tokenizer: Tokenizer
    vocab_size: int
    notes: list[str]
    fingerprint: str
    validation_fingerprint: str

    @property
    @abstractmethod
    def train_tokens(self) -> int | None: ...

    def epoch(self, reached: int) -> int | None:
        """Sequences in an epoch; None if that is not known. reached: of a stream, whose end may be waited
        for, see `TokenData`."""
        return None

    def length(self) -> int | None:
        """Sequences in an epoch, if that is known without waiting."""
        return None if self.train_tokens is None else self.epoch(0)

    @abstractmethod
    def batch(self, step: int, sequences: int, offset: int = 0) -> Tensor:
        """int64 [sequences, seq_len + 1] on the CPU: inputs are [:, :-1], targets [:, 1:].

        offset: how many more sequences the earlier steps had than `sequences` each; negative if fewer.
        """

    @abstractmethod
    def validation(self, max_tokens: int) -> Tensor:
        """int64 [windows, seq_len + 1]: the first `max_tokens` validation targets (0: all of them).

        The windows have a stride of seq_len, so every token except the very first is a target once. The last
        window is padded with IGNORED; `inputs_and_targets` turns this into valid inputs.
        """

    def validation_parts(self, max_tokens: int) -> dict[str, Tensor]:
        """The windows of `validation` by the name of the part that they come from; "" if there is one."""
        return {"": self.validation(max_tokens)}

    @abstractmethod
    def hashes(self, validation: bool = False) -> Iterator[np.ndarray]:
        """uint64 [documents], for each shard so far: the hashes of the documents that are trained on, or of
        the validation documents, where they are known; see `hashes`."""

    @abstractmethod
    def close(self) -> None:
        """Stop the threads of streams. Not needed when the process ends."""
