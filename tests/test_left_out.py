"""What of a source is not trained on is counted, and text in another encoding is converted or left out."""

from pathlib import Path

import pytest

from lowres.errors import UserError
from lowres.text import Source, documents
from tests.helpers import lowres_here

TEXT = "Größe und Maß, café — “so”."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ordinary files, one in another encoding, one without text, and one that is empty."""
    made = tmp_path / "texts"
    made.mkdir()
    for name in ("a", "b"):
        (made / f"{name}.txt").write_text("The cat sat on the mat. " * 40 + name)
    (made / "c.txt").write_bytes(TEXT.encode("cp1252"))
    (made / "d.txt").write_text(" \n\n")
    (made / "e.txt").write_text("")
    return made


def test_a_file_in_another_encoding_is_converted_or_left_out(folder: Path, tmp_path: Path) -> None:
    prepare = ("data", "prepare", folder)
    refused = lowres_here(*prepare, tmp_path / "no", code=2).stderr.splitlines()[-1]
    assert "c.txt: not UTF-8 text (byte 2)" in refused
    assert all(remedy in refused for remedy in ("data.encoding", "data.exclude", "data.damaged=skip"))
    read = [*documents(Source(str(folder), encoding="cp1252"))]
    assert read[2] == TEXT and len(read) == 3 and read[0].startswith("The cat")  # UTF-8 stays UTF-8
    done = lowres_here(*prepare, tmp_path / "all", "--set", "data.encoding=cp1252")
    assert "note: left out: 2 rows without text\n" in done.stderr
    assert " in 3 documents for training, " in done.stdout
    done = lowres_here(*prepare, tmp_path / "two", "--set", "data.damaged=skip")
    assert "1 file is damaged" in done.stderr and " in 2 documents for training, " in done.stdout


@pytest.mark.parametrize("separator", [None, "§"])
def test_other_encodings(separator: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("caf\xe9".encode("utf-16"))
    assert [*documents(Source(str(path), encoding="utf-16"))] == ["caf\xe9"]
    # one document of several
    path.write_bytes(b"ascii \xc2\xa7 " + "caf\xe9".encode("latin-1"))
    if separator:
        both = [*documents(Source(str(path), separator=separator, encoding="latin-1"))]
        assert both == ["ascii ", " caf\xe9"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "n\xb0,text\r\n1,café €\r\n2,plain\r\n"),
        ("a.tsv", "n\xb0\ttext\n1\tcafé €\n2\tplain\n"),
        ("a.jsonl", '{"n\xb0": 1, "text": "café €"}\n{"n\xb0": 2, "text": "plain"}\n'),
    ],
)
def test_tables_in_another_encoding(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("cp1252"))
    with pytest.raises(UserError, match=r":1: not UTF-8 text \(byte \d+\); set data.encoding"):
        list(documents(str(path)))
    assert [*documents(Source(str(path), encoding="cp1252"))] == ["café €", "plain"]


def test_an_encoding_must_exist(folder: Path, tmp_path: Path) -> None:
    refused = lowres_here("data", "prepare", folder, tmp_path / "no", "--set", "data.encoding=rot13", code=2)
    assert "data.encoding: is no encoding of text that Python knows" in refused.stderr
    # what is neither names both
    (folder / "c.txt").write_bytes(b"\x81 \x8d")
    refused = lowres_here("data", "prepare", folder, tmp_path / "no", "--set", "data.encoding=cp1252", code=2)
    assert "not UTF-8 text (byte 0, nor cp1252)" in refused.stderr
