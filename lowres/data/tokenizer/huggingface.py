"""tokenizer.json: what the library `tokenizers` writes, used for text that is only text.

The library would turn the spelling of a control token in a text, such as <|im_start|>, into the control
token. It can be told not to, but not for all kinds: added tokens that are not marked as special, and a
vocabulary that is matched by string, still give them. So the file is opened with those tokens under names
that no text has; their ids stay. What else would change documents is off: truncation, padding, dropout, and
the post-processor, as bos and eos are added here. White space that was added as a token is text and stays.

A copy has a post-processor of ours (`ends`). In it comes along the original one, with the files beside it,
for the day on which the model is taken elsewhere.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowres.data.tokenizer.base import SPACE, Special, Tokenizer, threads
from lowres.data.tokenizer.companions import Companions, read_beside
from lowres.data.tokenizer.ends import find_ends, template
from lowres.data.tokenizer.streaming import ByTable, Late, Stream
from lowres.errors import UserError, first_line
from lowres.sealed import Damaged, parse, seal, unseal

Node = dict[str, Any]
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_BOUNDARY = re.compile(r"\b")
# characters on either side of a cut in which it must make no difference, and places to try
_CONTEXT = 128
_TRIES = 16
_LARGEST_VOCAB = 1 << 24
_KEY = "lowres"
# keys of an added token about the text beside it
_BESIDE = ("lstrip", "rstrip", "single_word")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json. Raises UserError if it is none."""

    file_name = "tokenizer.json"
    chunk_chars = 1 << 16

    def __init__(
        self,
        path: Path,
        content: bytes,
        bos: str | int | None = None,
        eos: str | int | None = None,
        remedy: str | None = None,
    ) -> None:
        """bos, eos: tokens or ids that begin and end a document, if the user says so. remedy: what the user
        should do if the file is damaged."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"tokenizer {path}: a tokenizer.json needs the package tokenizers: pip install tokenizers"
            ) from None
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads()))
        self._open: Callable[[str], Any] = tokenizers.Tokenizer.from_str
        try:
            description = json.loads(content)
            companions, notes, is_new = _companions(path, description)
            ids = ids_of(description)
            added = description.get("added_tokens") or []
            names = {token["content"] for token in added} or ids.keys()
            ends = find_ends(path, description, companions, ids, names, bos, eos)
            tokens = {i: token for token, i in ids.items()}
            processor = template(ends, tokens)
            core = content
            if not is_new or companions.files or description.get("post_processor") != processor:
                description["post_processor"] = processor
                content, core = _written(with_companions(description, companions)), _written(description)
            super().__init__(path, content, core, companions)
            self.notes += notes
            self.bos_id, self.eos_id = ends.bos, ends.eos
            self.vocab_size = max(ids.values()) + 1
            if self.vocab_size > _LARGEST_VOCAB:
                raise ValueError(f"its largest id is {self.vocab_size - 1}")
            ends_too = {tokens[i] for i in (ends.bos, ends.eos) if i is not None}
            hidden = {token["content"]: token["special"] for token in added if not is_text(token)}
            hidden |= dict.fromkeys(ends_too, True)
            how = {token["content"]: {key: token[key] for key in _BESIDE} for token in added}
            self.specials = {
                token: Special(ids[token], not special, **how.get(token, {}))
                for token, special in hidden.items()
            }
            self._plain = _plain(description, {token: ids[token] for token in hidden})
            self._library = self._opened(self._plain)
            for token, plain in zip(added, self._plain["added_tokens"], strict=True):
                if self._library.token_to_id(plain["content"]) != token["id"]:
                    raise UserError(
                        f"tokenizer {path}: the id {token['id']} of {token['content']!r} does not follow the "
                        "others, and the library would change it; give a file that was saved by the library"
                    )
            controls = {ids[token] for token, special in hidden.items() if special}
            self._read_table(description, tokens, controls)
            self.note_loss()
        except UserError:
            raise
        except BaseException as error:  # the library panics too, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise UserError(
                f"tokenizer {path}: not a tokenizer.json, or damaged ({first_line(error)}); "
                f"{remedy or 'give another file'}"
            ) from None
        spelt = [token for token, special in hidden.items() if not special]
        if spelt:
            self.notes.append(
                f"tokenizer {path}: {len(spelt)} added tokens, such as {spelt[0]!r}, are spelt out in text, "
                "as control tokens are"
            )

    def decode(self, ids: Iterable[int]) -> str:
        if not self._by_table:
            table = self._bytes_of
            text: str = self._library.decode([i for i in ids if 0 <= i < len(table) and table[i]])
            return text
        text = super().decode(ids)
        return text.removeprefix(" ") if self._strips else text

    def stream(self) -> Stream:
        if not self._by_table:
            return Late(self.decode)
        return ByTable(self._bytes_of, " " if self._strips else "")

    def content_with(self, companions: Companions) -> bytes:
        return _written(with_companions(parse(self.core), companions))

    def _encode(self, parts: list[str]) -> list[np.ndarray]:
        found: dict[type[str], Iterator[np.ndarray]] = {}
        for kind in {type(part) for part in parts}:
            of_kind = [str(part) for part in parts if type(part) is kind]
            found[kind] = iter(_encoded(self._library_for(kind), of_kind))
        return [next(found[type(part)]) for part in parts]

    def _parts(self, text: str, after_token: bool) -> Iterator[str | np.ndarray]:
        kind: type[str] = _AfterToken if after_token else str
        for chunk in self._chunks(text):
            yield kind(chunk)
            kind = _Following

    def _library_for(self, kind: type[str]) -> Any:
        if kind is _Following:
            return self._following
        return self._after_token if kind is _AfterToken else self._library

    def _cut(self, text: str, start: int) -> int | None:
        assert self.chunk_chars
        for near in range(start, len(text), self.chunk_chars):
            places = _WORD_BOUNDARY.finditer(text, near)
            for _, match in zip(range(_TRIES), places, strict=False):
                if 0 < match.start() < len(text) and self._is_cut(text, match.start()):
                    return match.start()
        return None

    def _is_cut(self, text: str, place: int) -> bool:
        """Whether the tokens around a place are the same if the text is cut there."""
        before, after = text[max(0, place - _CONTEXT) : place], text[place : place + _CONTEXT]
        whole, left = _encoded(self._library, [before + after, before])
        (right,) = _encoded(self._following, [after])
        return np.array_equal(whole, np.concatenate((left, right)))

    @cached_property
    def _following(self) -> Any:
        """The library's tokenizer for what follows a cut: without what is added in front of a text."""
        plain = _without_prefix(self._plain)
        return self._library if plain == self._plain else self._opened(plain)

    @cached_property
    def _after_token(self) -> Any:
        """The library's tokenizer for what follows a special token: without what is added in front of the
        first part of a text only."""
        plain = _without_prefix(self._plain, of_all=False)
        return self._library if plain == self._plain else self._opened(plain)

    def as_it_came(self) -> Node:
        """The description with the post-processor that it had before ours took its place."""
        description: Node = json.loads(self.core)
        if self.content != self.core:
            description["post_processor"] = self.companions.post_processor
        return description

    @cached_property
    def around(self) -> list[int]:
        ids: list[int] = self._open(json.dumps(self.as_it_came())).encode("").ids
        return ids

    def _opened(self, description: Node) -> Any:
        library = self._open(json.dumps(description))
        library.encode_special_tokens = True  # the file cannot say it
        return library

    def _read_table(self, description: Node, tokens: dict[int, str], controls: set[int]) -> None:
        """Set how ids become text."""
        steps = [n for key in ("normalizer", "pre_tokenizer", "decoder") for n in nodes(description.get(key))]
        kinds = {step.get("type") for step in steps}
        model = description["model"]
        by_byte = "ByteLevel" in kinds
        spaces = "Metaspace" in kinds or any(step.get("content") == SPACE for step in steps)
        fallback = model.get("byte_fallback") or "ByteFallback" in kinds
        added = {token["id"] for token in description.get("added_tokens") or []}
        alphabet = byte_level_alphabet()

        def bytes_of(i: int, token: str) -> bytes:
            if i in controls:
                return b""
            if by_byte and i not in added and all(letter in alphabet for letter in token):
                return bytes(alphabet[letter] for letter in token)
            if fallback and (byte := BYTE.fullmatch(token)):
                return bytes([int(byte[1], 16)])
            if spaces:
                return token.replace(SPACE, " ").encode()
            if model.get("type") == "WordPiece":
                prefix = model.get("continuing_subword_prefix", "##")
                return (token.removeprefix(prefix) if token.startswith(prefix) else " " + token).encode()
            return token.encode()

        self._by_table = by_byte or spaces or "ByteFallback" in kinds
        self._strips = spaces and any(_strips(node) for node in nodes(description.get("decoder")))
        self._bytes_of = [b""] * self.vocab_size
        for i, token in tokens.items():
            self._bytes_of[i] = bytes_of(i, token)


