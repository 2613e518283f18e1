"""Every kind of tokenizer gives the ids of its own library, whatever is in a text and however it is cut."""

import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowres.config import DataConfig
from lowres.config_file import load_config
from lowres.data import FILE_NAMES, Data, TokenData, find_tokenizer, open_data, open_text, prepare
from lowres.data.shards import Shard
from lowres.data.tokenizer import Tokenizer, Vocabulary, base, huggingface, open_tokenizer, train
from lowres.data.tokenizer.streaming import Late
from lowres.engine import Choice, make_engine
from lowres.engine.cache import Reader, Rereading
from lowres.errors import UserError
from lowres.evaluate import evaluate
from lowres.runs import open_run
from lowres.sample import Sampling, sample
from lowres.start import HISTORY, decide
from tests.helpers import ROOMS, lowres_here, make_batch, make_config, make_units

PROSE = (
    "The cat sat on the mat, and the other cat (42 years old) didn't.\n    return cats[0]  # ok\n"
    "<s>[INST] we'll <|im_start|>user </s>\n\n\tIt's 1,234,567 o'clock; na\u00efve caf\u00e9s \u4e2d\u3002\n"
) * 30
SPECIAL = [
    "",
    " ",
    "a",
    " a",
    "   leading and trailing   ",
    "\ttabs\t\tand  runs   of    spaces      and\n\n\n\nlines\r\n\r\n",
    "nul \0 and \x01\x1b\x7f controls",
    "\u2028 \u2029 \x85 \u00a0 \u3000 \ufeff \u200b",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \u2460 is not 1",
    "<s> </s> <unk> <0x41> <pad><|endoftext|> <|begin_of_text|><|im_start|>system <tool_call>",
    "\U0001f600\U0001f468\u200d\U0001f469 \U0010ffff \u2047 \u2585 \ufffd",
    "\u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d 12345678 3.14",
]
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r\0'<s>/0x12aetch,.\u0301\u4e2d")
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sentencepiece_model(**options: Any) -> bytes:
    """A small SentencePiece model as others train it; by default as LLaMA-2 is."""
    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 400,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.split("\n")),
        model_writer=model,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**llama, **options},
    )
    return model.getvalue()


def byte_level(
    split: Any, normalizer: Any = None, special: tuple[str, ...] = ("<|endoftext|>",), **model: Any
) -> library.Tokenizer:
    made = library.Tokenizer(models.BPE(**model))
    made.normalizer = normalizer
    made.pre_tokenizer = split
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([PROSE], trainer)
    return made


def gpt2() -> library.Tokenizer:
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def llama3() -> library.Tokenizer:
    split = pre_tokenizers.Split(library.Regex(LLAMA3), "isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>")
    made = byte_level(pre_tokenizers.Sequence([split, rest]), None, special, ignore_merges=True)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", 0)],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def smollm() -> library.Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def qwen() -> library.Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())


def neox() -> library.Tokenizer:
    """White space is added as tokens."""
    made = gpt2()
    made.add_tokens([library.AddedToken(" " * n, normalized=False, special=False) for n in (4, 3, 2)])
    return made


