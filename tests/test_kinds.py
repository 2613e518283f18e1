"""The kinds of file: each gives back what was written, byte for byte, and says what it does not read."""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowres.errors import UserError
from lowres.text import TEST, TRAIN, VALIDATION, Source, list_files, numbered_documents
from lowres.text.kinds import json_file

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

NASTY = [
    "plain",
    "two\r\nlines\n",
    "",
    'a "quote", a comma; a\ttab | and a \\ backslash',
    "\ufeff a byte order mark inside",
    "\u2028 \u2029 \x85 \x0b \x0c line ends of other kinds",
    "\U0001f600 " * 300,
    '"',
    '""',
    "]},{[",
    '{"text": "no row"}',
    "2019-04-25",
    "0123",
    "NaN",
    "null",
    "  spaces around  ",
    "long " * 60_000,
    "the last",
]
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(zstandard.ZstdCompressor().compress(data)),
}


def json_rows(texts: list[str], between: str, **how: Any) -> bytes:
    return between.join(json.dumps({"id": i, "text": t}, **how) for i, t in enumerate(texts)).encode()


def separated(texts: list[str], divider: str, name: str = "text") -> bytes:
    made = io.StringIO()
    writer = csv.writer(made, delimiter=divider)
    writer.writerow(["id", name, "more"])
    writer.writerows([[i, text, ""] for i, text in enumerate(texts)])
    return made.getvalue().encode()


def arrow_table(texts: list[str], kind: Any = None) -> Any:
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})


def arrow_stream(table: Any, batch: int = 7) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return bytes(sink.getvalue())


def feather(table: Any, **how: Any) -> bytes:
    sink = io.BytesIO()
    pytest.importorskip("pyarrow.feather").write_feather(table, sink, **how)
    return sink.getvalue()


def parquet(table: Any, **how: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pytest.importorskip("pyarrow.parquet").write_table(table, sink, **how)
    return bytes(sink.getvalue())


def record(text: str | bytes, kind: str = "conversion", size: int | None = None) -> bytes:
    """A WARC record, by the text of the standard."""
    data = text.encode() if isinstance(text, str) else text
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: text/plain\r\n"
    return (
        f"{head}Content-Length: {len(data) if size is None else size}\r\n\r\n".encode() + data + b"\r\n\r\n"
    )


def wet(texts: list[str]) -> bytes:
    return b"".join(map(record, texts))


KINDS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "JSON lines": (".jsonl", lambda t: json_rows(t, "\n")),
    "JSON lines in .json": (".json", lambda t: json_rows(t, "\n", ensure_ascii=False) + b"\n"),
    "JSON lines with CRLF": (".json", lambda t: b"\xef\xbb\xbf" + json_rows(t, "\r\n")),
    "JSON objects without lines": (".json", lambda t: json_rows(t, "")),
    "pretty JSON objects": (".json", lambda t: json_rows(t, "\n", indent=2)),
    "JSON array": (".json", lambda t: b"[" + json_rows(t, ",\n", ensure_ascii=False) + b"]"),
    "pretty JSON array": (".json", lambda t: json.dumps([{"text": x} for x in t], indent=4).encode()),
    "JSON array of strings": (".json", lambda t: json.dumps(t).encode()),
    "JSON array in an object": (".json", lambda t: json.dumps({"n": 1, "data": t, "end": {}}).encode()),
    "CSV": (".csv", lambda t: separated(t, ",")),
    "CSV with BOM and semicolons": (".csv", lambda t: b"\xef\xbb\xbf" + separated(t, ";", " Text")),
    "TSV": (".tsv", lambda t: separated(t, "\t", "TEXT")),
    "Arrow stream": (".arrow", lambda t: arrow_stream(arrow_table(t))),
    "Arrow file": (".arrow", lambda t: feather(arrow_table(t), compression="uncompressed")),
    "Feather": (".feather", lambda t: feather(arrow_table(t), compression="lz4", chunksize=5)),
    "parquet": (".parquet", lambda t: parquet(arrow_table(t), row_group_size=5)),
    "parquet of large strings": (".parquet", lambda t: parquet(arrow_table(t, pa.large_string()))),
    "parquet of string views": (".parquet", lambda t: parquet(arrow_table(t, pa.string_view()))),
    "parquet of a dictionary": (
        ".parquet",
        lambda t: parquet(pa.table({"text": pa.array(t).dictionary_encode()})),
    ),
    "WET": (".warc.wet", wet),
}