def core_of(content: bytes) -> bytes:
    """The content of a tokenizer.json without what came along."""
    description, companions = _parsed(content)
    return content if companions is None else _written(description)


def made_of(content: bytes) -> str | None:
    """The fingerprint of the SentencePiece model that a tokenizer.json was made of, if it says so."""
    companions = _parsed(content)[1]
    return companions.made_of if companions else None


def _parsed(content: bytes) -> tuple[Node, Companions | None]:
    """The description and what comes along; neither if nothing does, or if it is damaged."""
    if _KEY.encode() not in content:
        return {}, None
    try:
        description = parse(content)
        return description, take_companions(description)
    except Damaged:
        return {}, None


def _companions(path: Path, description: Node) -> tuple[Companions, list[str], bool]:
    """What comes along with a file, notes, and whether it is not in the file yet. It is taken out of the
    description."""
    taken = take_companions(description)
    if taken and not taken.made_of:
        return taken, [], False
    beside, notes = read_beside(path)
    original = {"post_processor": description.get("post_processor")}
    return beside.model_copy(update=original), notes, True


def take_companions(description: Node) -> Companions | None:
    """Take what came along out of the description; None if nothing did. Raises Damaged."""
    processor = description.get("post_processor")
    if not isinstance(processor, dict) or _KEY not in processor:
        return None
    return unseal(json.dumps(processor.pop(_KEY)).encode(), Companions)


