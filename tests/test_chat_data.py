"""Chats and pairs as data: nothing is lost without a line, and what is trained is what should be."""

import io
import itertools
import json
import random
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowres import checkpoint, metrics
from lowres.config_file import parse_config, to_toml, with_places
from lowres.data import ChatData, open_data
from lowres.data.batches import BEGINS, IGNORED, ONLY_READ
from lowres.data.chat.chat_data import padding_of
from lowres.data.chat.packing import pack
from lowres.data.chat.records import BadRow, parse
from lowres.data.chat.template import BUILT_IN
from lowres.data.tokenizer import Tokenizer, open_tokenizer, train
from lowres.engine import Choice, make_engine
from lowres.errors import UserError
from lowres.runs import starts_of
from lowres.text import Source, documents, with_form
from lowres.text.source import CHATS, PAIRS
from tests.fake_hub import FakeHub
from tests.helpers import ROOMS, lowres_here, make_config, make_units

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
Row = dict[str, Any]
prepare_module = sys.modules["lowres.data.prepare"]


def said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def some_words(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def chats(count: int, seed: int = 0) -> list[Row]:
    rng, made = random.Random(seed), []
    for i in range(count):
        messages = [said("system", "Be brief.")] if i % 3 == 0 else []
        for _ in range(rng.choice([1, 1, 2, 3])):
            messages += [said("user", some_words(rng)), said("assistant", f"{i} {some_words(rng)}")]
        made.append({"id": i, "messages": messages, "source": "x"})
    return made


def pairs(count: int, seed: int = 1) -> list[Row]:
    rng = random.Random(seed)
    return [
        {"prompt": f"{i} {some_words(rng)}", "chosen": f"good {some_words(rng)}", "rejected": some_words(rng)}
        for i in range(count)
    ]


def json_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(json_lines(rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(5)
    text = "".join(f"user system assistant Be brief. good {i} {some_words(rng)}\n" for i in range(2000))
    (folder / "tokenizer.model").write_bytes(train([text], 300, exact=False)[0])
    return open_tokenizer(folder / "tokenizer.model")


Open = Callable[..., ChatData]


@pytest.fixture
def opened(tokenizer: Tokenizer, tmp_path: Path) -> Open:
    """Opens data: source, then keys of [data], of objective as objective__key, or seed."""

    def made(source: str, **keys: Any) -> ChatData:
        seed, given = keys.pop("seed", 0), {"name": "sft"}
        given |= {key.removeprefix("objective__"): keys.pop(key) for key in list(keys) if "__" in key}
        own: Row = {"source": source, "tokenizer": str(tokenizer.path), "cache": str(tmp_path / "cache")}
        own |= {"chat_template": "tulu", "seq_len": 256}
        config = parse_config({"data": own | keys, "objective": given})[0]
        data = open_data(config.data, None, seed, False, config.objective)
        assert isinstance(data, ChatData)
        return data

    return made


def examples_in(windows: Tensor) -> list[tuple[list[int], list[bool]]]:
    """(ids, which are targets) of the examples, in the order in which they stand in windows."""
    found: list[tuple[list[int], list[bool]]] = []
    for row in windows.tolist():
        assert row[-1] == IGNORED
        for word in row:
            if word == IGNORED:
                continue
            if word & BEGINS:
                found.append(([], []))
            found[-1][0].append(word & (1 << 40) - 1)
            found[-1][1].append(word < ONLY_READ)
    return found


def trained_text(data: ChatData, example: tuple[list[int], list[bool]]) -> str:
    return data.tokenizer.decode(i for i, target in zip(*example, strict=True) if target)


def complaint(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- rows


def written(path: Path, rows: list[Row], kind: str) -> Path:
    """The rows as a file of a kind; "" has no suffix."""
    path = path / f"rows{kind}"
    if kind in (".parquet", ".arrow"):
        table = pa.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    elif kind == ".csv":
        table = pa.Table.from_pylist(rows)
        pa.csv.write_csv(table, path)
    elif kind == ".tar":
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("a/rows.jsonl")
            member.size = len(json_lines(rows))
            tar.addfile(member, io.BytesIO(json_lines(rows)))
    else:
        path.write_bytes(json.dumps(rows, indent=1).encode() if kind == ".json" else json_lines(rows))
    return path


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *itertools.product(
            [".jsonl", ".json", ".parquet", ".arrow", ".tar", ""],
            ["messages", "conversation", "prompt", "pairs"],
        ),
        *((".csv", form) for form in ("prompt", "pairs")),
    ],
)
def test_rows_of_every_kind_of_file(tmp_path: Path, kind: str, form: str) -> None:
    rows: list[Row] = [{"id": 1} | row for row in (pairs(5) if form == "pairs" else chats(5))]
    if form == "prompt":
        rows = [{"prompt": some_words(random.Random(i)), "completion": "é\u2028", "n": i} for i in range(5)]
    if form == "conversation":
        rows = [{"conversation": row["messages"], "text": "t"} for row in rows]
    path = written(tmp_path, rows, kind)
    source = Source(str(path), form=PAIRS if form == "pairs" else CHATS)
    keys = {"messages": ["messages"], "conversation": ["conversation"], "prompt": ["prompt", "completion"]}
    wanted = [
        {"messages" if key == "conversation" else key: row[key] for key in keys.get(form, [*row][1:])}
        for row in rows
    ]
    assert [json.loads(document) for document in documents(source)] == wanted
    # without being told, only what is no text is taken for chats
    assert with_form(Source(str(path))).form == ("text" if form == "conversation" else source.form)


def test_what_is_no_table_of_chats(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", chats(3))
    (tmp_path / "README.md").write_text("# Card\n")
    (tmp_path / "notes.txt").write_text("a text of some length " * 99)
    message = complaint(lambda: list(documents(Source(str(tmp_path), form=CHATS))))
    assert "notes.txt" in message and "holds no chats" in message and "README" not in message
    (tmp_path / "notes.txt").unlink()
    assert len(list(documents(Source(str(tmp_path), form=CHATS)))) == 3
    message = complaint(lambda: list(documents(str(tmp_path / "train.jsonl"))))
    assert 'chats ("messages")' in message and 'objective.name = "sft"' in message
    message = complaint(lambda: list(documents(Source(str(tmp_path / "train.jsonl"), form=PAIRS))))
    assert 'objective.name = "sft"' in message
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n')
    assert '"content" comes twice' in complaint(lambda: list(documents(Source(str(twice), form=CHATS))))
    twice.write_text(json_lines(chats(1)).decode() + "5\n")
    message = complaint(lambda: list(documents(Source(str(twice), form=CHATS))))
    assert '"messages"' in message and '"text"' not in message
    message = complaint(lambda: list(documents(Source("stdlib", form=CHATS))))
    assert message.startswith("stdlib: ") and "no chats" in message and "data.source" in message


USER, ANSWER, OTHER = said("user", "q"), said("assistant", "a"), said("assistant", "b")
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        (CHATS, {"messages": [USER, ANSWER | {"name": "x", "y": None}]}, [[USER, ANSWER | {"name": "x"}]]),
        (CHATS, {"messages": SHAREGPT}, [[USER, ANSWER]]),
        (CHATS, {"prompt": "q", "completion": "a"}, [[USER, ANSWER]]),
        (CHATS, {"prompt": [USER], "completion": [ANSWER]}, [[USER, ANSWER]]),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "b"}, [[USER, ANSWER], [USER, OTHER]]),
        (
            PAIRS,
            {"prompt": "beside", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            [[USER, ANSWER], [USER, OTHER]],
        ),
        (
            PAIRS,
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [said("assistant", "")]},
            [[USER, ANSWER], [USER, said("assistant", "")]],
        ),
        (CHATS, {}, "no messages"),
        (CHATS, {"messages": []}, "messages is empty"),
        (CHATS, {"messages": "q"}, "messages is text, no list"),
        (CHATS, {"messages": [USER]}, "no assistant turn"),
        (CHATS, {"messages": [USER, said("poet", "a")]}, 'message 2 .* the unknown role "poet"'),
        (CHATS, {"messages": [USER, said("po\net", "a")]}, r'the unknown role "po\\net"'),
        (CHATS, {"messages": [USER, ANSWER | {"content": None}]}, "message 2 .* content is nothing"),
        (CHATS, {"messages": [USER, {"role": "assistant", "content": ["a"]}]}, "content is a list"),
        (CHATS, {"messages": [USER, {"content": "a"}]}, 'message 2 .* no "role"'),
        (CHATS, {"messages": [USER, "a"]}, "message 2 .* is text, no object"),
        (CHATS, {"prompt": "q", "completion": None}, "no completion"),
        (CHATS, {"completion": "a"}, "completion answers nothing: no prompt"),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen is equal to rejected"),
        (PAIRS, {"prompt": "q", "chosen": "a"}, "no rejected"),
        (PAIRS, {"chosen": "a", "rejected": "b"}, "chosen answers nothing: no prompt"),
        (PAIRS, {"chosen": [USER, ANSWER, USER], "rejected": [USER, ANSWER]}, "chosen does not end"),
    ],
)  # fmt: skip
def test_messages_of_a_row(form: str, row: Row, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(BadRow, match=expected):
            parse(json.dumps(row), form)
    else:
        assert parse(json.dumps(row), form) == expected


# ---------------------------------------------------------------------------- packing


def naive(lengths: list[int], size: int) -> list[list[int]]:
    windows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        left = [size - sum(lengths[j] for j in window) for window in windows]
        fits = [room for room in left if room >= lengths[i]]
        if fits:
            windows[left.index(min(fits))].append(i)
        else:
            windows.append([i])
    return windows


@given(st.integers(1, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_packing_is_best_fit_decreasing(size: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, size), max_size=60))
    windows = pack(lengths, size)
    assert sorted(itertools.chain(*windows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in window) <= size for window in windows)
    assert windows == naive(lengths, size)


# ---------------------------------------------------------------------------- batches


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowres.data.opening.SHARD_TOKENS", 700)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("form", ["sft", "dpo"])
def test_every_example_comes_once_an_epoch(opened: Open, tmp_path: Path, form: str) -> None:
    source = write(tmp_path / "rows.jsonl", chats(60) if form == "sft" else pairs(60))
    data = opened(source, objective__name=form, seed=3)
    assert len(list(data.folder.glob("train_*.bin"))) > 3, "examples must go on in the next shard"
    count, each = data.epoch_examples, 2 if form == "dpo" else 1
    every = data.of_training(range(count))
    stored = dict(zip(every.examples.tolist(), examples_in(every.windows), strict=True))
    assert sorted(stored) == list(range(each * count))
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(-(-count // 7)):
            sequences = min(7, count - 7 * step)
            packed = data.packed(0, sequences, offset=epoch * count + 7 * step)
            assert packed.windows.shape[1] == data.seq_len + 1
            assert torch.equal(data.order(0, sequences, epoch * count + 7 * step), packed.order)
            assert sorted(packed.order.tolist()) == list(range(each * sequences))
            documents = data.documents(0, sequences, epoch * count + 7 * step)
            for place, number, example in zip(
                packed.order.tolist(), packed.examples.tolist(), examples_in(packed.windows), strict=True
            ):
                assert number == each * documents[place // each] + place % each
                assert example == stored[number]
            seen += documents
        assert sorted(seen) == list(range(count))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    # what a step has depends on its place only, also across the epochs, and on the seed
    whole = data.documents(0, 2 * count)
    assert whole == epochs[0] + epochs[1]
    assert [data.documents(step, 11, 5) for step in range(3)] == [
        whole[5 + 11 * s : 16 + 11 * s] for s in range(3)
    ]
    assert opened(source, objective__name=form, seed=4).documents(0, count) != epochs[0]
    windows, padding = data.padding(7)
    steps = [data.batch(step, 7) for step in range(-(-count // 7))]
    assert windows == pytest.approx(sum(map(len, steps)) / len(steps))
    assert padding == pytest.approx(padding_of(torch.cat(steps)))


def test_what_is_trained_of_chats_and_pairs(opened: Open, tmp_path: Path) -> None:
    rows = chats(20)
    data = opened(write(tmp_path / "chats.jsonl", rows), seq_len=512)
    validation = data.of_validation(range(data.validation_examples))
    for packed in (data.of_training(range(data.epoch_examples)), validation):
        for example in examples_in(packed.windows):
            text = trained_text(data, example)
            number = int(text.split()[0])
            answers = [m["content"] for m in rows[number]["messages"] if m["role"] == "assistant"]
            assert text == "".join(answers)
            ends = [i for i, target in zip(*example, strict=True) if target and i == data.tokenizer.eos_id]
            assert len(ends) == len(answers)
    every = opened(str(tmp_path / "chats.jsonl"), seq_len=512, objective__train_on="all")
    assert all(
        trained == [False] + [True] * (len(ids) - 1)
        for ids, trained in examples_in(every.of_training(range(every.epoch_examples)).windows)
    )
    # the answers that both chats of a pair begin with are not compared
    turn = [said("user", "alpha"), said("assistant", "before"), said("user", "beta")]
    several = [
        {
            "chosen": [*turn, said("assistant", f"{i} good")],
            "rejected": [*turn, said("assistant", f"{i} bad")],
        }
        for i in range(20)
    ]
    data = opened(write(tmp_path / "pairs.jsonl", several), objective__name="dpo", seq_len=512)
    packed = data.packed(0, 8)
    texts = {
        place: trained_text(data, example)
        for place, example in zip(packed.order.tolist(), examples_in(packed.windows), strict=True)
    }
    for i in range(8):
        which = texts[2 * i].split()[0]
        assert which.isdigit() and (texts[2 * i], texts[2 * i + 1]) == (f"{which} good", f"{which} bad")


def test_packed_examples_give_the_loss_of_each_alone(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(BUILT_IN["tulu"].replace("{{- bos_token }}", ""))
    data = opened(write(tmp_path / "chats.jsonl", chats(30)), chat_template=str(tmp_path / "t.jinja"))
    config = make_config(objective={"name": "sft"}, memory={"weights": "fp32"})
    starts = starts_of(config, data.tokenizer)
    engine = make_engine(config, make_units(config.model), None, ROOMS, Choice(2), starts)
    packed = data.packed(0, 9)
    assert len(packed.windows) < 9, "there must be something to pack"
    nats, count = engine.evaluate(packed.windows)
    alone = [engine.evaluate(data.of_training([int(n)]).windows) for n in packed.examples]
    assert count == sum(n for _, n in alone)
    assert nats == pytest.approx(sum(one for one, _ in alone), rel=1e-6)


# ---------------------------------------------------------------------------- preparing


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_bad_row_is_named_or_counted(opened: Open, tmp_path: Path, part: str) -> None:
    write(tmp_path / "d/train-0.jsonl", chats(9))
    write(tmp_path / "d/train-1.jsonl", chats(9, seed=7))
    write(tmp_path / "d/validation.jsonl", chats(4, seed=8))
    bad = tmp_path / "d" / ("train-1.jsonl" if part == "train" else "validation.jsonl")
    rows = bad.read_bytes().splitlines(keepends=True)
    rows[1:1] = [b'{"messages": []}\n', b"\n", b'{"messages": [{"role": "poet", "content": "a"}]}\n']
    bad.write_bytes(b"".join(rows))
    source = str(tmp_path / "d")
    message = complaint(lambda: opened(source))
    assert message.startswith(f"{bad} row 2: messages is empty") and 'data.bad_rows = "skip"' in message
    assert not list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else True
    data = opened(source, bad_rows="skip")
    assert (data.epoch_examples, data.validation_examples) == (18, 4)
    what = "2 bad rows; the first is " + f"{bad} row 2: messages is empty"
    assert any(what in note or "without 2 bad rows" in note for note in data.notes)
    # what a template refuses is found when it is rendered
    (tmp_path / "t.jinja").write_text(
        BUILT_IN["tulu"] + "{% if messages[0].content == 'stop' %}{{ raise_exception('no stop') }}{% endif %}"
    )
    bad.write_bytes(json_lines([{"messages": [said("user", "stop"), ANSWER]}, *chats(9, seed=9)]))
    keys = {"chat_template": str(tmp_path / "t.jinja")}
    message = complaint(lambda: opened(source, **keys))
    assert message.startswith(f"{bad} row 1: ") and "no stop" in message
    notes = opened(source, **keys, bad_rows="skip").notes
    assert any("1 bad row;" in note and "no stop" in note for note in notes)


def test_what_is_cut_and_dropped_is_counted(opened: Open, tmp_path: Path) -> None:
    rows = [
        {"messages": [said("user", "beta " * i + "."), said("assistant", f"{i} " + "gamma " * 20)]}
        for i in range(60)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    long, data = opened(path, seq_len=1024), opened(path, seq_len=64)
    whole = examples_in(long.of_training(range(long.epoch_examples)).windows)
    assert long.epoch_examples + long.validation_examples == 60 and not any(
        "cut" in note for note in long.notes
    )
    kept = [(ids, trained) for ids, trained in whole if any(trained[:64])]
    found = examples_in(data.of_training(range(data.epoch_examples)).windows)
    assert Counter(map(str, found)) == Counter(str((ids[:64], trained[:64])) for ids, trained in kept)
    cut = [len(ids) - 64 for ids, _ in kept if len(ids) > 64]
    assert 0 < len(kept) < len(whole)
    notes = "\n".join(data.notes)
    assert f"{len(whole) - len(kept):,} chats without a token to train on in their first 64 tokens" in notes
    assert f"data.seq_len = 64: {len(cut)} chats of the training data, by {sum(cut):,} tokens" in notes
    other = opened(write(tmp_path / "other.jsonl", chats(9)), val_source=path, seq_len=64)
    assert any("chats without a token" in note and "of the validation data" in note for note in other.notes)
    assert any(f"validation: {other.validation_answers} tokens of answers" in note for note in other.notes)
    assert 0 < other.validation_answers < other.validation(0).numel() / 2
    # nothing is left: why, and what helps
    asks = write(tmp_path / "long.jsonl", [{"messages": [said("user", "beta " * 99), ANSWER]}])
    of_both = {"data.source": lambda: opened(path, seq_len=8)}
    of_both["data.val_source"] = lambda: opened(str(tmp_path / "other.jsonl"), val_source=asks, seq_len=64)
    for key, opens in of_both.items():
        message = complaint(opens)
        assert message.startswith(key) and "without a token to train on" in message
        assert "data.seq_len" in message
    targets = sum(sum(trained) for _, trained in found)
    assert f"{len(found)} chats of {sum(len(ids) for ids, _ in found):,} tokens, {targets:,} of them" in notes


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_preparation_ends_the_same(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*chats(60), {"messages": []}, *pairs(1), {"messages": [said("user", "z " * 99), ANSWER]}]
    random.Random(2).shuffle(rows)
    path = write(tmp_path / "rows.jsonl", [*rows, {"messages": []}])  # the last one is bad in any case
    keys = {"bad_rows": "skip", "drop_duplicates": True}
    straight = opened(path, **keys, cache=str(tmp_path / "straight"))
    files = {file.name: file.read_bytes() for file in straight.folder.iterdir()}
    for name, number in (("store_shard", 0), ("store_shard", 5), ("write", 1), ("write", 4), ("finish", 0)):
        original, left = getattr(prepare_module, name), [number]

        def interrupted(*given: Any, original: Any = original, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*given)

        cache = str(tmp_path / f"{name}-{number}")
        monkeypatch.setattr(prepare_module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(path, **keys, cache=cache)
        monkeypatch.setattr(prepare_module, name, original)
        again = opened(path, **keys, cache=cache)
        assert {file.name: file.read_bytes() for file in again.folder.iterdir()} == files


def test_what_determines_the_words_is_in_the_name_of_the_folder(opened: Open, tmp_path: Path) -> None:
    path, template = write(tmp_path / "rows.jsonl", chats(12)), tmp_path / "t.jinja"
    template.write_text(BUILT_IN["tulu"].replace("<|", "<"))
    changes: list[dict[str, Any]] = [
        {"chat_template": str(template)},
        {"seq_len": 128},
        {"objective__train_on": "all"},
        {"bad_rows": "skip"},
    ]
    made = [opened(path, **keys) for keys in ({}, {}, *changes)]
    assert made[0].folder == made[1].folder and made[0].fingerprint == made[1].fingerprint
    assert len({data.folder for data in made}) == len(changes) + 1
    assert len({data.fingerprint for data in made}) == len(changes) + 1
    assert len({data.validation_fingerprint for data in made}) == len(changes) + 1


def test_validation_chats_are_whole_and_not_trained(opened: Open, tmp_path: Path) -> None:
    def ids_of(data: ChatData, validation: bool) -> set[str]:
        packed = data.of_validation if validation else data.of_training
        count = data.validation_examples if validation else data.epoch_examples
        return {str(ids) for ids, _ in examples_in(packed(range(count)).windows)}

    # copies of what is held out are not trained on either
    path = write(tmp_path / "rows.jsonl", chats(40) + chats(40))
    data = opened(path, seq_len=512)
    held_out, trained = ids_of(data, True), ids_of(data, False)
    assert 1 <= len(held_out) == data.validation_examples and not held_out & trained
    assert len(held_out | trained) == 40
    # two long chats are enough to hold one out, one is not
    assert opened(write(tmp_path / "two.jsonl", chats(2))).validation_examples == 1
    assert "no chats are left to validate on" in complaint(
        lambda: opened(write(tmp_path / "one.jsonl", chats(1)))
    )
    # a validation split of its own; other chats; as many whole ones as eval_tokens allows
    write(tmp_path / "d/train.jsonl", chats(10))
    write(tmp_path / "d/validation.jsonl", chats(5, seed=9))
    own = opened(str(tmp_path / "d"), seq_len=512)
    assert (own.epoch_examples, own.validation_examples) == (10, 5)
    other = opened(
        str(tmp_path / "d/train.jsonl"), val_source=str(tmp_path / "d/validation.jsonl"), seq_len=512
    )
    assert torch.equal(other.validation(0), own.validation(0))
    lengths = [len(ids) for ids, _ in examples_in(own.of_validation(range(5)).windows)]
    first = examples_in(own.of_validation([0]).windows)[0]
    assert examples_in(own.validation(1)) == [first]
    most = sum(len(examples_in(own.of_validation([i]).windows)[0][0]) for i in range(3))
    assert len(examples_in(own.validation(most))) == 3 and len(examples_in(own.validation(most - 1))) == 2
    assert len(examples_in(own.validation(0))) == len(lengths)
    same = write(tmp_path / "same.jsonl", chats(3))
    assert "max_overlap" in complaint(lambda: opened(path, val_source=same))


def test_chats_of_the_hub_are_prepared_to_their_end(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    try:
        hub.use(monkeypatch, tmp_path)
        rows = chats(90)
        hub.put("x/chats", {f"train-{i}.jsonl": json_lines(rows[45 * i : 45 * i + 45]) for i in range(2)})
        monkeypatch.setattr("lowres.data.survey.LOOKAHEAD_CHARS", 2000)
        data = opened("hf:x/chats", seq_len=512)
        assert data.epoch_examples + data.validation_examples == 90 and data.validation_examples >= 1
        assert "row 3" in complaint(lambda: _bad(hub, opened))
    finally:
        hub.close()


def _bad(hub: FakeHub, opened: Open) -> None:
    hub.put("x/bad", {"train.jsonl": json_lines([*chats(2), {"messages": []}])})
    opened("hf:x/bad")


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tokenizer": None}, ["data.tokenizer", 'objective.name = "sft"', "--init-from"]),
        ({"objective__name": "dpo"}, ["chats", 'objective.name = "sft"', "no pairs"]),
        ({"objective__name": "dpo", "text_key": "x"}, ["data.text_key"]),
        ({"document_mask": False}, ["data.document_mask", "leave it out"]),
        ({"text_key": "chat"}, ['no column "chat"', "data.text_key"]),
        ({"chat_template": None}, ["data.chat_template", "tulu"]),
        ({"val_source": "prepared"}, ["data.val_source", "holds the tokens of text"]),
    ],
)
def test_refusals(
    opened: Open, tmp_path: Path, tokenizer: Tokenizer, keys: dict[str, Any], expected: list[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", chats(8))
    if keys.get("val_source"):
        (tmp_path / "text.txt").write_text("some text\n" * 2000)
        prepared = tmp_path / "prepared"
        lowres_here("data", "prepare", tmp_path / "text.txt", prepared, "--tokenizer", tokenizer.path)
        keys = {"val_source": str(prepared)}
        assert "holds the tokens of text" in complaint(lambda: opened(str(prepared)))
        pretraining = {"source": str(opened(path).folder)}
        config = parse_config({"data": pretraining})[0]
        assert "holds prepared chats" in complaint(lambda: open_data(config.data, None, 0, False))
    message = complaint(lambda: opened(path, **keys))
    assert all(part in message for part in expected), message


def test_a_mixture_of_chats_is_refused(tmp_path: Path) -> None:
    mixture = {"data": {"mixture": [{"source": "a", "weight": 1}]}, "objective": {"name": "sft"}}
    assert "data.mixture" in complaint(lambda: parse_config(mixture))


def test_names_of_templates_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in BUILT_IN:
        (tmp_path / name).mkdir()
        config = parse_config({"data": {"chat_template": name}})[0]
        assert with_places(config, None).data.chat_template == name


# ---------------------------------------------------------------------------- commands


def test_inspect_knows_chats_and_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = chats(12)
    path = write(tmp_path / "chats.jsonl", [*rows, {"messages": []}])
    found = json.loads(lowres_here("data", "inspect", path, "--json").stdout)
    [group] = found["groups"]
    assert (found["form"], group["documents"], group["bad"]) == ("chats", 12, 1)
    assert group["messages"] == sum(len(row["messages"]) for row in rows)
    contents = ["\n".join(m["content"] for m in row["messages"]) for row in rows]
    assert group["characters"] == sum(map(len, contents))
    shown = lowres_here("data", "inspect", path, "--set", f"data.tokenizer={tokenizer.path}").stdout
    assert f"user: {rows[0]['messages'][1]['content']} | assistant: 0 " in shown
    assert 'objective.name = "sft"' in shown and "chats in messages" in shown and "messages is empty" in shown
    path = write(tmp_path / "texts.jsonl", [{"messages": "a text"}] * 3)
    error = lowres_here("data", "inspect", path, "--set", "objective.name=sft", code=2).stderr
    assert "contains no chats" in error and "messages is text" in error
    path = write(tmp_path / "pairs.jsonl", pairs(5))
    shown = lowres_here("data", "inspect", path).stdout
    assert 'objective.name = "dpo"' in shown and " | chosen: good " in shown and " | rejected: " in shown
    error = lowres_here("data", "inspect", path, "--set", "objective.name=sft", code=2).stderr
    assert 'objective.name = "dpo"' in error


def test_overlap_counts_shared_ngrams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lowres.data.overlap"], "_PIECE", 40)  # a text in many pieces
    rng, n = random.Random(3), 4
    train = [" ".join(rng.choices(WORDS, k=30)) for _ in range(40)]
    evaluation = [" ".join(rng.choices([*WORDS, "nowhere"], k=rng.randint(1, 12))) for _ in range(60)]
    (tmp_path / "train.jsonl").write_bytes(json_lines([{"text": f"{t.upper()}! 漢字"} for t in train]))
    rows = [{"prompt": text.replace(" ", ", "), "completion": "漢字"} for text in evaluation]
    path = write(tmp_path / "eval.jsonl", rows)

    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    known = set().union(*(grams([*text.split(), "漢", "字"]) for text in train))
    documents = [[*text.split(), "漢", "字"] for text in evaluation]
    shared = [words for words in documents if grams(words) & known]
    mostly = 0
    for words in documents:
        covered = {
            j for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in known for j in range(i, i + n)
        }
        mostly += len(covered) > len(words) / 2
    command = ("data", "overlap", tmp_path / "train.jsonl", path, "--ngram", n)
    found = json.loads(lowres_here(*command, "--json").stdout)
    assert (found["train_documents"], found["documents"]) == (40, 60)
    assert 0 < found["shared"] == len(shared) < 60 and found["share"] == pytest.approx(len(shared) / 60)
    assert 0 < found["mostly"] == mostly < len(shared)
    assert found["short"] == sum(len(words) < n for words in documents)
    for place, text in found["examples"]:
        row = int(place.removeprefix(f"{path} row "))
        assert tuple(text.split()) in known & grams(documents[row - 1])
    shown = lowres_here(*command).stdout
    assert (
        f"{len(shared)} ({len(shared) / 60:.2%}) of 60 evaluation documents share 4 words in a row" in shown
    )
    nothing = write(tmp_path / "nothing.jsonl", [{"text": "one two"}])
    assert json.loads(lowres_here("data", "overlap", nothing, path, "--json").stdout)["shared"] == 0


def test_a_run_on_chats_goes_on_inside_an_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, run = write(tmp_path / "chats.jsonl", chats(40)), tmp_path / "run"
    config = {
        "run": {"device": "cpu"},
        "model": {"dim": 32, "n_layers": 1, "n_heads": 2, "ffn_dim": 64},
        "memory": {"engine": "autograd", "weights": "fp32"},
        "data": {
            "source": path,
            "tokenizer": str(tokenizer.path),
            "chat_template": "tulu",
            "seq_len": 128,
            "cache": str(tmp_path / "cache"),
        },
        "objective": {"name": "sft"},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"batch_tokens": 16 * 128, "steps": 5, "checkpoint_every": 3},
        "log": {"progress": False},
    }
    (tmp_path / "sft.toml").write_text(to_toml(parse_config(config)[0]))
    said = lowres_here("train", tmp_path / "sft.toml", "--run", run).stderr
    assert "an epoch is 2." in said and " is padding" in said
    straight = (run / "metrics.jsonl").read_bytes()
    losses = [(one["step"], one["loss"]) for one in metrics.read(run / "metrics.jsonl") if "loss" in one]
    shutil.rmtree(checkpoint.step_folder(run / "checkpoints", 5))
    lowres_here("train", tmp_path / "sft.toml", "--run", run, "--resume")
    assert straight != (run / "metrics.jsonl").read_bytes(), "it did not go on"
    again = [(one["step"], one["loss"]) for one in metrics.read(run / "metrics.jsonl") if "loss" in one]
    assert again == losses and [step for step, _ in losses] == [1, 2, 3, 4, 5]
    score = json.loads(lowres_here("eval", run, "--data", path, "--json").stdout)
    assert 0 < score["val_loss"] < losses[0][1]