def tarred(files: dict[str, bytes], mode: Any = "w:") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


def rows_of(texts: list[str]) -> list[tuple[int, str]]:
    return [(i, text) for i, text in enumerate(texts) if text.strip()]


def read(path: Path | str, part: str = TRAIN, **how: Any) -> list[str]:
    return [text for _, text in numbered_documents(Source(str(path), **how), part=part)]


def complaint(path: Path | str, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **how)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# ---------------------------------------------------------------------------- what is written is read


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_with_its_row(tmp_path: Path, kind: str, compression: str) -> None:
    suffix, write = KINDS[kind]
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(COMPRESSED[compression](write(NASTY)))
    assert list(numbered_documents(str(path))) == rows_of(NASTY)
    assert list(numbered_documents(str(path), start=9)) == rows_of(NASTY)[8:]


@pytest.mark.parametrize("archive", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip"])
def test_an_archive_is_a_folder(tmp_path: Path, archive: str) -> None:
    files, expected = dict[str, bytes](), list[str]()
    for number, (kind, (suffix, write)) in enumerate(KINDS.items()):
        texts = [f"{kind} {text}" for text in NASTY[:6] if text]
        compression = list(COMPRESSED)[number % len(COMPRESSED)]
        files[f"./b/{number:02}{suffix}{compression}"] = COMPRESSED[compression](write(texts))
        expected += texts
    files["notes.txt"] = b"a text file"
    files["z/picture.png"] = b"\x89PNG"
    plain = zipped(files) if archive == ".zip" else tarred(files)
    data = next((COMPRESSED[c](plain) for c in COMPRESSED if c and archive.endswith(c[1:])), plain)
    (tmp_path / f"a{archive}").write_bytes(data)
    assert read(tmp_path / f"a{archive}") == [*expected, "a text file"]
    listing = list_files(str(tmp_path))
    assert [each.name for each in listing.left_out] == [f"a{archive}/z/picture.png"]
    assert read(tmp_path, include=("*.csv*",)) == [text for text in expected if text.startswith("CSV ")]
    assert read(tmp_path, exclude=("b/", "z/", f"a{archive}/b/**")) == ["a text file"]


def test_splits_hold_inside_an_archive(tmp_path: Path) -> None:
    names = ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")
    (tmp_path / "wikitext.zip").write_bytes(zipped({f"w/{name}": name.encode() for name in names}))
    assert [read(tmp_path, part) for part in (TRAIN, VALIDATION, TEST)] == [[name] for name in names]
    assert read(tmp_path / "wikitext.zip", VALIDATION) == ["wiki.valid.raw"]


def test_two_readers_of_one_tape_do_not_meet(tmp_path: Path) -> None:
    files = {f"{i:03}.txt": f"text {i}".encode() * 500 for i in range(40)}
    (tmp_path / "a.tar.gz").write_bytes(tarred(files, "w:gz"))
    first, second = (numbered_documents(str(tmp_path)) for _ in range(2))
    expected = [(i, data.decode()) for i, data in enumerate(files.values())]
    assert [next(first) for _ in range(7)] == expected[:7]
    assert [next(second) for _ in range(3)] == expected[:3]
    assert list(first) == expected[7:]
    assert list(second) == expected[3:]


def test_a_tape_is_wound_forward_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowres.text import archives

    files = {f"{i:03}.jsonl": json_rows([f"text {i}"], "\n") for i in range(30)}
    (tmp_path / "a.tar.gz").write_bytes(tarred(files, "w:gz"))
    opened = list[Path]()
    real = archives.decompressed

    def counted(raw: Any, compression: str, path: Path) -> Any:
        opened.append(path)
        return real(raw, compression, path)

    monkeypatch.setattr(archives, "decompressed", counted)
    assert len(read(tmp_path)) == 30
    assert len(opened) == 2  # to list what is there, and to read it


def test_a_tape_is_not_shared_with_another_process(tmp_path: Path) -> None:
    noise = random.Random(0)
    files = {f"{i:03}.txt": noise.randbytes(20_000).hex().encode() for i in range(20)}
    (tmp_path / "a.tar.gz").write_bytes(tarred(files, "w:gz"))
    assert len(list_files(str(tmp_path)).files) == 20
    next(iter(numbered_documents(str(tmp_path))))  # the tape waits in its middle
    child = os.fork()
    if not child:
        os._exit(0 if len(read(tmp_path)) == 20 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read(tmp_path) == [data.decode() for data in files.values()]


def test_several_tars_in_one_file_are_all_read(tmp_path: Path) -> None:
    one, two = tarred({"a.txt": b"one"}), tarred({"b.txt": b"two"})
    (tmp_path / "both.tar").write_bytes(one + two)
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(one) + gzip.compress(two))
    assert read(tmp_path) == ["one", "two"] * 2


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    made = io.BytesIO(tarred({"a.txt": b"old", "b.txt": b"b"}))
    with tarfile.open(fileobj=made, mode="a") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    (tmp_path / "x.tar").write_bytes(made.getvalue())
    assert sorted(read(tmp_path)) == ["b", "new"]
    assert [each.reason for each in list_files(str(tmp_path)).left_out] == [
        "replaced by a later member of the same name"
    ]


def test_what_is_no_file_in_an_archive_is_listed(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind in (
            ("l.txt", tarfile.SYMTYPE),
            ("h.txt", tarfile.LNKTYPE),
            ("p.txt", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.txt"
            tar.addfile(member)
        for name in ("a.txt", ".hidden/b.txt", "__MACOSX/c.txt", "in.tar", "../../outside.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
    (tmp_path / "x.tar").write_bytes(made.getvalue())
    listing = list_files(Source(str(tmp_path), max_left_out=1.0))
    assert {each.name.removeprefix("x.tar/"): each.reason.split(";")[0] for each in listing.left_out} == {
        "l.txt": "a link inside an archive",
        "h.txt": "a link inside an archive",
        "p.txt": "not an ordinary file",
        ".hidden/b.txt": "hidden",
        "__MACOSX/c.txt": "hidden",
        "in.tar": "an archive inside an archive",
    }
    assert [file.name for file in listing.files] == ["x.tar/a.txt", "x.tar/../../outside.txt"]
    assert not (tmp_path.parent.parent / "outside.txt").exists()


# ---------------------------------------------------------------------------- columns


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".arrow"])
def test_text_inside_objects(tmp_path: Path, kind: str) -> None:
    rows = [
        {"doc": {"body": {"raw": "a"}, "n": 1}},
        {"doc": {"body": None, "n": 2}},
        {"doc": {"body": {"raw": "b"}}},
    ]
    if kind.startswith(".json"):
        data = "\n".join(map(json.dumps, rows)).encode()
    else:
        table = pa.Table.from_pylist(rows)
        data = parquet(table) if kind == ".parquet" else arrow_stream(table)
    (tmp_path / f"a{kind}").write_bytes(data)
    source = Source(str(tmp_path), text_key="doc.body.raw")
    assert list(numbered_documents(source)) == [(0, "a"), (2, "b")]
    message = complaint(tmp_path, text_key="doc.nothing")
    assert f"a{kind}:1" in message and 'no column "doc.nothing"' in message


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', ["messages", "supervised"]),
        ("a.json", b'[{"conversations": [{"from": "human"}]}]', ["conversations", "supervised"]),
        ("a.parquet", parquet(pa.table({"input_ids": [[1, 2]]})), ["token ids", "no text"]),
        ("a.parquet", parquet(pa.table({"text": [["a", "b"]]})), ["a.parquet:1", "list", "data.text_key"]),
        ("a.parquet", parquet(pa.table({"text": [b"a"]})), ["a.parquet:1", "bytes"]),
        ("a.arrow", arrow_stream(pa.table({"text": [1.5]})), ["a.arrow:1", "float"]),
        ("a.jsonl", b'{"text": "a"}\n{"prose": "b"}', ["a.jsonl:2", 'no column "text"', "found prose"]),
        ("a.json", b'[{"text": "a"}, {"prose": "b"}]', ["a.json:1 row 2", 'no column "text"', "found prose"]),
        ("a.jsonl", b'{"text": "a", "text": "b"}', ["a.jsonl:1", '"text" comes twice']),
        ("a.json", b'{"text": "a", "text": "b"}', ["a.json:1", '"text" comes twice']),
        ("a.csv", b"prose,n\na,1\n", ["a.csv", "found prose, n", "data.text_key"]),
        ("a.csv", b"Once upon a time\nthere was\n", ["a.csv", "found Once upon a time", "data.text_key"]),
        ("a.csv", b"text,text\na,b\n", ["a.csv", '2 columns "text"']),
    ],
)
def test_what_is_no_column_of_text(tmp_path: Path, name: str, data: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    message = complaint(tmp_path / name)
    assert all(part in message for part in expected), message


def test_numbers_that_json_cannot_hold_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": ' + b"9" * 5000 + b', "x": NaN, "y": 1e999, "text": "a"}')
    (tmp_path / "b.json").write_bytes(b'[{"h": {"k": 1, "k": 2}, "n": -' + b"9" * 5000 + b', "text": "b"}]')
    assert read(tmp_path) == ["a", "b"]


def test_what_surrounds_the_rows_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\r\n\r\ntext,n\r\na,1\r\n\r\n,2\r\nb,3")
    assert list(numbered_documents(str(path))) == [(0, "a"), (3, "b")]
    path.write_bytes(b"\n\n")
    assert "no text" in complaint(path)
    path.write_bytes(b"id\ttext\n1\ta, b; c\n")
    assert read(path) == ["a, b; c"]


def test_an_encrypted_table_says_so(tmp_path: Path) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[name-defined]
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return base64.b64encode(key)

    factory = encryption.CryptoFactory(lambda connection: Keys())
    for in_the_open in (True, False):
        how = encryption.EncryptionConfiguration(
            footer_key="a", column_keys={"b": ["text"]}, plaintext_footer=in_the_open
        )
        properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
        (tmp_path / "a.parquet").write_bytes(parquet(TABLE, encryption_properties=properties))
        assert "encrypted" in complaint(tmp_path / "a.parquet")


def test_a_page_of_parquet_with_another_checksum_is_damaged(tmp_path: Path) -> None:
    data = parquet(TABLE, compression="none", use_dictionary=False, write_page_checksum=True)
    (tmp_path / "a.parquet").write_bytes(data.replace(b"text 20", b"text 2O"))
    assert "a.parquet" in complaint(tmp_path)


# ---------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("package.json", b'{"name": "x", "files": ["a.js"], "text": "no"}'),
        ("tsconfig.json", b'{\n  // comment\n  "text": 1\n}'),
        ("settings.json", b'{"a": [1, 2,], "text": "x"}'),
        ("theme.json", b'{"colour": "red", "sizes": {"text": "small"}}'),
        ("one.json", b'{"name": "only one column of strings"}'),
        ("version.json", b'"1.2"'),
        ("number.json", b"12"),
    ],
)
def test_settings_are_no_data(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "program.py").write_text("pass")
    assert read(tmp_path) == ["pass"]
    listing = list_files(str(tmp_path))
    assert [(each.name, each.data) for each in listing.left_out] == [(name, False)]
    assert listing.warnings() == []


