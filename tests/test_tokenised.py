"""Corpora that are tokenised already. Every format is written here by its published layout, not by lowres."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowres.config import DataConfig
from lowres.data import Data, open_data, open_tokenizer, prepare
from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.data.tokenised import corpus as corpus_module
from lowres.errors import UserError
from lowres.text import list_files
from tests.helpers import lowres_here

VOCAB, SEP, SEQ = 300, 299, 16
Docs = list[np.ndarray]


def made(count: int, seed: int, most: int = 60, least: int = 1) -> Docs:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, SEP, draw.integers(least, most)) for _ in range(count)]


def joined(docs: Docs, at_start: bool = False) -> np.ndarray:
    ends = ([SEP], []) if at_start else ([], [SEP])
    return np.concatenate([np.concatenate((ends[0], doc, ends[1])) for doc in docs]).astype(np.int64)


TRAIN, VAL = made(120, 1), made(20, 2)


# ---------------------------------------------------------------------------- writers


def llm_c(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u4" if magic == 20240801 else "<u2").tobytes())


def megatron(path: Path, docs: Docs, code: int, dtype: str, per_document: int = 1) -> None:
    """per_document: sequences in a document."""
    parts = [part for doc in docs for part in np.array_split(doc, per_document)]
    path.with_suffix(".bin").write_bytes(np.concatenate(parts).astype(dtype).tobytes())
    lengths = [len(part) for part in parts]
    pointers = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(parts))]
    index = [i * per_document for i in range(len(docs) + 1)]
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<QQ", len(parts), len(index))
        + struct.pack(f"<{len(parts)}i", *lengths)
        + struct.pack(f"<{len(parts)}q", *pointers)
        + struct.pack(f"<{len(index)}q", *index)
    )


def with_separator(docs: Docs) -> Docs:
    return [np.append(doc, SEP) for doc in docs]


# name -> (writer, options); a writer returns the ids of every training file, and of the validation file
def write_nanogpt(root: Path) -> tuple[Docs, np.ndarray]:
    train, val = joined(TRAIN), joined(VAL)
    train.astype("<u2").tofile(root / "train.bin")
    val.astype("<u2").tofile(root / "val.bin")
    (root / "prepare.py").write_text("# makes the files\n")
    (root / "readme.md").write_text("how\n")
    (root / "meta.pkl").write_bytes(b"\x80\x04N.")
    return [train], val


def write_llm_c(root: Path) -> tuple[Docs, np.ndarray]:
    parts = [joined(TRAIN[:70], True), joined(TRAIN[70:], True)]
    for number, part in enumerate(parts, 1):
        llm_c(root / f"fineweb_train_{number:06}.bin", part)
    llm_c(root / "fineweb_val_000000.bin", joined(VAL, True))
    return parts, joined(VAL, True)


def write_llama3(root: Path) -> tuple[Docs, np.ndarray]:
    llm_c(root / "tiny_train.bin", joined(TRAIN, True), 20240801, 7)
    llm_c(root / "tiny_val.bin", joined(VAL, True), 20240801, 7)
    return [joined(TRAIN, True)], joined(VAL, True)


def write_megatron(root: Path) -> tuple[Docs, np.ndarray]:
    megatron(root / "a_train_text_document", with_separator(TRAIN), 8, "<u2")
    megatron(root / "a_valid_text_document", with_separator(VAL), 4, "<i4", per_document=3)
    return [joined(TRAIN)], joined(VAL)


def write_npy(root: Path) -> tuple[Docs, np.ndarray]:
    (root / "train").mkdir()
    (root / "val").mkdir()
    np.save(root / "train" / "0.npy", joined(TRAIN).astype(">i4"))
    square = joined(TRAIN)[:1600].reshape(100, 16)
    np.save(root / "train" / "1.npy", square)
    np.save(root / "val" / "0.npy", joined(VAL).astype(np.uint16))
    return [joined(TRAIN), square.ravel()], joined(VAL)


def write_olmo(root: Path) -> tuple[Docs, np.ndarray]:
    """OLMo's .npy have no header."""
    joined(TRAIN).astype("<u4").tofile(root / "part-0-00000.npy")
    joined(VAL).astype("<u4").tofile(root / "valid-0-00000.npy")
    return [joined(TRAIN)], joined(VAL)


