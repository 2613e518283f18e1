"""Preparing: what is held out is never trained on, and a killed preparation ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowres import disk
from lowres.data import open_tokenizer, prepare
from lowres.data import validation as validation_module
from lowres.data.folder import LOCK
from lowres.data.shards import HEADER_BYTES, Shard, token_dtype, write_shard
from lowres.data.survey import EvenSample, survey
from lowres.errors import UserError
from lowres.lock import held
from lowres.text import Source

module = sys.modules["lowres.data.prepare"]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        f"Document {i}\n" + " ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + "\n" for i in range(count)
    ]


def write_source(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_source(tmp_path / "source.jsonl", make_documents(200))


def make(source: str, out: Path, **options: Any) -> dict[str, Any]:
    return prepare(source, out, **{"vocab_size": 300, "progress": False, "shard_tokens": 1000} | options)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tokens_of(folder: Path, part: str) -> list[int]:
    shards = json.loads((folder / "data.json").read_text())[part]
    return [int(token) for shard in shards for token in Shard(folder / shard["file"]).read()]


def texts_of(folder: Path, part: str) -> list[str]:
    """The documents of a part; each must stand between bos and eos."""
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    assert tokenizer.eos_id is not None
    texts, ids = [], tokens_of(folder, part)
    while ids:
        assert ids[0] == tokenizer.bos_id
        end = ids.index(tokenizer.eos_id)
        texts.append(tokenizer.decode(ids[1:end]))
        ids = ids[end + 1 :]
    return texts


def complaint(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- what is written


def test_every_document_is_stored_once_whole_and_in_order(source: str, tmp_path: Path) -> None:
    summary = make(source, tmp_path / "out")
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    texts = make_documents(200)
    assert train == [text for text in texts if text in train]
    assert sorted(train + val) == sorted(texts)
    characters = sum(map(len, texts))
    assert 0.03 * characters < sum(map(len, val)) <= 0.05 * characters
    # a choice, not the first or last ones
    rows = sorted(texts.index(text) for text in val)
    assert len(val) > 3 and rows[0] > 0 and rows != list(range(rows[0], rows[0] + len(val)))
    assert [shard["tokens"] for shard in summary["train"][:-1]] == [1000] * (len(summary["train"]) - 1)
    for part, stored in (("train", train), ("val", val)):
        assert summary[f"{part}_documents"] == len(stored)
        assert summary[f"{part}_bytes"] == sum(len(text.encode()) for text in stored)
        assert summary[f"{part}_tokens"] == len(tokens_of(tmp_path / "out", part))
    recorded = json.loads((tmp_path / "out" / "data.json").read_text())
    assert recorded.pop("seal") and recorded == summary


def test_copies_of_a_held_out_document_are_not_trained_on(tmp_path: Path) -> None:
    texts = make_documents(100)
    make(write_source(tmp_path / "a.jsonl", texts), tmp_path / "a")
    held_out = texts_of(tmp_path / "a", "val")
    # which ones are held out follows from the content alone, wherever they stand
    shuffled = texts[::-1] + held_out + texts[:50]
    make(write_source(tmp_path / "b.jsonl", shuffled), tmp_path / "b")
    train, val = texts_of(tmp_path / "b", "train"), texts_of(tmp_path / "b", "val")
    assert set(held_out) <= set(val)
    assert len(set(val)) == len(val)
    assert not set(train) & set(val)
    assert len(train) + sum(shuffled.count(text) for text in val) == len(shuffled)


def test_one_big_document_gives_its_end(tmp_path: Path) -> None:
    text = "".join(make_documents(200))
    (tmp_path / "big.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text)
    summary = make(str(tmp_path), tmp_path / "out")
    [train], [val] = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert train + val == text
    assert train.endswith("\n") and 0.04 * len(text) < len(val) < 0.11 * len(text)
    assert any("largest" in note for note in summary["notes"])


def test_end_of_a_document_without_newlines(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("ab cd " * 500)
    make(str(tmp_path / "big.txt"), tmp_path / "out", vocab_size=270)
    [train], [val] = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert (len(train), len(val)) == (2850, 150)


def test_max_tokens_bounds_training_only(source: str, tmp_path: Path) -> None:
    everything = make(source, tmp_path / "all")
    bounded = make(source, tmp_path / "out", max_tokens=2500)
    assert [shard["tokens"] for shard in bounded["train"]] == [1000, 1000, 500]
    assert tokens_of(tmp_path / "out", "train") == tokens_of(tmp_path / "all", "train")[:2500]
    assert bounded["val"] == everything["val"]


def test_given_tokenizer_is_used(source: str, tmp_path: Path) -> None:
    first = make(source, tmp_path / "first", vocab_size=280)
    model = tmp_path / "first" / "tokenizer.model"
    second = make(source, tmp_path / "second", tokenizer=str(model), vocab_size=None)
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert second["fingerprint"] == first["fingerprint"]
    assert make(source, tmp_path / "third", vocab_size=290)["fingerprint"] != first["fingerprint"]


def test_default_vocabulary_is_lowered_with_a_note_and_an_explicit_one_refused(
    source: str, tmp_path: Path
) -> None:
    summary = make(source, tmp_path / "out", vocab_size=None)
    assert 260 < summary["vocab_size"] < 4096
    assert any(f"{summary['vocab_size']} pieces" in note for note in summary["notes"])
    message = complaint(make, source, tmp_path / "other", vocab_size=4096)
    assert f"the largest that works is {summary['vocab_size']}" in message
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("data", [b"", b"\n\n", b'{"text": ""}', b"\xff\xfe\x00", b'{"text": "a"}\n{"tex'])
def test_bad_source_leaves_nothing_behind(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "source.jsonl").write_bytes(data)
    assert "source.jsonl" in complaint(make, str(tmp_path / "source.jsonl"), tmp_path / "deep" / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source.jsonl"]


def test_finished_folder_is_left_alone(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(source, out)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert any("already prepared" in note for note in make(source, out)["notes"])
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_other_arguments_are_refused_by_name(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(source, out)
    other = write_source(tmp_path / "other.jsonl", make_documents(10))
    make(other, tmp_path / "model", vocab_size=270)
    before = content(out)
    model = str(tmp_path / "model" / "tokenizer.model")
    assert "vocab_size 300, not 290" in complaint(make, source, out, vocab_size=290)
    assert "vocab_size 300, not left to default" in complaint(make, source, out, vocab_size=None)
    assert "max_tokens left to default, not 5" in complaint(make, source, out, max_tokens=5)
    assert "with tokenizer left to default" in complaint(make, source, out, tokenizer=model)
    assert "other.jsonl" in complaint(make, other, out)
    write_source(Path(source), make_documents(201))
    assert "have changed" in complaint(make, source, out)
    assert content(out) == before


def test_folder_with_something_else_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "not empty" in complaint(make, source, tmp_path / "out")
    assert "is a file" in complaint(make, source, tmp_path / "source.jsonl")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_write_into_one_folder(source: str, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out", name=LOCK):
        assert "is being prepared by process" in complaint(make, source, tmp_path / "out")
    make(source, tmp_path / "out")


# ---------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("rows", [0, 1, 70, 150, 199])
def test_failing_source_is_resumed_to_the_same_bytes(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    make(source, tmp_path / "straight")
    read = module.numbered_documents

    def failing(*asked: Any) -> Iterator[tuple[int, str]]:
        for row, text in read(*asked):
            if row == rows:
                raise OSError("the disk is gone")
            yield row, text

    monkeypatch.setattr(module, "_BATCH_CHARS", 500)
    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(module, "numbered_documents", failing)
        make(source, tmp_path / "out")
    assert not (tmp_path / "out" / "data.json").exists()
    assert "vocab_size" in complaint(make, source, tmp_path / "out", vocab_size=290)
    written = len(list((tmp_path / "out").glob("train_*.bin")))
    notes = make(source, tmp_path / "out")["notes"]
    assert any(f"after shard {written}" in note for note in notes) == (written > 0)
    assert written > 0 or rows < 70
    assert content(tmp_path / "out") == content(tmp_path / "straight")


KILLED_AT_EVERY_RENAME = """
import os, signal, sys
from pathlib import Path
from lowres.data import prepare

