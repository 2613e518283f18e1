"""Data sets on the hub: the text of their files arrives as it is, or a line says why not."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowres.errors import UserError
from lowres.text import Marks, Source, documents, fingerprint, numbered_documents, pinned
from lowres.text.kinds import KINDS
from lowres.text.source import File
from tests.fake_hub import FakeHub

pytest.importorskip("datasets")
DATES = ["2019-04-25", "2019-04-25T10:00:00Z", "2020-01-01 00:00:00"]
LIKE_NOTHING = ["NA", "null", "None", "nan", "", "n/a"]
LIKE_NUMBERS = ["1", "1.50", "007", "1e5", "true"]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    server.use(monkeypatch, tmp_path)
    server.repos.clear()
    server.requests.clear()
    return server


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: list[str], group: int = 2) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), file, row_group_size=group)
    return file.getvalue()


def card(yaml: str) -> bytes:
    return f"---\n{yaml}\n---\n# A data set\n".encode()


def complaint(source: str | Source) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


FEATURES = card("dataset_info:\n  features:\n  - name: text\n    dtype: string")


@pytest.mark.parametrize("with_card", [False, True])
@pytest.mark.parametrize("texts", [DATES, LIKE_NUMBERS, [t for t in LIKE_NOTHING if t]], ids=lambda t: t[0])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json.gz", "train.parquet"])
def test_text_arrives_byte_for_byte(hub: FakeHub, name: str, texts: list[str], with_card: bool) -> None:
    data = parquet(texts) if "parquet" in name else json_lines(texts)
    files = {name: gzip.compress(data) if name.endswith(".gz") else data}
    hub.put("x/y", files | ({"README.md": FEATURES} if with_card else {}))
    assert list(documents("hf:x/y")) == texts


def test_parquet_may_hold_what_json_may_not(hub: FakeHub) -> None:
    hub.put("x/y", {"train.parquet": parquet(LIKE_NOTHING)})
    assert list(documents("hf:x/y")) == [text for text in LIKE_NOTHING if text]


def test_tables_and_arrays_are_not_read_as_anything_but_text(hub: FakeHub) -> None:
    hub.put("x/csv", {"train.csv": b"text,n\nNA,1\n2019-04-25,2\n007,3\n1.50,4\n"})
    assert list(documents("hf:x/csv")) == ["NA", "2019-04-25", "007", "1.50"]
    hub.put("x/json", {"train.json": b'[{"text": "2019-04-25"}, {"text": "2019-04-26"}]'})
    assert list(documents("hf:x/json")) == ["2019-04-25", "2019-04-26"]


def test_text_files_are_documents(hub: FakeHub) -> None:
    """`datasets` would give their lines."""
    hub.put("x/y", {"train/a.txt": b"one\ntwo\n", "train/b.txt": b"three<|endoftext|>\n"})
    assert list(documents("hf:x/y")) == ["one\ntwo\n", "three<|endoftext|>\n"]
    hub.put("x/z", {"train.txt": b"one\n<|endoftext|>\ntwo\n\n<|endoftext|>\nthree"})
    assert list(documents("hf:x/z")) == ["one", "two", "three"]


def test_zstandard_frames_of_any_window_and_none_that_is_cut(hub: FakeHub) -> None:
    zstandard = pytest.importorskip("zstandard")
    long = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=long).compressobj()
    whole = compressor.compress(b"a whole text " * 1000) + compressor.flush()
    assert zstandard.get_frame_parameters(whole).window_size == 1 << 28
    hub.put("x/y", {"train.txt.zst": whole})
    assert list(documents("hf:x/y")) == ["a whole text " * 1000]
    hub.put("x/y", {"train.txt.zst": whole[:-10]})
    assert "hf:x/y/train.txt.zst: damaged or truncated" in complaint("hf:x/y")


def test_token_ids_are_no_text(hub: FakeHub) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"input_ids": [[1, 2, 3], [4]]}), file)
    hub.put("x/y", {"train.parquet": file.getvalue()})
    message = complaint("hf:x/y")
    assert "hf:x/y/train.parquet: holds token ids" in message and "hf download x/y" in message


def test_a_damaged_file_is_named_or_skipped(hub: FakeHub) -> None:
    files = {f"train-{i}.jsonl": json_lines([f"{i}a", f"{i}b", f"{i}c"]) for i in range(3)}
    files["train-1.jsonl"] = b'{"text": "1a"}\n{"text": 1}\n{"text": "1c"}\n'
    hub.put("x/y", files)
    assert "hf:x/y/train-1.jsonl:2: " in complaint("hf:x/y")
    skip = Source("hf:x/y", damaged="skip")
    skipped: dict[str, str] = {}
    rows = list(numbered_documents(skip, skipped=skipped))
    assert [text for _, text in rows] == ["0a", "0b", "0c", "1a", "2a", "2b", "2c"]
    assert list(skipped) == ["train-1.jsonl"]
    assert all(list(numbered_documents(skip, start)) == rows[start:] for start in range(7))


# ---------------------------------------------------------------------------- what datasets must read


def test_other_formats_come_through_datasets(hub: FakeHub) -> None:
    members = {"a.txt": b"hello", "a.json": b'{"n": 1}', "b.txt": "caf\u00e9".encode(), "b.json": b'{"n": 2}'}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    hub.put("x/y", {"train.tar": archive.getvalue()})
    assert list(documents(Source("hf:x/y", text_key="txt"))) == ["hello", "caf\u00e9"]
    message = complaint(Source("hf:x/y", text_key="txt", include=("*.tar",)))
    assert "leave out data.include" in message
    message = complaint("hf:x/y")
    assert 'no column "text"; found txt, json' in message and "data.text_key" in message


def test_options_of_a_card_are_not_ignored(hub: FakeHub) -> None:
    """They would change the text, and only `datasets` knows them."""
    json_in_a_field = card("configs:\n- config_name: default\n  data_files: a.json\n  field: rows")
    hub.put("x/y", {"a.json": b'{"rows": [{"text": "2019-04-25"}]}', "README.md": json_in_a_field})
    assert "its card sets field" in complaint("hf:x/y")
    semicolons = card('configs:\n- config_name: default\n  data_files: a.csv\n  sep: ";"')
    hub.put("x/z", {"a.csv": b"text;n\n007;1\n", "README.md": semicolons})
    message = complaint("hf:x/z")
    assert "its card sets sep" in message and "hf download x/z" in message
    columns = card("configs:\n- config_name: default\n  data_files: a.parquet\n  columns: [text]")
    hub.put("x/p", {"a.parquet": parquet(["one", "2019-04-25"]), "README.md": columns})
    assert list(documents("hf:x/p")) == ["one", "2019-04-25"]


# ---------------------------------------------------------------------------- configs, splits, commits

CONFIGS = card(
    "configs:\n"
    "- config_name: en\n"
    "  data_files:\n"
    "  - split: train\n    path: en/train-*.jsonl.gz\n"
    "  - split: validation\n    path: en/validation-*.jsonl.gz\n"
    "- config_name: de\n"
    "  data_files: de/*.jsonl.gz"
)


def two_languages() -> dict[str, bytes]:
    texts = {
        "en/train-0.jsonl.gz": ["one", "two"],
        "en/train-1.jsonl.gz": ["three"],
        "en/validation-0.jsonl.gz": ["held out"],
        "de/a.jsonl.gz": ["eins"],
    }
    files = {name: gzip.compress(json_lines(found), mtime=0) for name, found in texts.items()}
    return files | {"README.md": CONFIGS}


@pytest.fixture(params=["hub", "folder"])
def languages(hub: FakeHub, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A data set of two configs, on the hub or as a clone of it."""
    files = two_languages()
    hub.put("x/two", files)
    if request.param == "hub":
        return "hf:x/two"
    for name, data in files.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(data)
    return f"hf:{tmp_path / 'clone'}"