def write_saved(root: Path) -> tuple[Docs, np.ndarray]:
    """A DatasetDict of `datasets` as save_to_disk writes it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for part, docs in (("train", TRAIN), ("validation", VAL)):
        table = {
            "attention_mask": [[1] * (len(doc) + 1) for doc in docs],
            "input_ids": [doc.tolist() for doc in with_separator(docs)],
        }
        datasets.Dataset.from_dict(table).save_to_disk(root / part, num_shards=1)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return [joined(TRAIN)], joined(VAL)


def write_parquet(root: Path) -> tuple[Docs, np.ndarray]:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, docs in (("train-00000-of-00001", TRAIN), ("validation-00000-of-00001", VAL)):
        rows = [doc.tolist() for doc in with_separator(docs)]
        parquet.write_table(pyarrow.table({"input_ids": rows}), root / f"{name}.parquet", row_group_size=37)
    return [joined(TRAIN)], joined(VAL)


def write_feather(root: Path) -> tuple[Docs, np.ndarray]:
    """The file form of Arrow, with lists of a fixed size, compressed and not."""
    pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    square, val = joined(TRAIN)[:1600].reshape(100, 16), joined(VAL)[:320].reshape(20, 16)
    for name, rows, compression in (("train", square, None), ("validation", val, "zstd")):
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel(), pyarrow.int32()), 16)
        table = pyarrow.table({"tokens": column})
        options = ipc.IpcWriteOptions(compression=compression)
        with ipc.new_file(str(root / f"{name}.arrow"), table.schema, options=options) as out:
            out.write_table(table, max_chunksize=13)
    return [square.ravel()], val.ravel()


RAW: dict[str, Any] = {"token_dtype": "uint16"}
FORMATS: dict[str, tuple[Callable[[Path], tuple[Docs, np.ndarray]], dict[str, Any]]] = {
    "nanoGPT": (write_nanogpt, RAW),
    "llm.c": (write_llm_c, {}),
    "llm.c, LLaMA-3": (write_llama3, {}),
    "Megatron-LM": (write_megatron, {}),
    "npy": (write_npy, {}),
    "OLMo": (write_olmo, {"token_dtype": "uint32"}),
    "save_to_disk": (write_saved, {}),
    "parquet": (write_parquet, {}),
    "Arrow file": (write_feather, {}),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def config(source: Path, **keys: Any) -> DataConfig:
    given: dict[str, Any] = {"seq_len": SEQ, "vocab_size": VOCAB, "cache": str(source.parent / "cache")}
    return DataConfig(source=str(source), **(given | keys))


def opened(source: Path, **keys: Any) -> Data:
    return open_data(config(source, **keys), None, 0, False)


def complaint(source: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(source, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def windows(ids: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + SEQ + 1].tolist()) for start in range(0, len(ids) - SEQ, SEQ)]


def epoch(data: Data, count: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for step in range(count) for row in data.batch(step, 1).tolist())


def targets(data: Data) -> list[int]:
    found = inputs_and_targets(data.validation(0))[1]
    return [int(i) for i in found[found != IGNORED]]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "corpus").mkdir()
    yield tmp_path / "corpus"
    # nothing is left beside the files but what had to be unpacked
    assert {p.name for p in tmp_path.iterdir()} <= {
        "corpus",
        "cache",
        "run",
        "straight",
        "moved",
        "c.toml",
        "v",
    }


# ---------------------------------------------------------------------------- what is read


@every_format
def test_windows_are_those_of_the_source(root: Path, name: str) -> None:
    write, options = FORMATS[name]
    parts, val = write(root)
    data = opened(root, **options)
    assert (data.train_tokens, data.vocab_size) == (sum(map(len, parts)), VOCAB)
    expected = [window for part in parts for window in windows(part)]
    assert epoch(data, len(expected)) == Counter(expected)
    assert targets(data) == val[1:].tolist()
    assert data.validation(40).shape == (3, SEQ + 1)
    again = opened(root, **options)
    assert (again.fingerprint, again.validation_fingerprint) == (
        data.fingerprint,
        data.validation_fingerprint,
    )
    assert torch.equal(again.batch(7, 5), data.batch(7, 5))
    line = data.notes[0]
    assert f"{sum(map(len, parts)):,} training tokens" in line and f"{len(val):,} for validation" in line
    assert f"largest id {max(int(p.max()) for p in [*parts, val])}" in line


@pytest.mark.parametrize(
    ("name", "bos", "eos", "line"),
    [
        ("llm.c", -1, None, "separates"),
        ("Megatron-LM", SEP, None, f"separator {SEP} at the end of documents, 140 among"),
        ("save_to_disk", SEP, None, f"separator {SEP} at the end of documents, 140 among"),
        ("npy", -1, None, "rows of 16 ids, one after the other"),
    ],
)
def test_what_separates_documents_is_found_and_said(
    root: Path, name: str, bos: int, eos: int | None, line: str
) -> None:
    write, options = FORMATS[name]
    write(root)
    data = opened(root, **options)
    assert (data.tokenizer.bos_id, data.tokenizer.eos_id) == (bos, eos)
    assert any(line in note for note in data.notes), data.notes


def test_documents_with_bos_and_eos(root: Path) -> None:
    docs = [np.concatenate([[1], doc, [2]]) for doc in made(50, 3)]
    megatron(root / "x", docs, 4, "<i4")
    data = opened(root)
    assert (data.tokenizer.bos_id, data.tokenizer.eos_id) == (1, 2)
    assert any("begin with id 1 and end with id 2" in note for note in data.notes)


def test_the_separators_of_gpt2_and_llama3_are_known(root: Path) -> None:
    ids = np.tile(np.concatenate([[50256], np.arange(700)]), 5)
    llm_c(root / "a_train.bin", ids)
    data = opened(root, vocab_size=None)
    assert (data.vocab_size, data.tokenizer.bos_id) == (50257, 50256)
    assert any("separator 50256 at the start of documents, 5 among 3,505" in note for note in data.notes)
    llm_c(root / "a_train.bin", np.where(ids == 50256, 128000, ids), 20240801, 7)
    data = opened(root, vocab_size=None)
    assert (data.vocab_size, data.tokenizer.bos_id) == (128256, 128000)


def test_padding_is_noticed(root: Path) -> None:
    rows = np.zeros((50, 64), np.int32)
    for row, doc in zip(rows, made(50, 4), strict=True):
        row[: len(doc)] = doc + 1
    np.save(root / "rows.npy", rows)
    assert any("end with id 0 several times: they look padded" in note for note in opened(root).notes)


def test_the_tokenizer_gives_vocabulary_and_text(root: Path, prepared: Path) -> None:
    tokenizer = open_tokenizer(prepared / "tokenizer.model")
    ids = tokenizer.encode("It says what was written. " * 100)
    np.array(ids, "<u2").tofile(root / "train.bin")
    data = opened(root, vocab_size=None, tokenizer=str(tokenizer.path), **RAW)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint and data.vocab_size == 500
    assert any("'It says what" in note for note in data.notes)
    np.array([*ids, 500], "<u2").tofile(root / "train.bin")
    message = complaint(root, vocab_size=None, tokenizer=str(tokenizer.path), **RAW)
    assert f"train.bin: id 500 at token {len(ids):,} is not in the vocabulary of 500" in message


# ---------------------------------------------------------------------------- which files


def test_scripts_and_cards_beside_ids_are_not_trained_on(root: Path) -> None:
    write_nanogpt(root)
    data = opened(root, **RAW)
    assert sum("prepare.py" in note for note in data.notes) == 1
    assert any("meta.pkl" in note and "pickle" in note for note in data.notes)
    listing = list_files(str(root))
    assert [(f.name, f.part) for f in listing.files] == [("train.bin", "train"), ("val.bin", "validation")]


def test_text_that_the_ids_were_made_from_is_a_question(root: Path) -> None:
    write_nanogpt(root)
    (root / "input.txt").write_text("text " * 5000)
    message = complaint(root, **RAW)
    assert "token ids beside text" in message and "data.include" in message
    assert opened(root, include=("*.bin",), **RAW).train_tokens == len(joined(TRAIN))


def test_binary_files_of_a_program_are_no_corpus(root: Path) -> None:
    for i in range(20):
        (root / f"a{i}.py").write_text("print('hello')\n" * 50)
    (root / "firmware.bin").write_bytes(random.Random(0).randbytes(900))
    np.save(root / "train_labels.npy", np.arange(100))
    (root / "train.bin").write_bytes(b"PK\3\4" + random.Random(1).randbytes(200))
    listing = list_files(str(root))
    assert not listing.tokens and {f.path.suffix for f in listing.files} == {".py"}
    reasons = {each.name: each.reason for each in listing.left_out}
    assert reasons["firmware.bin"].startswith("unknown type; if it holds token ids, data.token_dtype")
    assert reasons["train.bin"] == "unknown type" and "beside text" in reasons["train_labels.npy"]


def test_a_single_file_a_glob_and_include(root: Path) -> None:
    write_nanogpt(root)
    ids = joined(TRAIN)
    for source in (root / "train.bin", root / "tr*.bin"):
        data = opened(source, cache=str(root.parent / "cache"), **RAW)
        held = int(0.05 * len(ids))
        assert data.train_tokens is not None and held <= len(ids) - data.train_tokens <= 2 * held
    (root / "train.bin").rename(root / "mine.bin")
    assert "data.token_dtype takes it" in complaint(root / "mine.bin")
    assert opened(root / "mine.bin", **RAW).train_tokens


def test_text_wins_over_ids_unless_asked_for(root: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["some words " * 30] * 200, "input_ids": [[1, 2, 3, 4]] * 200})
    parquet.write_table(table, root / "a.parquet")
    assert not list_files(str(root)).tokens
    assert opened(root, text_key="input_ids").train_tokens == 800 - 40


# ---------------------------------------------------------------------------- validation


@pytest.mark.parametrize("at_start", [False, True])
def test_without_validation_files_the_end_is_held_out(root: Path, at_start: bool) -> None:
    ids = joined(made(400, 5), at_start)
    ids = np.where(ids == SEP, 50256, ids)
    llm_c(root / "ids.bin", ids)
    data = opened(root, vocab_size=50257)
    cut = data.train_tokens
    assert cut is not None
    assert 0.05 * len(ids) <= len(ids) - cut <= 0.05 * len(ids) + 61
    assert targets(data) == ids[cut:][1:].tolist()
    assert (ids[cut] if at_start else ids[cut - 1]) == 50256
    assert "held out at the end" in data.notes[0]
    seen = epoch(data, len(windows(ids[:cut])))
    assert seen == Counter(windows(ids[:cut]))


def test_held_out_documents_are_whole_where_they_are_known(root: Path) -> None:
    docs = made(300, 6, least=5)
    megatron(root / "b", docs[:290], 8, "<u2")
    megatron(root / "c", docs[290:], 8, "<u2")
    data = opened(root)
    lengths = np.cumsum([len(doc) for doc in docs])
    # the last file is too small, so the end of the one before it is held out too
    assert data.train_tokens in lengths[:290]
    assert targets(data) == np.concatenate(docs)[data.train_tokens :][1:].tolist()


def test_a_window_is_held_out_of_a_small_corpus(root: Path) -> None:
    np.arange(100, dtype="<u2").tofile(root / "train.bin")
    data = opened(root, **RAW)
    assert (data.train_tokens, targets(data)) == (83, list(range(84, 100)))


def test_val_source_is_not_trained_on(root: Path) -> None:
    docs = joined(TRAIN)
    for i in range(3):
        docs[i * 500 : (i + 1) * 500].astype("<u2").tofile(root / f"{i}.bin")
    data = opened(root, val_source=str(root / "1.bin"), **RAW)
    assert data.train_tokens == 1000 and targets(data) == docs[501:1000].tolist()
    assert any("also in data.source; they are not trained on" in note for note in data.notes)
    assert "all its ids are validation data" in complaint(
        root / "1.bin", val_source=str(root / "1.bin"), **RAW
    )


def test_val_source_may_be_text_if_there_is_a_tokenizer(root: Path, prepared: Path) -> None:
    joined(TRAIN).astype("<u2").tofile(root / "train.bin")
    (root.parent / "v").mkdir()
    (root.parent / "v" / "a.txt").write_text("held out words " * 50)
    options = {"val_source": str(root.parent / "v"), **RAW}
    assert "data.tokenizer" in complaint(root, **options)
    data = opened(root, vocab_size=None, tokenizer=str(prepared / "tokenizer.model"), **options)
    assert data.train_tokens == len(joined(TRAIN))
    assert data.tokenizer.decode(targets(data)) == "held out words " * 50


def test_ids_do_not_validate_text(root: Path, prepared: Path) -> None:
    joined(TRAIN).astype("<u2").tofile(root / "train.bin")
    (root.parent / "v").mkdir()
    text = root.parent / "v" / "text.txt"
    text.write_text("words to train on\n" * 200)
    message = complaint(text, vocab_size=None, val_source=str(root), token_dtype="uint16")
    assert message.startswith("data.val_source: ") and message.endswith("give text")


def test_the_user_says_what_begins_documents(root: Path) -> None:
    """Of ids whose files do not tell, without a tokenizer."""
    ids = np.concatenate([[5, 6, 7], joined(TRAIN, at_start=True)])
    ids.astype("<u2").tofile(root / "train.bin")
    assert "or data.bos to the id" in complaint(root, document_mask=True, **RAW)
    for bos in (SEP, str(SEP)):
        data = opened(root, document_mask=True, bos=bos, **RAW)
        assert (data.tokenizer.bos_id, data.tokenizer.eos_id) == (SEP, None)
    assert opened(root, bos=SEP, eos=1, **RAW).tokenizer.eos_id == 1
    for wrong in ("<s>", VOCAB):
        assert f"data.bos: {wrong!r} is no id below" in complaint(root, bos=wrong, **RAW)


# ---------------------------------------------------------------------------- faults


def cut(path: Path, count: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - count)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


FAULTS: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "odd size": ("nanoGPT", lambda r: cut(r / "train.bin", 1), ["train.bin", "no whole number of uint16"]),
    "wide": (
        "nanoGPT",
        lambda r: joined(TRAIN).astype("<u4").tofile(r / "train.bin"),
        ["train.bin: as uint16, most of its ids are 0", "set data.token_dtype to uint32"],
    ),
    "wider": (
        "nanoGPT",
        lambda r: joined(TRAIN).tofile(r / "train.bin"),
        ["set data.token_dtype to int64"],
    ),
    "narrow": (
        "OLMo",
        lambda r: (
            joined(TRAIN + TRAIN[:1])[: len(joined(TRAIN)) // 2 * 2]
            .astype("<u2")
            .tofile(r / "part-0-00000.npy")
        ),
        ["part-0-00000.npy: as uint32, it has ids that are not in", "set data.token_dtype to uint16"],
    ),
    "byte order": (
        "nanoGPT",
        lambda r: joined(TRAIN).astype(">u2").tofile(r / "train.bin"),
        ["as big-endian uint16 it has none", "little-endian"],
    ),
    "llm.c cut": ("llm.c", lambda r: cut(r / "fineweb_train_000001.bin", 3), ["cut short", "header says"]),
    "llm.c longer": (
        "llm.c",
        lambda r: (r / "fineweb_train_000001.bin").open("ab").write(b"1234"),
        ["fineweb_train_000001.bin: damaged"],
    ),
    "llm.c version": (
        "llm.c",
        lambda r: patch(r / "fineweb_train_000002.bin", 4, struct.pack("<i", 2)),
        ["fineweb_train_000002.bin: version 2", "only 1"],
    ),
    "id": (
        "llm.c",
        lambda r: patch(r / "fineweb_train_000002.bin", 1024 + 2 * 700, struct.pack("<H", 1234)),
        ["fineweb_train_000002.bin: id 1234 at token 700 is not in the vocabulary of 300", "data.vocab_size"],
    ),
    "Megatron bin cut": (
        "Megatron-LM",
        lambda r: cut(r / "a_train_text_document.bin", 2),
        ["a_train_text_document.bin: cut short", "a_train_text_document.idx says"],
    ),
    "Megatron idx cut": (
        "Megatron-LM",
        lambda r: cut(r / "a_train_text_document.idx", 8),
        ["a_train_text_document.idx: its size does not match its 120 sequences"],
    ),
    "Megatron of another": (
        "Megatron-LM",
        lambda r: shutil.copy(r / "a_valid_text_document.bin", r / "a_train_text_document.bin"),
        ["a_train_text_document.bin"],
    ),
    "Megatron floats": (
        "Megatron-LM",
        lambda r: patch(r / "a_train_text_document.idx", 17, b"\7"),
        ["type with code 7"],
    ),
    "Megatron version": (
        "Megatron-LM",
        lambda r: patch(r / "a_train_text_document.idx", 9, b"\2"),
        ["version 2 is not known"],
    ),
    "Megatron order": (
        "Megatron-LM",
        lambda r: patch(r / "a_train_text_document.idx", 34 + 4 * 120, struct.pack("<qq", 4, 0)),
        ["do not follow each other"],
    ),
    "Megatron documents": (
        "Megatron-LM",
        lambda r: patch(r / "a_train_text_document.idx", 34 + 12 * 120, struct.pack("<q", 7000)),
        ["its document index is damaged"],
    ),
    "npy cut": ("npy", lambda r: cut(r / "train" / "0.npy", 5), ["0.npy: cut short"]),
    "npy columns first": (
        "npy",
        lambda r: np.save(r / "train" / "1.npy", np.asfortranarray(np.ones((5, 8), np.int32))),
        ["1.npy: its columns come first"],
    ),
    "negative": (
        "npy",
        lambda r: np.save(r / "train" / "0.npy", np.array([5, 6, -100, 7])),
        ["id -100 at token 2"],
    ),
    "parquet id": (
        "parquet",
        lambda r: rows_of(r / "train-00000-of-00001.parquet", [[1, 2]] * 9 + [[3, 300]]),
        ["row 9: id 300 is not in the vocabulary of 300"],
    ),
    "parquet null": (
        "parquet",
        lambda r: rows_of(r / "train-00000-of-00001.parquet", [[1, 2], None]),
        ['the column "input_ids" has nulls'],
    ),
    "Arrow without its end": (
        "save_to_disk",
        lambda r: cut(next((r / "train").glob("*.arrow")), 8),
        ["data-00000-of-00001.arrow: has no end: cut short"],
    ),
    "Arrow file cut": (
        "Arrow file",
        lambda r: cut(r / "train.arrow", 700),
        ["train.arrow: not a complete Arrow file"],
    ),
    "parquet page": (
        "parquet",
        lambda r: patch(r / "train-00000-of-00001.parquet", 4, bytes(40)),
        ["train-00000-of-00001.parquet: damaged or cut short"],
    ),
}


def rows_of(path: Path, rows: list[Any]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"input_ids": rows}), path)


def compressed_rows(path: Path, rows: list[Any]) -> None:
    rows_of(path.with_suffix(""), rows)
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    path.with_suffix("").unlink()


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(root: Path, fault: str) -> None:
    name, damage, words = FAULTS[fault]
    write, options = FORMATS[name]
    write(root)
    damage(root)
    message = complaint(root, **options)
    assert all(word in message for word in words), message


REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "pickled": (lambda r: np.save(r / "a.npy", np.array([[1], [2, 3]], object)), ["an array of objects"]),
    "floats": (lambda r: np.save(r / "a.npy", np.ones(9, np.float32)), ["a.npy", "an array of float32"]),
    "npz": (lambda r: np.savez(r / "a.npz", x=np.arange(9)), ["several arrays; save each as .npy"]),
    "compressed": (lambda r: (r / "train.bin.gz").write_bytes(b"\x1f\x8b" * 9), ["decompress it"]),
    "no index": (lambda r: (r / "x_text_document.bin").write_bytes(b"\1\0" * 99), ["x_text_document.idx"]),
    "no ids": (lambda r: (r / "x.idx").write_bytes(b"MMIDIDX\0\0" + b"\0" * 99), ["put x.bin beside it"]),
    "old index": (
        lambda r: [(r / "x.idx").write_bytes(b"TNTIDX\0\0" * 9), (r / "x.bin").write_bytes(b"\1\0" * 99)],
        ["old form of Megatron-LM (TNTIDX)"],
    ),
    "weights of llm.c": (
        lambda r: llm_c(r / "train.bin", np.arange(9), 20240326, 3),
        ["magic number 20240326"],
    ),
    "newer llm.c": (lambda r: llm_c(r / "train.bin", np.arange(9), 20260101), ["newer; known are 20240520"]),
    "compressed rows": (
        lambda r: compressed_rows(r / "a.parquet.gz", [[1, 2]]),
        ["token ids in a compressed file; decompress it"],
    ),
    "an archive": (lambda r: archive(r / "a.tar", {"train.bin": b"\1\0" * 99}), ["in an archive; unpack it"]),
    "a prepared shard": (lambda r: (r / "x.bin").write_bytes(b"lowres\0\0" + bytes(99)), ["give the folder"]),
    "nothing": (lambda r: llm_c(r / "train.bin", np.arange(0)), ["has no ids"]),
    "empty": (lambda r: (r / "train.bin").write_bytes(b""), ["empty: a download that failed?"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_usable_ids_are_left_out_with_the_reason(root: Path, name: str) -> None:
    write, words = REFUSED[name]
    write(root)
    message = complaint(root)
    assert all(word in message for word in words), message


def test_what_is_missing_is_asked_for(root: Path) -> None:
    write_nanogpt(root)
    assert "set data.token_dtype (nanoGPT writes uint16" in complaint(root)
    message = complaint(root, vocab_size=None)
    assert "data.tokenizer" in message and "data.vocab_size" in message and "data.token_dtype" in message
    # the rows of the embedding are an upper bound
    assert open_data(config(root, vocab_size=None, **RAW), 400, 0, False).vocab_size == 400
    with pytest.raises(UserError, match=r"model\.vocab_size: 299 is less than the 300"):
        open_data(config(root, **RAW), 299, 0, False)


def test_a_type_that_the_file_contradicts_is_refused(root: Path) -> None:
    write_llm_c(root)
    assert "its ids are uint16; leave it out" in complaint(root, token_dtype="uint32")


def test_a_damaged_file_may_be_skipped_and_is_named(root: Path) -> None:
    parts, _ = write_llm_c(root)
    cut(root / "fineweb_train_000001.bin", 2)
    data = opened(root, damaged="skip")
    assert data.train_tokens == len(parts[1])
    assert any("left out: " in note and "fineweb_train_000001.bin" in note for note in data.notes)


def test_nothing_is_prepared_of_ids(root: Path) -> None:
    write_llm_c(root)
    with pytest.raises(UserError, match="holds token ids already, so there is no text to prepare"):
        prepare(str(root), root.parent / "out", progress=False)


@every_format
def test_inspect_counts_and_writes_nothing(root: Path, name: str) -> None:
    write, options = FORMATS[name]
    parts, val = write(root)
    settings = [part for key, value in options.items() for part in ("--set", f"data.{key}={value}")]
    found = json.loads(lowres_here("data", "inspect", root, *settings, "--json").stdout)
    tokens = {"train": 0, "validation": 0}
    for group in found["groups"]:
        tokens[group["part"]] += group["tokens"]
    assert tokens == {"train": sum(map(len, parts)), "validation": len(val)}
    assert f"{sum(map(len, parts)):,}" in lowres_here("data", "inspect", root, *settings).stdout
    assert not (root.parent / "cache").exists()


# ---------------------------------------------------------------------------- changes


def test_the_same_ids_elsewhere_are_the_same_data(root: Path) -> None:
    write_llm_c(root)
    data = opened(root)
    shutil.copytree(root, root.parent / "moved")
    assert opened(root.parent / "moved").fingerprint == data.fingerprint
    patch(root / "fineweb_train_000002.bin", 2048, b"\3\0")
    changed = opened(root)
    assert changed.fingerprint != data.fingerprint
    assert changed.validation_fingerprint == data.validation_fingerprint


@pytest.mark.parametrize("sampled", [False, True])
def test_a_file_that_changes_while_it_is_used(
    root: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(corpus_module, "READ_AT_ONCE_BYTES", 0)
    monkeypatch.setattr("lowres.disk.PAUSES", ())
    write_nanogpt(root)
    data, path = opened(root, **RAW), root / "train.bin"
    before, content = data.batch(0, 8), path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert torch.equal(data.batch(0, 8), before)
    patch(path, 0, b"\7\0" if content[:2] != b"\7\0" else b"\6\0")
    with pytest.raises(UserError, match=r"train\.bin: changed while it was used \(other ids\)"):
        data.batch(0, 8)
    path.write_bytes(content)
    assert torch.equal(data.batch(0, 8), before)
    cut(path, 10)
    with pytest.raises(UserError, match=r"train\.bin: changed while it was used \(it has"):
        data.batch(0, 8)
    path.unlink()
    with pytest.raises(UserError, match=r"train\.bin: cannot be read .*put it back"):
        data.batch(0, 8)


def test_large_corpora_are_sampled_and_checked_as_they_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "READ_AT_ONCE_BYTES", 0)
    monkeypatch.setattr("lowres.data.tokenised.files._SAMPLES", 4)
    monkeypatch.setattr("lowres.data.tokenised.files._SAMPLE", 8)
    ids = joined(TRAIN)
    ids[1000] = 301
    llm_c(root / "a_train.bin", ids)
    llm_c(root / "a_val.bin", ids[:100])
    data = opened(root)
    assert "in a sample" in data.notes[0]
    with pytest.raises(UserError, match=r"a_train\.bin: id 301 at token 1,000 is not"):
        epoch(data, len(windows(ids)))


def test_parquet_is_unpacked_once(root: Path) -> None:
    write_parquet(root)
    data = opened(root)
    cache = root.parent / "cache"
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    assert [p.name for p in sorted(cache.rglob("*.*")) if p.is_file()] == ["ids.bin", "ids.idx"] * 2
    assert opened(root).fingerprint == data.fingerprint
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()} == stamps
    # as after a kill
    for index in cache.rglob("*.idx"):
        index.unlink()
    assert opened(root).fingerprint == data.fingerprint
    rows_of(root / "train-00000-of-00001.parquet", [[1, 2, 3]] * 100)
    assert opened(root).train_tokens == 300
    # the file that the user has is named, not the one in the cache
    assert "train-00000-of-00001.parquet: id 3 at token 2 " in complaint(root, vocab_size=3)


# ---------------------------------------------------------------------------- runs


def command(root: Path, run: str, *more: str, code: int = 0, **keys: Any) -> str:
    file = root.parent / "c.toml"
    keys = {"vocab_size": VOCAB} | keys
    given = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items() if value is not None)
    file.write_text(
        f"""