def test_an_array_of_something_else_is_left_out_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    for data in ("[1, 2]", "[[1], [2]]", "[true]"):
        (tmp_path / "b.json").write_text(data)
        assert read(tmp_path) == ["text " * 100]
        assert "without objects or strings" in list_files(str(tmp_path)).warnings()[0]
    (tmp_path / "b.json").write_text('[null, {"text": "b"}]')
    assert list(numbered_documents(str(tmp_path / "b.json"))) == [(1, "b")]


def test_a_document_in_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"title": "A", "text": "first", "tags": ["x"]}, indent=2))
    (tmp_path / "b.json").write_text(json.dumps({"Content": "second", "refs": [{"text": "no row"}]}))
    assert read(tmp_path) == ["first", "second"]
    (tmp_path / "c.json").write_text(json.dumps({"story": "third", "tags": ["x"]}))
    assert read(tmp_path / "c.json", text_key="story") == ["third"]


@pytest.mark.parametrize("form", ["array", "object", "lines"])
def test_a_long_json_file_is_read_in_pieces(tmp_path: Path, form: str) -> None:
    texts = [f'{i} \u00e4\\"\n' * (1 + 50_000 * (i % 7 == 3)) for i in range(70)]
    if form == "lines":
        data = "\n".join(json.dumps({"parts": ["a"], "text": t}, ensure_ascii=False) for t in texts)
    else:
        data = json.dumps([{"text": t} for t in texts], ensure_ascii=False)
        data = data if form == "array" else f'{{"version": [1, 2], "rows": {data}, "count": {{"n": 70}}}}'
    assert len(data) > 1 << 22
    (tmp_path / "a.json").write_text(data)
    assert read(tmp_path) == texts