def with_companions(description: Node, companions: Companions) -> Node:
    """The description, and what comes along: in the post-processor, as the library reads no file with a key
    that it does not know at the first level."""
    record = json.loads(seal(companions.model_dump()))
    return description | {"post_processor": {**description["post_processor"], _KEY: record}}


class _Following(str):
    """A part of a text that follows a cut."""

    __slots__ = ()


class _AfterToken(str):
    """A part of a text that follows a special token."""

    __slots__ = ()


def _written(description: Node) -> bytes:
    return json.dumps(description).encode()


def _encoded(library: Any, parts: list[str]) -> list[np.ndarray]:
    encodings = library.encode_batch_fast(parts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def ids_of(description: Node) -> dict[str, int]:
    """The id of every token, added ones too."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):  # of a unigram model
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in description.get("added_tokens") or []}


def is_text(token: Node) -> bool:
    """Whether an added token is a piece of text: a run of white space that takes nothing beside it."""
    blank = not token["content"].replace(SPACE, " ").strip()
    return blank and not (token["special"] or token["lstrip"] or token["rstrip"] or token["single_word"])


def _plain(description: Node, hidden: dict[str, int]) -> Node:
    """The description for text that is only text. hidden: tokens that no text may give, and their ids."""
    names = {token: f"\0 {i} \0" for token, i in hidden.items()}
    model = dict(description["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if not names.keys() & {left, right, left + right.removeprefix(prefix)}
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("dropout"):
        model["dropout"] = None  # it is random
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        token | off | {"content": names[token["content"]]} if token["content"] in names else token
        for token in description.get("added_tokens") or []
    ]
    changes = {"truncation": None, "padding": None, "post_processor": None}
    return description | changes | {"model": model, "added_tokens": added}


def nodes(node: Node | None) -> Iterator[Node]:
    """A part of the description and all parts of its sequences."""
    if not node:
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in node.get(key) or []:
            yield from nodes(part)
    yield node


def _without_prefix(description: Node, of_all: bool = True) -> Node:
    """The description without what puts a space in front of a text. of_all: also of a text between special
    tokens."""
    changed = {key: copy.deepcopy(description.get(key)) for key in ("normalizer", "pre_tokenizer")}
    found = description | changed
    for node in (*nodes(found["normalizer"]), *nodes(found["pre_tokenizer"])):
        scheme = node.get("prepend_scheme", "always") if node.get("type") == "Metaspace" else "never"
        if of_all and node.get("type") == "Prepend":
            node["prepend"] = ""
        elif of_all and node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        elif scheme == "first" or (of_all and scheme != "never"):
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)
    return found


def _strips(node: Node) -> bool:
    """Whether a decoder removes the space in front of a text."""
    if node.get("type") == "Strip":
        return bool(node.get("content") == " " and node.get("start"))
    prefix = node.get("prepend_scheme", "always") != "never" and node.get("add_prefix_space", True)
    return node.get("type") == "Metaspace" and bool(prefix)


def byte_level_alphabet() -> dict[str, int]:
    """The byte of each letter in which GPT-2 writes bytes: printable ones of Latin-1 as they are, the others
    from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
