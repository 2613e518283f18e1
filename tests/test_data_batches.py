"""Batches are a pure function of (seed, step), see every window once an epoch, and do not care
whether the data were prepared before or are a stream that is still being written."""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.config import DataConfig
from lowres.data import Data, TokenData, cache_bytes, open_data, prepare
from lowres.data import opening as opening_module
from lowres.data import survey as survey_module
from lowres.data.ahead import ReadAhead
from lowres.data.batches import BEGINS, IGNORED, ONLY_READ, inputs_and_targets
from lowres.data.folder import Job
from lowres.data.shards import HEADER_BYTES, Shard
from lowres.data.stream import BlockStream
from lowres.engine.common import MARKED, apart, split
from lowres.errors import UserError
from lowres.rooms import Rooms
from lowres.text import Source

prepare_module = sys.modules["lowres.data.prepare"]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]
SEQ = 16
BLOCK = 700
AHEAD = BLOCK * 5 // 2  # with data.shuffle_blocks = 4


def write_source(path: Path, count: int = 150, seed: int = 0) -> str:
    draw = random.Random(seed)
    texts = [
        f"Document {seed}.{i} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for i in range(count)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("prepared")
    source = write_source(base / "source.jsonl")
    prepare(source, base / "out", vocab_size=300, progress=False, shard_tokens=BLOCK)
    return base / "out"


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def shards(folder: Path, part: str) -> list[list[int]]:
    entries = json.loads((folder / "data.json").read_text())[part]
    return [Shard(folder / entry["file"]).read().tolist() for entry in entries]


def windows_of(shards: list[list[int]], seq: int = SEQ) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(shard[start : start + seq + 1]) for shard in shards for start in range(0, len(shard) - seq, seq)
    )


def rows(batch: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tolist()]