@pytest.mark.parametrize("piece", [1, 5, 17])
@pytest.mark.parametrize("kind", [kind for kind, (suffix, _) in KINDS.items() if suffix == ".json"])
def test_a_piece_may_end_inside_any_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, piece: int
) -> None:
    monkeypatch.setattr(json_file, "_PIECE", piece)
    monkeypatch.setattr(json_file, "_HEAD", 20)
    texts = ['\U0001f600 \u00e9 \\ " / false'] + [f"{i} {text[:50]}" for i, text in enumerate(NASTY)]
    (tmp_path / "a.json").write_bytes(KINDS[kind][1](texts))
    assert read(tmp_path) == texts


def test_a_second_array_behind_a_long_one_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": ["x" * 100_000] * 50, "b": ["y"]}))
    assert '"b" beside an array of rows' in complaint(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"a": ["x" * 100_000] * 50, "text": "y"}))
    assert '"text" beside an array of rows' in complaint(tmp_path)


def test_a_row_that_is_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    long = "x" * (5 << 20)
    (tmp_path / "a.json").write_bytes(json_rows([long, "b"], "\n"))
    assert read(tmp_path) == [long, "b"]


JSON_FAULTS = {
    "cut array": (b'[{"text": "a"}, {"text": "b"}', ["a", "b"], ["row 2", "no end"]),
    "cut string": (b'[{"text": "a"}, {"text": "b', ["a"], ["row 2", "Unterminated"]),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', ["a"], ["row 1", "no comma"]),
    "more after an array": (b'[{"text": "a"}]\n[{"text": "b"}]', ["a"], ["a.json:2", "follows"]),
    "two arrays": (b'{"a": ["x", "y"], "b": [{"text": "z"}]}', [], ["several arrays (a, b)"]),
    "a number": (b'[{"text": "a"}, 5]', ["a"], ["row 2", "object or a string"]),
    "an array between objects": (b'{"text": "a"}\n["b"]', ["a"], ["a.json:2 row 2", "object or a string"]),
    "bad object": (b'{"text": "a"}\n{"text": "b"}\n{"text": }', ["a", "b"], ["a.json:3", "Expecting value"]),
    "not UTF-8": (b'[{"text": "a"}, {"text": "caf\xe9"}]', ["a"], ["not UTF-8"]),
    "NUL": (b'[{"text": "a"}, {"text": "b"\0}]', ["a"], ["row 2", "not valid JSON"]),
    "control character": (b'[{"text": "a"}, {"text": "b\nc"}]', ["a"], ["row 2", "control character"]),
    "deep": (b'[{"text": "a"}, ' + b"[" * 100_000, ["a"], ["row 2"]),
}  # fmt: skip
CSV_FAULTS = {
    "ragged": (b"id,text\n1,a\n2,b,c\n", ["a"], ["a.csv:3", "3 columns instead of 2"]),
    "short": (b"id,text\n1,a\n2\n", ["a"], ["a.csv:3", "1 columns instead of 2"]),
    "open quote": (b'id,text\n1,a\n2,"b\n3,c\n', ["a"], ["a.csv:3", "unexpected end"]),
    "text after a quote": (b'id,text\n1,a\n2,"b"c\n', ["a"], ["a.csv:3", "expected after"]),
    "not UTF-8": (b"id,text\n1,a\n2,caf\xe9\n", ["a"], ["a.csv:3", "not UTF-8"]),
    "NUL": (b"id,text\n1,a\n2,b\0\n", ["a"], ["a.csv:3", "NUL"]),
    "old line ends": (b"id,text\n1,a\n2,b\r3,c\n", ["a"], ["a.csv:3", "new-line"]),
}
TABLE = arrow_table([f"text {i}" for i in range(30)])
STREAM = arrow_stream(TABLE, 10)


