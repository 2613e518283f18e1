"""A stream that is interrupted goes on with the same text, wherever the text comes from."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowres.config import DataConfig
from lowres.config_file import parse_config, with_places
from lowres.data import open_data, prepare
from lowres.data import opening as opening_module
from lowres.data import survey as survey_module
from lowres.data.batches import TokenData
from lowres.data.shards import Shard
from lowres.errors import UserError
from lowres.sealed import seal
from tests.fake_hub import FakeHub

pytest.importorskip("datasets")
BLOCK, SEQ, FILES = 700, 16, 6
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]


def files(seed: int) -> dict[str, bytes]:
    draw = random.Random(seed)
    texts = [f"{seed}.{i} " + " ".join(draw.choices(WORDS, k=40)) for i in range(FILES * 20)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    return {f"train-{i}.jsonl": "".join(rows[i::FILES]).encode() for i in range(FILES)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A data set x/y."""
    monkeypatch.setattr(opening_module, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr(survey_module, "LOOKAHEAD_CHARS", 3000)
    monkeypatch.setattr(sys.modules["lowres.data.prepare"], "_BATCH_CHARS", 500)
    hub = FakeHub()
    hub.use(monkeypatch, tmp_path / "home")
    hub.put("x/y", files(0))
    yield hub
    hub.close()


def opened(tmp_path: Path, source: str = "hf:x/y", cache: str = "cache", **options: Any) -> TokenData:
    config = DataConfig(source=source, cache=str(tmp_path / cache), seq_len=SEQ, **options)
    data = open_data(config, 280, 0, False)
    assert isinstance(data, TokenData)
    return data


def to_the_end(data: TokenData) -> None:
    step = 0
    while data.train_tokens is None:
        data.batch(step, 10)
        step += 1
    data.close()


def blocks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.bin"))}


def recorded(folder: Path) -> dict[str, Any]:
    [file] = [file for name in ("data.json", "progress.json") if (file := folder / name).exists()]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_data_set_that_changes_is_read_at_the_commit_it_was_begun_with(
    hub: FakeHub, tmp_path: Path
) -> None:
    straight = opened(tmp_path, cache="straight")
    to_the_end(straight)
    begun = opened(tmp_path)
    begun.batch(0, 10)
    begun.close()
    assert begun.train_tokens is None and recorded(begun.folder)["commit"] == next(iter(hub.repos["x/y"]))
    newer = hub.put("x/y", files(1))
    resumed = opened(tmp_path)
    to_the_end(resumed)
    assert resumed.folder == begun.folder and blocks(resumed.folder) == blocks(straight.folder)
    assert resumed.fingerprint == straight.fingerprint
    # another cache begins with what the hub has now, and a run that had the old text would not go on with it
    other = opened(tmp_path, cache="other")
    other.close()
    assert other.fingerprint != straight.fingerprint
    assert recorded(other.folder)["commit"] == newer


def test_what_is_tokenised_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    begun = opened(tmp_path)
    for block in range(13):
        begun.batch(block, (BLOCK - 1) // SEQ)
    begun.close()
    place = recorded(begun.folder)["next"]
    assert 1 < place["file"] < FILES and place["file_row"] == place["file"] * 20 <= place["row"]
    hub.requests.clear()
    to_the_end(opened(tmp_path))
    assert {path[-7] for path in hub.fetched(".jsonl")} == {str(i) for i in range(place["file"], FILES)}


def test_what_was_recorded_without_a_place_is_still_read(hub: FakeHub, tmp_path: Path) -> None:
    straight = opened(tmp_path, cache="straight")
    to_the_end(straight)
    begun = opened(tmp_path)
    begun.batch(3, (BLOCK - 1) // SEQ)
    begun.close()
    found = recorded(begun.folder)
    del found["next"]["file"], found["next"]["file_row"], found["commit"], found["seal"]
    (begun.folder / "progress.json").write_bytes(seal(found))
    resumed = opened(tmp_path)
    to_the_end(resumed)
    assert blocks(resumed.folder) == blocks(straight.folder)


def test_a_folder_whose_files_changed_is_another_stream(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files(0).items():
        (folder / name).write_bytes(data)
    source = f"hf:{folder}"
    prepare(source, tmp_path / "out", vocab_size=280, progress=False)
    begun = opened(tmp_path, source)
    begun.close()
    again = opened(tmp_path, source)
    again.close()
    assert again.folder == begun.folder
    (folder / "train-5.jsonl").write_bytes(files(1)["train-5.jsonl"])
    changed = opened(tmp_path, source)
    to_the_end(changed)
    assert changed.folder != begun.folder and changed.fingerprint != begun.fingerprint
    tokens = [
        token for file in sorted(changed.folder.glob("train_*")) for token in Shard(file).read().tolist()
    ]
    assert "1.11 " in changed.tokenizer.decode(tokens) and "0.11 " not in changed.tokenizer.decode(tokens)
    with pytest.raises(UserError, match="have changed since then"):
        prepare(source, tmp_path / "out", vocab_size=280, progress=False)


def test_a_validation_split_is_said_and_taken(hub: FakeHub, tmp_path: Path) -> None:
    validation = {"text": "a split of its own " * 5}
    hub.put("x/y", files(0) | {"validation.jsonl": (json.dumps(validation) + "\n").encode()})
    data = opened(tmp_path)
    data.close()
    [note] = [note for note in data.notes if "hf:x/y::validation" in note]
    assert 'data.val_source = "hf:x/y::validation"' in note
    other = opened(tmp_path, val_source="hf:x/y::validation")
    other.close()
    targets = other.validation(0)[:, 1:]
    assert validation["text"] in other.tokenizer.decode(targets[targets >= 0].tolist())
    assert not any("hf:x/y::validation" in note for note in other.notes)


def test_a_folder_is_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"source": "hf:folder::train", "val_source": "hf:x/y::validation"}
    data = with_places(parse_config({"data": given})[0], None).data
    assert (data.source, data.val_source) == (f"hf:{tmp_path}/folder::train", "hf:x/y::validation")
