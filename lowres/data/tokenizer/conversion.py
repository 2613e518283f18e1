r"""A SentencePiece model as a tokenizer.json, the file that the Hugging Face libraries read.

exact   Pieces are written with spaces, not with U+2581. So there is nothing to normalise, and U+2581 in a
        text, which no piece has, becomes its bytes. Others convert with a normaliser that replaces spaces by
        U+2581, and there U+2581 comes back as a space.
own     Pieces are as they are, and SentencePiece's normaliser is written as steps of the library.

SentencePiece merges the neighbours of the highest score, and of equal ones the leftmost. The library merges
those that come first in a list, so two splits of one piece are never equal. It matters only where both fit:
three neighbours x, y, z with xy = yz. Then xy has to come first, as it is further left.

The library finds the pieces of a Unigram model by their strings, also those of control tokens and bytes. So a
text is split inside such a string, where no other piece goes across if there is such a place.
"""

from __future__ import annotations

import base64
from typing import Any

from lowres.data.tokenizer.base import SPACE
from lowres.data.tokenizer.ends import in_front
from lowres.data.tokenizer.sentencepiece_file import BPE, UNIGRAM, Type, types_of
from lowres.data.tokenizer.sentencepiece_model import SentencePieceTokenizer

Node = dict[str, Any]


def as_json(tokenizer: SentencePieceTokenizer) -> Node:
    """The content of a tokenizer.json with the ids of this tokenizer, and bos in front of a text."""
    pieces = _Pieces(tokenizer)
    unigram = tokenizer.spec.model_type == UNIGRAM
    bos = tokenizer.bos_id
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces, [] if unigram else pieces.user_defined),
        "normalizer": _normaliser(tokenizer) if tokenizer.form == "own" else None,
        "pre_tokenizer": _split_names(pieces) if unigram else None,
        "post_processor": in_front(bos, pieces.names[bos]),
        "decoder": _decoder(tokenizer),
        "model": _unigram(pieces) if unigram else _bpe(pieces, tokenizer.spec.model_type == BPE),
    }


class _Pieces:
    """The pieces of a model. names: as they are written. scores. controls: ids without text. normal: ids of
    the pieces that are found by their scores. user_defined: of those that are found before any other."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        processor = tokenizer.processor
        every = range(tokenizer.vocab_size)
        self.names: list[str] = [processor.id_to_piece(i) for i in every]
        self.scores: list[float] = [processor.get_score(i) for i in every]
        self.unknown: int = processor.unk_id()
        self.controls = [i for i in every if processor.is_control(i) or processor.is_unknown(i)]
        # SentencePiece does not find those with a space, as it has replaced it
        types = types_of(tokenizer.content)
        found = [i for i in every if types[i] is Type.USER_DEFINED]
        self.user_defined = [i for i in found if " " not in self.names[i]]
        not_spelt = {*self.controls, *filter(processor.is_byte, every)}
        if tokenizer.form == "exact":
            for i in every:
                if i not in not_spelt:
                    self.names[i] = self.names[i].replace(SPACE, " ")
        others = {*not_spelt, *found, *filter(processor.is_unused, every)}
        self.normal = {name: i for i, name in enumerate(self.names) if i not in others}


def _bpe(pieces: _Pieces, merges: bool) -> Node:
    ids, scores = pieces.normal, pieces.scores
    merged = sorted(ids.values(), key=lambda i: (-scores[i], i))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces.names[pieces.unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(pieces.names)},
        "merges": [pair for i in merged for pair in splits(pieces.names[i], ids)] if merges else [],
    }


def splits(piece: str, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """The ways to put a piece together from two, in their order among the merges."""
    size = len(piece)
    cuts = [cut for cut in range(1, size) if piece[:cut] in pieces and piece[cut:] in pieces]

    def place(cut: int) -> tuple[int, bool]:
        # Only the splits at `low` and `high` fit into the same x, y, z. In a repetition both x, y, x and
        # y, x, y are possible, but runs are merged from the left, so the longer part comes first in them.
        low = min(cut, size - cut)
        high = size - low
        first = high if piece.startswith(piece[high:]) else low
        return low, cut != first

    return [(piece[:cut], piece[cut:]) for cut in sorted(cuts, key=place)]


def _unigram(pieces: _Pieces) -> Node:
    scores = list(pieces.scores)
    best = max((scores[i] for i in pieces.normal.values()), default=0.0)
    for i in pieces.user_defined:  # SentencePiece's own rule
        scores[i] = len(pieces.names[i]) * best - 0.1
    return {
        "type": "Unigram",
        "unk_id": pieces.unknown,
        "vocab": [[name, score] for name, score in zip(pieces.names, scores, strict=True)],
        "byte_fallback": True,
    }


def _split_names(pieces: _Pieces) -> Node:
    """What keeps the library from finding control tokens and bytes in a text."""
    pairs = {name[j : j + 2] for name in pieces.normal for j in range(len(name) - 1)}

    def place(name: str, cuts: range) -> int:
        return next((cut for cut in cuts if name[cut - 1 : cut + 1] not in pairs), 1)

    cut = place("<0x", range(1, 3))
    places = [f"(?<={_literal('<0x'[:cut])})(?={_literal('<0x'[cut:])}[0-9A-F]{{2}}>)"]
    for name in (pieces.names[i] for i in pieces.controls):
        cut = place(name, range(1, len(name)))
        places.append(f"(?<={_literal(name[:cut])})(?={_literal(name[cut:])})")
    return {
        "type": "Split",
        "pattern": {"Regex": "|".join(places)},
        "behavior": "Isolated",
        "invert": False,
    }


def _literal(text: str) -> str:
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)


def _normaliser(tokenizer: SentencePieceTokenizer) -> Node:
    """SentencePiece's own: characters, spaces that are too many, the prefix, U+2581."""
    spec = tokenizer.spec
    steps: list[Node] = []
    if spec.character_map:
        content = base64.b64encode(spec.character_map).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": content})
    if spec.removes_spaces:
        # at the end, it looks for spaces that it has replaced
        steps += [_replaced(r"\A +", ""), _replaced(" {2,}", " "), _replaced(f"[ {SPACE}]+\\z", "")]
    if spec.adds_prefix:
        prefix = _replaced(r"\z", SPACE) if spec.is_suffix else {"type": "Prepend", "prepend": SPACE}
        steps.append(prefix)
    if spec.escapes_spaces:
        steps.append(_replaced(" ", SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _replaced(pattern: str, content: str) -> Node:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoder(tokenizer: SentencePieceTokenizer) -> Node:
    parts: list[Node] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.form == "own":
        parts.insert(0, {"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
        if tokenizer.spec.adds_prefix:
            # at the end of an empty text, Strip panics
            strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
            parts.append(_replaced(r" \z", "") if tokenizer.spec.is_suffix else strip)
    return {"type": "Sequence", "decoders": parts}


def _added(pieces: _Pieces, others: list[int]) -> list[Node]:
    """The control tokens, and other pieces that are longer than a character, which are found in any case."""
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = dict.fromkeys(pieces.controls, True) | {i: False for i in others if len(pieces.names[i]) > 1}
    return [
        {"id": i, "content": pieces.names[i], **off, "special": special} for i, special in sorted(ids.items())
    ]
