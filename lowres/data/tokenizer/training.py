"""Training a tokenizer: a SentencePiece BPE model with byte fallback that never changes a text."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece

from lowres.data.tokenizer.base import SPACE
from lowres.errors import UserError

BYTES_AND_SPECIALS = 256 + 3
LEAST_VOCAB = BYTES_AND_SPECIALS + 1


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
