"""What each file of a source is: kinds, parts, and what is left out with its reason."""

import bz2
import errno
import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowres.cli import main
from lowres.errors import UserError
from lowres.text import TEST, TRAIN, VALIDATION, Source, documents, fingerprint, list_files, splits
from lowres.text.globs import matches
from lowres.text.words import summary


def rows(*texts: str, key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "n": 1}) + "\n" for text in texts).encode()


def write(root: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def parts(source: str | Source) -> dict[str, str]:
    return {file.name: file.part for file in list_files(source).files}


def reasons(source: str | Source) -> dict[str, str]:
    return {each.name: each.reason for each in list_files(source).left_out}


def refusal(source: str | Source) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/00", "train/01", "val", "test"], "TTVE"),  # the Pile
        (["TinyStories-train", "TinyStories-valid"], "TV"),
        (["c4-train.00000-of-01024", "c4-validation.00000-of-00008"], "TV"),
        (["data/train-00000-of-00001", "data/validation-00000-of-00001", "data/test-0"], "TVE"),
        (["train", "dev", "evaluation"], "TVE"),
        (["a", "b", "val"], "TTV"),  # the plain word needs no "train"
        (["a", "validation/x"], "TV"),
        (["ops/a", "dev/a", "eval/b"], "TTT"),  # may mean something else
        (["my-test-set", "other"], "TT"),  # a word inside a name does
        (["my-test-set"], "T"),
        (["test", "val"], "TT"),  # nothing else to train on
        (["validation_00", "validation_01", "x"], "VVT"),
        (["train_val_split", "other"], "TT"),  # says nothing
        (["latest", "contest", "training-notes", "evaluate"], "TTTT"),  # parts of words
        (["train/test_of_time"], "T"),  # the folder's plain name decides
        (["val/train"], "T"),  # the deepest plain name
        (
            ["c4-en.tfrecord-00000-of-02", "c4-en.tfrecord-00001-of-02", "c4-en-validation.tfrecord-0-of-01"],
            "TTV",
        ),
        (["c4-en.tfrecord-0", "c4-de-validation.tfrecord-0"], "TT"),  # of another language
        (["training-monolingual/news.en-1", "heldout-monolingual/news.en.heldout-0"], "TV"),  # LM1B
        (["heldout/a", "b"], "TT"),
        (["split=train/0", "split=val/0"], "TV"),
        (["TrainSet", "TestSet"], "TE"),
        (["trainers", "testament", "Contest"], "TTT"),
    ],
)
def test_parts_by_name(names: list[str], expected: str) -> None:
    letters = {TRAIN: "T", VALIDATION: "V", TEST: "E"}
    assert "".join(letters[part] for part in splits.parts(names)) == expected


def test_source_code_has_no_splits(tmp_path: Path) -> None:
    source = write(tmp_path, {"train.py": "1", "test/a.py": "2", "test.c": "3"})
    assert set(parts(source).values()) == {TRAIN}


def test_outermost_folders_split_source_code(tmp_path: Path) -> None:
    source = write(tmp_path, {"train/x/test/a.py": "1", "valid/b.py": "2", "test/c.c": "3", "val.py": "4"})
    assert list(parts(source).values()) == [TEST, TRAIN, TRAIN, VALIDATION]


def test_text_without_a_suffix_has_splits(tmp_path: Path) -> None:
    names = ("20news-bydate-train/sci.med/1", "20news-bydate-test/sci.med/2", "README")
    source = write(tmp_path, dict.fromkeys(names, "text"))
    assert parts(source) == {names[1]: TEST, names[0]: TRAIN}
    assert reasons(source) == {"README": "describes the data"}


def test_folders_above_a_glob_say_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "test" / "x", {"a.jsonl": rows("a"), "b/train.jsonl": rows("b")})
    assert sorted(documents(f"{source}/**/*.jsonl")) == ["a", "b"]
    assert list(documents(f"{tmp_path}/*/x/b/*")) == ["b"]


def test_test_is_never_read_and_validation_is_apart(tmp_path: Path) -> None:
    source = write(tmp_path, {f"{name}.jsonl": rows(name) for name in ("train", "val", "test")})
    assert list(documents(source)) == ["train"]
    assert list(documents(source, VALIDATION)) == ["val"]
    # a part of its own is read as what it is asked for
    assert list(documents(f"{source}/test.jsonl")) == ["test"]