def cut_after_batch(count: int) -> bytes:
    """A stream that ends between two of its batches."""
    reader = pa.BufferReader(STREAM)
    batches = pa.ipc.open_stream(reader)
    for _ in range(count):
        batches.read_next_batch()
    return STREAM[: reader.tell()]


def invalid_strings() -> Any:
    """A column in which row 2 is not UTF-8."""
    data = pa.array([b"text 0", b"caf\xe9", b"text 2"], pa.binary())
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 3, data.buffers())})


FIRST = [f"text {i}" for i in range(30)]
LINES = json_rows(FIRST, "\n")
CUT = FIRST[: LINES[:500].count(b"\n")]
OTHER_FAULTS: dict[str, tuple[str, bytes, list[str], list[str]]] = {
    "Arrow between batches": ("a.arrow", cut_after_batch(2), [], ["no end", "get the file again"]),
    "Arrow in a batch": ("a.arrow", STREAM[:-100] + STREAM[-8:], FIRST[:20], ["get the file again"]),
    "Arrow file cut": ("a.feather", feather(TABLE)[:-30], [], ["get the file again"]),
    "Feather 1": ("a.feather", b"FEA1" + bytes(100), [], ["Feather version 1", ".parquet"]),
    "Arrow not UTF-8": ("a.arrow", arrow_stream(invalid_strings()), ["text 0"], ["a.arrow:2", "not UTF-8"]),
    "parquet not UTF-8": ("a.parquet", parquet(invalid_strings()), ["text 0"], ["a.parquet:2", "not UTF-8"]),
    "WET cut": ("a.wet", wet(["one", "two"])[:-5], ["one"], ["record 2", "truncated"]),
    "WET cut in a header": ("a.wet", wet(["one", "two"])[:-20], ["one"], ["record 2", "truncated"]),
    "WET without a header": ("a.wet", wet(["one"]) + b"some text\r\n" * 9, ["one"], ["record 2", "damaged"]),
    "WET with a page": ("a.wet", wet(["one"]) + record("<p>", "response"), ["one"], ["record 2", "response"]),
    "WARC of pages": ("a.warc", record("<html>", "response"), [], ["web pages", ".wet"]),
    "WET not UTF-8": ("a.wet", wet(["one"]) + record(b"caf\xe9"), ["one"], ["record 2", "not UTF-8"]),
    "no zip": ("a.zip", b"PK\3\4 and no more", [], ["not a zip file", "get the file again"]),
    "no tar": ("a.tar", b"text" * 500, [], ["header", "get the file again"]),
    "tar cut in a member": ("a.tar", tarred({"a.jsonl": LINES})[: 512 + 500], CUT, ["get the file again"]),
    "not gzip": ("a.tar.gz", tarred({"a.txt": b"x"}), [], ["a.tar.gz", "gzip"]),
}  # fmt: skip
FAULTS = (
    {f"JSON {k}": ("a.json", *v) for k, v in JSON_FAULTS.items()}
    | {f"CSV {k}": ("a.csv", *v) for k, v in CSV_FAULTS.items()}
    | OTHER_FAULTS
)


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_and_what_comes_before_it_kept(tmp_path: Path, case: str) -> None:
    name, data, kept, expected = FAULTS[case]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "another file"}\n')
    message = complaint(tmp_path / name)
    assert name in message and all(part in message for part in expected), message
    source = Source(str(tmp_path), damaged="skip", max_left_out=1.0)
    skipped = dict[str, str]()
    found = [text for _, text in numbered_documents(source, skipped=skipped)]
    assert found == [*kept, "another file"]
    reported = {**skipped, **{each.name: each.reason for each in list_files(source).left_out}}
    assert any(key.startswith(name) for key in reported)


