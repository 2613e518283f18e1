"""Sources: every kind of file gives its documents, and everything wrong with one gives one line."""

import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowres.errors import UserError
from lowres.text import connection, documents, fingerprint, is_stream, listing, numbered_documents

TEXTS = ["first\r\n\tdocument ", "zweites Dokument: ä\u2028", "  third\n"]


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))
    if suffix == ".gz":
        return gzip.compress(data)
    return lzma.compress(data) if suffix == ".xz" else data


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(tmp_path: Path, columns: dict[str, list]) -> bytes:
    pytest.importorskip("pyarrow.parquet").write_table(
        pytest.importorskip("pyarrow").table(columns), tmp_path / "made"
    )
    data = (tmp_path / "made").read_bytes()
    (tmp_path / "made").unlink()
    return data


def complaint(source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(str(source)))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, kind: str, compression: str) -> None:
    if kind == ".jsonl":
        data, expected = json_lines(TEXTS), TEXTS
    elif kind == ".parquet":
        data, expected = parquet(tmp_path, {"text": TEXTS, "n": [1, 2, 3]}), TEXTS
    else:
        data, expected = "".join(TEXTS).encode(), ["".join(TEXTS)]
    file = tmp_path / f"data{kind}{compression}"
    file.write_bytes(compress(data, compression))
    assert list(documents(str(file))) == expected


def test_zst_of_several_frames(tmp_path: Path) -> None:
    file = tmp_path / "data.txt.zst"
    file.write_bytes(compress(b"one " * 100_000, ".zst") + compress(b"two", ".zst"))
    assert list(documents(str(file))) == ["one " * 100_000 + "two"]


def test_folder_is_read_recursively_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.txt").write_text("2")
    (tmp_path / "c.md").write_text("3")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"1"))
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    (tmp_path / ".git" / "y.txt").write_text("hidden")
    assert list(documents(str(tmp_path))) == ["1", "2", "3"]
    assert list(documents(str(tmp_path / "*.md"))) == ["3"]
    assert list(documents(str(tmp_path / "**" / "*.txt"))) == ["2"]


def test_rows_count_blank_documents_so_that_reading_can_go_on_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": " \\n"}\n{"text": null}\n{"text": "b"}\n{"text": "c"}')
    rows = list(numbered_documents(str(file)))
    assert rows == [(0, "a"), (4, "b"), (5, "c")]
    assert [list(numbered_documents(str(file), start)) for start in (1, 4, 5, 6)] == [
        rows[1:],
        rows[1:],
        rows[2:],
        [],
    ]


def test_lone_surrogates_are_replaced_and_pairs_kept(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a\\ud800b \\ud83d\\ude00 \\udc00"}')
    assert list(documents(str(file))) == ["a\ufffdb \U0001f600 \ufffd"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "there"}')
    assert list(documents(str(tmp_path))) == ["hello", "there"]


def test_stdlib_is_source_code_without_tests() -> None:
    texts = list(documents("stdlib"))
    assert sum(map(len, texts)) > 5_000_000
    assert Path(json.__file__).read_text() in texts
    assert not any("class TestDecode(" in text for text in texts)
    assert fingerprint("stdlib").startswith(f"python {sys.version.split()[0]}, ")


def bad_files(tmp_path: Path) -> dict[str, tuple[str, bytes, list[str]]]:
    good = json_lines(TEXTS * 1000)
    return {
        "not UTF-8": ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8"]),
        "UTF-16": ("a.txt", "hello".encode("utf-16-le"), ["a.txt", "not UTF-8"]),
        "binary": ("a.py", os.urandom(1000) + b"\xff", ["a.py", "not UTF-8"]),
        "binary lines": ("a.jsonl", b'{"text": "a"}\n\xff\xfe\n', ["a.jsonl:2", "not UTF-8"]),
        "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl:2", "not valid JSON"]),
        "deep JSON": ("a.jsonl", b'{"text": ' + b"[" * 100_000, ["a.jsonl:1", "not valid JSON"]),
        "no object": ("a.jsonl", b'["text"]\n', ["a.jsonl:1", "JSON object"]),
        "no text": ("a.jsonl", b'{"prose": "a", "n": 1}\n', ["a.jsonl", "prose, n", "data.text_key"]),
        "number": ("a.jsonl", b'{"text": 1}\n', ["a.jsonl:1", "int"]),
        "cut gz": ("a.jsonl.gz", compress(good, ".gz")[:-100], ["a.jsonl.gz", "truncated"]),
        "cut xz": ("a.jsonl.xz", compress(good, ".xz")[:-100], ["a.jsonl.xz", "truncated"]),
        "cut zst": ("a.jsonl.zst", compress(good, ".zst")[:-10], ["a.jsonl.zst", "truncated"]),
        "no gz": ("a.txt.gz", b"hello", ["a.txt.gz", "damaged"]),
        "no xz": ("a.txt.xz", b"hello", ["a.txt.xz", "damaged"]),
        "no zst": ("a.txt.zst", b"hello", ["a.txt.zst", "damaged"]),
        "no parquet": ("a.parquet", b"PAR1hello", ["a.parquet", "parquet file"]),
        "cut parquet": ("a.parquet", parquet(tmp_path, {"text": TEXTS})[:-20], ["a.parquet", "parquet file"]),
        "parquet columns": (
            "a.parquet",
            parquet(tmp_path, {"prose": TEXTS, "n": [1, 2, 3]}),
            ["a.parquet", "prose, n"],
        ),
        "parquet numbers": ("a.parquet", parquet(tmp_path, {"text": [1]}), ["a.parquet", "int"]),
        "nothing": ("a.txt", b"", ["a.txt", "no text"]),
        "blank": ("a.jsonl", b'\n{"text": " "}\n', ["a.jsonl", "no text"]),
        "unknown": ("a.doc", b"hel\0lo", ["a.doc", ".jsonl"]),
    }