# ---------------------------------------------------------------------------- the card

CARD = "---\nlicense: mit\nconfigs:\n{}\n---\n# A card\n"


def test_card_says_which_files_are_what(tmp_path: Path) -> None:
    config = "- config_name: default\n  data_files:\n  - split: train\n    path: 'data/a*'\n"
    config += "  - split: validation\n    path:\n    - data/b.jsonl\n  - split: test\n    path: '**/c.*'"
    files = {f"data/{name}.jsonl": rows(name) for name in ("a1", "a2", "b", "c")}
    source = write(tmp_path, files | {"README.md": CARD.format(config)})
    assert list(parts(source).values()) == [TRAIN, TRAIN, VALIDATION, TEST]
    assert reasons(source) == {"README.md": "describes the data"}
    write(tmp_path, {"more.jsonl": rows("m")})
    assert reasons(source)["more.jsonl"] == "not in the card's configs"
    assert "more.jsonl" in refusal(source) and "data.include" in refusal(source)
    assert list(documents(Source(source, include=("more*",)))) == ["m"]
    assert list(documents(Source(source, max_left_out=0.3))) == ["a1", "a2"]


def test_one_of_several_configs_is_named(tmp_path: Path) -> None:
    config = "- config_name: de\n  data_files: de/*\n- config_name: en\n  default: true\n  data_files: en/*"
    files = {"en/a.jsonl": rows("e" * 99), "de/a.jsonl": rows("d")}
    source = write(tmp_path, files | {"README.md": CARD.format(config)})
    chosen = Source(source, max_left_out=0.5)
    assert list(documents(chosen)) == ["e" * 99]
    assert any('"en" is read, not de' in line for line in list_files(chosen).warnings())
    assert reasons(chosen)["de/a.jsonl"] == 'of the card\'s config "de"'
    assert "de/a.jsonl" in refusal(source)


def test_a_config_that_is_included_keeps_its_splits(tmp_path: Path) -> None:
    config = "- config_name: en\n  default: true\n  data_files: en/*\n- config_name: de\n  data_files:\n"
    config += "".join(
        f"  - split: {split}\n    path: de/{name}.jsonl\n"
        for split, name in (("train", "a"), ("validation", "b"), ("test", "c"))
    )
    files = {f"{name}.jsonl": rows(name) for name in ("en/x", "de/a", "de/b", "de/c")}
    source = Source(write(tmp_path, files | {"README.md": CARD.format(config)}), include=("de/",))
    assert list(parts(source).values()) == [TRAIN, VALIDATION, TEST]
    assert list(documents(source)) == ["de/a"]


def test_a_config_may_be_a_folder(tmp_path: Path) -> None:
    config = "- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: ./de/"
    files = {"en/train-0.jsonl": rows("e" * 99), "en/validation-0.jsonl": rows("v"), "de/a.jsonl": rows("d")}
    source = Source(write(tmp_path, files | {"README.md": CARD.format(config)}), max_left_out=0.5)
    assert parts(source) == {"en/train-0.jsonl": TRAIN, "en/validation-0.jsonl": VALIDATION}
    assert reasons(source)["de/a.jsonl"] == 'of the card\'s config "de"'


def test_what_a_card_gives_to_two_splits_is_not_for_training(tmp_path: Path) -> None:
    config = "- config_name: default\n  data_files:\n  - split: train\n    path: '*'\n"
    config += "  - split: test\n    path: t*"
    files = {name: rows(name) for name in ("a.jsonl", "t.jsonl")}
    assert list(documents(write(tmp_path, files | {"README.md": CARD.format(config)}))) == ["a.jsonl"]


def test_the_nearest_card_counts(tmp_path: Path) -> None:
    config = (
        "- config_name: default\n  data_files:\n  - split: train\n    path: x*\n  - split: test\n    path: y*"
    )
    files = {name: rows(name) for name in ("one/x.jsonl", "one/y.jsonl", "two/y.jsonl")}
    source = write(tmp_path, files | {"one/README.md": CARD.format(config)})
    assert list(documents(source)) == ["one/x.jsonl", "two/y.jsonl"]


