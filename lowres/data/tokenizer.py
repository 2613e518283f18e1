"""The tokenizer: a SentencePiece BPE model with byte fallback, used in a way that never changes a text.

    decode(encode(text)) == text        for every text without lone surrogates

SentencePiece alone is not lossless: it can normalise text, remove or add spaces, and it stores a space as
U+2581, so this character becomes a space after decoding. Therefore:
- a model is opened with normalisation off, even if its file turns it on;
- U+2581 in a text is encoded as its three bytes;
- decoding uses a table from id to bytes.

Pieces never contain a newline, which has its own byte piece. So a text can be cut after any newline without
changing its tokens, and several threads encode the parts of long documents.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from lowres.disk import DiskError, read_whole, what_failed
from lowres.errors import UserError
from lowres.text import without_surrogates

SPACE = "\u2581"  # how SentencePiece writes a space
BYTES_AND_SPECIALS = 256 + 3
LEAST_VOCAB = BYTES_AND_SPECIALS + 1
CHUNK_CHARS = 1 << 16
GROUP_CHARS = 1 << 22

# Serialised protobuf messages can be concatenated, and the last value of a field counts. This is a
# `normalizer_spec` without character map, dummy prefix and removal of spaces, but with escaping of spaces.
_NO_NORMALISATION = bytes([0x1A, 8, 0x12, 0, 0x18, 0, 0x20, 0, 0x28, 1])


_PROBE = f" a  b\n{SPACE} \u00e9"


class Tokenizer:
    """A SentencePiece model with byte fallback.

    `vocab_size`: number of pieces. `encode` never produces `bos_id` and `eos_id`. `fingerprint`: hash of the
    file; `content`: of the file; `file_name`: of its copies. Raises UserError if it is not such a model.
    """

    file_name = "tokenizer.model"

    def __init__(self, path: str | Path, fingerprint: str | None = None, remedy: str | None = None) -> None:
        """fingerprint: that of the file, if it is known; then a changed file is never given to SentencePiece.
        remedy: what the user should do if the file is missing, changed or damaged."""
        path = Path(path)
        try:
            model = read_whole(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):  # or not an ordinary file
                raise DiskError(path, error, "read") from None
            raise UserError(
                f"tokenizer {path}: cannot be read ({what_failed(error)}); "
                f"{remedy or 'give the path of a SentencePiece model'}"
            ) from None
        self.path, self.content = path, model
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        if fingerprint not in (None, self.fingerprint):
            raise UserError(f"tokenizer {path}: changed; {remedy or 'put the original back'}")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            # SentencePiece accepts an empty file as a model without pieces
            if not model or not self._processor.LoadFromSerializedProto(model + _NO_NORMALISATION):
                raise RuntimeError
            self.vocab_size: int = self._processor.get_piece_size()
            self.bos_id: int = self._processor.bos_id()
            self.eos_id: int = self._processor.eos_id()
            self._bytes_of = [self._piece_bytes(i) for i in range(self.vocab_size)]
        except (RuntimeError, ValueError, IndexError, TypeError, OSError):
            raise UserError(
                f"tokenizer {path}: not a SentencePiece model, or damaged; {remedy or 'give another file'}"
            ) from None
        byte_ids = {self._bytes_of[i]: i for i in range(self.vocab_size) if self._processor.is_byte(i)}
        if len(byte_ids) < 256:
            raise UserError(
                f"tokenizer {path}: it has no byte pieces and would lose text; train it with byte_fallback"
            )
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"tokenizer {path}: it has no bos or eos piece; train it with both")
        self._space_character = np.array([byte_ids[bytes([byte])] for byte in SPACE.encode()], np.int32)
        # only models from elsewhere have pieces across newlines; then each document is encoded as a whole
        crosses = any(b"\n" in piece and piece != b"\n" for piece in self._bytes_of)
        self._chunk_chars = None if crosses else CHUNK_CHARS
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"tokenizer {path}: it has no usable piece for the space and would lose it; train it on text"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of the text, without bos and eos. A lone surrogate becomes U+FFFD."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [tokens] for each text, computed by one thread per core."""
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(texts, self._chunk_chars):
            encoded = self._processor.encode([chunk for _, chunk in group], num_threads=os.cpu_count() or 1)
            for (i, chunk), ids in zip(group, encoded, strict=True):
                parts[i].append(self._space_character if chunk == SPACE else np.array(ids, np.int32))
        return [np.concatenate(of_text) for of_text in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Control pieces and ids outside the vocabulary give no text; bytes that are not
        UTF-8, which a model may produce, give U+FFFD."""
        table = self._bytes_of
        return b"".join(table[i] for i in ids if 0 <= i < len(table)).decode("utf-8", "replace")

    def token_bytes(self) -> Tensor:
        """int64 [vocab_size]: number of UTF-8 bytes that each token stands for (bos and eos: 0)."""
        return torch.tensor([len(piece) for piece in self._bytes_of])

    def _piece_bytes(self, i: int) -> bytes:
        processor = self._processor
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        piece: str = processor.id_to_piece(i)
        if processor.is_byte(i):
            return bytes([int(piece[1:-1], 16)])  # written <0x41>
        return piece.replace(SPACE, " ").encode()


def _groups(texts: list[str], size: int | None) -> Iterator[list[tuple[int, str]]]:
    """(index of the text, chunk), in groups that limit the memory for Python lists of ids."""
    group: list[tuple[int, str]] = []
    characters = 0
    for i, text in enumerate(texts):
        for chunk in _chunks(without_surrogates(text), size):
            head, *rest = chunk.split(SPACE)
            group.append((i, head))
            for part in rest:
                # a chunk that is only U+2581 stands for this character itself
                group += [(i, SPACE), (i, part)]
            characters += len(chunk)
            if characters >= GROUP_CHARS:
                yield group
                group, characters = [], 0
    if group:
        yield group


def _chunks(text: str, size: int | None) -> Iterator[str]:
    """The text cut after newlines, each part as short as possible but of at least `size` characters."""
    start = 0
    while size and len(text) - start > size:
        cut = text.find("\n", start + size - 1) + 1
        if not cut:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError if this size is too small for a tokenizer of any text."""
    if vocab_size < LEAST_VOCAB:
        raise UserError(
            f"vocab_size: {vocab_size} is too small; {BYTES_AND_SPECIALS} pieces are for bytes and special "
            f"tokens, so the smallest that works is {LEAST_VOCAB}"
        )


def check_enough_pieces(pieces: int, vocab_size: int) -> None:
    """Raise UserError if a text that gives `pieces` pieces cannot give `vocab_size`."""
    if pieces < vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} is too large for this text; the largest that works is {pieces}"
        )