[model]
dim = 16
n_layers = 1
n_heads = 2
ffn_dim = 32
[data]
source = "{root}"
cache = "{root.parent}/cache"
seq_len = {SEQ}
{given}
[schedule]
name = "constant"
[train]
steps = 4
batch_tokens = 64
eval_every = 2
eval_tokens = 128
checkpoint_every = 2
[log]
progress = false
sample_tokens = 3
"""
    )
    done = lowres_here("train", file, "--run", root.parent / run, *more, code=code)
    return done.stdout + done.stderr


def test_documents_apart_need_to_be_seen(root: Path) -> None:
    write_megatron(root)
    assert opened(root, document_mask=True).tokenizer.bos_id == SEP
    for file in root.iterdir():
        file.unlink()
    np.arange(200, dtype="<u2").tofile(root / "train.bin")
    assert "data.document_mask: the ids" in complaint(root, document_mask=True, **RAW)


@every_format
def test_a_run_on_every_format_goes_on(root: Path, name: str) -> None:
    write, options = FORMATS[name]
    write(root)
    assert "a sample after 2 steps" in command(root, "run", "--set", "train.steps=2", **options)
    assert "continuing" in command(root, "run", "--resume", **options)
    records = [json.loads(line) for line in (root.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in records if "val_loss" in record] == [0, 2, 4]


def test_a_resumed_run_is_exact(root: Path) -> None:
    write_llm_c(root)
    command(root, "straight")
    command(root, "run", "--set", "train.steps=2")
    command(root, "run", "--resume")
    for file in sorted((root.parent / "straight" / "checkpoints" / "step_00000004").glob("*.safetensors")):
        resumed = load_file(root.parent / "run" / "checkpoints" / "step_00000004" / file.name)
        for key, tensor in load_file(file).items():
            assert torch.equal(tensor, resumed[key]), key


def test_ids_without_a_tokenizer_in_all_commands(root: Path) -> None:
    write_nanogpt(root)
    assert "a sample after 4 steps ---\n<" in command(root, "run", "--set", "log.sample_prompt=hello", **RAW)
    run = root.parent / "run"
    assert {p.name for p in run.iterdir()} >= {"vocabulary.json"} and not (run / "tokenizer.model").exists()
    assert lowres_here("sample", run, "--prompt", "<5><6>", "--tokens", 2).stdout.startswith("<5><6><")
    assert "as <17><4>" in lowres_here("sample", run, "--prompt", "words", code=2).stderr
    own = json.loads(lowres_here("eval", run, "--json").stdout)
    assert own.keys() == {"val_loss", "val_ppl", "val_tokens"}
    given = json.loads(lowres_here("eval", run, "--data", root / "val.bin", "--json").stdout)
    assert given == own
    assert "no text, so no bits per byte" in lowres_here("eval", run).stdout
    command(root, "straight", "--init-from", str(run), vocab_size=None, **RAW)
    joined(VAL).astype("<u2").tofile(root / "train.bin")
    more = ("--resume", "--set", "train.steps=6")
    assert "is not what the run in" in command(root, "straight", *more, code=2, vocab_size=None, **RAW)