@pytest.mark.parametrize("case", [
    "not UTF-8", "UTF-16", "binary", "binary lines", "broken JSON", "deep JSON", "no object", "no text",
    "number", "cut gz", "cut xz", "cut zst", "no gz", "no xz", "no zst", "no parquet", "cut parquet",
    "parquet columns", "parquet numbers", "nothing", "blank", "unknown",
])  # fmt: skip
def test_bad_file_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, data, expected = bad_files(tmp_path)[case]
    (tmp_path / name).write_bytes(data)
    message = complaint(tmp_path / name)
    assert all(part in message for part in expected), message


def test_paths_without_files(tmp_path: Path) -> None:
    assert "nowhere: no such file" in complaint(tmp_path / "nowhere")
    (tmp_path / "x.png").touch()
    for source in (tmp_path, tmp_path / "*.txt"):
        message = complaint(source)
        assert str(source) in message and ".parquet" in message


@pytest.mark.parametrize(
    ("package", "name"),
    [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet"), ("datasets", "hf:x")],
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"PAR1")
    message = complaint(name if is_stream(name) else tmp_path / name)
    assert f"pip install {package}" in message


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    def changed(change: Callable[[], object]) -> bool:
        before = fingerprint(str(tmp_path))
        change()
        return fingerprint(str(tmp_path)) != before

    file = tmp_path / "a.txt"
    file.write_text("one")
    stamp = file.stat().st_mtime_ns
    assert not changed(lambda: None)
    assert not changed((tmp_path / "other.png").touch)
    assert changed(lambda: os.utime(file, ns=(stamp, stamp + 1)))
    assert changed(lambda: file.write_text("three"))
    assert changed(lambda: file.rename(tmp_path / "b.txt"))
    assert changed((tmp_path / "c.txt").touch)


def test_hf_streams_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(json_lines(["a", "", "b", "c"]))
    (tmp_path / "test.jsonl").write_bytes(json_lines(["t"]))
    source = f"hf:{tmp_path}"
    assert list(documents(source)) == ["a", "b", "c"]
    assert list(numbered_documents(source, 2)) == [(2, "b"), (3, "c")]
    assert list(documents(f"{source}::test")) == ["t"]
    before = fingerprint(source)
    assert before == fingerprint(source) != fingerprint(f"{source}::test")
    (tmp_path / "train.jsonl").write_bytes(json_lines(["a", "", "b", "d"]))
    assert fingerprint(source) != before
    assert "nosuch" in complaint(f"{source}::nosuch")
    assert "--set data.source=PATH" in complaint(f"hf:{tmp_path}/missing")
    assert "write it as hf:" in complaint("hf:")


def test_hf_without_the_hub_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'no/one' on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    monkeypatch.setattr(connection, "FIRST_PAUSES", (0,))
    message = complaint("hf:no/one")
    assert "Couldn't reach" in message and "--set data.source=PATH" in message


def test_library_file_in_another_encoding_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "utf8.py").write_text("pass")
    monkeypatch.setattr(listing.sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(numbered_documents("stdlib")) == [(1, "pass")]