def complaint(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- order


def test_every_window_once_an_epoch_in_a_new_order(folder: Path) -> None:
    expected = windows_of(shards(folder, "train"))
    count = expected.total()
    data = TokenData(folder, SEQ, seed=1)
    epochs = [rows(data.batch(epoch, count)) for epoch in range(3)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != rows(TokenData(folder, SEQ, seed=2).batch(0, count))


def test_batch_depends_on_nothing_but_seed_and_step(folder: Path) -> None:
    data = TokenData(folder, SEQ, seed=1)
    steps = list(range(40))
    first = [data.batch(step, 32) for step in steps]
    again = TokenData(folder, SEQ, seed=1)
    random.Random(0).shuffle(steps)
    for step in steps:
        assert torch.equal(again.batch(step, 32), first[step])
    assert first[0].dtype == torch.int64 and first[0].shape == (32, SEQ + 1)
    # the same sequences however many make a step, also across the end of an epoch
    count = windows_of(shards(folder, "train")).total()
    assert 0 < count < 40 * 32 and count % 32, "no batch crosses an epoch: the test would be weak"
    assert torch.equal(torch.cat(first), torch.cat([data.batch(step, 80) for step in range(16)]))
    assert torch.equal(torch.cat(first), torch.cat([data.batch(step, 1) for step in range(1280)]))


def test_order_within_windows_is_that_of_the_text(folder: Path) -> None:
    data = TokenData(folder, SEQ, seed=1)
    train = [token for shard in shards(folder, "train") for token in shard]
    assert data.train_tokens == len(train)
    inputs, targets = inputs_and_targets(data.batch(0, 4))
    assert inputs.shape == targets.shape == (4, SEQ)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_windows_longer_than_a_block_or_the_data(folder: Path) -> None:
    longest = max(len(shard) for shard in shards(folder, "train"))
    data = TokenData(folder, longest - 1, seed=0)
    assert set(rows(data.batch(0, 1))) <= {tuple(shard) for shard in shards(folder, "train")}
    message = complaint(TokenData, folder, longest, 0)
    assert "data.seq_len" in message and f"the largest that works is {longest - 1}" in message


# ---------------------------------------------------------------------------- validation


def test_every_validation_token_but_the_first_is_a_target_once(folder: Path) -> None:
    [val] = shards(folder, "val")
    data = TokenData(folder, SEQ, seed=0)
    inputs, targets = inputs_and_targets(data.validation(0))
    assert targets[targets != IGNORED].tolist() == val[1:]
    assert inputs[targets != IGNORED].tolist() == val[:-1]
    assert (len(val) - 1) % SEQ, "no ragged window: the test would be weak"
    assert inputs.min() >= 0 and inputs.max() < data.vocab_size
    assert len(targets) == -(-(len(val) - 1) // SEQ)


@pytest.mark.parametrize("limit", [1, SEQ, SEQ + 3, 2 * SEQ])
def test_validation_is_limited_in_targets(folder: Path, limit: int) -> None:
    [val] = shards(folder, "val")
    targets = inputs_and_targets(TokenData(folder, SEQ, seed=0).validation(limit))[1]
    assert targets[targets != IGNORED].tolist() == val[1 : limit + 1]


def test_bytes_of_the_validation_targets_are_exact(folder: Path) -> None:
    data = TokenData(folder, SEQ, seed=0)
    targets = inputs_and_targets(data.validation(0))[1]
    manifest = json.loads((folder / "data.json").read_text())
    assert int(data.tokenizer.token_bytes()[targets[targets != IGNORED]].sum()) == manifest["val_bytes"]


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["train_00001.bin", "val_00000.bin"])
@pytest.mark.parametrize("at_once", [True, False])
def test_flipped_bit_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_once: bool
) -> None:
    bad = copy(folder, tmp_path / "bad")
    data = bytearray((bad / name).read_bytes())
    data[HEADER_BYTES + 100] ^= 4
    (bad / name).write_bytes(data)
    if at_once:
        assert name in complaint(TokenData, bad, SEQ, 0)
        return
    monkeypatch.setattr("lowres.data.stored.VERIFY_AT_ONCE_BYTES", 0)
    opened = TokenData(bad, SEQ, 0)
    assert name in complaint(opened.validation, 0) if "val" in name else complaint(opened.batch, 0, 500)


def test_exchanged_files_are_found(folder: Path, tmp_path: Path) -> None:
    bad = copy(folder, tmp_path / "bad")
    (bad / "train_00000.bin").write_bytes((bad / "train_00001.bin").read_bytes())
    assert "train_00000.bin" in complaint(TokenData, bad, SEQ, 0)
    worse = copy(folder, tmp_path / "worse")
    model = (worse / "tokenizer.model").read_bytes()
    (worse / "tokenizer.model").write_bytes(model + bytes([0x12, 0]))
    assert "tokenizer.model: changed" in complaint(TokenData, worse, SEQ, 0)
    (worse / "data.json").write_text("{")
    assert "data.json" in complaint(TokenData, worse, SEQ, 0)


# ---------------------------------------------------------------------------- opening


def config(tmp_path: Path, source: str | Path, **options: Any) -> DataConfig:
    return DataConfig(source=str(source), cache=str(tmp_path / "cache"), seq_len=SEQ, **options)


def test_prepared_folder_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    data = open_data(config(tmp_path, folder), None, 0, False)
    assert data.folder == folder and not (tmp_path / "cache").exists()
    assert data.fingerprint == json.loads((folder / "data.json").read_text())["fingerprint"]
    message = complaint(open_data, config(tmp_path, folder), 299, 0, False)
    assert "model.vocab_size: 299" in message and "300 pieces" in message
    assert open_data(config(tmp_path, folder), 512, 0, False).vocab_size == 300
    other = open_data(config(tmp_path, folder, vocab_size=270), None, 0, False)
    assert other.vocab_size == 300 and "data.vocab_size is not used" in other.notes[-1]


def test_text_is_prepared_once_into_the_cache(tmp_path: Path) -> None:
    source = write_source(tmp_path / "some text.jsonl")
    data = open_data(config(tmp_path, source), 280, 0, False)
    assert data.vocab_size == 280
    assert data.folder.parent == tmp_path / "cache" and data.folder.name.startswith("some-text.jsonl-")
    stamp = (data.folder / "data.json").stat().st_mtime_ns
    again = open_data(config(tmp_path, source), 280, 0, False)
    assert (again.folder, again.fingerprint) == (data.folder, data.fingerprint)
    assert (again.folder / "data.json").stat().st_mtime_ns == stamp
    others = [
        open_data(config(tmp_path, source), 290, 0, False),
        open_data(config(tmp_path, source, vocab_size=270), 290, 0, False),
        open_data(config(tmp_path, source, tokenizer=str(data.folder / "tokenizer.model")), None, 0, False),
    ]
    assert [other.vocab_size for other in others] == [290, 270, 280]
    write_source(Path(source), seed=1)
    folders = {data.folder, *(other.folder for other in others)}
    folders.add(open_data(config(tmp_path, source), 280, 0, False).folder)
    assert len(folders) == 5


def test_vocabulary_of_the_model_is_a_limit_that_of_the_data_a_demand(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl")
    data = open_data(config(tmp_path, source), 32000, 0, False)
    assert data.vocab_size < 32000 and any("32000" in note for note in data.notes)
    message = complaint(open_data, config(tmp_path, source, vocab_size=32000), 32000, 0, False)
    assert f"the largest that works is {data.vocab_size}" in message
    assert "model.vocab_size" in complaint(open_data, config(tmp_path, source, vocab_size=300), 280, 0, False)
    model = str(data.folder / "tokenizer.model")
    assert "model.vocab_size" in complaint(
        open_data, config(tmp_path, source, tokenizer=model), 280, 0, False
    )


def test_val_source_replaces_the_held_out_documents(tmp_path: Path, folder: Path) -> None:
    source, val = write_source(tmp_path / "a.jsonl"), write_source(tmp_path / "b.jsonl", count=7, seed=1)
    data = open_data(config(tmp_path, source, val_source=val), 300, 0, False)
    targets = inputs_and_targets(data.validation(0))[1]
    text = data.tokenizer.decode(targets[targets != IGNORED].tolist())
    assert text == "".join(json.loads(line)["text"] for line in Path(val).read_text().splitlines())
    # then nothing is held out of the source
    manifest = json.loads((data.folder / "data.json").read_text())
    assert (manifest["train_documents"], manifest["val_documents"]) == (150, 0)
    assert "another tokenizer" in complaint(
        open_data, config(tmp_path, source, val_source=str(folder)), 280, 0, False
    )


def test_unfinished_folder_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    unfinished = copy(folder, tmp_path / "unfinished")
    (unfinished / "data.json").rename(unfinished / "progress.json")
    assert "lowres data prepare" in complaint(open_data, config(tmp_path, unfinished), None, 0, False)


# ---------------------------------------------------------------------------- streams


@pytest.fixture
def stream_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A stream, through `datasets`, of which the first pass sees only the beginning."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(opening_module, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr(survey_module, "LOOKAHEAD_CHARS", 15_000)
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 500)
    (tmp_path / "hub").mkdir()
    write_source(tmp_path / "hub" / "train.jsonl")
    return config(tmp_path, f"hf:{tmp_path / 'hub'}")


def blocks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.bin"))}


def to_the_end(data: Data) -> int:
    """Read a stream until it has ended; returns the number of windows."""
    step = 0
    while data.train_tokens is None:
        data.batch(step, 10)
        step += 1
    return windows_of(shards(data.folder, "train")).total()


def test_stream_is_tokenised_one_block_ahead(stream_config: DataConfig) -> None:
    data = open_data(stream_config.model_copy(update={"shuffle_blocks": 1}), 280, 0, False)
    assert isinstance(data, TokenData) and data.train_tokens is None
    held_out = (BLOCK - 1) // SEQ
    for block in range(3):
        data.batch(block, held_out)
        assert data._stream is not None and data._stream.has(block + 1) is True
    time.sleep(0.5)  # enough to write all of them
    written = len(list(data.folder.glob("train_*.bin")))
    assert written == 5, "blocks beyond the next one are not written before they are wanted"
    data.close()


def test_stream_holds_out_its_leading_documents(stream_config: DataConfig, tmp_path: Path) -> None:
    lines = (tmp_path / "hub" / "train.jsonl").read_text().splitlines()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join([*lines, lines[0]]))
    data = open_data(stream_config, 280, 0, False)
    to_the_end(data)
    texts = [json.loads(line)["text"] for line in lines]
    targets = inputs_and_targets(data.validation(0))[1]
    val = data.tokenizer.decode(targets[targets != IGNORED].tolist())
    assert val.startswith(texts[0]) and 300 < len(val) <= 0.05 * 15_500
    train = data.tokenizer.decode(token for shard in shards(data.folder, "train") for token in shard)
    assert texts[0] not in train and train.endswith(texts[-1])
    assert sum(text in val for text in texts) + sum(text in train for text in texts) == len(texts)
    data.close()


