"""What every tokenizer does: encode on all cores in bounded memory, and decode by a table from id to bytes.

A long text is cut where no token can span the cut, so its ids are those of the whole text. The parts of all
texts go to the library in groups, and a group leaves nothing but its ids.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowres.data.tokenizer.companions import Companions
from lowres.data.tokenizer.streaming import ByTable, Stream
from lowres.errors import UserError
from lowres.text import without_surrogates

SPACE = "\u2581"  # how SentencePiece, and what derives from it, writes a space
GROUP_CHARS = 1 << 22
# of text that is looked at: share that may be lost, number of texts, characters that are shown
LARGEST_LOSS, LOOKED_AT, SHOWN = 0.1, 200, 40
# what tokenizers are known to change: characters that NFC and NFKC compose or replace, white space, capitals;
# then characters with every byte that UTF-8 has
PROBES = (
    "\ufb01",
    "e\u0301",
    "\u00e9",
    "a  b",
    "a\n\nb",
    "a\tb",
    "a\r\nb",
    "\u00a0",
    "A",
    "\u4e2d",
    "a, b",
    "\0",
    "\U0001f600",
    "a <0x41>",
    " a",
    "a ",
    "a",
    "",
    f"a{SPACE}b",
    *map(chr, (*range(256), *range(0x100, 0x800, 0x40), 0x800, *range(0x1000, 0x10000, 0x1000))),
    *map(chr, range(0x10000, 0x110000, 0x40000)),
)


@dataclass(frozen=True)
class Special:
    """A token that no text gives, not even its spelling. `is_text`: it stands for its spelling all the same;
    otherwise it is a control token, and stands for nothing. In a chat template, which may write it: it takes
    the white space on its left or right along, or is none as a part of a word."""

    id: int
    is_text: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Tokenizer(ABC):
    """A way to write text as ids.

    `vocab_size`: the largest id + 1. `bos_id` begins every document; `eos_id` ends it, or is None if there is
    no other token than bos between documents. `encode` produces neither, and none of `specials`, which are by
    their spelling. `content`: the bytes of the file
    that makes this tokenizer again, `file_name` its name in folders of prepared data, runs and checkpoints,
    and `core` is what decides the ids: the content without the `companions` that came along. `fingerprint`:
    the hash of the core. `path`: where it was opened. `notes`: what the user should know. `has_text`: whether
    ids stand for text.
    """

    file_name: str
    has_text = True
    # cut texts longer than this; None: never
    chunk_chars: int | None = None

    def __init__(
        self, path: Path, content: bytes, core: bytes | None = None, companions: Companions | None = None
    ) -> None:
        """core: None if it is the content."""
        self.path = path
        self.content = content
        self.core = content if core is None else core
        self.companions = companions or Companions()
        self.fingerprint = digest(self.core)
        self.notes: list[str] = []
        self.vocab_size: int
        self.bos_id: int
        self.eos_id: int | None
        self.specials: dict[str, Special] = {}
        self._bytes_of: list[bytes]  # of each id

    def encode(self, text: str) -> list[int]:
        """The ids of the text, without bos and eos. A lone surrogate becomes U+FFFD. Raises UserError if ids
        have no text."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: list[str], after_token: bool = False) -> list[np.ndarray]:
        """int32 [tokens] for each text, computed by one thread per core. after_token: they stand behind a
        special token, so what some tokenizers put in front of the first text is not there. Raises as
        `encode`."""
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(self._numbered_parts(texts, after_token)):
            encoded = iter(self._encode([part for _, part in group if isinstance(part, str)]))
            parts: dict[int, list[np.ndarray]] = {}
            for i, part in group:
                parts.setdefault(i, []).append(next(encoded) if isinstance(part, str) else part)
            for i, of_text in parts.items():
                found[i].append(np.concatenate(of_text) if len(of_text) > 1 else of_text[0])
        return [_joined(of_text) for of_text in found]

    def with_ends(self, ids: np.ndarray) -> np.ndarray:
        """A document as it is stored: bos, its tokens, and eos if there is one."""
        last = [] if self.eos_id is None else [self.eos_id]
        return np.concatenate((np.array([self.bos_id], np.int32), ids, np.array(last, np.int32)))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template with which a conversation becomes text; None if none came along."""
        return self.companions.chat_template

    @cached_property
    def around(self) -> list[int]:
        """The ids that other programs put around a text, where they have this tokenizer."""
        return [self.bos_id]

    @property
    def end_id(self) -> int:
        """The token after which a document is over: eos, or bos of the next one."""
        return self.bos_id if self.eos_id is None else self.eos_id

    @property
    def delimiter(self) -> int:
        """The token that every document has once."""
        return self.bos_id

    def prompt(self, text: str) -> list[int]:
        """The ids with which a model continues a text: bos and its tokens."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Control tokens and ids outside the vocabulary give no text; bytes that are not
        UTF-8, which a model may produce, give U+FFFD."""
        table = self._bytes_of
        return b"".join(table[i] for i in ids if 0 <= i < len(table)).decode("utf-8", "replace")

    def stream(self) -> Stream:
        """Decodes ids as they come."""
        return ByTable(self._bytes_of)

    def token_bytes(self) -> Tensor:
        """int64 [vocab_size]: number of UTF-8 bytes that each token stands for (control tokens: 0)."""
        return torch.tensor(self.sizes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """What `token_bytes` has, as an array."""
        return np.array([len(piece) for piece in self._bytes_of], np.int64)

    @cached_property
    def loss(self) -> tuple[str, str] | None:
        """A text that is not the same after encoding and decoding, and what it becomes; None if there is none
        among the probes."""
        for probe, ids in zip(PROBES, self.encode_batch(list(PROBES)), strict=True):
            found = self.decode(ids.tolist())
            if found != probe:
                return probe, found
        return None

    def note_loss(self) -> None:
        """Note that texts change, with an example."""
        if self.loss is not None:
            before, after = self.loss
            self.notes.append(f"tokenizer {self.path}: it changes text, e.g. {before!r} -> {after!r}")

    def content_with(self, companions: Companions) -> bytes:
        """The file of this tokenizer, in which others come along."""
        return self.content

    @abstractmethod
    def _encode(self, parts: list[str]) -> list[np.ndarray]:
        """int32 [tokens] for each part, as if it were all of a text or followed a cut."""

    def _parts(self, text: str, after_token: bool) -> Iterator[str | np.ndarray]:
        """What a text consists of: parts to encode, or ids. At least one. after_token: see `encode_batch`."""
        return self._chunks(text)

    def _cut(self, text: str, start: int) -> int | None:
        """The first place from `start` on where the text can be cut without changing its ids; None if that is
        nowhere known."""
        return None

    def _chunks(self, text: str) -> Iterator[str]:
        """The text in parts of `chunk_chars` characters or a little more."""
        size, start = self.chunk_chars, 0
        while size and len(text) - start > size:
            cut = self._cut(text, start + size)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _numbered_parts(self, texts: list[str], after_token: bool) -> Iterator[tuple[int, str | np.ndarray]]:
        for i, text in enumerate(texts):
            for part in self._parts(without_surrogates(text), after_token):
                yield i, part


def check_lost(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """A note on characters of the texts that a tokenizer does not keep, white space aside. Raises UserError
    if they are more than LARGEST_LOSS of them: the tokenizer is not for such text."""
    if tokenizer.loss is None:
        return []
    before = lost = 0
    example = ("", "")
    for text in texts[:: -(-len(texts) // LOOKED_AT) or 1]:
        kept = tokenizer.decode(tokenizer.encode(text))
        count = len("".join(text.split()))
        missing = max(0, count - len("".join(kept.split())))
        if missing and not lost:
            example = text.strip()[:SHOWN], kept.strip()[:SHOWN]
        before, lost = before + count, lost + missing
    if not lost:
        return []
    what = f"tokenizer {tokenizer.path}: {lost / before:.2%} of the characters of the text are lost"
    if lost > LARGEST_LOSS * before:
        raise UserError(f"{what}, e.g. {example[0]!r} -> {example[1]!r}; give a tokenizer for such text")
    return [what]


def digest(content: bytes) -> str:
    """The fingerprint of a tokenizer whose core this is."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def threads() -> int:
    """How many threads encode: the cores this process may use, or fewer if OMP_NUM_THREADS says so."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) > 0 else cores


def _groups(parts: Iterable[tuple[int, str | np.ndarray]]) -> Iterator[list[tuple[int, str | np.ndarray]]]:
    """The parts in groups of about GROUP_CHARS characters, which limit what the library holds at one time."""
    group: list[tuple[int, str | np.ndarray]] = []
    characters = 0
    for i, part in parts:
        group.append((i, part))
        characters += len(part)
        if characters >= GROUP_CHARS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """All parts as one array; each is released as soon as it is copied."""
    if len(parts) == 1:
        return parts.pop()
    whole = np.empty(sum(map(len, parts)), np.int32)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole
