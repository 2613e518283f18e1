"""What becomes validation data, and which copies are not trained on, from the source to the shards."""

import contextlib
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowres.config import DataConfig
from lowres.data import hashes as hashes_module
from lowres.data import open_data, open_text, open_tokenizer, prepare
from lowres.data import survey as survey_module
from lowres.data import validation as validation_module
from lowres.data.ahead import read_ahead
from lowres.data.batches import inputs_and_targets
from lowres.data.hashes import Seen, common, content_hash
from lowres.errors import UserError
from lowres.stopping import Left
from lowres.text import Source, numbered_documents
from tests.helpers import lowres_here
from tests.test_data_prepare import (
    complaint,
    content,
    make,
    make_documents,
    texts_of,
    tokens_of,
    write_source,
)

prepare_module = sys.modules["lowres.data.prepare"]


def make_splits(root: Path, train: list[str], val: list[list[str]]) -> str:
    """A folder with train/, several validation files and a test split."""
    for part in ("train", "validation", "test"):
        (root / part).mkdir(parents=True)
    write_source(root / "train" / "a.jsonl", train[: len(train) // 2])
    write_source(root / "train" / "b.jsonl", train[len(train) // 2 :])
    for i, texts in enumerate(val):
        write_source(root / "validation" / f"{i}.jsonl", texts)
    write_source(root / "test" / "a.jsonl", ["Never read this. " * 9])
    return str(root)


def note(summary: dict[str, Any], words: str) -> str:
    [found] = [each for each in summary["notes"] if words in each]
    return str(found)


TRAIN = make_documents(120, seed=1)
VAL = [[f"Held {i}. {text}" for text in make_documents(count, seed=i)] for i, count in enumerate((9, 14, 11))]


# ---------------------------------------------------------------------------- the source's own split


def test_own_split_is_the_validation_data_and_nothing_of_it_is_trained_on(tmp_path: Path) -> None:
    copied = VAL[0][3]
    source = make_splits(tmp_path / "source", [*TRAIN[:50], copied, *TRAIN[50:], copied], VAL)
    summary = make(source, tmp_path / "out", max_overlap=0.03)
    assert texts_of(tmp_path / "out", "train") == TRAIN
    assert texts_of(tmp_path / "out", "val") == [text for file in VAL for text in file]
    assert "1 of 34 validation documents" in note(summary, "also in the training text")
    assert ": 2 copies" in note(summary, "copies of validation")
    assert "34 documents of the source's own validation split (3 files)" in note(summary, "validation: ")
    assert f"{summary['val_tokens']:,} tokens" in note(summary, "validation: ")


def test_a_split_that_is_mostly_in_the_training_text_is_refused(tmp_path: Path) -> None:
    source = make_splits(tmp_path / "source", TRAIN + VAL[0][:5], VAL)
    message = complaint(make, source, tmp_path / "out", max_overlap=4 / 34)
    assert "5 of 34 validation documents" in message and not (tmp_path / "out").exists()
    allowed = float(message.split("data.max_overlap = ")[1].split()[0])
    make(source, tmp_path / "out", max_overlap=allowed)
    assert texts_of(tmp_path / "out", "train") == TRAIN


@pytest.mark.parametrize("limit", [1500, 4000, 6000])
def test_a_long_split_is_cut_so_that_every_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(validation_module, "OWN_CHARS", limit)
    small = [VAL[0][0]]
    files = [VAL[0], VAL[1], small, VAL[2]]
    assert sum(len(text) for file in files for text in file) > limit
    summary = make(make_splits(tmp_path / "source", TRAIN, files), tmp_path / "out")
    found = texts_of(tmp_path / "out", "val")
    # in the order of the files, the first documents of each
    kept, at = [], 0
    for file in files:
        count = 0
        while at < len(found) and count < len(file) and found[at] == file[count]:
            at, count = at + 1, count + 1
        kept.append(count)
    assert at == len(found) and min(kept) >= 1
    longest = max(len(text) for file in files for text in file)
    sizes = [sum(map(len, file[:count])) for file, count in zip(files, kept, strict=True)]
    assert limit - longest < sum(sizes) <= limit
    # a file of which something was left out has about as much as any other
    cut = [size for size, file, count in zip(sizes, files, kept, strict=True) if count < len(file)]
    assert cut and min(cut) > max(sizes) - 2 * longest
    assert f"{sum(sizes):,} characters" in note(summary, "spread over its files")


def test_one_long_validation_document_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_module, "OWN_CHARS", 500)
    text = "".join(VAL[0])
    make(make_splits(tmp_path / "source", [*TRAIN, text], [[text]]), tmp_path / "out", max_overlap=1.0)
    assert texts_of(tmp_path / "out", "val") == [text[:500]]
    assert texts_of(tmp_path / "out", "train") == TRAIN


def test_text_to_evaluate_is_the_split_of_its_source(tmp_path: Path) -> None:
    source = make_splits(tmp_path / "source", TRAIN, VAL)
    plain = write_source(tmp_path / "plain.jsonl", make_documents(90, seed=5))
    config = DataConfig(source=plain, val_source=source, cache=str(tmp_path / "cache"), seq_len=16)
    data = open_data(config, 300, 0, False)
    both = config.model_copy(update={"source": source, "val_source": plain})
    assert any("own validation split is not used" in each for each in open_data(both, 300, 0, False).notes)
    held = "".join(text for file in VAL for text in file)
    for windows in (data.validation(0), open_text(source, data.tokenizer, 16)):
        targets = inputs_and_targets(windows)[1]
        assert data.tokenizer.decode(targets[targets >= 0].tolist()) == held


# ---------------------------------------------------------------------------- another text for validation


@pytest.mark.parametrize("source_prepared", [False, True])
@pytest.mark.parametrize("val_prepared", [False, True])
def test_overlap_with_another_validation_text(
    tmp_path: Path, source_prepared: bool, val_prepared: bool
) -> None:
    source = write_source(tmp_path / "a.jsonl", TRAIN)
    val = write_source(tmp_path / "b.jsonl", [*VAL[0], *TRAIN[7:10], TRAIN[8], *VAL[1]])
    make(source, tmp_path / "a", vocab_size=300)
    hidden = len(set(TRAIN[7:10]) & set(texts_of(tmp_path / "a", "val"))) if source_prepared else 0
    found = 3 - hidden
    if source_prepared:
        source = str(tmp_path / "a")
    model = str(tmp_path / "a" / "tokenizer.model")
    if val_prepared:
        make(val, tmp_path / "b", tokenizer=model, vocab_size=None)
        val = str(tmp_path / "b")
    options: dict[str, Any] = {"cache": str(tmp_path / "cache"), "seq_len": 16, "val_source": val}
    options |= {"source": source} | ({} if source_prepared else {"tokenizer": model})
    assert found > 0
    message = complaint(open_data, DataConfig(**options, max_overlap=found / 26 - 0.001), None, 0, False)
    assert f"data.val_source: {found} of 26 validation documents" in message
    notes = open_data(DataConfig(**options, max_overlap=found / 26 + 0.001), None, 0, False).notes
    assert any(f"{found} of 26" in each for each in notes)


def test_overlap_is_unknown_where_an_older_version_prepared(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", TRAIN)
    make(source, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "data.json").read_text())
    del record["seal"], record["arguments"]["part"], record["arguments"]["drop_duplicates"]
    for entry in record["train"] + record["val"]:
        (tmp_path / "a" / entry["file"]).with_suffix(".hashes").unlink()
        del entry["hashes"]
    (tmp_path / "a" / "data.json").write_text(json.dumps(record))
    config = DataConfig(source=str(tmp_path / "a"), val_source=source, cache=str(tmp_path / "c"), seq_len=16)
    assert any("older version" in each for each in open_data(config, None, 0, False).notes)
    assert any("already prepared" in each for each in make(source, tmp_path / "a")["notes"])


# ---------------------------------------------------------------------------- ends of large documents


def write_books(folder: Path, books: list[str]) -> str:
    folder.mkdir()
    for i, book in enumerate(books):
        (folder / f"{i}.txt").write_text(book)
    return str(folder)


BOOKS = ["".join(make_documents(40 + 10 * i, seed=20 + i)) for i in range(6)]
SMALL = "A small file, 26 bytes...\n"


def test_a_few_books_and_a_small_file_hold_out_the_end_of_each_book(tmp_path: Path) -> None:
    books = [*BOOKS, SMALL]
    summary = make(write_books(tmp_path / "books", books), tmp_path / "out")
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert len(val) == len(BOOKS) and train[-1] == SMALL
    for beginning, book in zip(train, BOOKS, strict=False):
        [end] = [text for text in val if beginning + text == book]
        assert 0.025 * len(book) <= len(end) <= 0.05 * len(book) and beginning.endswith("\n")
    assert "6 largest documents" in note(summary, "validation: ")
    # wherever they stand, and with another small file
    other = write_books(tmp_path / "other", [SMALL, *reversed(BOOKS), BOOKS[2], "Another small file.\n"])
    make(other, tmp_path / "second")
    assert texts_of(tmp_path / "second", "val") == val
    assert sorted(texts_of(tmp_path / "second", "train")) == sorted([*train, "Another small file.\n"])


def test_ends_share_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_module, "VAL_CHARS", 900)
    monkeypatch.setattr(validation_module, "_ENDS", 4)
    flat = [book.replace("\n", " ") for book in BOOKS]
    make(write_books(tmp_path / "books", flat), tmp_path / "out")
    val = texts_of(tmp_path / "out", "val")
    # of the four largest ones the same, as 5 % of each would be more
    assert sorted(map(len, val)) == [225] * 4 and min(0.05 * len(book) for book in flat[2:]) > 225
    assert all(any(book.endswith(text) for text in val) for book in flat[2:])


def test_few_validation_tokens_are_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "a.jsonl", TRAIN)
    assert "data.val_source" in note(make(source, tmp_path / "few"), "validation: ")
    monkeypatch.setattr(validation_module, "FEW_TOKENS", 100)
    assert "data.val_source" not in note(make(source, tmp_path / "enough"), "validation: ")


# ---------------------------------------------------------------------------- copies


REPEATED = [text for i, text in enumerate(TRAIN) for text in [text] * (1 + i % 3)] + TRAIN[5:60]


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", REPEATED)
    summary = make(source, tmp_path / "out", drop_duplicates=True)
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert train == [text for text in dict.fromkeys(REPEATED) if text not in val]
    counts = Counter(REPEATED)
    copies = sum(counts[text] - 1 for text in val)
    assert f": {copies} " in note(summary, "copies of validation")
    assert f": {len(REPEATED) - len(counts) - copies} " in note(summary, "exact copies")
    kept = make(source, tmp_path / "all")
    assert texts_of(tmp_path / "all", "train") == [text for text in REPEATED if text not in val]
    assert not any("exact copies" in each for each in kept["notes"])
    assert "drop_duplicates True, not False" in complaint(make, source, tmp_path / "out")


@pytest.mark.parametrize("own_split", [False, True])
def test_stopped_at_every_shard_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_split: bool
) -> None:
    source = write_source(tmp_path / "a.jsonl", REPEATED)
    if own_split:
        source = make_splits(tmp_path / "source", REPEATED + VAL[0][:2], VAL)
    options: dict[str, Any] = {"drop_duplicates": True, "max_overlap": 1.0, "shard_tokens": 500}
    make(source, tmp_path / "straight", **options)
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 300)
    store, visits = prepare_module.store_shard, Counter[str]()

    def stopping(out: Path, name: str, *rest: Any) -> Any:
        """Stops before a shard is written, then after it, and then goes on."""
        visits[name] += 1
        if visits[name] == 1:
            raise KeyboardInterrupt
        entry = store(out, name, *rest)
        if visits[name] == 2:
            raise KeyboardInterrupt
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "store_shard", stopping)
        while not (tmp_path / "out" / "data.json").exists():
            with contextlib.suppress(KeyboardInterrupt):
                make(source, tmp_path / "out", **options)
    assert visits.keys() == {file.name for file in (tmp_path / "out").glob("*.bin")}
    assert len(visits) > 8 and set(visits.values()) == {3}
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_seen_is_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "_RECENT", 7)
    draw, seen, known = random.Random(0), Seen(), set[int]()
    numbers = [0, (1 << 64) - 1, *(draw.getrandbits(64) for _ in range(50))]
    for number in draw.choices(numbers, k=400):
        assert seen.add(number) == (number not in known)
        known.add(number)
    more = np.array([1 << 63, 12345], np.uint64)
    seen.update(more)
    assert not any(seen.add(int(number)) for number in [*more, *known])
    assert (
        common(np.array([3, 3, 5, 9], np.uint64), [np.array([5], np.uint64), np.array([9, 5], np.uint64)])
        == 2
    )


def test_content_hash_is_that_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "a", "\U0001f600é" * 9, "x" * 50]
    whole = [content_hash(text) for text in texts]
    monkeypatch.setattr(hashes_module, "_PIECE", 4)
    assert [content_hash(text) for text in texts] == whole and len(set(whole)) == 4


# ---------------------------------------------------------------------------- how much is read


def test_few_tokens_of_much_text_are_read_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "a.jsonl", make_documents(400))
    monkeypatch.setattr(survey_module, "LOOKAHEAD_CHARS", 3000)
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 500)
    monkeypatch.setattr(prepare_module, "_AHEAD_CHARS", 1000)
    furthest = dict.fromkeys((survey_module, prepare_module), 0)
    for module in furthest:
        read = module.numbered_documents

        def watched(*asked: Any, read: Any = read, module: Any = module) -> Iterator[tuple[int, str]]:
            for row, text in read(*asked):
                furthest[module] = row
                yield row, text

        monkeypatch.setattr(module, "numbered_documents", watched)
    summary = make(source, tmp_path / "out", max_tokens=900)
    assert summary["train_tokens"] == 900 and summary["val_tokens"] > 0
    assert all(0 < row < 60 for row in furthest.values())
    val = texts_of(tmp_path / "out", "val")
    assert not any(text in val for text in texts_of_beginning(tmp_path / "out"))
    make(source, tmp_path / "more", max_tokens=3000)
    assert 100 < furthest[survey_module] < 399


def texts_of_beginning(folder: Path) -> list[str]:
    """The whole documents among the training tokens, the last of which may be cut."""
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    ids = tokens_of(folder, "train")
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    starts = [0, *(end + 1 for end in ends)]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, ends, strict=False)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_is_kept_by_nobody_but_its_user(tmp_path: Path, name: str) -> None:
    text = "".join(TRAIN) + "\u2019"
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    for _, found in numbered_documents(str(tmp_path / name)):
        assert found == text
        assert sys.getrefcount(found) == 2  # `found`, and the argument


def test_items_are_read_ahead_within_the_limit_and_an_error_keeps_its_place() -> None:
    started: list[int] = []

    def items() -> Iterator[int]:
        for i in range(9):
            if i == 7:
                raise UserError("the disk is gone")
            started.append(i)
            yield i

    found = []
    with pytest.raises(UserError, match="gone"):
        for item in read_ahead(items(), lambda _: 10, 25):
            found.append(item)
            assert len(started) <= item + 3
    assert found == list(range(7))
    assert list(read_ahead(iter("abc"), len, 0)) == ["a", "b", "c"]
    few = read_ahead(items(), lambda _: 10, 0)
    assert next(few) == 0
    few.close()


# ---------------------------------------------------------------------------- what is said


def test_what_is_left_out_is_in_the_notes(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_source(folder / "a.jsonl", TRAIN)
    (folder / "b.jsonl").write_text(json.dumps({"text": "Whole row."}) + '\n{"tex')
    (folder / "c.bin").write_bytes(b"\0\1\2\3")
    source = Source(str(folder), damaged="skip")
    summary = prepare(source, tmp_path / "out", vocab_size=300, progress=False)
    assert "c.bin" in note(summary, "left out: ")
    assert note(summary, "1 file is damaged").count("b.jsonl:2") == 1
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(
        [*TRAIN, "Whole row."]
    )


def test_what_is_left_out_later_is_said_of_a_prepared_folder(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_source(tmp_path / "source/a.jsonl", make_documents(200))
    source, out = str(tmp_path / "source"), tmp_path / "out"
    make(source, out)
    (tmp_path / "source/b.weird").write_bytes(bytes(1000))
    assert any("b.weird" in note for note in make(source, out)["notes"])
    (tmp_path / "source/b.weird").write_bytes(bytes(100_000))
    with pytest.raises(UserError, match="max_left_out"):
        make(source, out)
    make(Source(source, max_left_out=1.0), out)  # type: ignore[arg-type]


def test_files_that_break_between_the_passes_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_source(folder / "a.jsonl", TRAIN)
    broken = folder / "b.jsonl"
    broken.write_text(json.dumps({"text": "Whole row."}) + '\n{"tex')
    source, options = Source(str(folder), damaged="skip"), {"vocab_size": 300, "progress": False}
    written = prepare_module._write_plan

    def after(change: str) -> str:
        def then(*plan: Any) -> Any:
            found = written(*plan)
            broken.write_text(change)
            return found

        monkeypatch.setattr(prepare_module, "_write_plan", then)
        return complaint(prepare, source, tmp_path / f"out{len(change)}", **options)

    assert "b.jsonl" in after('{"text": "a"}\n{"text": "b"}\n{"tex')
    assert "b.jsonl" in after('{"text": "a"}\n')


def test_a_damaged_file_before_the_place_of_a_stop_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": "Whole row."}) + '\n{"tex')
    for i in range(4):
        write_source(folder / f"b{i}.jsonl", TRAIN[30 * i : 30 * i + 30])
    source = Source(str(folder), damaged="skip")
    options: dict[str, Any] = {"vocab_size": 300, "progress": False, "shard_tokens": 500}
    prepare(source, tmp_path / "straight", **options)
    store = prepare_module.store_shard

    def stopping(out: Path, name: str, *rest: Any) -> Any:
        if name == "train_00008.bin":
            raise KeyboardInterrupt
        return store(out, name, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "store_shard", stopping)
        prepare(source, tmp_path / "out", **options)
    prepare(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_settings_of_the_command_line(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text, "text_id": "x"}) + "\n" for text in REPEATED]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    command = ["data", "prepare", tmp_path / "a.jsonl", tmp_path / "out", "--vocab-size", 300]
    lowres_here(*command, "--set", "data.text_key=body", "--set", "data.drop_duplicates=true")
    parts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    assert sorted(parts) == sorted(set(REPEATED))
    refused = lowres_here(*command, "--set", "data.val_source=stdlib", code=2)
    assert "data.val_source" in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preparation_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = write_source(tmp_path / "a.jsonl", TRAIN)
    command = ["data", "prepare", source, tmp_path / "out", "--vocab-size", 300]

    def stopped(*_: Any) -> None:
        raise Left(number) if number == signal.SIGTERM else KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "store_shard", stopped)
        done = lowres_here(*command, code=128 + number)
    assert done.stderr.splitlines()[-1] == "lowres: interrupted; start it again to go on"
    lowres_here(*command)


def test_advice_on_a_folder_loses_no_text(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    write_source(mine / "text.jsonl", TRAIN)
    (mine / "data.json").write_text('{"format": 3, "arguments": ["--fast"], "text": "mine"}')
    (mine / "tokenizer.model").write_bytes(b"of another program")
    (mine / "train_00000.bin").write_bytes(bytes(100))
    config = DataConfig(source=str(mine / "text.jsonl"), cache=str(tmp_path / "cache"), seq_len=16)
    open_data(config, 300, 0, False)
    refused = complaint(make, str(mine / "text.jsonl"), mine)
    assert "not empty and not a folder of prepared data" in refused and "remove" not in refused
    make(str(mine / "text.jsonl"), tmp_path / "out")
    (tmp_path / "out" / "data.json").write_text("{")
    message = complaint(open_data, config.model_copy(update={"source": str(tmp_path / "out")}), 300, 0, False)
    assert "damaged" in message and "remove" not in message