def damage(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_nothing_behind_a_damaged_header_of_a_tar_is_lost_silently(tmp_path: Path, compression: str) -> None:
    data = tarred({f"{i}.txt": b"text %d" % i for i in range(4)})
    for broken in (damage(data, 2 * 1024 + 5), data[: 2 * 1024], data[: 2 * 1024 + 300]):
        path = tmp_path / f"a.tar{compression}"
        path.write_bytes(COMPRESSED[compression](broken))
        assert "a.tar" in complaint(path)
        source = Source(str(path), damaged="skip", max_left_out=1.0)
        assert [text for _, text in numbered_documents(source)] == ["text 0", "text 1"]
        (rest,) = list_files(source).left_out
        assert rest.reason.startswith("the rest of the archive") and rest.data


def test_damage_inside_a_member_of_a_zip(tmp_path: Path) -> None:
    data = zipped({"a.txt": b"text of a", "b.txt": b"text of b"}, zipfile.ZIP_STORED)
    (tmp_path / "x.zip").write_bytes(data.replace(b"text of a", b"text of X", 1))
    assert "x.zip/a.txt" in complaint(tmp_path)
    assert read(tmp_path, damaged="skip", max_left_out=1.0) == ["text of b"]


def test_members_of_a_zip_that_cannot_be_read(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": b"a" * 50, "b.txt": b"b" * 50, "c.txt": b"c" * 50}))
    at = data.find(b"PK\1\2")
    struct.pack_into("<H", data, at + 8, 1)  # encrypted
    struct.pack_into("<H", data, data.find(b"PK\1\2", at + 1) + 10, 9)  # deflate64
    (tmp_path / "x.zip").write_bytes(data)
    assert read(tmp_path, max_left_out=1.0) == ["c" * 50]
    reasons = [each.reason for each in list_files(Source(str(tmp_path))).left_out]
    assert "encrypted" in reasons[0] and "Python cannot read (9)" in reasons[1]
    assert "0.67 of its bytes" in complaint(tmp_path)


@pytest.mark.parametrize(
    "suffix",
    [".pdf", ".epub", ".docx", ".rtf", ".doc", ".ppt", ".xls", ".7z", ".rar", ".lz4", ".br", ".snappy"],
)
def test_kinds_that_are_not_read_say_what_to_do(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"anything" * 100)
    (tmp_path / "b.txt").write_text("text")
    assert any(word in complaint(tmp_path) for word in ("extract its text", "unpack it"))
    assert read(tmp_path, max_left_out=1.0) == ["text"]
    assert len(list_files(str(tmp_path)).warnings()) == 1


def test_a_wet_file_in_one_member_of_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(wet(["one", "two"])))
    (tmp_path / "b.warc.wet.gz").write_bytes(b"".join(gzip.compress(record(t)) for t in ("three", "four")))
    assert read(tmp_path) == ["one", "two", "three", "four"]


# ---------------------------------------------------------------------------- saved by `datasets`


def test_a_saved_data_set_is_what_its_state_lists(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(12)]})
    made.save_to_disk(str(tmp_path / "d"), num_shards=2)
    again = datasets.load_from_disk(str(tmp_path / "d"))
    again.map(lambda row: {"text": row["text"].upper()})
    again.shuffle(seed=1)
    made.save_to_disk(str(tmp_path / "d"), num_shards=3)
    assert read(tmp_path / "d") == made["text"][:]
    reasons = {each.name: each.reason for each in list_files(str(tmp_path / "d")).left_out}
    assert sum("cache" in reason for reason in reasons.values()) == 2
    assert sum("earlier save" in reason for reason in reasons.values()) == 2
    assert not list_files(str(tmp_path / "d")).warnings()
    shutil.copytree(tmp_path / "d", tmp_path / "e", ignore=shutil.ignore_patterns("*1-of-00003.arrow"))
    assert "data-00001-of-00003.arrow, which is missing" in complaint(tmp_path / "e")


