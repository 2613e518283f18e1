"""The files of a tokenizer in a folder of a Hugging Face model.

A SentencePiece model becomes a tokenizer.json, and transformers is told to use that as it is: under the names
of its own classes, version 5 makes another one of the vocabulary. Text is only text there too, except with a
chat template, which spells control tokens. The tokenizer.model stands beside it for programs that look for
U+2581 in pieces, and for us: a tokenizer.json that was made of it says so, and then it is opened instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lowres.data.tokenizer.base import PROBES, SPACE, Tokenizer
from lowres.data.tokenizer.companions import CONFIG, TEMPLATE, Companions
from lowres.data.tokenizer.conversion import as_json
from lowres.data.tokenizer.huggingface import JsonTokenizer, ids_of, with_companions
from lowres.data.tokenizer.sentencepiece_file import UNIGRAM
from lowres.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lowres.errors import UserError

# of texts that are compared: pieces in one, how far apart they are in the vocabulary, how often a piece is
# repeated, and a character
_JOINED, _STRIDE, _REPEATED, _LONGEST_RUN = 12, 7919, 5, 64


@dataclass(frozen=True)
class Exported:
    """files: contents by name. notes: what the user should know."""

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def exported(tokenizer: Tokenizer, trained_on_text: bool = True) -> Exported:
    """What a folder needs so that other programs have this tokenizer; nothing if it has ids only.
    trained_on_text: whether its model was, with bos in front of every document. Raises UserError if a piece
    of its vocabulary is damaged."""
    if isinstance(tokenizer, JsonTokenizer):
        return _as_it_came(tokenizer, trained_on_text)
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            return _converted(tokenizer)
        except UnicodeDecodeError:
            raise UserError(
                f"tokenizer {tokenizer.path}: damaged (a piece is not UTF-8); give another file"
            ) from None
    return Exported()


def _as_it_came(tokenizer: JsonTokenizer, trained_on_text: bool) -> Exported:
    description = tokenizer.as_it_came()
    files = {JsonTokenizer.file_name: _json(description)}
    files |= {name: text.encode() for name, text in tokenizer.companions.files.items()}
    tokens = {i: token for token, i in ids_of(description).items()}
    if CONFIG not in files:
        files[CONFIG] = _config(tokenizer, tokens, description["model"].get("unk_token"))
    around = [tokens[i] for i in tokenizer.around]
    bos = tokens[tokenizer.bos_id]
    if around == [bos] or not trained_on_text:
        return Exported(files)
    return Exported(
        files,
        [
            f"tokenizer {tokenizer.path}: as it came, it puts {' and '.join(around) or 'nothing'} around a "
            f"text; the model was trained with {bos} in front"
        ],
    )


def _converted(tokenizer: SentencePieceTokenizer) -> Exported:
    about = f"tokenizer {tokenizer.path}: "
    files = {SentencePieceTokenizer.file_name: tokenizer.core}
    description = as_json(tokenizer)
    files[JsonTokenizer.file_name] = _json(
        with_companions(description, Companions(made_of=tokenizer.fingerprint))
    )
    came, template = tokenizer.companions, tokenizer.chat_template
    more: dict[str, Any] = {}
    if TEMPLATE in came.files:
        files[TEMPLATE] = came.files[TEMPLATE].encode()
    elif template is not None:
        more["chat_template"] = came.content_of(CONFIG)["chat_template"]
    names = {i: tokenizer.processor.id_to_piece(i) for i in range(tokenizer.vocab_size)}
    settings = {"add_bos_token": True, "add_eos_token": False, "split_special_tokens": template is None}
    files[CONFIG] = _config(tokenizer, names, names[tokenizer.processor.unk_id()], **settings, **more)
    notes = [about + note for note in _differences(tokenizer, description)]
    if tokenizer.spec.model_type == UNIGRAM:
        notes.append(
            f"{about}the library tokenizers adds the scores of a Unigram model with other precision, so in "
            "rare places it divides a text in another way"
        )
    if template is not None:
        notes.append(
            f"{about}its chat template spells control tokens, so in any text transformers reads "
            f"{names[tokenizer.bos_id]!r} as one"
        )
    return Exported(files, notes)


def _config(tokenizer: Tokenizer, tokens: dict[int, str], unknown: str | None, **more: Any) -> bytes:
    """A tokenizer_config.json with which transformers 4 and 5 use a tokenizer.json as it is."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[tokenizer.bos_id],
        "eos_token": tokens[tokenizer.end_id],
        "clean_up_tokenization_spaces": False,
        # otherwise token_type_ids too, which no LLaMA takes
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if unknown is not None:
        settings["unk_token"] = unknown
    return _json(settings | more, indent=2)


def _differences(tokenizer: SentencePieceTokenizer, description: dict[str, Any]) -> list[str]:
    """A note on texts to which the library gives other ids, or other text to their ids, with an example."""
    try:
        import tokenizers
    except ImportError:
        return ["its tokenizer.json was not compared with it; pip install tokenizers"]
    library = tokenizers.Tokenizer.from_str(json.dumps(description))
    library.encode_special_tokens = True
    texts = _to_compare(tokenizer)
    theirs = library.encode_batch_fast(texts, add_special_tokens=False)
    found: list[str] = []
    for text, ours, encoding in zip(texts, tokenizer.encode_batch(texts), theirs, strict=True):
        ids = ours.tolist()
        before, after = tokenizer.decode(ids), library.decode(ids)
        if encoding.ids != ids:
            found.append(f"{text!r} is {_shown(encoding.ids)} instead of {_shown(ids)}")
        elif before != after:
            found.append(f"{_shown(ids)} is {after!r} instead of {before!r}")
    if not found:
        return []
    how_many = f"{len(found)} of {len(texts)} texts that were compared"
    return [f"{how_many} come out otherwise by the library tokenizers, e.g. {min(found, key=len)}"]


def _shown(ids: list[int]) -> str:
    return " ".join(map(str, ids)) or "nothing"


def _to_compare(tokenizer: SentencePieceTokenizer) -> list[str]:
    """What tokenizers are known to change, and all pieces: alone, repeated, and beside others."""
    count = tokenizer.vocab_size
    names = [tokenizer.processor.id_to_piece(i) for i in range(count)]
    pieces = [name.replace(SPACE, " ") for name in names]
    joined = [
        "".join(pieces[(start + _STRIDE * k) % count] for k in range(_JOINED))
        for start in range(0, count, _JOINED)
    ]
    there = set(pieces)
    runs = [c * n for c in there if len(c) == 1 and c * 2 in there for n in range(2, _LONGEST_RUN)]
    texts = [*PROBES, *pieces, *(piece * _REPEATED for piece in pieces), *joined, *runs]
    return list(dict.fromkeys(texts))


def _json(content: dict[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=indent).encode() + b"\n"