def test_configs_and_splits(languages: str) -> None:
    assert list(documents(f"{languages}:en")) == ["one", "two", "three"]
    assert list(documents(f"{languages}:en:train")) == ["one", "two", "three"]
    assert list(documents(f"{languages}:en:validation")) == ["held out"]
    assert list(documents(f"{languages}:de")) == ["eins"]


def test_a_wrong_config_or_split_names_those_that_exist(languages: str) -> None:
    message = complaint(f"{languages}:fr")
    assert 'no config "fr"' in message and "en, de" in message
    message = complaint(f"{languages}:en:test")
    assert 'no split "test"; it has train, validation' in message


def test_a_data_set_of_several_configs_needs_one(hub: FakeHub) -> None:
    hub.put("x/two", two_languages())
    message = complaint("hf:x/two")
    assert "it has several configs" in message and "en, de" in message


def test_the_validation_split_is_known(languages: str) -> None:
    found = pinned(Source(f"{languages}:en"))
    assert found.validation is not None and list(documents(found.validation)) == ["held out"]
    assert pinned(Source(f"{languages}:de")).validation is None
    assert pinned(Source(f"{languages}:en:validation")).validation is None


def test_what_datasets_does_not_take_is_said(hub: FakeHub) -> None:
    hub.put("x/y", {"a.jsonl": json_lines(["one"]), "b.parquet": parquet(["two"]), "LICENSE.txt": b"free"})
    read = list(documents("hf:x/y"))
    assert len(read) == 1, "datasets takes one format"
    [note] = pinned(Source("hf:x/y")).notes
    assert ("a.jsonl" if read == ["two"] else "b.parquet") in note and "LICENSE" not in note
    hub.put("x/z", {"a.jsonl": json_lines(["one"]), "README.md": b"# Z"})
    assert not pinned(Source("hf:x/z")).notes