def test_a_card_of_other_files_is_said(tmp_path: Path) -> None:
    card = CARD.format("- config_name: default\n  data_files: data/*.parquet")
    source = write(tmp_path, {"README.md": card, "a.jsonl": rows("a")})
    assert list(documents(source)) == ["a"]
    assert any(
        "README.md" in line and "no file that is here" in line for line in list_files(source).warnings()
    )


def test_a_card_without_files_changes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path, {"README.md": "---\nlicense: mit\n---\n# Card", "a.jsonl": rows("a")})
    assert list(documents(source)) == ["a"]
    (tmp_path / "README.md").write_text(CARD.format("- [broken"))
    assert "README.md" in refusal(source) and "data.exclude" in refusal(source)
    assert list(documents(Source(source, exclude=("README.md",)))) == ["a"]


# ---------------------------------------------------------------------------- kinds and what is left out


def test_all_that_is_text_is_read(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {
            "a.c": "1",
            "b.py": "2",
            "c.weird": "3",
            "Makefile": "4",
            "D.MD": "5",
            "e.TXT.GZ": gzip.compress(b"6"),
        },
    )
    assert sorted(documents(source)) == list("123456")
    assert not list_files(source).left_out


@pytest.mark.parametrize("name", ["AA/wiki_00", "part-00000", "x.jsonl.aa", "x.jsonlines", "pubmed.txt"])
def test_json_lines_by_any_name(tmp_path: Path, name: str) -> None:
    source = write(tmp_path, {name: rows("one", "two"), f"{name}1.bz2": bz2.compress(rows("three"))})
    assert list(documents(source)) == ["one", "two", "three"]
    assert {file.kind for file in list_files(source).files} == {"JSON lines"}


@pytest.mark.parametrize(
    "text",
    ['{"text": "one object"}', '{"a": 1}\n{"a": 2}', '{"text": "a"}\nno JSON', '[{"text": "a"}]\n' * 2],
)
def test_other_text_is_no_json_lines(tmp_path: Path, text: str) -> None:
    assert list(documents(write(tmp_path, {"a.txt": text, "b": text}))) == [text, text]


def test_a_damaged_row_does_not_make_text_of_json_lines(tmp_path: Path) -> None:
    source = write(tmp_path, {"wiki_00": b"\n" + rows("a", "b") + b"oops\n" + rows("c")})
    assert "wiki_00:4: not valid JSON" in refusal(source)