def test_stream_visits_each_window_of_a_block_then_the_next_and_repeats(stream_config: DataConfig) -> None:
    stream_config = stream_config.model_copy(update={"shuffle_blocks": 1})
    data = open_data(stream_config, 280, 0, False)
    count = to_the_end(data)
    train, size = shards(data.folder, "train"), (BLOCK - 1) // SEQ
    assert len(train) > 3 and len(train[-1]) < BLOCK, "weak without several blocks and a shorter one"
    assert Counter(rows(data.batch(0, size))) == windows_of(train[:1])
    assert Counter(rows(data.batch(1, size))) == windows_of(train[1:2])
    first, second = rows(data.batch(0, count)), rows(data.batch(1, count))
    assert Counter(first) == Counter(second) == windows_of(train) and first != second
    # a folder that is complete from the start gives the same
    again = open_data(stream_config, 280, 0, False)
    assert rows(again.batch(0, count)) == first and rows(again.batch(1, count)) == second
    assert again.fingerprint == data.fingerprint and again.train_tokens == data.train_tokens


@pytest.mark.parametrize("spread", [1, 2, 4, 40])
def test_stream_spreads_each_block_over_its_neighbours(stream_config: DataConfig, spread: int) -> None:
    stream_config = stream_config.model_copy(update={"shuffle_blocks": spread})
    data = open_data(stream_config, 280, 0, False)
    assert isinstance(data, TokenData)
    first_block = windows_of([Shard(data.folder / "train_00000.bin").read().tolist()])
    size = (BLOCK - 1) // SEQ
    assert set(rows(data.batch(0, size // spread))) <= set(first_block)
    stream = data._stream
    assert stream is not None and len(stream.entries) <= 2, "the first step waits for no other block"
    count = to_the_end(data)
    train = shards(data.folder, "train")
    windows = [(len(shard) - 1) // SEQ for shard in train]
    assert len(train) > 5 and windows[-1] < size == windows[0]
    everything = {(block, window) for block, n in enumerate(windows) for window in range(n)}
    order = [data._order.locate(place) for place in range(count)]
    assert len(order) == len(everything) and set(order) == everything, "each window once"
    assert Counter(rows(data.batch(0, count))) == windows_of(train)
    # block b is in slots b to b + spread - 1; slot s begins after sizes 1/spread, 2/spread, ..., 1 of a block
    starts = [sum(min(s + 1, spread) * size // spread for s in range(slot)) for slot in range(len(train))]
    for slot, (start, end) in enumerate(pairwise(starts)):
        there = Counter(block for block, _ in order[start:end])
        assert set(there) == set(range(max(0, slot - spread + 1), slot + 1))
        assert max(there.values()) - min(there.values()) <= 1
    if spread == 4:
        fourth = order[starts[4] : starts[5]]
        assert all(len({block for block, _ in fourth[at : at + 12]}) > 1 for at in range(size - 12))
        assert [w for block, w in fourth if block == 2] != sorted(w for block, w in fourth if block == 2)
    # then all of them again, in an order over all blocks, as from a folder that is complete from the start
    again = [data._order.locate(count + place) for place in range(count)]
    assert set(again) == everything and again != order and len({block for block, _ in again[:40]}) > 10
    complete = open_data(stream_config, 280, 0, False)
    assert isinstance(complete, TokenData)
    assert [complete._order.locate(place) for place in range(2 * count)] == order + again
    # how long it is, is known beyond its end only
    assert [complete.epoch(reached) for reached in (0, 1, count)] == [None] * 3
    assert complete.epoch(count + 1) == complete.epoch(1 << 60) == count
    # a run does not go on in another order
    other = open_data(stream_config.model_copy(update={"shuffle_blocks": spread + 1}), 280, 0, False)
    assert complete.fingerprint == data.fingerprint != other.fingerprint and other.folder == data.folder


@pytest.mark.parametrize("stops", [[0], [3], [0, 2, 4]])
def test_resumed_stream_gives_identical_blocks(
    stream_config: DataConfig, tmp_path: Path, stops: list[int]
) -> None:
    straight = open_data(stream_config, 280, 0, False)
    to_the_end(straight)
    batches = [straight.batch(step, 10) for step in range(140)]
    resumed_config = stream_config.model_copy(update={"cache": str(tmp_path / "other")})
    for stop in stops:
        interrupted = open_data(resumed_config, 280, 0, False)
        interrupted.batch(stop, (BLOCK - 1) // SEQ)
        interrupted.close()
        assert interrupted.train_tokens is None
    resumed = open_data(resumed_config, 280, 0, False)
    assert resumed.fingerprint == straight.fingerprint
    # straight to the end, over blocks that nobody has read
    assert all(torch.equal(resumed.batch(step, 10), batches[step]) for step in reversed(range(140)))
    assert blocks(resumed.folder) == blocks(straight.folder)
    assert (resumed.folder / "data.json").read_bytes() == (straight.folder / "data.json").read_bytes()


def test_error_in_the_thread_reaches_the_training_loop(
    stream_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = prepare_module.numbered_documents

    def failing(*asked: Any) -> Iterator[tuple[int, str]]:
        for row, text in read(*asked):
            if row == 60:
                raise UserError("hf:x: the line is dead")
            yield row, text

    with monkeypatch.context() as broken:
        broken.setattr(prepare_module, "numbered_documents", failing)
        data = open_data(stream_config, 280, 0, False)
        first = data.batch(0, 10)
        with pytest.raises(UserError, match="the line is dead"):
            to_the_end(data)
        data.close()
    again = open_data(stream_config, 280, 0, False)
    assert torch.equal(again.batch(0, 10), first)
    to_the_end(again)


def test_stream_goes_on_where_it_was_without_reading_what_it_has(
    stream_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(Source(stream_config.source), vocab_size=280, shard_tokens=BLOCK)
    stream = BlockStream(job, tmp_path / "blocks", False)
    assert stream.has(3)
    stream.close()
    starts: list[int] = []
    read = prepare_module.numbered_documents

    def watched(source: Source, start: int, *more: Any) -> Iterator[tuple[int, str]]:
        starts.append(start)
        return read(source, start, *more)

    monkeypatch.setattr(prepare_module, "numbered_documents", watched)
    stream = BlockStream(job, tmp_path / "blocks", False)
    assert stream.has(6)
    stream.close()
    assert len(starts) == 1 and starts[0] > 10


def test_what_the_blocks_of_a_stream_will_take(stream_config: DataConfig, tmp_path: Path) -> None:
    for vocab_size, size in ((280, 2), (1 << 16, 2), (70_000, 4)):
        assert cache_bytes(stream_config, vocab_size, 10_000) == (10_000 + AHEAD) * size
    assert cache_bytes(config(tmp_path, "stdlib"), 280, 10_000) == 0
    data = open_data(stream_config, 280, 0, False)
    data.batch(0, (BLOCK - 1) // SEQ)
    data.close()
    there = sum(file.stat().st_size - HEADER_BYTES for file in data.folder.glob("train_*.bin"))
    assert there > 0 and there % (2 * BLOCK) == 0
    assert cache_bytes(stream_config, 280, 10_000) == (10_000 + AHEAD) * 2 - there
    to_the_end(open_data(stream_config, 280, 0, False))
    assert cache_bytes(stream_config, 280, 10_000) == 0


def test_the_next_batch_is_read_ahead_and_errors_keep_their_step() -> None:
    started: list[int] = []

    def read(step: int) -> torch.Tensor:
        started.append(step)
        if step == 3:
            raise UserError("shard 7 is damaged")
        return torch.tensor(step)

    ahead = ReadAhead(read, end=5)
    assert [int(ahead.batch(step)) for step in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="shard 7"):
        ahead.batch(3)
    assert int(ahead.batch(4)) == 4  # a step that was not read ahead
    assert started == [0, 1, 2, 3, 4]  # nothing beyond the end


def test_flags_say_what_is_only_read_and_where_examples_begin() -> None:
    plain = torch.tensor([[5, 6, 7, 8, IGNORED], [9, 1, 2, 3, 4]])
    words = plain.clone()
    words[0, 2] |= ONLY_READ
    words[0, 3] |= BEGINS
    words[1, 0] |= BEGINS | ONLY_READ
    words[1, 3] |= ONLY_READ
    inputs, targets = inputs_and_targets(words)
    assert torch.equal(inputs, plain[:, :-1])
    assert targets.tolist() == [[6, IGNORED, IGNORED, IGNORED], [1, 2, IGNORED, 4]]
    assert torch.equal(inputs_and_targets(plain)[1], plain[:, 1:])
    rooms = Rooms(torch.device("cpu"))
    (_,), (same,), count, (documents,) = apart(words, split(words, 2, rooms), rooms, MARKED)
    assert torch.equal(same, targets) and count == 4
    assert documents == [(3, 1), (4,)]