def train(texts: Iterable[str], vocab_size: int, exact: bool = True) -> tuple[bytes, int]:
    """Train a tokenizer on the texts; returns (content of the model file, number of pieces).

    The same texts give the same file. Raises UserError if `vocab_size` is too small for any text or, with
    `exact`, too large for these texts. Without `exact`, the result may have fewer pieces.
    """
    check_vocab_size(vocab_size)
    texts = list(texts)
    alphabet = _alphabet(texts, vocab_size - BYTES_AND_SPECIALS)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_training_lines(texts, alphabet),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # of the characters that remain, see _alphabet
        # as in LLaMA
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        # the text must not change
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        # the number is stored in the file, so it must not depend on the machine
        num_threads=2,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    if exact:
        check_enough_pieces(pieces, vocab_size)
    return model.getvalue(), pieces


def _alphabet(texts: list[str], room: int) -> set[str]:
    """The characters that get their own pieces; all others are written as bytes.

    They cover 0.9995 of the text, the usual value, but use at most half of the room for pieces, so that there
    are always pieces for words too.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    # the trainer reserves U+2585 and drops lines that contain it
    for never_in_a_piece in ("\n", "\0", "\t", SPACE, "\u2585"):
        del counts[never_in_a_piece]
    wanted = 0.9995 * counts.total()
    # an unknown space would be written as the bytes of U+2581
    alphabet = {" "}
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if wanted <= 0 or len(alphabet) >= room // 2:
            break
        alphabet.add(character)
        wanted -= count
    return alphabet


def _training_lines(texts: list[str], alphabet: set[str]) -> Iterator[str]:
    """Sequences of the alphabet's characters, at most 1000 long (the trainer drops lines over 4192 bytes)."""
    yield " "
    run = re.compile(f"[{''.join(map(re.escape, sorted(alphabet)))}]{{1,1000}}")
    for text in texts:
        yield from run.findall(text)
