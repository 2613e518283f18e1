"""Small files in the exact layouts in which people have text. `docs/data.md` has a row for each."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# all that a reader might change
TEXTS = [
    'First document.\n\nWith two paragraphs, "quotes", commas; and\ttabs.',
    "Zweites Dokument: äöü, 日本語, \u2028 and \u00a0, 😀.",
    "  spaces at both ends  ",
    "2019-04-25",
    "12",
    "null",
    "a line\r\nwith a carriage return",
    '{"text": "JSON in a text"}',
    "<|endoftext|> and </s> and \u2581 in the text",
    'def f(x):\n    return [x, "\\n"]',
]
VAL = ["Only for validation: " + text for text in TEXTS[:3]]
TEST = ["Only for a test."]
CARD = "---\nlicense: odc-by\n---\n# A data set\n\nThis describes the data and is no training text.\n" * 3

Write = Callable[[Path], None]


@dataclass(frozen=True)
class Layout:
    """name: the row's first column in docs/data.md. write: makes it in an empty folder. train, val: its
    documents in order. source: what to give, below the folder. settings: keys of [data]."""

    name: str
    write: Write
    train: list[str] = field(default_factory=lambda: TEXTS)
    val: list[str] = field(default_factory=list)
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


LAYOUTS: list[Layout] = []


def layout(name: str, **more: Any) -> Callable[[Write], Write]:
    def add(write: Write) -> Write:
        LAYOUTS.append(Layout(name, write, **more))
        return write

    return add


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def lines(texts: Iterable[str], key: str = "text", **more: Any) -> bytes:
    rows = (json.dumps({**more, key: text}, ensure_ascii=False) for text in texts)
    return "".join(row + "\n" for row in rows).encode()


def zst(data: bytes) -> bytes:
    pack = pytest.importorskip("zstandard").ZstdCompressor()
    half = len(data) // 2  # two frames
    return bytes(pack.compress(data[:half]) + pack.compress(data[half:]))


def parquet(path: Path, columns: dict[str, list[Any]], **more: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **more)


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


A, B = TEXTS[:5], TEXTS[5:]
FILES = {f"{i:02}": text.encode() for i, text in enumerate(TEXTS)}


@layout("text files")
def text_files(root: Path) -> None:
    for name, data in FILES.items():
        put(root / f"{name}.txt", data)
    put(root / "README.md", CARD)


@layout("books without a suffix, in folders")
def no_suffix(root: Path) -> None:
    for name, data in FILES.items():
        put(root / name[0] / name / f"pg{name}", data)


@layout(
    "TinyStories", val=["A held-out story.", "Another."], train=["One day.\n\nThe end.", "Then.", "Last."]
)
def tiny_stories(root: Path) -> None:
    put(
        root / "TinyStories-train.txt",
        "One day.\n\nThe end.\n<|endoftext|>\nThen.\n<|endoftext|>\nLast.\n<|endoftext|>\n",
    )
    put(root / "TinyStories-valid.txt", "A held-out story.\n<|endoftext|>\nAnother.\n<|endoftext|>\n")
    put(root / "README.md", CARD)


@layout(
    "text with a separator of its own",
    train=["one", "two\n--\nstill", "three"],
    settings={"separator": "====="},
)
def separated(root: Path) -> None:
    put(root / "a.txt", "one\n=====\ntwo\n--\nstill\n=====\nthree")


@layout("JSON lines, compressed in any way", train=TEXTS * 5)
def json_lines(root: Path) -> None:
    put(root / "a.jsonl", lines(TEXTS))
    put(root / "b.JSONL.GZ", gzip.compress(lines(TEXTS)))
    put(root / "c.ndjson.xz", lzma.compress(lines(TEXTS)))
    put(root / "d.jsonl.zst", zst(lines(TEXTS)))
    put(root / "e.jsonl.bz2", bz2.compress(lines(TEXTS)))


@layout("C4", val=VAL)
def c4(root: Path) -> None:
    extra = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
    put(root / "en/c4-train.00000-of-01024.json.gz", gzip.compress(lines(A, **extra)))
    put(root / "en/c4-train.00001-of-01024.json.gz", gzip.compress(lines(B, **extra)))
    put(root / "en/c4-validation.00000-of-00008.json.gz", gzip.compress(lines(VAL, **extra)))
    put(root / "README.md", CARD)


@layout("mC4", val=VAL)
def mc4(root: Path) -> None:
    names = {"": A, "1": B, "-validation": VAL}
    for i, (name, texts) in enumerate(names.items()):
        word = name if name.startswith("-") else ""
        put(root / f"c4-en{word}.tfrecord-0000{i}-of-00002.json.gz", gzip.compress(lines(texts, url="u")))


@layout("One Billion Word", train=["a b .\nc d .\n", "e .\n"], val=["f g .\n"])
def one_billion_word(root: Path) -> None:
    name = "monolingual.tokenized.shuffled"
    put(root / f"training-{name}/news.en-00001-of-00100", "a b .\nc d .\n")
    put(root / f"training-{name}/news.en-00002-of-00100", "e .\n")
    put(root / f"heldout-{name}/news.en.heldout-00000-of-00050", "f g .\n")
    put(root / "README", "About the corpus")


@layout("JSON lines without a suffix: WikiExtractor, Spark")
def wiki_extractor(root: Path) -> None:
    put(root / "AA/wiki_00", lines(A, id="1", title="t"))
    put(root / "AB/part-00000.bz2", bz2.compress(lines(B, id="1", title="t")))
    put(root / "_SUCCESS", "")


@layout("the Pile", val=VAL)
def pile(root: Path) -> None:
    meta: dict[str, Any] = {"meta": {"pile_set_name": "Pile-CC"}}
    for name, texts in {"train/00": A, "train/01": B, "val": VAL, "test": TEST}.items():
        put(root / f"{name}.jsonl.zst", zst(lines(texts, **meta)))


@layout("SlimPajama", val=VAL)
def slim_pajama(root: Path) -> None:
    for name, texts in {"train/chunk1/example_train_0": A, "train/chunk2/example_train_1": B}.items():
        put(root / f"{name}.jsonl.zst", zst(lines(texts)))
    put(root / "validation/chunk1/example_holdout_0.jsonl.zst", zst(lines(VAL)))
    put(root / "test/chunk1/example_holdout_0.jsonl.zst", zst(lines(TEST)))


@layout("Dolma")
def dolma(root: Path) -> None:
    extra: dict[str, Any] = {"id": "d1", "source": "common-crawl", "metadata": {"length": 1}}
    put(root / "documents/cc_en_head-0000.json.gz", gzip.compress(lines(A, **extra)))
    put(root / "documents/cc_en_head-0001.json.gz", gzip.compress(lines(B, **extra)))


@layout("RedPajama v2")
def red_pajama(root: Path) -> None:
    extra = {"url": "https://example.org", "date_download": "2023-06-01T00:00:00Z"}
    put(root / "documents/2023-06/0000/en_head.json.gz", gzip.compress(lines(A, "raw_content", **extra)))
    put(root / "documents/2023-06/0001/en_head.json.gz", gzip.compress(lines(B, "raw_content", **extra)))


@layout("FineWeb")
def fineweb(root: Path) -> None:
    for i, texts in enumerate((A, B)):
        columns: dict[str, list[Any]] = {"text": texts, "id": ["<urn:uuid>"] * 5, "token_count": [7] * 5}
        parquet(root / f"sample/10BT/00{i}_00000.parquet", columns, compression="zstd", row_group_size=2)
    put(root / "README.md", CARD)


@layout("a data set of the hub", val=VAL)
def hub(root: Path) -> None:
    for name, texts in {"train": TEXTS, "validation": VAL, "test": TEST}.items():
        parquet(root / f"data/{name}-00000-of-00001.parquet", {"title": [""] * len(texts), "text": texts})
    files = "".join(
        f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "validation", "test")
    )
    put(
        root / "README.md",
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# A data set\n",
    )
    put(root / ".gitattributes", "*.parquet filter=lfs")


@layout("the Stack")
def stack(root: Path) -> None:
    columns = {"hexsha": ["ab"] * 10, "ext": ["py"] * 10, "content": TEXTS}
    parquet(root / "data/python/train-00000-of-00206.parquet", columns)


@layout("a column of another name", settings={"text_key": "body.main"})
def other_column(root: Path) -> None:
    rows = [json.dumps({"id": "1", "body": {"main": text, "aside": "x"}}) for text in TEXTS]
    put(root / "a.jsonl", "\n".join(rows))


@layout("CSV and TSV", train=TEXTS * 2)
def tables(root: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        text = io.StringIO()
        table = csv.writer(text, delimiter=delimiter)
        table.writerow(["id", "text"])
        table.writerows(enumerate(TEXTS))
        put(root / name, text.getvalue())


@layout("a JSON array")
def array(root: Path) -> None:
    put(root / "a.json", json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=2))


@layout("a JSON file per document")
def objects(root: Path) -> None:
    for i, text in enumerate(TEXTS):
        put(root / f"{i:02}.json", json.dumps({"id": i, "text": text}, indent=2))


@layout("`save_to_disk`", val=VAL)
def saved(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": TEXTS, "validation": VAL, "test": TEST}
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(made).save_to_disk(
        root / "saved", num_shards={"train": 2, "validation": 1, "test": 1}
    )


@layout("a tar of text files")
def tar_of_text(root: Path) -> None:
    tar(root / "books.tar.gz", {f"books/{name}.txt": data for name, data in FILES.items()}, "w:gz")


@layout("WebDataset")
def web_dataset(root: Path) -> None:
    for i, texts in enumerate((A, B)):
        members = {}
        for j, text in enumerate(texts):
            members[f"{j:06}.txt"] = text.encode()
        tar(root / f"shard-{i:06}.tar", members)


@layout("a zip of text files")
def zip_of_text(root: Path) -> None:
    with zipfile.ZipFile(root / "books.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"{name}.txt", data)


@layout("Common Crawl's WET")
def wet(root: Path) -> None:
    records = []
    for i, text in enumerate(["", *TEXTS]):
        kind, body = "conversion" if i else "warcinfo", text.encode()
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: https://example.org/{i}\r\n"
        head += f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
        records.append(gzip.compress(head.encode() + body + b"\r\n\r\n"))
    put(root / "CC-MAIN-20240101000000-00000.warc.wet.gz", b"".join(records))


@layout("source code", train=["int a;", "pass", "fn main() {}", "all:", "# A program"])
def code(root: Path) -> None:
    files = {
        "a.c": "int a;",
        "b.py": "pass",
        "src/main.rs": "fn main() {}",
        "zz/Makefile": "all:",
        "zz/README.md": "# A program",
    }
    for name, text in files.items():
        put(root / name, text)
    put(root / "logo.png", b"\x89PNG\0")
    put(root / "package.json", '{\n  "name": "x"\n}\n')
    put(root / ".git/config", "[core]")


@layout("kinds and cases mixed, with links", train=[*TEXTS, *TEXTS])
def mixed(root: Path) -> None:
    put(root / "a.jsonl", lines(A))
    put(root / "B.JSON.GZ", gzip.compress(lines(B)))
    put(root.parent / "elsewhere" / "c.jsonl", lines(TEXTS))
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "twice").symlink_to(root.parent / "elsewhere")