def test_a_separator_that_is_asked_for_makes_text_of_json_lines(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": '{"text": "a", "n": 1}\n{"text": "b", "n": 1}'})
    assert len(list(documents(Source(source, separator="}\n")))) == 2


@pytest.mark.parametrize(
    "head", ['<mediawiki xmlns="x">\n<page>', "<?xml version='1.0'?>\n<posts>\n  <row Id=\"1\" />"]
)
def test_dumps_are_no_text(tmp_path: Path, head: str) -> None:
    source = write(tmp_path, {"a.txt": "a", "pages.xml-p1p41242.bz2": bz2.compress(head.encode())})
    assert "XML dump" in refusal(source) and "extract" in refusal(source)
    assert list(documents(write(tmp_path / "other", {"pom.xml": "<project/>"}))) == ["<project/>"]


def test_names_that_only_begin_like_a_licence_are_text(tmp_path: Path) -> None:
    names = ["notice-board.txt", "authors_of_note.txt", "copying_machines.txt", "license_history.txt"]
    aside = ["README_de.md", "LICENSE-MIT", "COPYING.LESSER", "NOTICE.txt", "en_sha256.txt", "CITATION.cff"]
    source = write(tmp_path, dict.fromkeys([*names, *aside], "x"))
    assert sorted(parts(source)) == sorted(names)
    assert set(reasons(source)) == set(aside)


def test_a_script_beside_a_book_is_said(tmp_path: Path) -> None:
    source = write(tmp_path, {"input.txt": "word " * 20_000, "prepare.py": "pass", "readme.md": "# Card"})
    assert list(documents(source)) == ["word " * 20_000]
    assert ["prepare.py" in line and "data.include" in line for line in list_files(source).warnings()] == [
        True
    ]


def test_rows_in_a_program_are_its_own(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.py": "pass\n" * 20_000,
        "tests/x.json": '[{"text": "a"}]',
        "README.md": "# A program",
    }
    source = write(tmp_path, files)
    assert sorted(documents(source)) == ["# A program", "pass\n" * 20_000]
    assert "tests/x.json" in list_files(source).warnings()[0]


def test_a_log_or_backup_is_read_if_it_is_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": "a", "irc.log": "b", "c.svg": "<svg/>", "d.jsonl.bak": rows("d")})
    assert "data.include" in reasons(source)["irc.log"]
    assert list(documents(Source(source, include=("*.log", "*.svg", "*.bak")))) == ["<svg/>", "d", "b"]


def test_one_object_with_long_text_is_no_settings(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.jsonl": rows("a" * 9000),
        "b.json": json.dumps({"title": "t", "paragraph": "p" * 200}),
    }
    source = write(tmp_path, files | {"c.json": '{"x": "short"}'})
    [line] = list_files(source).warnings()
    assert "b.json" in line and "title, paragraph" in line and "data.text_key" in line


def test_suffixes_count_in_any_case_and_kinds_mix(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "A.jsonl": rows("1"),
        "B.JSONL": rows("2"),
        "c.ndjson.GZ": gzip.compress(rows("3")),
        "d.txt": "4",
        "desktop.ini": "[x]",
    }
    assert list(documents(write(tmp_path, files))) == list("1234")


def test_what_only_describes_is_left_out_beside_data(tmp_path: Path) -> None:
    data: dict[str, bytes | str] = {"a.jsonl": rows("text " * 500)}
    aside: dict[str, bytes | str] = {
        "README.md": "# Card",
        "LICENSE": "MIT",
        "LICENSE.txt": "MIT",
        "sha256sums.txt": "00",
        "load.py": "pass",
    }
    source = write(tmp_path, data | aside)
    assert list(documents(source)) == ["text " * 500]
    found = reasons(source)
    assert found.keys() == aside.keys() and found["load.py"].startswith("source code beside data")
    # what might be data is said
    assert list_files(source).warnings() == [
        "left out: load.py, 4 bytes (source code beside data files; data.include takes it)"
    ]


def test_a_readme_is_text_where_all_is_prose(tmp_path: Path) -> None:
    assert list(documents(write(tmp_path, {"README.md": "read", "LICENSE": "me", "a.c": "too"}))) == [
        "me",
        "read",
        "too",
    ]


def test_too_much_left_out_is_an_error_that_names_the_settings(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.jsonl": rows("x"), "b.unknown": bytes(10_000)})
    message = refusal(source)
    assert "b.unknown" in message and all(
        f"data.{key}" in message for key in ("include", "exclude", "max_left_out")
    )
    assert list(documents(Source(source, exclude=("*.unknown",)))) == ["x"]
    assert list(documents(Source(source, max_left_out=1.0))) == ["x"]


def test_failed_downloads_and_dangling_links_are_said(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.jsonl": rows("x"), "b.jsonl.gz": b""})
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    found = reasons(source)
    assert "failed" in found["b.jsonl.gz"] and found["c.jsonl"] == "a link to nothing"
    assert len(list_files(source).warnings()) == 2


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", {"x.jsonl": rows("x")})
    source = write(tmp_path / "source", {"a.jsonl": rows("a")})
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "loop").symlink_to(tmp_path / "source")
    (tmp_path / "source" / "b.jsonl").symlink_to("a.jsonl")
    assert sorted(documents(source)) == ["a", "x"]
    found = reasons(source)
    assert found["b.jsonl"] == "the same file as a.jsonl, which is read"
    assert found["linked/"] == found["loop/"] == "a link to a folder that is read already"


def test_what_is_excluded_takes_no_name_from_what_is_read(tmp_path: Path) -> None:
    source = write(tmp_path, {"c/x.jsonl": rows("x"), "blobs/0a": rows("y")})
    (tmp_path / "a").symlink_to("c")
    for name in ("r1", "r2"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        (tmp_path / "snapshots" / name / "y.jsonl").symlink_to("../../blobs/0a")
    assert list(parts(Source(source, exclude=("a/", "snapshots/r1/")))) == [
        "c/x.jsonl",
        "snapshots/r2/y.jsonl",
    ]
    assert list(parts(Source(source, include=("a/", "blobs/")))) == ["a/x.jsonl", "blobs/0a"]
    assert list(documents(Source(source, include=("blobs/",)))) == ["y"]


def test_folders_of_links_tell_the_parts(tmp_path: Path) -> None:
    source = write(
        tmp_path, {"raw/p1/a.jsonl": rows("a"), "raw/p2/b.jsonl": rows("b"), "raw/c.jsonl": rows("c")}
    )
    (tmp_path / "train").symlink_to("raw/p1")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/c.jsonl").symlink_to("../raw/c.jsonl")
    (tmp_path / "val").symlink_to("raw/p2")
    assert parts(source) == {"test/c.jsonl": TEST, "train/a.jsonl": TRAIN, "val/b.jsonl": VALIDATION}
    assert reasons(source)["raw/p1/a.jsonl"] == "the same file as train/a.jsonl, which is read"


def test_links_among_folders_come_to_an_end(tmp_path: Path) -> None:
    source = write(tmp_path, {f"{i}/a.jsonl": rows(str(i)) for i in range(20)})
    for i in range(19):
        for name in ("left", "right"):
            (tmp_path / str(i) / name).symlink_to(f"../{i + 1}")
    assert sorted(documents(source), key=int) == [str(i) for i in range(20)]


def test_a_hub_caches_card_counts(tmp_path: Path) -> None:
    card = CARD.format(
        "- config_name: default\n  data_files:\n  - split: train\n    path: a*\n  - split: test\n    path: b*"
    )
    source = write(tmp_path / "cache", {"blobs/1": rows("a"), "blobs/2": rows("b"), "blobs/3": card})
    (tmp_path / "cache/snapshots/r").mkdir(parents=True)
    for name, blob in {"a.jsonl": 1, "b.jsonl": 2, "README.md": 3}.items():
        (tmp_path / "cache/snapshots/r" / name).symlink_to(f"../../blobs/{blob}")
    assert list(documents(source)) == ["a"]


def test_the_hubs_cache_has_names_only_as_links(tmp_path: Path) -> None:
    source = write(tmp_path / "datasets--x", {"blobs/0a1b": rows("text"), "refs/main": "0a1b"})
    (tmp_path / "datasets--x/snapshots/r").mkdir(parents=True)
    (tmp_path / "datasets--x/snapshots/r/train.jsonl").symlink_to("../../blobs/0a1b")
    assert list(documents(Source(source, max_left_out=1))) == ["text"]
    assert reasons(source)["blobs/0a1b"] == "the same file as snapshots/r/train.jsonl, which is read"


def test_pointers_copies_and_doubles_are_said(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000000\n"
    source = write(tmp_path, {"a.jsonl": rows("a"), "b.jsonl": pointer, "c.txt~": "old"})
    assert "git lfs pull" in refusal(source)
    assert list(documents(Source(source, max_left_out=1))) == ["a"]
    assert "backup" in reasons(source)["c.txt~"]
    double = write(tmp_path / "double", {"a.jsonl": rows("a"), "A.jsonl.gz": gzip.compress(rows("a"))})
    assert list(documents(double)) == ["a", "a"]
    assert [line for line in list_files(double).warnings() if "without the compression" in line]


def test_an_archive_that_is_unpacked_beside_itself_is_said(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("Books/1.txt", "one")
    for name, zipped in {"Books/1.txt": "all.zip", "d/all/Books/1.txt": "d/all.ZIP"}.items():
        source = write(tmp_path / zipped[:1], {name: "one", zipped: packed.getvalue()})
        [line] = list_files(source).warnings()
        assert f"{zipped}/Books/1.txt" in line and "outside its archive" in line
    alone = write(tmp_path / "alone", {"all.zip": packed.getvalue(), "2.txt": "two"})
    assert not list_files(alone).warnings()


def test_own_output_that_a_glob_matches_is_no_text(tmp_path: Path) -> None:
    source = write(tmp_path, {"a/x.jsonl": rows("a"), "run/config.toml": "x", "run/metrics.jsonl": rows("b")})
    assert list(documents(f"{source}/*")) == ["a"]
    assert reasons(f"{source}/*") == {f"{source}/run/": "made by lowres"}


def test_own_output_inside_a_source_is_no_text(tmp_path: Path) -> None:
    source = write(
        tmp_path, {"a.jsonl": rows("a"), "out/data.json": '{"format": 1, "arguments": {}}', "out/x.txt": "x"}
    )
    write(tmp_path, {"run/config.toml": "", "run/metrics.jsonl": "{}"})
    assert list(documents(source)) == ["a"]
    assert reasons(source) == {"out/": "made by lowres", "run/": "made by lowres"}


def test_include_and_exclude(tmp_path: Path) -> None:
    files = {f"{d}/{name}": rows(f"{d}{name}") for d in "ab" for name in ("x.jsonl", "y.JSONL")}
    source = write(tmp_path, files | {"notes.md": "notes"})
    assert list(documents(Source(source, include=("a/*.jsonl",)))) == ["ax.jsonl", "ay.JSONL"]
    assert list(documents(Source(source, exclude=("a/", "notes.md", "Y.*")))) == ["bx.jsonl"]
    # what is asked for is read whatever lies beside it
    assert list(documents(Source(source, include=("*.md", "b/x*")))) == ["bx.jsonl", "notes"]
    assert fingerprint(Source(source, include=("a/",))) != fingerprint(Source(source, include=("b/",)))


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a/b.txt", "*.txt", True), ("a/b.txt", "a/*.txt", True), ("a/b/c.txt", "a/*.txt", False),
        ("a/b/c.txt", "a/**/*.txt", True), ("a/c.txt", "a/**/*.txt", True), ("a/b/c.txt", "a/", True),
        ("A/B.TXT", "a/b.txt", True), ("b.txt", "[!a].txt", True), ("a.txt", "[!a].txt", False),
        ("b+c.txt", "b+c.txt", True), ("bbc.txt", "b+c.txt", False), ("ab.txt", "a?.txt", True),
    ],
)  # fmt: skip
def test_globs(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) == expected


# ---------------------------------------------------------------------------- columns and separators


def test_default_column_and_text_key(tmp_path: Path) -> None:
    for key in ("content", "raw_content", "Markdown"):
        source = write(tmp_path / key, {"a.jsonl": rows("x", key=key)})
        assert list(documents(source)) == ["x"]
    source = write(
        tmp_path / "own", {"a.jsonl": rows("x", key="prose"), "b.jsonl": b'{"prose": {"de": "y"}}\n'}
    )
    assert "data.text_key" in refusal(source)
    assert list(documents(Source(f"{source}/a.jsonl", text_key="prose"))) == ["x"]
    assert list(documents(Source(f"{source}/b.jsonl", text_key="prose.de"))) == ["y"]
    assert "b.jsonl:1" in refusal(Source(f"{source}/b.jsonl", text_key="prose.en"))


def test_a_table_without_the_column_is_no_silence(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.jsonl": rows("text " * 200), "meta.jsonl": b'{"id": 1, "url": "u"}\n'})
    assert list(documents(source)) == ["text " * 200]
    [line] = list_files(source).warnings()
    assert "meta.jsonl" in line and "id, url" in line


def test_separated_documents(tmp_path: Path) -> None:
    stories = ["One\n\nday", "Then <|endoftext|> inside", "Last"]
    text = "\n<|endoftext|>\n".join(stories)
    source = write(tmp_path, {"a.txt": text})
    assert list(documents(source)) == ["One\n\nday", "Then ", " inside", "Last"]
    assert list(documents(Source(source, separator=""))) == [text]
    other = write(tmp_path / "other", {"a.txt": "x\n===\ny\n===\n"})
    assert list(documents(other)) == ["x\n===\ny\n===\n"]
    assert list(documents(Source(other, separator="==="))) == ["x", "y"]


def test_a_separator_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowres.text.kinds.plain._PIECE", 3)
    source = write(tmp_path, {"a.txt": "äb\n=====\ncd=====ef"})
    assert list(documents(Source(source, separator="====="))) == ["äb", "cd", "ef"]


# ---------------------------------------------------------------------------- damage


def test_damaged_files_can_be_skipped_and_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(rows(*map(str, range(5000))))
    source = write(tmp_path, {"a.jsonl": rows("a"), "b.jsonl.gz": whole[:-2000], "c.jsonl": rows("c")})
    assert "b.jsonl.gz" in refusal(source)
    skipped: dict[str, str] = {}
    from lowres.text import numbered_documents

    found = [text for _, text in numbered_documents(Source(source, damaged="skip"), skipped=skipped)]
    assert found[0] == "a" and found[-1] == "c" and 100 < len(found) < 5002
    assert found[1:-1] == [str(i) for i in range(len(found) - 2)]
    assert list(skipped) == ["b.jsonl.gz"] and "truncated" in skipped["b.jsonl.gz"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a.jsonl": rows("a"), "secret/b.jsonl": rows("b")})
    read = os.listdir

    def refused(path: Path) -> list[str]:  # root may read everything
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(os, "listdir", refused)
    message = refusal(source)
    assert "secret" in message and "Permission denied" in message
    # what the line advises works
    assert list(documents(Source(source, exclude=("secret/",)))) == ["a"]


def test_an_unreadable_file_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a.jsonl": rows("a"), "b.jsonl": rows("b")})
    real = Path.open

    def guarded(path: Path, *args: Any) -> Any:
        if path.name == "b.jsonl":
            raise PermissionError(13, "Permission denied")
        return real(path, *args)

    monkeypatch.setattr(Path, "open", guarded)
    assert "b.jsonl: cannot be read" in refusal(source) and "data.exclude" in refusal(source)
    assert list(documents(Source(source, exclude=("b.jsonl",)))) == ["a"]


def test_an_excluded_folder_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a.jsonl": rows("a"), "secret/b.jsonl": rows("b")})
    real = os.listdir

    def guarded(path: Path) -> list[str]:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("os.listdir", guarded)
    assert "secret" in refusal(source) and "data.exclude" in refusal(source)
    assert list(documents(Source(source, exclude=("secret/",)))) == ["a"]
    assert list(documents(Source(f"{source}/*", exclude=(f"{source}/secret/",)))) == ["a"]


# ---------------------------------------------------------------------------- inspect


def test_inspect_shows_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"train.jsonl": rows("one two", "three"), "val.jsonl": rows("four"), "test.jsonl": rows("secret")}
    source = write(tmp_path, files | {"README.md": "# Card"})
    assert main(["data", "inspect", source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    counts = {(g["part"], g["documents"], g["exact"], g["column"]) for g in found["groups"]}
    assert counts == {(TRAIN, 2, True, "text"), (VALIDATION, 1, True, "text"), (TEST, 0, True, "text")}
    assert main(["data", "inspect", source]) == 0
    out = capsys.readouterr().out
    assert "one two" in out and "README.md" in out and "secret" not in out
    assert main(["data", "inspect", source, "--set", "data.text_key=nothing"]) == 2
    assert "data.text_key" in capsys.readouterr().err
    assert main(["data", "inspect", source, "--set", "optim.lr=1"]) == 2


def test_inspect_refuses_what_a_run_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, files in {"blank": {"a.txt": " \n", "val.txt": "v"}, "nothing": {}}.items():
        source = write(tmp_path / name, dict(files))
        (tmp_path / name).mkdir(exist_ok=True)
        assert main(["data", "inspect", source]) == 2
        assert capsys.readouterr().err == f"lowres: {refusal(source)}\n"
    assert "(among the files that it matches: none)" in refusal(f"{tmp_path}/*.txt")


def test_inspect_estimates_large_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowres.data.inspection.EXACT_BYTES", 1000)
    monkeypatch.setattr("lowres.data.inspection.SAMPLE_CHARS", 100_000)
    text = "words and more words " * 10
    source = write(tmp_path, {f"{i}.jsonl": rows(*[text] * 10_000) for i in range(3)})
    assert main(["data", "inspect", source, "--json"]) == 0
    [group] = json.loads(capsys.readouterr().out)["groups"]
    assert not group["exact"] and group["documents"] == pytest.approx(30_000, rel=0.1)


@pytest.fixture
def deep(tmp_path: Path) -> Callable[[int], str]:
    return lambda count: write(tmp_path, {f"{i}.jsonl": rows(str(i)) for i in range(count)})


def test_summary_is_one_line(tmp_path: Path, deep: Callable[[int], str]) -> None:
    source = deep(3)
    write(tmp_path, {"x.bad": bytes(9)})
    line = summary(list_files(source))
    assert "3 files of JSON lines, column text" in line and "left out: 1 file" in line and "\n" not in line
