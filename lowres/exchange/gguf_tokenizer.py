"""The tokenizer of a model as the keys of a GGUF file, where llama.cpp has the same one.

llama.cpp has its own implementation of each kind of tokenizer, and a file names the kind:

llama     SentencePiece BPE: pieces are merged by their score
gpt2      BPE on bytes: merges by rank, in words that one of the pre-tokenizers of llama.cpp finds
no_vocab  ids only

What would give other ids there is refused by its name. For what remains, see docs/models.md.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowres.data import Tokenizer, open_tokenizer
from lowres.data.tokenizer.base import SPACE
from lowres.data.tokenizer.huggingface import BYTE, JsonTokenizer, byte_level_alphabet, is_text, nodes
from lowres.data.tokenizer.sentencepiece_file import BPE, Type, types_of
from lowres.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lowres.errors import UserError

Node = dict[str, Any]


@dataclass
class Vocabulary:
    """The keys of a file below `tokenizer.`; `pre` and `merges` only of the kind gpt2, `scores` only of
    llama. notes: what the user should know."""

    kind: str = "no_vocab"
    tokens: list[str] = field(default_factory=list)
    types: list[Type] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = ""
    bos: int | None = None
    eos: int | None = None
    answer_end: int | None = None
    unknown: int | None = None
    adds_bos: bool = True
    adds_prefix: bool = False
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Give the keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.kind)
        if self.kind == "no_vocab":
            return
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(list(map(int, self.types)))
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for add, value in (
            (writer.add_bos_token_id, self.bos),
            (writer.add_eos_token_id, self.eos),
            (writer.add_eot_token_id, self.answer_end),
            (writer.add_unk_token_id, self.unknown),
        ):
            if value is not None:
                add(value)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.adds_prefix)
        writer.add_remove_extra_whitespaces(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)

    def pad(self, size: int) -> None:
        """Add unused tokens up to the rows of the embedding."""
        missing = size - len(self.tokens)
        self.tokens += itertools.islice(_unused_names(self.tokens), missing)
        self.types += [Type.UNUSED] * missing
        if self.scores:
            self.scores += [0.0] * missing


def vocabulary_of(path: Path | None, size: int, trained_on_text: bool) -> Vocabulary:
    """The vocabulary for an embedding of `size` rows. path: the tokenizer's file. trained_on_text: see
    `StoredModel`; if not, bos is put in front of a text if the tokenizer, as it came, does so. Raises
    UserError if llama.cpp has no such tokenizer."""
    if path is None:
        return Vocabulary(notes=["the model has no tokenizer: the file takes and gives ids only"])
    tokenizer = open_tokenizer(path, form="own")
    if not tokenizer.has_text:
        return Vocabulary(notes=["the model was trained on ids: the file takes and gives ids only"])
    if tokenizer.vocab_size > size:
        raise UserError(
            f"tokenizer {path}: it has {tokenizer.vocab_size} tokens, but the model {size}; put the right "
            "one back"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _of_sentencepiece(tokenizer)
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        found = _of_json(tokenizer)
    found.adds_bos = trained_on_text or tokenizer.bos_id in tokenizer.around
    found.bos = tokenizer.bos_id
    found.eos = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    found.chat_template = tokenizer.chat_template
    found.pad(size)
    return found


def _refused(tokenizer: Tokenizer, what: str) -> UserError:
    return UserError(
        f"tokenizer {tokenizer.path}: {what}, which llama.cpp does not have, so its ids would differ; use "
        "--format hf"
    )


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    spec, pieces = tokenizer.spec, tokenizer.processor
    if spec.model_type != BPE:
        raise _refused(tokenizer, "it is a SentencePiece model of another type than BPE with byte pieces")
    if spec.normalises and not spec.only_adds_prefix:
        raise _refused(tokenizer, "it has a normaliser")
    types = types_of(tokenizer.content)
    if Type.UNUSED in types:
        raise _refused(tokenizer, "it has unused pieces")
    texts = [pieces.id_to_piece(i) for i in range(len(types))]
    found = Vocabulary(
        kind="llama",
        # a user-defined piece is looked for before spaces are escaped
        tokens=[
            text.replace(SPACE, " ") if kind is Type.USER_DEFINED else text
            for text, kind in zip(texts, types, strict=True)
        ],
        types=types,
        scores=[pieces.get_score(i) for i in range(len(types))],
        unknown=pieces.unk_id(),
        adds_prefix=spec.adds_prefix,
    )
    if found.adds_prefix and Type.USER_DEFINED in types:
        found.notes.append(
            "llama.cpp puts a space after each user-defined piece, and none before one that begins a text"
        )
    found.notes += _mistaken(found)
    return found


def _mistaken(found: Vocabulary) -> Iterator[str]:
    """A note if the text of a token that is no text can come from merges: llama.cpp does not ask for its
    type."""
    texts = set(found.tokens)
    for text, kind in zip(found.tokens, found.types, strict=True):
        if kind in (Type.NORMAL, Type.USER_DEFINED):
            continue
        if any(_splits(text, texts)):
            yield f"llama.cpp may take the text {text!r} in a document for the token of this name"
            return


def _splits(text: str, texts: Set[str]) -> Iterator[tuple[str, str]]:
    """The pairs of neighbours that make a text: pieces, or single characters."""
    for cut in range(1, len(text)):
        pair = text[:cut], text[cut:]
        if all(len(part) == 1 or part in texts for part in pair):
            yield pair


def _of_json(tokenizer: JsonTokenizer) -> Vocabulary:
    description: Node = json.loads(tokenizer.content)
    model = description["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refused(tokenizer, f"its model is {model.get('type')}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(tokenizer, f"its model has a {key}")
    added = {token["id"]: token for token in description.get("added_tokens") or []}
    ids = {i: token for token, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    types = {
        i: Type.CONTROL if token["special"] or i in ends else Type.USER_DEFINED for i, token in added.items()
    } | {i: Type.CONTROL for i in ends if i is not None}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    by_byte = any(node.get("type") == "ByteLevel" for node in nodes(description.get("pre_tokenizer")))
    of_kind = _of_bytes if by_byte else _of_pieces
    found = of_kind(tokenizer, description, ids, types, merges)
    spelt = [t["content"] for i, t in added.items() if types[i] is Type.USER_DEFINED and not is_text(t)]
    if spelt:
        found.notes.append(
            f"llama.cpp finds {len(spelt)} added tokens, such as {spelt[0]!r}, in text, where they were "
            "spelt out in training"
        )
    return found


def _filled(ids: Mapping[int, str], types: Mapping[int, Type]) -> Vocabulary:
    """Tokens and types; an id without a token becomes an unused one."""
    names = _unused_names(ids.values())
    count = max(ids) + 1
    return Vocabulary(
        tokens=[ids[i] if i in ids else next(names) for i in range(count)],
        types=[types.get(i, Type.NORMAL if i in ids else Type.UNUSED) for i in range(count)],
    )


def _unused_names(tokens: Iterable[str]) -> Iterator[str]:
    """Names that no token has: llama.cpp takes no vocabulary with the same one twice."""
    taken = set(tokens)
    return (name for i in itertools.count() if (name := f"[PAD{i}]") not in taken)


# --- BPE on bytes ---------------------------------------------------------------------------------------

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> list[Node]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# (name in llama.cpp, pre-tokenizer, ignore_merges)
_PRE: tuple[tuple[str, list[Node], bool], ...] = (
    ("gpt-2", [_BYTES], False),
    ("smollm", [_DIGITS, _BYTES], False),
    ("llama-bpe", _split(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"), True),
    ("smaug-bpe", _split(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"), False),
    ("qwen2", _split(rf"{_LETTERS}|\p{{N}}|{_REST}"), False),
)


def pre_tokenizer_of(description: Node) -> str | None:
    """The name in llama.cpp of the pre-tokenizer of a BPE on bytes, if it has one."""
    ignores = bool(description["model"].get("ignore_merges"))
    steps = [_step(node) for node in _steps(description.get("pre_tokenizer"), "pretokenizers")]
    return next((name for name, known, ignored in _PRE if (known, ignored) == (steps, ignores)), None)


def _of_bytes(
    tokenizer: Tokenizer,
    description: Node,
    ids: Mapping[int, str],
    types: Mapping[int, Type],
    merges: list[list[str]],
) -> Vocabulary:
    pre = pre_tokenizer_of(description)
    if pre is None:
        names = " and ".join(step["type"] for step in _steps(description["pre_tokenizer"], "pretokenizers"))
        merges_too = " with ignore_merges" if description["model"].get("ignore_merges") else ""
        raise _refused(tokenizer, f"it has a pre-tokenizer of its own ({names}{merges_too})")
    normalisers = {node["type"] for node in _steps(description.get("normalizer"), "normalizers")}
    if normalisers - {"NFC"}:
        raise _refused(tokenizer, f"it has the normalizer {min(normalisers)}")
    texts = set(description["model"]["vocab"])
    if not byte_level_alphabet().keys() <= texts:
        raise _refused(tokenizer, "it has no token for some bytes")
    hidden = {ids[i] for i, kind in types.items() if kind is Type.CONTROL}
    found = _filled(ids, types)
    found.kind, found.pre = "gpt2", pre
    found.merges = [
        f"{left} {right}"
        for left, right in merges
        if not hidden & {left, right, left + right}  # text never gives a control token
    ]
    if normalisers:
        found.notes.append("llama.cpp does not compose characters (NFC): decomposed text has other ids there")
    return found


def _steps(node: Node | None, parts: str) -> list[Node]:
    """The parts of a sequence in order, or the node itself."""
    if not node:
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [step for part in node[parts] for step in _steps(part, parts)]


def _step(node: Node) -> Node:
    """A pre-tokenizer without what changes no ids, and with its defaults."""
    if node["type"] == "ByteLevel":
        return {
            "type": "ByteLevel",
            "add_prefix_space": node.get("add_prefix_space", True),
            "use_regex": node.get("use_regex", True),
        }
    return node


# --- SentencePiece as a tokenizer.json ------------------------------------------------------------------


def _of_pieces(
    tokenizer: Tokenizer,
    description: Node,
    ids: Mapping[int, str],
    types: Mapping[int, Type],
    merges: list[list[str]],
) -> Vocabulary:
    model = description["model"]
    prefix = _prefix(description)
    if not (description.get("normalizer") or description.get("pre_tokenizer")):
        # made of a SentencePiece model, for the exact form: pieces are written with spaces
        prefix = None if any(SPACE in text for text in ids.values()) else False
        ids = {i: text if i in types else text.replace(" ", SPACE) for i, text in ids.items()}
        merges = [[part.replace(" ", SPACE) for part in pair] for pair in merges]
    if prefix is None or not (model.get("byte_fallback") and model.get("fuse_unk")):
        raise _refused(tokenizer, "it is neither a BPE on bytes nor like one of SentencePiece")
    scores = _scores(merges, {text for i, text in ids.items() if i not in types})
    if scores is None:
        raise _refused(tokenizer, "its merges do not follow from scores of its pieces")
    of_byte = {i: Type.BYTE for i, text in ids.items() if BYTE.fullmatch(text)}
    if len(of_byte) < 256:
        raise _refused(tokenizer, "it has no token for some bytes")
    unknown = model["vocab"].get(model.get("unk_token"))
    of_unknown = {} if unknown is None else {unknown: Type.UNKNOWN}
    found = _filled(ids, {**types, **of_byte, **of_unknown})
    found.kind, found.unknown, found.adds_prefix = "llama", unknown, prefix
    found.scores = [scores.get(text, 0.0) for text in found.tokens]
    if prefix and description.get("pre_tokenizer"):
        found.notes.append("llama.cpp also puts a space in front of a text that begins with one")
    found.notes += _mistaken(found)
    return found


def _prefix(description: Node) -> bool | None:
    """Whether a text gets a space in front, if that is all that changes besides the writing of spaces; else
    None."""
    before = _steps(description.get("normalizer"), "normalizers")
    split = description.get("pre_tokenizer")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    if not split:
        return {1: False, 2: True}[len(before)] if before in ([replaces], [prepends, replaces]) else None
    if before or split["type"] != "Metaspace" or split.get("replacement") != SPACE:
        return None
    return None if split.get("split", True) else split.get("prepend_scheme", "always") != "never"


def _scores(merges: list[list[str]], texts: Set[str]) -> dict[str, float] | None:
    """Scores by which the merges are in order; None if there are none. By scores, two neighbours are merged
    if the text of both is a piece, so every such pair must be in the list."""
    pairs = {(left, right) for left, right in merges}
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        text = left + right
        if text != last and text in scores:
            return None
        scores.setdefault(text, -float(rank))
        last = text
    for text in texts:
        if any(pair not in pairs for pair in _splits(text, texts)) and not BYTE.fullmatch(text):
            return None
    return scores
