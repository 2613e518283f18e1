"""A prepared folder in which anything has changed gives the same batches, or one line that says why not."""

import errno
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowres import disk
from lowres.config import DataConfig
from lowres.data import Data, TokenData, open_data, prepare
from lowres.data import shards as shards_module
from lowres.data.manifest import read_complete
from lowres.data.shards import HEADER_BYTES, Shard, write_shard
from lowres.errors import UserError
from lowres.sealed import seal

SEQ = 16
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
FILES = ["data.json", "tokenizer.model", "train_00000.bin", "train_00002.bin", "val_00000.bin"]
OPTIONS: dict[str, Any] = {"vocab_size": 300, "progress": False, "shard_tokens": 700}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "source.jsonl"
    draw = random.Random(0)
    texts = [f"Document {i} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def folder(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(source, out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def begun(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preparation that was killed after its second shard."""
    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["lowres.data.prepare"]
        store = module.store_shard

        def failing(out: Path, name: str, *rest: Any) -> Any:
            if name == "train_00002.bin":
                raise KeyboardInterrupt
            return store(out, name, *rest)

        patch.setattr(module, "store_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, **OPTIONS)
    return out


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSES", (0.0,))


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def complaint(call: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config(folder: Path | str, **options: Any) -> DataConfig:
    return DataConfig(source=str(folder), seq_len=SEQ, **options)


def everything(data: Data) -> torch.Tensor:
    windows = torch.cat([data.batch(step, 30) for step in range(3)])
    return torch.cat([windows, data.validation(0)])


# ---------------------------------------------------------------------------- any change

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_header(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(HEADER_BYTES)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def fifo(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, draw: random.Random) -> None:
    target = draw.choice([path.with_name("nothing"), path.with_name(draw.choice(FILES)), Path("/dev/zero")])
    path.unlink()
    path.symlink_to(target)


CHANGES = [flip, flip_header, cut, delete, fifo, directory, link]
EXAMPLES = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(name=st.sampled_from(FILES), change=st.sampled_from(CHANGES), seed=st.integers(0, 10**9))
def test_any_change_of_a_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, change: Any, seed: int
) -> None:
    bad = copy(folder, tmp_path_factory.mktemp("bad") / "out")
    change(bad / name, random.Random(seed))
    with no_hang():
        try:
            found = everything(open_data(config(bad), None, 0, False))
        except (UserError, OSError) as error:
            assert "\n" not in str(error) and str(bad) in str(error)
            return
    assert torch.equal(found, everything(open_data(config(folder), None, 0, False)))


@EXAMPLES
@given(name=st.sampled_from(FILES[2:]), change=st.sampled_from(CHANGES), seed=st.integers(0, 10**9))
def test_any_change_of_a_shard_during_a_run(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, change: Any, seed: int
) -> None:
    bad = copy(folder, tmp_path_factory.mktemp("bad") / "out")
    data = open_data(config(bad), None, 0, False)
    os.utime(bad / name, ns=(0, 0))  # as long ago, so that any change has another time
    before = everything(data)
    change(bad / name, random.Random(seed))
    with no_hang():
        try:
            found = everything(data)
        except UserError as error:
            assert "\n" not in str(error) and str(bad / name) in str(error)
            return
    assert torch.equal(found, before)


@EXAMPLES
@given(
    name=st.sampled_from(["progress.json", "tokenizer.model", "train_00000.bin"]),
    change=st.sampled_from(CHANGES),
    seed=st.integers(0, 10**9),
)
def test_any_change_of_an_interrupted_preparation(
    begun: Path,
    folder: Path,
    source: str,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    change: Any,
    seed: int,
) -> None:
    bad = copy(begun, tmp_path_factory.mktemp("bad") / "out")
    change(bad / name, random.Random(seed))
    with no_hang():
        try:
            prepare(source, bad, **OPTIONS)
            found = everything(open_data(config(bad), None, 0, False))
        except (UserError, OSError) as error:
            assert "\n" not in str(error) and str(bad) in str(error)
            return
    assert torch.equal(found, everything(open_data(config(folder), None, 0, False)))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


@settings(EXAMPLES, max_examples=200)
@given(draw=st.data(), value=JSON, sealed=st.booleans(), delete_it=st.booleans())
@pytest.mark.parametrize("name", ["data.json", "progress.json"])
def test_any_value_in_a_record(
    begun: Path,
    folder: Path,
    source: str,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    draw: st.DataObject,
    value: Any,
    sealed: bool,
    delete_it: bool,
) -> None:
    original = folder if name == "data.json" else begun
    bad = copy(original, tmp_path_factory.mktemp("bad") / "out")
    content = json.loads((bad / name).read_text())
    del content["seal"]
    *inner, last = draw.draw(st.sampled_from(places(content)[1:]))
    part = content
    for key in inner:
        part = part[key]
    if delete_it:
        del part[last]
    else:
        part[last] = value
    (bad / name).write_bytes(seal(content) if sealed else json.dumps(content).encode())
    with no_hang():
        try:
            if name == "progress.json":
                prepare(source, bad, **OPTIONS)
            found = everything(open_data(config(bad), None, 0, False))
        except (UserError, OSError) as error:
            assert "\n" not in str(error) and str(bad) in str(error)
            return
    # what may stand in progress.json under a right seal (another position) is believed
    if name == "data.json":
        assert torch.equal(found, everything(open_data(config(folder), None, 0, False)))


# ---------------------------------------------------------------------------- what is said


def test_damaged_record_names_what_is_wrong_and_the_remedy(folder: Path, tmp_path: Path) -> None:
    bad = copy(folder, tmp_path / "bad")
    content = json.loads((bad / "data.json").read_text())

    def after(text: bytes) -> str:
        (bad / "data.json").write_bytes(text)
        message = complaint(open_data, config(bad), None, 0, False)
        assert message.startswith(f"{bad / 'data.json'}: ")
        assert message.endswith("; move the folder away and prepare the data again")
        return message

    assert "damaged (is not JSON)" in after(b"\xff{")
    assert "damaged (is not JSON)" in after(b"[" * 100_000)
    assert "does not match its seal" in after(json.dumps(content | {"vocab_size": 301}).encode())
    del content["seal"]
    assert "format 2, but this lowres reads 1" in after(json.dumps(content | {"format": 2}).encode())
    assert "train_tokens" in after(json.dumps(content | {"train_tokens": 5}).encode())
    assert "train.0.crc32" in after(
        json.dumps(content | {"train": [content["train"][0] | {"crc32": "x"}]}).encode()
    )
    assert "not numbered" in after(json.dumps(content | {"train": content["train"][1:]}).encode())
    # as older versions wrote it
    (bad / "data.json").write_text(json.dumps(content))
    assert torch.equal(
        everything(open_data(config(bad), None, 0, False)), everything(TokenData(folder, SEQ, 0))
    )
    (bad / "data.json").unlink()
    assert "data.json: missing; put it back, or move" in complaint(open_data, config(bad), None, 0, False)


@pytest.mark.parametrize("text", ['{"text": "mine"}', "[1, 2]", "not JSON", None])
def test_a_folder_of_text_with_a_data_json_of_its_own_is_text(
    source: str, tmp_path: Path, text: str | None
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(source, mine / "text.jsonl")
    (mine / "data.json").mkdir() if text is None else (mine / "data.json").write_text(text)
    data = open_data(config(mine, cache=str(tmp_path / "cache"), vocab_size=300), None, 0, False)
    assert data.folder.parent == tmp_path / "cache"
    assert "not empty and not a folder of prepared data" in complaint(prepare, source, mine, **OPTIONS)
    message = complaint(TokenData, mine, SEQ, 0)
    assert "not a record of prepared data" in message and "remove" not in message


def test_path_that_is_not_utf8(source: str, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    try:
        shutil.copy(source, odd)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    prepare(str(odd), tmp_path / "out", **OPTIONS)
    assert read_complete(tmp_path / "out").arguments.source == str(odd)
    assert any("already prepared" in note for note in prepare(str(odd), tmp_path / "out", **OPTIONS)["notes"])


def test_complete_folder_that_may_only_be_read(
    folder: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert any("already prepared" in note for note in prepare(source, folder, **OPTIONS)["notes"])


# ---------------------------------------------------------------------------- shards in use


def test_tokens_beyond_the_vocabulary_are_found_under_a_right_checksum(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([1, 2, 300]), 300)
    assert "token 300 is not in its vocabulary of 300" in complaint(Shard, tmp_path / "a.bin")
    # a change that leaves no trace, as of a failing disk
    write_shard(tmp_path / "b.bin", np.array([1, 2, 3, 4]), 300)
    shard = Shard(tmp_path / "b.bin")
    stamp = (tmp_path / "b.bin").stat().st_mtime_ns
    with (tmp_path / "b.bin").open("r+b") as file:
        file.seek(HEADER_BYTES + 2)
        file.write(b"\xff\xff")
    os.utime(tmp_path / "b.bin", ns=(stamp, stamp))
    assert shard.read(2).tolist() == [3, 4]
    assert "b.bin: damaged: token 65535" in complaint(shard.read)


def test_shard_that_changes_during_a_run(folder: Path, tmp_path: Path) -> None:
    bad = copy(folder, tmp_path / "bad")
    for path in bad.iterdir():
        os.utime(path, ns=(0, 0))
    data = TokenData(bad, SEQ, 0)
    expected = everything(data)
    path = bad / "train_00001.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-20])
    assert f"{path}: damaged: its size" in complaint(everything, data)
    # one token of the vocabulary for another
    path.write_bytes(good[:-2] + b"\x05\x01")
    assert f"{path}: damaged: its checksum" in complaint(everything, data)
    path.unlink()
    assert f"{path}: cannot be read (No such file or directory); put it back" in complaint(everything, data)
    # it is put back: another file with the same content
    path.write_bytes(good)
    assert torch.equal(everything(data), expected)


def test_error_of_the_disk_is_tried_again_and_then_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TokenData(folder, SEQ, 0)
    expected = data.batch(0, 5)
    opened = shards_module.open_regular
    errors = [5, 5]

    def failing(path: Path) -> Any:
        if errors:
            raise OSError(errors.pop(), "Input/output error")
        return opened(path)

    monkeypatch.setattr(shards_module, "open_regular", failing)
    message = complaint(data.batch, 0, 5)
    assert ".bin: cannot be read (Input/output error); the disk reports an error" in message
    errors[:] = [5]
    assert torch.equal(data.batch(0, 5), expected)