def test_a_saved_selection_and_saved_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(12)]})
    chosen = made.shuffle(seed=3).select(range(5))
    splits = datasets.DatasetDict(train=chosen, validation=made.select([1]), test=made.select([2]))
    splits.save_to_disk(str(tmp_path / "d"))
    assert read(tmp_path / "d") == chosen["text"][:]
    assert read(tmp_path / "d", VALIDATION) == ["text 1"]
    assert read(tmp_path / "d", TEST) == ["text 2"]
    state = tmp_path / "d" / "train" / "state.json"
    state.write_text(
        json.dumps(json.loads(state.read_text()) | {"_indices_files": [{"filename": "i.arrow"}]})
    )
    assert "file of indices" in complaint(tmp_path / "d" / "train")


# ---------------------------------------------------------------------------- nothing is lost


class Folder:
    """A random folder of everything.

    written: name of a file -> its documents. kept: how many of them are before its fault, None if that is
    for the decompression to say."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.number = 0
        self.written = dict[str, list[str]]()
        self.kept = dict[str, int | None]()
        for _ in range(self.random.randrange(2, 9)):
            folder = self.random.choice(["", "", "train/", "validation/", "deep/er/", "test/"])
            self.random.choice([self.file, self.file, self.file, self.archive, self.link])(folder)

    def texts(self, count: int) -> list[str]:
        first = self.number
        self.number += count
        return [f"<{first + i}> {self.random.choice(NASTY)}" for i in range(count)]

    def member(self, folder: str) -> tuple[str, bytes]:
        """(name, content) of a file, noted down."""
        plain = [(suffix, lambda texts: texts[0].encode()) for suffix in (".txt", ".md", ".c")]
        suffix, write = self.random.choice([*KINDS.values(), *plain])
        texts = self.texts(1 if (suffix, write) in plain else self.random.randrange(1, 9))
        data, kept = write(texts), len(texts)
        compression = self.random.choice(list(COMPRESSED))
        if self.random.random() < 0.25 and suffix == ".jsonl":
            kept = self.random.randrange(len(texts))
            lines = data.split(b"\n")
            lines[kept] = lines[kept][:-1]
            data = b"\n".join(lines)
        data = COMPRESSED[compression](data)
        cut = compression and self.random.random() < 0.15
        name = f"{folder}f{self.number:04}{suffix}{compression}"
        name = name.upper() if self.random.random() < 0.2 and not folder else name
        self.written[name], self.kept[name] = texts, None if cut else kept
        return name, data[: len(data) // 2] if cut else data

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def file(self, folder: str) -> None:
        self.put(*self.member(folder))

    def archive(self, folder: str) -> None:
        self.number += 1
        suffix = self.random.choice([".tar", ".tar.gz", ".tar.zst", ".zip", ".TAR"])
        name = f"{folder}a{self.number:04}{suffix}"
        members = dict(self.member("") for _ in range(self.random.randrange(1, 5)))
        for member in members:
            self.written[f"{name}/{member}"] = self.written.pop(member)
            self.kept[f"{name}/{member}"] = self.kept.pop(member)
        data = zipped(members) if suffix == ".zip" else tarred(members)
        self.put(name, COMPRESSED.get(Path(suffix).suffix, bytes)(data))

    def link(self, folder: str) -> None:
        self.number += 1
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        there = [name for name in self.written if (self.root / name).is_file()]
        target = self.random.choice([*there, "nothing"])
        (self.root / folder / f"l{self.number:04}{Path(target).suffix}").symlink_to(self.root / target)


@pytest.mark.parametrize("seed", range(60))
def test_every_document_is_read_once_or_its_file_is_reported(tmp_path: Path, seed: int) -> None:
    made = Folder(tmp_path, seed)
    source = Source(str(tmp_path), damaged="skip", max_left_out=1.0)
    try:
        listing = list_files(source)
    except UserError as error:
        # not one file can be read
        assert "left out: " in str(error) or not made.written
        assert not any(made.kept.values())
        return
    part_of = {file.name: file.part for file in listing.files}
    reported = {each.name for each in listing.left_out}
    cut, found = dict[str, str](), dict[str, set[str]]()
    for part in (TRAIN, VALIDATION, TEST):
        try:
            texts = [text for _, text in numbered_documents(source, part=part, skipped=cut)]
        except UserError as error:
            assert "contains no text" in str(error)
            texts = []
        found[part] = set(texts)
        assert len(texts) == len(found[part])
    for name, texts in made.written.items():
        there = [text in found[part_of[name]] for text in texts] if name in part_of else []
        for part in (TRAIN, VALIDATION, TEST):
            assert part == part_of.get(name) or not found[part] & set(texts)
        kept = sum(there)
        assert all(there[:kept]), name
        if name in reported:
            assert not there
        else:
            assert made.kept[name] in (kept, None)
            assert (name in cut) == (kept < len(texts)), name
    everything = {text for texts in made.written.values() for text in texts}
    assert set().union(*found.values()) <= everything
    for link in (path for path in tmp_path.rglob("*") if path.is_symlink()):
        name = str(link.relative_to(tmp_path))
        assert name in reported or name in part_of
