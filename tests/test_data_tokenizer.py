"""The tokenizer loses nothing, whatever the text and however it is cut."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowres.data.tokenizer import LEAST_VOCAB, Tokenizer, base, open_tokenizer, train
from lowres.errors import UserError

PROSE = "The cat sat on the mat, and the other cat (42 years old) did not.\n    return cats[0]  # ok\n" * 30
SPECIAL = [
    "",
    " ",
    "   leading and trailing   ",
    "\ttabs\t\tand  runs   of    spaces",
    "lines\nlines\r\nlines\r\n\n\n",
    "nul \0 and \x01\x1b\x7f controls",
    "\u2581 itself\u2581\u2581, a \u2581\n\u2581",
    "\u2028 \u2029 \x85 \u00a0 \u3000 \ufeff \u200b",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \u2460 is not 1",
    "<s> </s> <unk> <0x41> <pad>",
    "\U0001f600\U0001f468\u200d\U0001f469 \U0010ffff \u2047 \u2585 \ufffd",
    "中文 العربية हिन्दी",
]


@pytest.fixture(scope="session", params=[LEAST_VOCAB, 330])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save(tmp_path_factory.mktemp("tokenizer"), train([PROSE], request.param)[0])


def save(folder: Path, model: bytes) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    return open_tokenizer(folder / "tokenizer.model")


def foreign(**options: Any) -> bytes:
    """A model as others train it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


def check(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    lengths = tokenizer.token_bytes()
    assert sum(int(lengths[i]) for i in ids) == len(text.encode())


@pytest.mark.parametrize("text", SPECIAL)
def test_special_text(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r\0\u2581<s>0x")))
def test_any_text(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))), vocab_size=st.integers(260, 300))
def test_a_tokenizer_of_any_text_is_lossless(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], vocab_size: int
) -> None:
    tokenizer = save(tmp_path_factory.mktemp("any"), train(texts, vocab_size, exact=False)[0])
    for text in [*texts, *SPECIAL]:
        check(tokenizer, text)


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_tokens_do_not_depend_on_how_the_text_is_cut(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [PROSE, "", "no newline " * 50, "\n\n \n", "\u2581" + PROSE]
    whole = [tokenizer.encode(text) for text in texts]
    for size in (1, 7, 100):
        monkeypatch.setattr(tokenizer, "chunk_chars", size)
        monkeypatch.setattr(base, "GROUP_CHARS", 3 * size)
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole
        assert max(map(len, tokenizer._chunks("ab\ncd\n" * 99))) <= size + 3


def test_decode_survives_what_a_model_may_produce(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id is not None
    lone_byte = tokenizer.encode("é")[0]
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), lone_byte, tokenizer.vocab_size + 5, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hi\ufffd"


def test_ids_are_as_in_llama(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.token_bytes()[:4].tolist() == [0, 0, 0, 1]
    assert tokenizer.encode("\n") == [3 + 10]
    # digits one by one
    assert len(tokenizer.encode("1999")) == 4


def test_training_is_deterministic_and_learns_words(tmp_path: Path) -> None:
    assert train([PROSE], 320) == train([PROSE], 320)
    tokenizer = save(tmp_path, train([PROSE], 320)[0])
    assert len(tokenizer.encode(PROSE)) < 0.5 * len(PROSE)


@pytest.mark.parametrize("vocab_size", [260, 261, 300, 350])
def test_small_vocabularies_work(tmp_path: Path, vocab_size: int) -> None:
    model, pieces = train([PROSE, *SPECIAL], vocab_size)
    assert pieces == vocab_size == save(tmp_path, model).vocab_size


def test_impossible_vocabulary_names_the_possible_one() -> None:
    with pytest.raises(UserError, match="the smallest that works is 260"):
        train([PROSE], 259)
    _, largest = train([PROSE], 100_000, exact=False)
    with pytest.raises(UserError, match=f"the largest that works is {largest}"):
        train([PROSE], 100_000)
    assert train([PROSE], largest)[1] == largest


def test_foreign_model_is_lossless_too(tmp_path: Path) -> None:
    # normalises, adds a dummy prefix and removes spaces, if asked by SentencePiece itself
    tokenizer = save(tmp_path, foreign(vocab_size=340, model_type="bpe", byte_fallback=True))
    for text in [*SPECIAL, PROSE]:
        check(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(
    place=st.integers(0, 10**6),
    bit=st.integers(0, 7),
    cut=st.sampled_from([None, None, None, 0.3, 0.99]),
)
@example(place=5252, bit=0, cut=None)  # the piece for the space is of another type
def test_damaged_model_is_refused_or_works(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, cut: float | None
) -> None:
    model = bytearray(tokenizer.path.read_bytes())
    model[place % len(model)] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "x.model"
    path.write_bytes(model[: int(cut * len(model))] if cut else model)
    with pytest.raises(UserError, match=r"x\.model: changed; remove the folder"):
        open_tokenizer(path, fingerprint=tokenizer.fingerprint, remedy="remove the folder")
    try:
        damaged = open_tokenizer(path)
    except UserError as error:
        assert "x.model" in str(error) and "\n" not in str(error)
        return
    for text in ["The cat sat on the \u2581 mat\n  42 \u00e9", *SPECIAL]:
        check(damaged, text)


def test_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").mkdir()
    os.mkfifo(tmp_path / "y.model")
    for name, problem in (("x", "the folder has no"), ("y", r"cannot be read \(is not an ordinary file\)")):
        with pytest.raises(UserError, match=rf"{name}\.model: {problem}"):
            open_tokenizer(tmp_path / f"{name}.model")


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: None, "cannot be read"),
        (lambda: b"", "not a SentencePiece model"),
        (lambda: b"hello" * 100, "not a SentencePiece model"),
        (lambda: train([PROSE], 300)[0][:2000], "not a SentencePiece model"),
        (lambda: foreign(vocab_size=60, model_type="bpe"), "no byte pieces"),
        (lambda: foreign(vocab_size=340, model_type="bpe", byte_fallback=True, eos_id=-1), "no bos or eos"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, model: Any, problem: str) -> None:
    content = model()
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.model: .*{problem}"):
        open_tokenizer(path)