def converted(model: bytes, front: str) -> library.Tokenizer:
    """A SentencePiece BPE model as a tokenizer.json: merges in the order of their scores."""
    found = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [found.id_to_piece(i) for i in range(found.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (i, piece[:cut], piece[cut:])
        for piece, i in ids.items()
        if not (found.is_byte(i) or found.is_control(i) or found.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    rank = sorted(merges, key=lambda merge: (-found.get_score(merge[0]), ids[merge[1]], ids[merge[2]]))
    pairs = [(left, right) for _, left, right in rank]
    made = library.Tokenizer(
        models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    strip = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if front == "prepend":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=front, split=front == "always")
    made.decoder = strip
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def unigram() -> library.Tokenizer:
    """As T5 and XLM-R: control tokens are in the vocabulary that is matched by string."""
    scores = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("\u2581", -2.0),
        ("\u2581the", -3.0),
        ("at", -4.0),
    ]
    letters = [(letter, -6.0) for letter in sorted(set(PROSE) - {" "})]
    tail = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    made = library.Tokenizer(models.Unigram(scores + letters + tail, 0, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def wordpiece() -> library.Tokenizer:
    made = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        [PROSE], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return made


KINDS: dict[str, Callable[[], library.Tokenizer]] = {
    "gpt2": gpt2,
    "llama3": llama3,
    "smollm": smollm,
    "qwen": qwen,
    "neox": neox,
    "prepend": lambda: converted(sentencepiece_model(), "prepend"),
    "metaspace": lambda: converted(sentencepiece_model(), "first"),
    "always": lambda: converted(sentencepiece_model(), "always"),
    "unigram": unigram,
    "wordpiece": wordpiece,
}
LOSSLESS = ("gpt2", "llama3", "smollm", "neox")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tokenizer.json of each kind."""
    found = {}
    for name, make in KINDS.items():
        found[name] = tmp_path_factory.mktemp(name) / "tokenizer.json"
        make().save(str(found[name]))
    return found


def oracle(path: Path) -> library.Tokenizer:
    """The library's own, told that text is only text."""
    found = library.Tokenizer.from_file(str(path))
    found.encode_special_tokens = True
    return found


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest, made: dict[str, Path]) -> tuple[Tokenizer, library.Tokenizer]:
    return open_tokenizer(made[request.param]), oracle(made[request.param])


# ---------------------------------------------------------------------------- tokenizer.json


@pytest.mark.parametrize("text", [*SPECIAL, PROSE])
def test_ids_are_those_of_the_library(kind: tuple[Tokenizer, library.Tokenizer], text: str) -> None:
    ours, theirs = kind
    if "[UNK]" in theirs.get_vocab() or ("<s>" in text and theirs.get_vocab().get("at") == 5):
        return  # of a vocabulary that is matched by string: see below
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", LOSSLESS)
@MANY
@given(text=TEXTS | st.sampled_from(SPECIAL) | st.just(f"a{base.SPACE}b"))
def test_no_byte_is_lost(made: dict[str, Path], name: str, text: str) -> None:
    tokenizer = opened(made[name])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


_OPENED: dict[Path, Tokenizer] = {}


def opened(path: Path) -> Tokenizer:
    return _OPENED.setdefault(path, open_tokenizer(path))


IDS = st.lists(st.integers(-1, 430) | st.sampled_from([3, 5, 200, 233, 235, 259]), max_size=30)


def check_stream(tokenizer: Tokenizer, ids: list[int], begun: int) -> None:
    """All parts together are the text, and what has been given out is never taken back."""
    stream, whole = tokenizer.stream(), tokenizer.decode(ids)
    begun = 0 if isinstance(stream, Late) else begun
    found = stream.begin(ids[:begun])
    for i in ids[begun:]:
        found += stream.add([i])
        assert whole.startswith(found)
    assert found + stream.end() == whole


@MANY
@given(ids=IDS, begun=st.integers(0, 4))
def test_text_comes_in_whole_characters(
    kind: tuple[Tokenizer, library.Tokenizer], ids: list[int], begun: int
) -> None:
    check_stream(kind[0], ids, begun)


def test_lone_surrogates_become_replacement_characters(made: dict[str, Path]) -> None:
    tokenizer = opened(made["gpt2"])
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_tokenizers_need_no_note(made: dict[str, Path], name: str) -> None:
    assert opened(made[name]).notes == [] and opened(made[name]).loss is None


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("qwen", "'e\u0301' -> '\u00e9'"),
        ("prepend", f"'a{base.SPACE}b' -> 'a b'"),
        ("metaspace", "' a' -> 'a'"),
        ("unigram", "'<0x41>'|'a <0x41>' -> 'a A'"),
        ("wordpiece", " -> "),
    ],
)
def test_a_lossy_tokenizer_says_so_once_with_an_example(
    made: dict[str, Path], name: str, example: str
) -> None:
    tokenizer = open_tokenizer(made[name])
    assert sum("it changes text" in note for note in tokenizer.notes) == 1
    assert any(part in tokenizer.notes[0] for part in example.split("|")), tokenizer.notes


@pytest.mark.parametrize("name", ["prepend", "metaspace", "always"])
def test_a_converted_model_decodes_what_it_can_hold(made: dict[str, Path], name: str) -> None:
    tokenizer = opened(made[name])
    for text in SPECIAL:
        if not text.startswith(" ") or name == "prepend":
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_byte_that_the_vocabulary_lacks_is_a_loss(made: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads(made["gpt2"].read_text("utf-8"))
    letter = {letter: byte for letter, byte in huggingface.byte_level_alphabet().items() if byte == 0xF0}
    removed = [token for token in content["model"]["vocab"] if set(token) & letter.keys()]
    for token in removed:
        content["model"]["vocab"][f"unused {token!a}"] = content["model"]["vocab"].pop(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (note,) = open_tokenizer(tmp_path).notes
    assert "changes text, e.g. '\U0001f600' -> " in note


# cutting


@pytest.mark.parametrize("size", [7, 300])
def test_ids_do_not_depend_on_how_a_text_is_cut(
    kind: tuple[Tokenizer, library.Tokenizer], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    ours, _ = kind
    texts = [PROSE[:900], PROSE.replace("\n", " ")[:900], "", *SPECIAL, "\u4e2d\u6587\uff0c" * 30, "x" * 99]
    whole = [ours.encode(text) for text in texts]
    monkeypatch.setattr(ours, "chunk_chars", size)
    monkeypatch.setattr(base, "GROUP_CHARS", 3 * size)
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == whole
    assert len(list(ours._chunks(texts[0]))) > 900 / (size + 40)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "smollm", "prepend", "metaspace"])
@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(TEXTS | st.sampled_from([*SPECIAL, "  ", "\n\n", "'s", " 1234567", "don't"]), max_size=40)
)
def test_cut_random_texts_give_the_ids_of_the_whole(
    made: dict[str, Path], name: str, parts: list[str]
) -> None:
    tokenizer = opened(made[name])
    text = "".join(parts)
    tokenizer.chunk_chars = None
    whole = tokenizer.encode(text)
    try:
        tokenizer.chunk_chars = 8
        assert tokenizer.encode(text) == whole
    finally:
        tokenizer.chunk_chars = type(tokenizer).chunk_chars


# control tokens


@pytest.mark.parametrize(
    "flags", [{}, {"normalized": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]
)
@pytest.mark.parametrize("special", [True, False])
def test_text_never_makes_an_added_token(tmp_path: Path, special: bool, flags: dict[str, bool]) -> None:
    made = gpt2()
    token = library.AddedToken("<tool_call>", special=special, **{"normalized": False, **flags})
    made.add_tokens([token])
    made.save(str(tmp_path / "tokenizer.json"))
    plain = gpt2()
    tokenizer = open_tokenizer(tmp_path)
    for text in ("<tool_call>", "a <tool_call> b", "  <tool_call>\n\n<tool_call>"):
        assert tokenizer.encode(text) == plain.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == plain.get_vocab_size() + 1
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == ("" if special else "<tool_call>")
    assert any("<tool_call>" in note for note in tokenizer.notes) is not special


@pytest.mark.parametrize("name", ["unigram", "wordpiece"])
def test_a_vocabulary_matched_by_string_has_no_way_to_its_control_tokens(
    made: dict[str, Path], name: str
) -> None:
    tokenizer, theirs = opened(made[name]), oracle(made[name])
    tokens = {"<s>": 1, "</s>": 2} if name == "unigram" else {"[CLS]": 2, "[SEP]": 3}
    text = "".join(f"a{token} {token}{token} " for token in tokens)
    assert not set(tokens.values()) & set(tokenizer.encode(text))
    if name == "unigram":  # by itself the library does so, whatever it is told
        assert set(tokens.values()) <= set(theirs.encode(text, add_special_tokens=False).ids)
    ordinary = "the cat sat at the mat"
    assert tokenizer.encode(ordinary) == theirs.encode(ordinary, add_special_tokens=False).ids


def test_a_control_token_that_was_also_merged_from_text_is_spelt(
    made: dict[str, Path], tmp_path: Path
) -> None:
    content = json.loads(made["gpt2"].read_text("utf-8"))
    ids = content["model"]["vocab"]
    ids["<s>"] = len(ids)
    ids["<s"] = len(ids)
    content["model"]["merges"] = [["<", "s"], ["<s", ">"], *content["model"]["merges"]]
    content["added_tokens"].append(content["added_tokens"][0] | {"id": ids["<s>"], "content": "<s>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.bos_id == ids["<s>"] not in tokenizer.encode("<s> a<s>")
    assert tokenizer.decode(tokenizer.encode("<s> a<s>")) == "<s> a<s>"


def test_what_would_change_documents_is_off(made: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads(made["llama3"].read_text("utf-8"))
    changed = library.Tokenizer.from_str(json.dumps(content))
    changed.enable_truncation(5)
    changed.enable_padding(length=64, pad_id=0, pad_token="<|begin_of_text|>")
    content = json.loads(changed.to_str())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode(PROSE) == opened(made["llama3"]).encode(PROSE)
    assert tokenizer.encode("a") == opened(made["llama3"]).encode("a")


def test_ids_with_a_gap_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    """The library would count on from the last one."""
    content = json.loads(made["gpt2"].read_text("utf-8"))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the id 5000 of '<far>' does not follow the others"):
        open_tokenizer(tmp_path)


# ends of a document


def with_files(made: Path, folder: Path, **files: Any) -> Path:
    folder.mkdir()
    shutil.copy(made, folder / "tokenizer.json")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "files", "ends"),
    [
        ("gpt2", {}, ("<|endoftext|>", None)),
        ("llama3", {}, ("<|begin_of_text|>", "<|end_of_text|>")),
        (
            "llama3",
            {"tokenizer_config": {"eos_token": "<|im_start|>"}},
            ("<|begin_of_text|>", "<|im_start|>"),
        ),
        (
            "llama3",
            {"special_tokens_map": {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_start|>"}},
            ("<|im_start|>", None),
        ),
        ("llama3", {"generation_config": {"eos_token_id": [2, 1]}}, ("<|begin_of_text|>", "<|im_start|>")),
        ("llama3", {"config": {"bos_token_id": 2}}, ("<|begin_of_text|>", "<|end_of_text|>")),
        ("prepend", {}, ("<s>", "</s>")),
        ("wordpiece", {}, ("[CLS]", "[SEP]")),
        ("wordpiece", {"tokenizer_config": {"bos_token": None, "eos_token": "[PAD]"}}, ("[CLS]", "[PAD]")),
    ],
)
def test_ends_are_found(
    made: dict[str, Path], tmp_path: Path, name: str, files: dict[str, Any], ends: tuple[str, str | None]
) -> None:
    tokenizer = open_tokenizer(with_files(made[name], tmp_path / "x", **files))
    ids = oracle(made[name]).get_vocab()
    bos, eos = ends
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids[bos], None if eos is None else ids[eos])
    stored = tokenizer.with_ends(np.array([7, 8], np.int32))
    assert stored.dtype == np.int32
    assert stored.tolist() == [ids[bos], 7, 8] + ([] if eos is None else [ids[eos]])


def test_ends_can_be_given(made: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads(made["gpt2"].read_text("utf-8"))
    content["added_tokens"] = []
    content["model"]["vocab"] = {f"<{i}>" if i == 0 else t: i for t, i in content["model"]["vocab"].items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: nothing says .* set data\.bos and data\.eos"):
        open_tokenizer(path)
    tokenizer = open_tokenizer(path, bos="<0>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, None)
    tokenizer = open_tokenizer(path, bos=0, eos="a")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, content["model"]["vocab"]["a"])
    assert tokenizer.eos_id not in tokenizer.encode("a")
    for wrong in ("nope", 100_000, -1):
        with pytest.raises(UserError, match=r"data\.bos: .* is no token of"):
            open_tokenizer(path, bos=wrong)


def test_a_copy_says_everything(made: dict[str, Path], tmp_path: Path) -> None:
    """Also without the files beside the original; and it is its own copy."""
    files = {"tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": "<|im_start|>"}}
    original = open_tokenizer(with_files(made["llama3"], tmp_path / "x", **files))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(original.content)
    copied = open_tokenizer(path, form="own", fingerprint=original.fingerprint)
    assert (copied.bos_id, copied.eos_id) == (original.bos_id, None)
    assert copied.content == original.content and copied.fingerprint == original.fingerprint
    assert copied.encode(PROSE) == original.encode(PROSE)
    theirs = library.Tokenizer.from_file(str(path))  # which puts bos in front of a prompt, and nothing behind
    assert theirs.encode("a cat").ids == original.prompt("a cat")
    path.write_bytes(original.content.replace(b"cat", b"cta"))
    with pytest.raises(UserError, match=r"tokenizer\.json: changed; do this"):
        open_tokenizer(path, fingerprint=original.fingerprint, remedy="do this")


# files that are something else


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_tokenizer(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "damaged (is not JSON)"),
        (b'{"the": 5, "a": 6}', "not a tokenizer.json (it has no model)"),
        (b'{"model": 5}', "not a tokenizer.json, or damaged"),
        (b'{"model": {"type": "BPE", "vocab": {"<s>": 0}, "merges": [["a", "b"]]}}', "or damaged"),
        (b'{"model": {"vocab": {"<s>": 100000000000}}}', "or damaged (its largest id is 100000000000)"),
        (b'{"model": {"type": "New", "vocab": {"<s>": 0}, "merges": []}}', "or damaged"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "tiktoken ranks"),
        (b'{"seal": "0", "vocab_size": 5}', "damaged (does not match its seal)"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert "x.json" in refused(path) and problem in refused(path)


def test_a_file_cut_short_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(made["gpt2"].read_bytes()[:-20])
    assert "damaged" in refused(path, remedy="again") and refused(path, remedy="again").endswith("; again")


def test_a_damaged_file_beside_it_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = with_files(made["gpt2"], tmp_path / "x")
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: is not JSON" in refused(folder)


def test_a_folder_may_hold_several(made: dict[str, Path], tmp_path: Path) -> None:
    assert "the folder has no tokenizer.json, tokenizer.model or vocabulary.json" in refused(tmp_path)
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert open_tokenizer(tmp_path).file_name == "tokenizer.model"
    shutil.copy(made["gpt2"], tmp_path / "tokenizer.json")
    assert open_tokenizer(tmp_path).file_name == "tokenizer.json"
    assert any("tokenizer.model in the same folder is not used" in n for n in open_tokenizer(tmp_path).notes)
    assert open_tokenizer(tmp_path, form="own").file_name == "tokenizer.model"
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"


# ---------------------------------------------------------------------------- SentencePiece


FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "removes spaces": {"remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "suffix": {"treat_whitespace_as_suffix": True},
    "no prefix": {"add_dummy_prefix": False},
    "symbols": {"user_defined_symbols": ["<tool>", "\n", "  ", "cat sat"]},
    "unigram": {"model_type": "unigram", "vocab_size": 380},
    "nfkc unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "vocab_size": 380,
    },
}


@pytest.fixture(scope="session", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / request.param / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes(sentencepiece_model(**FORMS[request.param]))
    return path


@MANY
@given(text=TEXTS | st.sampled_from([*SPECIAL, PROSE, f"{base.SPACE} a{base.SPACE}{base.SPACE}b "]))
def test_own_form_gives_the_ids_of_sentencepiece(model: Path, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = own(model)
    if model.parent.name == "no prefix":  # then it is exact as it is
        text = text.replace(base.SPACE, "")
    expected = theirs.encode(text)
    assert tokenizer.encode(text) == expected
    # U+2581 decodes to a space; a suffix stays when SentencePiece decodes
    if base.SPACE not in text and model.parent.name != "suffix":
        assert tokenizer.decode(expected) == theirs.decode(expected)
    if "unigram" in model.parent.name:  # whose ties depend on rounding
        return
    size = tokenizer.chunk_chars
    try:
        tokenizer.chunk_chars = size and 6
        assert tokenizer.encode(text) == expected
    finally:
        tokenizer.chunk_chars = size


@MANY
@given(ids=IDS, begun=st.integers(0, 4), form=st.sampled_from(["own", "exact"]))
def test_text_of_sentencepiece_comes_in_whole_characters(
    model: Path, ids: list[int], begun: int, form: Any
) -> None:
    tokenizer = own(model) if form == "own" else _OPENED.setdefault(model / form, open_tokenizer(model, form))
    check_stream(tokenizer, ids, begun)


def own(path: Path) -> Tokenizer:
    return _OPENED.setdefault(path, open_tokenizer(path, form="own"))


def test_both_forms_are_in_the_file(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    exact = open_tokenizer(model, form="exact")
    for text in [*SPECIAL, PROSE, f"a{base.SPACE}b"]:
        assert exact.decode(exact.encode(text)) == text
    copy = tmp_path / "tokenizer.model"
    for form in (exact, open_tokenizer(model, form="own")):
        copy.write_bytes(form.content)
        again = open_tokenizer(copy, form="own", fingerprint=form.fingerprint)
        assert again.encode(PROSE) == form.encode(PROSE) and again.content == form.content
        assert open_tokenizer(copy, form="exact").content == exact.content
    assert open_tokenizer(model, form="own").content == content
    differs = exact.content != content
    assert bool(open_tokenizer(model).notes) is differs and not exact.notes
    assert any("data.tokenizer_form" in note for note in open_tokenizer(model).notes) is differs


def test_only_a_model_that_normalises_is_overridden(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train([PROSE], 330)[0])
    for form in ("exact", "own", None):
        tokenizer = open_tokenizer(path, form=form)
        assert tokenizer.content == path.read_bytes() and tokenizer.notes == []


def test_a_lossy_normaliser_is_said_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(sentencepiece_model(normalization_rule_name="nmt_nfkc"))
    (note,) = open_tokenizer(path, form="own").notes
    assert "x.model: it changes text, e.g. '\ufb01' -> 'fi'" in note


def test_own_form_is_what_transformers_makes_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    tokenizer = open_tokenizer(path, form="own")
    for text in [text for text in [*SPECIAL, PROSE] if "<s>" not in text and not text.startswith(" ")]:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_a_line_of_any_length_is_cut(tmp_path: Path) -> None:
    """A new model, and one of LLaMA's kind: no line break is needed."""
    line = PROSE.replace("\n", " ") * 9
    for number, content in enumerate((train([PROSE], 400)[0], sentencepiece_model())):
        path = tmp_path / f"{number}.model"
        path.write_bytes(content)
        tokenizer = open_tokenizer(path, form="own")
        assert tokenizer.chunk_chars is not None
        parts = list(tokenizer._chunks(line))
        assert len(parts) > 5 and max(map(len, parts)) < 1.1 * tokenizer.chunk_chars
        assert tokenizer.encode(line) == sentencepiece.SentencePieceProcessor(model_proto=content).encode(
            line
        )


def test_threads_follow_the_machine_and_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert base.threads() == cores
    for asked, expected in (("1", 1), ("9999", cores), ("0", cores), ("many", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert base.threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert base.threads() == 1
    finally:
        os.sched_setaffinity(0, before)


# ---------------------------------------------------------------------------- ids only


def test_a_vocabulary_has_ids_only(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(Vocabulary.content_of(50304, None, 50256))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50304, -1, 50256)
    assert tokenizer.delimiter == 50256 and not tokenizer.has_text
    assert tokenizer.decode([17, 4]) == "<17><4>" and tokenizer.encode("<17><4>") == [17, 4]
    assert tokenizer.prompt("") == [0] and tokenizer.prompt("<5>") == [5]
    assert tokenizer.with_ends(np.array([3], np.int32)).tolist() == [3, 50256]
    assert tokenizer.token_bytes().tolist() == [0] * 50304
    for text in ("hello", "<50304>", "<17> <4>"):
        with pytest.raises(UserError, match=r"vocabulary\.json: it has ids only; give ids below 50304"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="eos_id"):
        Vocabulary.content_of(100, None, 100)
    path.write_bytes(path.read_bytes().replace(b"50304", b"50305"))
    assert "damaged (does not match its seal)" in refused(path)


def test_ids_without_text_have_no_bits_per_byte_and_give_samples_of_ids(tmp_path: Path) -> None:
    config = make_config()
    units = make_units(config.model)
    engine = make_engine(config, units, None, ROOMS, Choice(micro_batch=4))
    batch = make_batch()
    scores = evaluate(engine, batch, torch.zeros(300, dtype=torch.int64), 4)
    with_text = evaluate(engine, batch, torch.ones(300, dtype=torch.int64), 4)
    assert scores.keys() == {"val_loss", "val_ppl"} and scores["val_loss"] == with_text["val_loss"]
    assert with_text["val_bits_per_byte"] == pytest.approx(with_text["val_loss"] / math.log(2))
    ids = Vocabulary(tmp_path, Vocabulary.content_of(300, 1, None))
    assert re.fullmatch(r"(<\d+>){2,5}", sample(engine, ids, "<7>", Sampling(3, 8)))
    assert sample(engine, ids, "<7>", Sampling(0, 8)) == "<1><7>"


def test_a_sample_ends_where_the_next_document_begins(made: dict[str, Path]) -> None:
    """GPT-2's kind has one token for both."""

    class Constant:
        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(1, 500)
            found[0, tokenizer.bos_id if ids.shape[1] > 3 else 40] = 9.0
            return found

        def reader(self, sequences: int, length: int) -> Reader:
            return Rereading(self.logits)

    tokenizer, engine = opened(made["gpt2"]), cast(Any, Constant())
    text = sample(engine, tokenizer, "", Sampling(50, 8, temperature=0))
    assert text == tokenizer.decode([40] * 3)


# ---------------------------------------------------------------------------- prepared data


def documents(folder: Path, data: Data) -> Iterator[list[int]]:
    """The documents of the training shards, without their ends."""
    files = sorted(folder.glob("train_*.bin"))
    tokens = np.concatenate([Shard(file).read(0, len(Shard(file))) for file in files]).tolist()
    tokenizer = data.tokenizer
    while tokens:
        assert tokens[0] == tokenizer.bos_id
        end = next((i for i, token in enumerate(tokens) if i and token == tokenizer.delimiter), len(tokens))
        document, tokens = tokens[1:end], tokens[end:]
        if tokenizer.eos_id is not None:
            assert document.pop() == tokenizer.eos_id
        yield document


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    path = tmp_path_factory.mktemp("source") / "text.jsonl"
    texts = [f"{number} {text} {PROSE[:500]}" for number, text in enumerate(SPECIAL * 4)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path), texts


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_prepared_documents_come_back(
    made: dict[str, Path], source: tuple[str, list[str]], tmp_path: Path, name: str
) -> None:
    path, texts = source
    out = tmp_path / "out"
    summary = prepare(path, out, tokenizer=str(made[name]), progress=False)
    data = TokenData(out, 32, seed=0)
    assert data.tokenizer.file_name == "tokenizer.json" and not (out / "tokenizer.model").exists()
    found = [data.tokenizer.decode(ids) for ids in documents(out, data)]
    # of some documents the end is held out
    assert all(any(text.startswith(part) for text in texts) for part in found)
    assert len(found) == summary["train_documents"] > len(texts) // 2
    assert summary["train_bytes"] == sum(len(text.encode()) for text in found)
    assert summary["train_bytes"] + summary["val_bytes"] == sum(len(text.encode()) for text in texts)
    again = prepare(path, out, tokenizer=str(made[name]), progress=False)
    assert any("already prepared" in note for note in again["notes"])


def test_a_run_and_its_checkpoints_keep_the_file(
    made: dict[str, Path], config: Path, source: tuple[str, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = [
        f"data.source={source[0]}",
        f"data.tokenizer={made['llama3']}",
        "train.steps=2",
        "data.seq_len=16",
    ]
    keys += [f"data.cache={tmp_path / 'cache'}", "log.sample_tokens=2", "train.eval_every=2"]
    options = [part for key in keys for part in ("--set", key)]
    lowres_here("train", config, "--run", run, *options)
    (checkpoint,) = (run / "checkpoints").iterdir()
    original = opened(made["llama3"])
    for folder in (run, checkpoint):
        assert find_tokenizer(folder) == folder / "tokenizer.json"
        assert (folder / "tokenizer.json").read_bytes() == original.content
    assert "tokenizer.json" in (checkpoint / "manifest.json").read_text()
    tokenizer = open_run(run)[2]
    assert (tokenizer.encode(PROSE), tokenizer.eos_id) == (original.encode(PROSE), original.eos_id)
    assert "bits per byte" in lowres_here("eval", run).stdout
    lowres_here("train", config, "--run", run, "--resume", *options, "--set", "train.steps=3")
    # weights bring their tokenizer, in the form in which they were trained
    again = [*keys[:1], f"data.cache={tmp_path / 'cache'}", f"run.init_from={run}", "data.seq_len=16"]
    started = decide(load_config(config, again)[0], tmp_path / "b", resume=False)
    assert started.config.data.tokenizer == str(run / "tokenizer.json")
    assert started.config.data.tokenizer_form == "own"
    assert started.data.tokenizer.fingerprint == original.fingerprint
    assert set(FILE_NAMES) <= set(HISTORY)  # what --restart moves aside


def test_weights_with_another_tokenizer_are_noted(
    source: tuple[str, list[str]], made: dict[str, Path], tmp_path: Path
) -> None:
    config, run = Path("configs/tiny.toml"), tmp_path / "run"
    keys = [f"data.source={source[0]}", "data.seq_len=16", "train.steps=1", "model.vocab_size=500"]
    keys += [f"data.cache={tmp_path / 'cache'}", "log.sample_tokens=0", "train.eval_every=0"]
    options = [part for key in keys for part in ("--set", key)]
    lowres_here("train", config, "--run", run, *options, "--set", f"data.tokenizer={made['llama3']}")
    keys.append(f"run.init_from={run}")
    for other, noted in (("llama3", False), ("gpt2", True)):
        asked = load_config(config, [*keys, f"data.tokenizer={made[other]}"])[0]
        lines = decide(asked, tmp_path / other, resume=False).lines
        assert any("run.init_from" in line for line in lines) is noted


def test_a_tokenizer_for_other_text_is_refused(tmp_path: Path) -> None:
    digits = library.Tokenizer(models.WordLevel({"[UNK]": 0, "[BOS]": 1, "7": 2}, unk_token="[UNK]"))
    digits.add_special_tokens(["[UNK]", "[BOS]"])
    digits.pre_tokenizer = pre_tokenizers.Whitespace()
    digits.save(str(tmp_path / "tokenizer.json"))
    for name, text in (("other", "some words " * 300), ("own", "7 " * 900), ("near", "7 " * 500 + "x ")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 9)

    def prepared(name: str) -> list[str]:
        out = tmp_path / name
        notes: list[str] = prepare(
            str(tmp_path / f"{name}.jsonl"), out, tokenizer=str(tmp_path), progress=False
        )["notes"]
        return notes

    with pytest.raises(UserError, match=r"100.00% of the characters .* give a tokenizer for such text"):
        prepared("other")
    assert not (tmp_path / "other").exists()
    assert not any("characters of the text are lost" in note for note in prepared("own"))
    assert any(": 0.20% of the characters of the text are lost" in note for note in prepared("near"))


def test_a_small_vocabulary_of_ones_own_is_enough(tmp_path: Path) -> None:
    """model.vocab_size is then no size of a tokenizer to train."""
    letters = library.Tokenizer(models.BPE({"\n": 0, "a": 1, "b": 2}, []))
    letters.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("ab\n" * 900)
    config = DataConfig(
        source=str(tmp_path / "a.txt"), tokenizer=str(tmp_path), bos=0, cache=str(tmp_path / "c"), seq_len=16
    )
    assert open_data(config, 3, 0, progress=False).vocab_size == 3


def test_prepare_takes_form_and_ends(source: tuple[str, list[str]], tmp_path: Path) -> None:
    model = tmp_path / "llama.model"
    model.write_bytes(sentencepiece_model())
    given = ["--tokenizer", model, "--set", "data.tokenizer_form=own"]
    lowres_here("data", "prepare", source[0], tmp_path / "out", *given)
    stored = open_tokenizer(tmp_path / "out", form="own")
    assert stored.fingerprint == open_tokenizer(model, form="own").fingerprint
    refused = lowres_here("data", "prepare", source[0], tmp_path / "b", *given, "--set", "data.bos=1", code=2)
    assert "data.bos" in refused.stderr
    trained = lowres_here("data", "prepare", source[0], tmp_path / "c", "--set", "data.bos=1", code=2)
    assert "data.bos: is for data.tokenizer" in trained.stderr


def test_the_config_chooses_the_form(source: tuple[str, list[str]], tmp_path: Path) -> None:
    path, texts = source
    model = tmp_path / "llama.model"
    model.write_bytes(sentencepiece_model())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    (tmp_path / "val.txt").write_text("something else " * 40)
    settings = {"source": path, "tokenizer": str(model), "cache": str(tmp_path / "cache"), "seq_len": 32}
    settings["val_source"] = str(tmp_path / "val.txt")
    datas = {
        form: open_data(DataConfig(**settings, tokenizer_form=form), None, 0, progress=False)  # type: ignore[arg-type]
        for form in ("own", "exact", None)
    }
    assert datas["own"].fingerprint != datas["exact"].fingerprint == datas[None].fingerprint
    trained = list(documents(datas["own"].folder, datas["own"]))
    assert trained == [ids for ids in theirs.encode(texts) if ids in trained] and len(trained) > 10
    exact = datas["exact"]
    assert {exact.tokenizer.decode(ids) for ids in documents(exact.folder, exact)} <= set(texts)
    assert any("data.tokenizer_form" in note for note in open_tokenizer(model).notes)
    assert open_text(path, datas["own"].tokenizer, 32).shape[1] == 33