def test_some_of_the_files(hub: FakeHub) -> None:
    hub.put("x/y", {f"data/train-{i}.jsonl": json_lines([str(i)]) for i in range(4)})
    assert list(documents(Source("hf:x/y", include=("*-1.jsonl", "*-3.*")))) == ["1", "3"]
    assert list(documents(Source("hf:x/y", exclude=("data/train-2*",)))) == ["0", "1", "3"]
    message = complaint(Source("hf:x/y", include=("*.txt",)))
    assert "data.include" in message and "data/train-0.jsonl" in message


def test_a_pinned_source_does_not_follow_the_hub(hub: FakeHub) -> None:
    old = hub.put("x/y", {"train.jsonl": json_lines(["old", "text"])})
    now = pinned(Source("hf:x/y")).source
    assert now.commit == old
    hub.put("x/y", {"train.jsonl": json_lines(["another"])})
    assert list(documents(now)) == ["old", "text"]
    assert list(documents("hf:x/y")) == ["another"]
    assert fingerprint(now) == fingerprint("hf:x/y"), "the cache is found without asking the hub"
    del hub.repos["x/y"][old]
    message = complaint(now)
    assert old in message and "data.cache" in message


@pytest.mark.parametrize("name", ["hf:", "hf::a", "hf:a:b:c:d"])
def test_a_name_that_is_none(name: str) -> None:
    assert "write it as hf:<dataset>" in complaint(name)


# ---------------------------------------------------------------------------- going on


def test_files_before_a_mark_are_not_fetched_again(hub: FakeHub) -> None:
    texts = [[f"{i}.{j}" for j in range(10)] for i in range(4)]
    hub.put("x/y", {f"train-{i}.jsonl": json_lines(texts[i]) for i in range(4)})
    marks = Marks()
    rows = list(numbered_documents("hf:x/y", marks=marks))
    assert rows == list(enumerate(text for file in texts for text in file))
    place = marks.before(25)
    assert place == (20, 2)
    hub.requests.clear()
    assert list(numbered_documents("hf:x/y", 25, marks=Marks(*place))) == rows[25:]
    assert {path[-7] for path in hub.fetched(".jsonl")} == {"2", "3"}


@pytest.mark.parametrize("damaged", ["refuse", "skip"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz"])
def test_reading_goes_on_at_any_row(tmp_path: Path, kind: str, damaged: str) -> None:
    for i in range(4):
        texts = [f"{i}.{j}" if j % 4 else "" for j in range(7 * i)]
        data = parquet(texts, group=3) if kind == "parquet" else json_lines(texts)
        data = gzip.compress(data) if kind.endswith("gz") else data
        (tmp_path / f"{i}.{kind}").write_bytes(data)
    source = Source(str(tmp_path), damaged=damaged, max_left_out=1)
    marks = Marks()
    rows = list(numbered_documents(source, marks=marks))
    assert len(rows) == sum(1 for i in range(4) for j in range(7 * i) if j % 4)
    for start in range(45):
        expected = [row for row in rows if row[0] >= start]
        if expected or not start:
            assert list(numbered_documents(source, start)) == expected
            assert list(numbered_documents(source, start, marks=Marks(*marks.before(start)))) == expected


def test_rows_before_the_start_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no JSON\n" * 5 + json_lines(["five", "six"]))
    with pytest.raises(UserError, match="not valid JSON"):
        list(numbered_documents(str(tmp_path)))
    file = File("a.jsonl", tmp_path / "a.jsonl", 1, "JSON lines", column="text")
    read_from = KINDS["JSON lines"].read_from
    assert read_from is not None
    assert list(read_from(file, Source(str(tmp_path)), 5)) == [None] * 5 + ["five", "six"]