source, out = sys.argv[1:]
replace = os.replace
for n in range(1, 100):
    child = os.fork()
    if child == 0:
        count = 0
        def dying(source, target):
            # odd: just before the n-th rename, even: just after it
            global count
            count += 1
            if count == (n + 1) // 2 and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = replace(source, target)
            if count == (n + 1) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        os.replace = dying
        prepare(source, out, vocab_size=300, progress=False, shard_tokens=1000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(n)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again_it_ends_with_the_same_bytes(source: str, tmp_path: Path) -> None:
    make(source, tmp_path / "straight")
    command = [sys.executable, "-c", KILLED_AT_EVERY_RENAME, source, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 8, "it must have been killed in the middle of the shards too"
    assert signal.SIGKILL == 9 and content(tmp_path / "out") == content(tmp_path / "straight")


# ---------------------------------------------------------------------------- shards


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537, 100_000])
def test_shard_round_trip(tmp_path: Path, vocab_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1000)
    tokens[0] = vocab_size - 1
    write_shard(tmp_path / "a.bin", tokens, vocab_size)
    shard = Shard(tmp_path / "a.bin", vocab_size=vocab_size)
    read = shard.read()
    assert shard.read(990).tolist() == shard.read(990, 50).tolist() == tokens[990:].tolist()
    assert shard.read(5, 2).tolist() == tokens[5:7].tolist() and len(shard) == 1000
    assert read.tolist() == tokens.tolist()
    assert read.dtype == token_dtype(vocab_size) == (np.uint16 if vocab_size <= 65536 else np.uint32)
    assert not read.flags.writeable
    assert (tmp_path / "a.bin").stat().st_size == HEADER_BYTES + 1000 * read.itemsize
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_damaged_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "train_00000.bin"
    checksum = write_shard(file, np.arange(100), 300)
    good = file.read_bytes()

    def after(data: bytes, **options: Any) -> str:
        file.write_bytes(data)
        message = complaint(Shard, file, **options)
        assert "train_00000.bin" in message and "prepare the data again" in message
        return message

    for place in (HEADER_BYTES, HEADER_BYTES + 77, len(good) - 1):
        flipped = bytearray(good)
        flipped[place] ^= 1
        assert "checksum" in after(bytes(flipped))
    assert "size" in after(good[:-1])
    assert "size" in after(good + b"\0\0")
    assert "version 2" in after(good[:8] + b"\2" + good[9:])
    assert "not a token file" in after(b"x" + good[1:])
    assert "not a token file" in after(b"")
    assert "another checksum" in after(good, crc32=checksum + 1)
    assert "another tokens" in after(good, tokens=99)
    assert "another vocabulary" in after(good, vocab_size=301)
    file.unlink()
    assert "train_00000.bin" in complaint(Shard, file)


