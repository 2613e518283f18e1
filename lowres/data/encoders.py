"""How the documents of a source become the words of its shards.

A word of text is a token id. A chat has flags beside each id, in the low bits (`chat.encoder`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from lowres.data.manifest import Dropped
from lowres.data.tokenizer import Tokenizer

NOTHING = Dropped()
# where a document is, for messages, by its number in a batch
Places = Callable[[int], str]


class Encoded(NamedTuple):
    """words: [words], none if the document is dropped. dropped: what of it is not in the words."""

    words: np.ndarray
    dropped: Dropped = NOTHING


class Encoder(Protocol):
    @property
    def flag_bits(self) -> int:
        """How many bits of a word are below the id."""

    def encode_batch(self, texts: list[str], places: Places) -> Iterator[Encoded]:
        """The documents in order; `texts` is emptied. Raises UserError."""


class TextEncoder:
    """Documents as text: with the tokens that begin and end them."""

    flag_bits = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: list[str], places: Places) -> Iterator[Encoded]:
        ids = deque(self._tokenizer.encode_batch(texts))
        texts.clear()  # before the documents are copied once more
        while ids:
            yield Encoded(self._tokenizer.with_ends(ids.popleft()))
