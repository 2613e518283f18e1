"""Every layout of docs/data.md: the right documents, each decoded back from the shards, in the right part."""

from pathlib import Path
from typing import Any

import pytest

from lowres.data import prepare
from lowres.data.manifest import read_complete
from lowres.data.shards import Shard
from lowres.data.tokenizer import open_tokenizer, train
from lowres.text import VALIDATION, Source, documents, list_files
from tests.layouts import LAYOUTS, TEST, TEXTS, Layout

DOCS = Path(__file__).parent.parent / "docs" / "data.md"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train(TEXTS, 300, exact=False)[0])
    return str(path)


def decoded(folder: Path, part: str) -> list[str]:
    """The documents of a prepared folder."""
    tokenizer = open_tokenizer(folder)
    found = list[list[int]]()
    for entry in getattr(read_complete(folder), part):
        for token in Shard(folder / entry.file).read().tolist():
            if token == tokenizer.bos_id:
                found.append([])
            elif token != tokenizer.eos_id:
                found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.name)
def made(request: Any, tmp_path: Path) -> tuple[Layout, Source]:
    layout: Layout = request.param
    (tmp_path / "source").mkdir()
    layout.write(tmp_path / "source")
    return layout, Source(str(tmp_path / "source" / layout.source), **layout.settings)


def test_documents_are_the_texts(made: tuple[Layout, Source]) -> None:
    layout, source = made
    assert sorted(documents(source)) == sorted(layout.train)
    if layout.val:
        assert sorted(documents(source, VALIDATION)) == sorted(layout.val)
    assert not list_files(source).warnings()


def test_shards_decode_to_the_texts(made: tuple[Layout, Source], tmp_path: Path, tokenizer: str) -> None:
    layout, source = made
    found = prepare(source, tmp_path / "out", tokenizer=tokenizer, progress=False)
    train, val = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    if layout.val:
        assert sorted(train) == sorted(layout.train) and sorted(val) == sorted(layout.val)
    else:  # some are held out, as a whole, with their copies, or their ends
        ends = {(text, end) for text in layout.train for end in val if text.endswith(end) and text not in val}
        cut = {text[: -len(end)]: text for text, end in ends}
        whole = [cut.get(text, text) for text in train]
        assert set(whole) | (set(val) & set(layout.train)) == set(layout.train)
        assert set(train) <= set(layout.train) | set(cut) and not set(train) & set(val)
    assert not set(TEST) & set(train + val)
    assert found["train_documents"] == len(train) and found["val_documents"] == len(val)


def test_docs_have_a_row_for_every_layout() -> None:
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    for layout in LAYOUTS:
        assert layout.name in rows