def test_empty_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.empty(0, np.int64), 300)
    shard = Shard(tmp_path / "a.bin")
    assert len(shard) == len(shard.read()) == 0


def test_full_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(disk, "PAUSES", (0.0,))
    assert "a.bin: cannot be written (No space left" in complaint(
        write_shard, tmp_path / "a.bin", np.arange(3), 300
    )


# ---------------------------------------------------------------------------- the first pass


def test_sample_is_bounded_and_spread_evenly() -> None:
    sample = EvenSample(100_000)
    for i in range(5000):
        sample.add(f"{i:04} " * 20)
    kept = [int(block[:4]) for block in sample.blocks]
    assert 50_000 <= sum(map(len, sample.blocks)) <= 100_000
    gaps = np.diff(kept)
    assert kept[0] == 0 and kept[-1] > 4980 and gaps.min() == gaps.max()


def test_a_sample_may_be_smaller_than_a_block() -> None:
    for limit in (0, 7):
        sample = EvenSample(limit)
        for _ in range(3):
            sample.add("word " * 5000)
        assert sum(map(len, sample.blocks)) <= limit and any(sample.blocks) is (limit > 0)


def test_candidates_beyond_the_memory_bound_change_nothing(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_module, "VAL_CHARS", 500)
    unbounded = survey(Source(source), True, False)
    monkeypatch.setattr(validation_module, "_CANDIDATE_CHARS", 2000)
    bounded = survey(Source(source), True, False)
    # the lowest hashes are the same; only what fills the last gap may differ
    assert bounded.validation and unbounded.validation
    common = set(bounded.validation.texts) & set(unbounded.validation.texts)
    assert common and 300 < sum(map(len, bounded.validation.texts)) <= 500


def test_nothing_is_held_out_if_not_asked_for(source: str) -> None:
    assert survey(Source(source), False, False).validation is None
