"""Mixtures: every part has its share at any moment and is read in its own order; weights may change."""

import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowres import events, metrics
from lowres.checkpoint import Passed, Start, State
from lowres.config import DataConfig
from lowres.config_file import load_config, parse_config, to_toml
from lowres.data import MixedData, TokenData, cache_bytes, open_data, prepare, record_of_one, with_tokenizer
from lowres.data import opening as opening_module
from lowres.data.mixture import Part
from lowres.data.turns import LARGEST_DENOMINATOR, Schedule, Turns, whole_shares
from lowres.errors import UserError
from lowres.resuming import sequences_before
from tests.helpers import lowres_here, train_and_kill

SEQ = 16
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]
Rows = list[tuple[int, ...]]


def write_source(path: Path, count: int, seed: int, column: str = "text") -> Path:
    draw = random.Random(seed)
    words = [
        [f"{draw.choice(WORDS)}{draw.randrange(99)}" for _ in range(draw.randint(5, 40))]
        for _ in range(count)
    ]
    texts = [f"{seed} {i} {' '.join(document)}" for i, document in enumerate(words)]
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three prepared folders of different sizes with one tokenizer."""
    base = tmp_path_factory.mktemp("mixture")
    found, model = dict[str, Path](), None
    for seed, (name, count) in enumerate({"web": 150, "code": 40, "math": 60}.items()):
        source = write_source(base / f"{name}.jsonl", count, seed)
        size = 300 if model is None else None
        out = base / name
        prepare(str(source), out, tokenizer=model, vocab_size=size, progress=False, shard_tokens=2000)
        found[name] = base / name
        model = str(base / "web" / "tokenizer.model")
    return found


def texts_of(folder: Path) -> list[str]:
    """The documents of the source of a prepared folder."""
    return [json.loads(line)["text"] for line in folder.with_suffix(".jsonl").read_text().splitlines()]


def mixed(folders: dict[str, Path], weights: dict[str, float], seed: int = 0, **epochs: float) -> MixedData:
    parts = [
        Part(name, TokenData(folders[name], SEQ, seed), w, epochs.get(name)) for name, w in weights.items()
    ]
    return MixedData(parts, seed)


def rows(batch: torch.Tensor) -> Rows:
    return [tuple(row) for row in batch.tolist()]


def alone(folder: Path, count: int, seed: int = 0) -> Rows:
    """The first sequences of a part, as if it were the only source."""
    return rows(TokenData(folder, SEQ, seed).batch(0, count))


def sorted_out(found: Rows, own: dict[str, Rows]) -> tuple[str, dict[str, list[int]]]:
    """Which part each sequence is of (by its first letter), and its numbers in the part, in this order."""
    at = {row: (name, k) for name, of_part in own.items() for k, row in enumerate(of_part)}
    assert len(at) == sum(map(len, own.values())), "sequences are not unique: the test would be weak"
    numbers: dict[str, list[int]] = {name: [] for name in own}
    letters = ""
    for row in found:
        name, k = at[row]
        letters += name[0]
        numbers[name].append(k)
    return letters, numbers


def complaint(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.2, 0.1],
        [1, 1],
        [1],
        [0.999, 0.001],
        [1 / 3, 0.123456789, 0.9],
        [1, 2, 3, 4, 5, 6, 7],
        [0.5] * 10 + [0.001] * 9,
        [100, 1, 1],
    ],
)
def test_every_part_has_its_share_after_any_number_of_turns(weights: list[float]) -> None:
    shares = whole_shares(weights)
    turns = Turns(shares, seed=3, name="x")
    count = 2 * turns.length + 77
    found = turns.between(0, count)
    given = np.cumsum(np.arange(len(shares)) == found[:, None], axis=0)
    behind = np.outer(np.arange(1, count + 1), shares) - given * sum(shares)  # in exact integers
    assert np.abs(behind).max() < sum(shares)
    # any turn is found without those before it
    draw = random.Random(0)
    for _ in range(20):
        start = draw.randrange(count)
        end = draw.randint(start, min(count, start + 3000))
        assert np.array_equal(turns.between(start, end), found[start:end])
        assert turns.counts(start).tolist() == [int((found[:start] == p).sum()) for p in range(len(shares))]
        part = int(found[start])
        assert turns.turn_of(part, int((found[:start] == part).sum())) == start
    if len(set(shares)) > 1 and max(shares) < 0.99 * sum(shares):
        assert not np.array_equal(found[: turns.length], found[turns.length : 2 * turns.length])
        assert not np.array_equal(found, Turns(shares, seed=4, name="x").between(0, count))


def test_weights_are_kept_exactly_or_to_a_65536th() -> None:
    assert whole_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_shares([3, 1.5]) == [2, 1]
    assert whole_shares([1e-9, 1.0]) == [1, LARGEST_DENOMINATOR - 1], "no part is lost"
    assert whole_shares([1e300, 1e300, 2e300]) == [1, 1, 2]
    weights = [random.Random(1).random() for _ in range(40)]
    shares = whole_shares(weights)
    total = sum(map(Fraction, weights))
    assert all(
        abs(s / sum(shares) - Fraction(w) / total) < 2**-15 for s, w in zip(shares, weights, strict=True)
    )


def test_a_schedule_in_pieces_is_the_same() -> None:
    """With limits, across their ends, asked for in any order."""

    def schedule() -> Schedule:
        return Schedule([0.5, 0.0, 0.3, 0.2], [None, 5, 40, 17], seed=1, since=10, before=[3, 1, 2, 0])

    straight = np.full(500, -1)
    for part, (places, first) in enumerate(schedule().turns(10, 500)):
        straight[places] = part
        assert first == [3, 1, 2, 0][part]
    pieces = [(start, min(7, 510 - start)) for start in range(10, 510, 7)]
    random.Random(0).shuffle(pieces)
    again = schedule()
    for start, count in pieces:
        for part, (places, first) in enumerate(again.turns(start, count)):
            assert (straight[start - 10 :][places] == part).all()
            assert first == [3, 1, 2, 0][part] + int((straight[: start - 10] == part).sum())
    assert Counter(straight.tolist()) == {0: 500 - 38 - 17, 2: 38, 3: 17}
    # the sequence after the last of a part is where it is used up
    ends = schedule().ends()
    assert [part for part, _ in ends] == [3, 2]
    for part, end in ends:
        assert (straight[end - 10 :] != part).all()


# ---------------------------------------------------------------------------- batches


def test_parts_are_read_in_their_own_order(folders: dict[str, Path]) -> None:
    weights = {"web": 0.6, "code": 0.1, "math": 0.3}
    data = mixed(folders, weights, seed=1)
    own = {name: alone(folder, 90, seed=1) for name, folder in folders.items()}
    letters, numbers = sorted_out(rows(data.batch(0, 140)), own)
    for name, weight in weights.items():
        assert numbers[name] == list(range(len(numbers[name])))
        for end in range(140):
            assert abs(letters[:end].count(name[0]) - weight * end) < 1
    assert letters[:70] != letters[70:]
    assert data.read(140) == {n: (len(k), len(k) / 140) for n, k in numbers.items()}
    assert data.batch(0, 3).dtype == torch.int64 and data.seq_len == SEQ


def test_a_batch_depends_on_nothing_but_seed_and_step(folders: dict[str, Path]) -> None:
    weights = {"web": 0.6, "code": 0.1, "math": 0.3}
    steps = list(range(40))
    data = mixed(folders, weights, seed=1, math=0.5)
    first = [data.batch(step, 32) for step in steps]
    random.Random(0).shuffle(steps)
    again = mixed(folders, dict(reversed(weights.items())), seed=1, math=0.5)  # however they are listed
    assert again.fingerprint == data.fingerprint
    assert again.validation_fingerprint == data.validation_fingerprint
    for step in steps:
        assert torch.equal(again.batch(step, 32), first[step])
    # the same sequences however many make a step
    assert torch.equal(torch.cat(first), torch.cat([data.batch(step, 80) for step in range(16)]))
    assert torch.equal(data.batch(3, 32, offset=-32), first[2])
    assert not torch.equal(mixed(folders, weights, seed=2, math=0.5).batch(0, 32), first[0])


def test_a_mixture_of_one_is_its_source(folders: dict[str, Path]) -> None:
    one, plain = mixed(folders, {"code": 3.0}), TokenData(folders["code"], SEQ, 0)
    for step in range(30):
        assert torch.equal(one.batch(step, 32), plain.batch(step, 32))
    assert torch.equal(one.validation(100), plain.validation(100))
    assert one.train_tokens == plain.train_tokens


def test_a_part_with_a_limit_leaves_its_weight_to_the_others(folders: dict[str, Path]) -> None:
    data = mixed(folders, {"web": 0.3, "code": 0.6, "math": 0.1}, code=1, math=0.5)
    code, math = (TokenData(folders[name], SEQ, 0) for name in ("code", "math"))
    sizes = {"code": code.epoch(0), "math": (math.epoch(0) or 0) // 2}
    ends = dict(data.ends())
    assert list(ends) == ["code", "math"] and data.over is None
    count = ends["math"] + 20
    found = rows(data.batch(0, count))
    web = TokenData(folders["web"], SEQ, 0).epoch(0) or 0
    own = {name: alone(folders[name], n) for name, n in (sizes | {"web": web}).items() if n}
    letters, numbers = sorted_out(found, own)
    # each sequence of an epoch once, at the places that were known before
    assert numbers["code"] == list(range(len(own["code"])))
    assert numbers["math"] == list(range(len(own["math"])))
    assert letters.rindex("c") < ends["code"] and letters.rindex("m") < ends["math"]
    left = letters[ends["code"] : ends["math"]]
    for end in range(len(left)):
        assert abs(left[:end].count("w") - 0.75 * end) < 1
    assert letters[ends["math"] :] == "w" * 20


def test_nothing_is_read_when_all_is_used_up(folders: dict[str, Path]) -> None:
    data = mixed(folders, {"code": 1.0, "math": 1.0, "web": 0.0}, code=1, math=2)
    sizes = [TokenData(folders[name], SEQ, 0).epoch(0) or 0 for name in ("code", "math")]
    assert data.over == sizes[0] + 2 * sizes[1]
    assert Counter(rows(data.batch(0, data.over))) == Counter(alone(folders["code"], sizes[0])) + Counter(
        alone(folders["math"], 2 * sizes[1])
    )
    assert data.read(data.over)["web"] == (0, 0.0)
    assert f"used up after {data.over:,} sequences" in complaint(data.batch, 0, data.over + 1)


# ---------------------------------------------------------------------------- resuming


def test_unchanged_weights_go_on_as_if_nothing_was(folders: dict[str, Path]) -> None:
    weights = {"web": 0.6, "code": 0.3, "math": 0.1}
    straight = mixed(folders, weights, code=0.5)
    doubled = {name: 2 * weight for name, weight in reversed(weights.items())}
    resumed = mixed(folders, doubled, code=0.5)
    assert resumed.go_on(straight.record(333), 333) is None
    assert torch.equal(resumed.batch(0, 300, 333), straight.batch(0, 300, 333))
    assert resumed.record(400) == straight.record(400) | {"parts": resumed.record(400)["parts"]}


def test_changed_weights_count_from_there_on(folders: dict[str, Path]) -> None:
    """What was read stays read; a stop on the way changes nothing; a part that was left out comes back where
    it was."""
    two = {name: folders[name] for name in ("web", "code")}
    own = {name: alone(folder, 400) for name, folder in folders.items() if name != "code"}
    own["code"] = alone(folders["code"], TokenData(folders["code"], SEQ, 0).epoch(0) or 0)
    first = mixed(two, {"web": 0.8, "code": 0.2})
    _, before = sorted_out(rows(first.batch(0, 50)), own)

    second = mixed(folders, {"math": 0.5, "code": 0.5})
    changed = second.go_on(first.record(50), 50)
    assert changed == ("code 0.2, web 0.8", "math 0.5, code 0.5")
    letters, between = sorted_out(rows(second.batch(0, 40, offset=50)), own)
    assert between["code"] == list(range(len(before["code"]), len(before["code"]) + 20))
    assert between["math"] == list(range(20)) and not between["web"]
    for end in range(40):
        assert abs(letters[:end].count("m") - end / 2) < 1
    assert second.read(90)["code"] == (30, 0.5)
    # the change had been planned: the same, from any stop in it
    for stop in (50, 63, 89):
        again = mixed(folders, {"code": 1, "math": 1})
        assert again.go_on(second.record(stop), stop) is None
        assert torch.equal(again.batch(0, 90 - stop, stop), second.batch(0, 90 - stop, stop))

    third = mixed(folders, {"web": 1.0, "math": 0.0})
    assert third.go_on(second.record(90), 90) is not None
    _, after = sorted_out(rows(third.batch(0, 30, offset=90)), own)
    assert after["web"] == list(range(len(before["web"]), len(before["web"]) + 30))
    fourth = mixed(folders, {"code": 1.0})
    fourth.go_on(third.record(120), 120)
    _, last = sorted_out(rows(fourth.batch(0, 4, offset=120)), own)
    assert last["code"] == [30, 31, 32, 33]


def test_a_source_may_become_a_mixture(folders: dict[str, Path]) -> None:
    plain = TokenData(folders["web"], SEQ, 0)
    data = mixed(folders, {"web": 0.5, "math": 0.5})
    data.go_on(record_of_one(plain.fingerprint, 70), 70)
    own = {"web": alone(folders["web"], 120), "math": alone(folders["math"], 50)}
    _, numbers = sorted_out(rows(data.batch(0, 20, offset=70)), own)
    assert numbers == {"web": list(range(70, 80)), "math": list(range(10))}


def test_batches_that_a_rollback_left_out_are_used() -> None:
    config = parse_config({"data": {"seq_len": 32}, "train": {"batch_tokens": 256}})[0]
    passed = [Passed(step=2, sequences=8), Passed(step=7, sequences=8)]
    state = State(step=4, tokens=4 * 256, data="", start=Start(batch_tokens=256), passed=passed)
    assert sequences_before(state, config) == 4 * 8 + 8


def test_a_limit_that_changes_counts_what_was_read(folders: dict[str, Path]) -> None:
    size = TokenData(folders["code"], SEQ, 0).epoch(0) or 0
    first = mixed(folders, {"web": 0.5, "code": 0.5})
    second = mixed(folders, {"web": 0.5, "code": 0.5}, code=1)
    assert second.go_on(first.record(40), 40) == ("web 0.5, code 0.5", "web 0.5, code 0.5 for 1 epochs")
    ((name, end),) = second.ends()
    assert name == "code" and abs(end - (40 + 2 * (size - 20))) <= 2
    # less than it has had: it gives no more
    third = mixed(folders, {"web": 0.5, "code": 0.5}, code=1e-6)
    third.go_on(first.record(40), 40)
    assert third.ends() == [("code", 40)]
    assert rows(third.batch(0, 9, 40)) == alone(folders["web"], 29)[20:]


def test_refusals_name_the_part(folders: dict[str, Path], tmp_path: Path) -> None:
    first = mixed(folders, {"web": 0.5, "code": 0.5})
    swapped = mixed(folders | {"code": folders["math"]}, {"web": 0.5, "code": 0.5})
    message = complaint(swapped.go_on, first.record(40), 40)
    assert message.startswith("data.mixture.code: is not what the run was trained on")
    other = mixed(folders, {"math": 1.0})
    assert "no part is what the run" in complaint(other.go_on, first.record(40), 40)
    assert "delete this checkpoint" in complaint(first.go_on, first.record(40) | {"since": 50}, 40)
    twice = folders | {"copy": folders["web"]}
    assert "has the same tokens as" in complaint(mixed, twice, {"web": 1.0, "copy": 1.0})
    source = write_source(tmp_path / "x.jsonl", 60, 9)
    prepare(str(source), tmp_path / "out", vocab_size=290, progress=False)
    message = complaint(mixed, folders | {"other": tmp_path / "out"}, {"web": 1.0, "other": 1.0})
    assert message.startswith("data.mixture.other: has another tokenizer than web")


# ---------------------------------------------------------------------------- the config


MIXTURE = """
[data]
text_key = "body"
[[data.mixture]]
source = "a/web.jsonl.gz"
weight = 3
[[data.mixture]]
source = "hf:some/set:en"
weight = 0.5
epochs = 2
text_key = "content"
include = ["*.jsonl"]
[[data.mixture]]
source = "*.txt"
name = "books"
weight = 0
"""


def test_a_mixture_in_a_config(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(MIXTURE)
    config, _ = load_config(path)
    assert [part.name for part in config.data.mixture] == ["web", "set-en", "books"]
    assert [config.data.of_part(i).text_key for i in range(3)] == ["body", "content", "body"]
    assert config.data.of_part(1).include == ("*.jsonl",) and config.data.of_part(1).mixture == ()
    assert config.data.sources == ["a/web.jsonl.gz", "hf:some/set:en", "*.txt"]
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml")[0] == config

    config, _ = load_config(
        path, ["data.mixture.0.weight=1", "data.mixture.books.weight=7", "data.mixture.set-en.epochs=1"]
    )
    assert [(part.weight, part.epochs) for part in config.data.mixture] == [(1, None), (0.5, 1), (7, None)]
    assert load_config(path, ["data.source=stdlib"])[0].data.sources == ["stdlib"]
    set_list = 'data.mixture=[{source = "x", weight = 1}]'
    assert load_config(path, [set_list])[0].data.sources == ["x"]


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.mixture.3.weight=1", "parts are web, set-en, books, 0, 1, 2"),
        ("data.mixture.web=1", "write it as data.mixture.<part>.<key>=value"),
        ("data.mixture.web.wieght=1", "data.mixture.0.wieght: unknown key; did you mean weight?"),
        ("data.mixture.1.weight=-1", "data.mixture.1.weight: "),
        ("data.mixture.1.epochs=0", "data.mixture.1.epochs: "),
        ("data.mixture.1.name=web", "2 parts are called web"),
        ("data.mixture.1.name=3", "data.mixture.1.name: "),
        ("data.mixture.1.damaged=ship", "data.mixture.1.damaged: "),
        ('data.mixture=[{source = "x", weight = 0}]', "every weight is 0"),
        (
            'data.mixture=[{source = "x", weigth = 0}]',
            "data.mixture.0.weigth: unknown key; did you mean weig",
        ),
        ('data.mixture=[{source = "x"}]', "data.mixture.0.weight: "),
    ],
)
def test_bad_keys_of_a_mixture_are_named(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "c.toml").write_text(MIXTURE)
    assert said in complaint(load_config, tmp_path / "c.toml", [override])


def test_a_config_has_a_source_or_a_mixture() -> None:
    both = {"source": "stdlib", "mixture": [{"source": "x", "weight": 1}]}
    assert "data.source: data.mixture takes its place" in complaint(parse_config, {"data": both})
    assert "the config has no data.mixture" in complaint(
        load_config, Path("configs/tiny.toml"), ["data.mixture.0.weight=1"]
    )


# ---------------------------------------------------------------------------- opening


def data_config(tmp_path: Path, *parts: dict[str, Any], **keys: Any) -> DataConfig:
    return DataConfig(mixture=parts, seq_len=SEQ, cache=str(tmp_path / "cache"), **keys)  # type: ignore[arg-type]


def opened(config: DataConfig, vocab_size: int | None = None) -> MixedData:
    data = open_data(config, vocab_size, 0, False)
    assert isinstance(data, MixedData)
    return data


def test_one_tokenizer_is_trained_on_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the weights, and each part with its own keys."""
    one = write_source(tmp_path / "one.jsonl", 400, 1)
    other = write_source(tmp_path / "other.jsonl", 400, 2, column="deep")
    other.write_text(other.read_text().upper().replace('"DEEP"', '"deep"'))
    monkeypatch.setattr("lowres.data.mixing.SAMPLE_CHARS", 20_000)
    seen = list[str]()

    def watched(texts: list[str], *args: Any, **more: Any) -> tuple[bytes, int]:
        seen.extend(texts)
        return train(texts, *args, **more)

    from lowres.data.tokenizer import train

    monkeypatch.setattr("lowres.data.mixing.train", watched)
    # blocks of a document are far smaller than the sample
    parts = {"source": str(one), "weight": 3}, {"source": str(other), "weight": 1, "text_key": "deep"}
    data = opened(data_config(tmp_path, *parts), 300)
    upper = sum(map(len, filter(str.isupper, seen)))
    assert 0.6 < upper / 5000 <= 1 and 0.6 < (sum(map(len, seen)) - upper) / 15000 <= 1
    text = data.tokenizer.decode(data.batch(0, 8).flatten().tolist())
    assert text.lower() != text != text.upper()
    seen.clear()
    assert opened(data_config(tmp_path, *parts), 300).fingerprint == data.fingerprint and not seen


def test_prepared_parts_bring_their_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    web, code = ({"source": str(folders[name]), "weight": 1} for name in ("web", "code"))
    path = write_source(tmp_path / "text.jsonl", 60, 7)
    text = {"source": str(path), "weight": 1}
    data = opened(data_config(tmp_path, text, web, code))
    assert data.tokenizer.fingerprint == TokenData(folders["web"], SEQ, 0).tokenizer.fingerprint
    assert data.names == ["text", "web", "code"]
    prepare(str(path), tmp_path / "own", vocab_size=280, progress=False)
    own = {"source": str(tmp_path / "own"), "weight": 1}
    message = complaint(open_data, data_config(tmp_path, web, own), None, 0, False)
    assert message.startswith(
        f"data.mixture.own: {tmp_path / 'own'} was prepared with another tokenizer than web"
    )
    assert f"--tokenizer {folders['web'] / 'tokenizer.model'}" in message
    model = str(tmp_path / "own" / "tokenizer.model")
    message = complaint(open_data, data_config(tmp_path, own, web, tokenizer=model), None, 0, False)
    assert message.startswith("data.mixture.web: ") and "than data.tokenizer" in message
    missing = {"source": str(tmp_path / "nowhere"), "weight": 1}
    message = complaint(open_data, data_config(tmp_path, web, missing), None, 0, False)
    assert message.startswith("data.mixture.nowhere: ") and "no such file" in message
    short = tmp_path / "short.txt"
    short.write_text("a b")
    message = complaint(
        open_data, data_config(tmp_path, web, {"source": str(short), "weight": 1}), None, 0, False
    )
    assert message.startswith("data.mixture.short: ")


def test_parts_that_are_token_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of one vocabulary, or with data.tokenizer beside text."""
    for name, seed in (("one", 1), ("two", 2)):
        ids = np.random.default_rng(seed).integers(3, 300, 4000, np.uint16)
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "ids.npy", ids)
    one, two = ({"source": str(tmp_path / name), "weight": 1} for name in ("one", "two"))
    data = opened(data_config(tmp_path, one, two, vocab_size=300))
    assert not data.tokenizer.has_text and data.read(10)["one"][0] == 5
    stored = tmp_path / data.tokenizer.file_name
    stored.write_bytes(data.tokenizer.content)
    again = opened(with_tokenizer(data_config(tmp_path, one, two, vocab_size=300), stored))
    assert again.fingerprint == data.fingerprint and torch.equal(again.batch(7, 8), data.batch(7, 8))

    text = {"source": str(write_source(tmp_path / "text.jsonl", 60, 7)), "weight": 1}
    message = complaint(open_data, data_config(tmp_path, text, one), None, 0, False)
    assert message.startswith("data.mixture.one: holds token ids") and "data.tokenizer" in message
    model = str(folders["web"] / "tokenizer.model")
    data = opened(data_config(tmp_path, text, one, tokenizer=model))
    found = rows(data.batch(0, 20))
    numbers = np.load(tmp_path / "one" / "ids.npy").tolist()
    starts = {tuple(numbers[i : i + SEQ + 1]) for i in range(0, len(numbers) - SEQ, SEQ)}
    assert sum(row in starts for row in found) == 10


def test_validation_is_spread_over_the_parts(folders: dict[str, Path], tmp_path: Path) -> None:
    """Or that of val_source, if there is one."""
    parts = [
        {"source": str(folders[name]), "weight": w} for name, w in (("web", 0.9), ("code", 0), ("math", 0.1))
    ]
    data = opened(data_config(tmp_path, *parts))
    windows = data.validation_parts(90)
    assert list(windows) == ["web", "code", "math"]
    for name, found in windows.items():
        assert torch.equal(found, TokenData(folders[name], SEQ, 0).validation(30))
    assert torch.equal(data.validation(90), torch.cat(list(windows.values())))
    # val_source is read with the keys of [data], not with those of a part
    text = write_source(tmp_path / "val.jsonl", 5, 20)
    deep = write_source(tmp_path / "deep.jsonl", 50, 21, column="deep")
    parts += [{"source": str(deep), "weight": 1, "text_key": "deep"}]
    data = opened(data_config(tmp_path, *parts, val_source=str(text)))
    assert list(data.validation_parts(0)) == [""]
    first = data.tokenizer.decode(data.validation(0)[0].tolist())
    assert json.loads(text.read_text().split("\n")[0])["text"].startswith(first[:20])


def test_validation_text_of_a_part_in_another(folders: dict[str, Path], tmp_path: Path) -> None:
    def held_out(folder: Path) -> list[str]:
        data = TokenData(folder, SEQ, 0)
        tokens = torch.cat([row[:-1] for row in data.validation(0)]).clamp(min=0)
        text = data.tokenizer.decode(tokens.tolist())
        return [one for one in texts_of(folder) if one in text]

    source = write_source(tmp_path / "other.jsonl", 20, 30)
    ours = held_out(folders["web"])
    copies = "".join(json.dumps({"text": text}) + "\n" for text in ours)
    source.write_text(source.read_text() + copies)
    model = str(folders["web"] / "tokenizer.model")
    prepare(str(source), tmp_path / "other", tokenizer=model, progress=False)
    both = len(set(ours) - set(held_out(tmp_path / "other")))
    assert both > 0
    parts: list[dict[str, Any]] = [
        {"source": str(folders["web"]), "weight": 1},
        {"source": str(tmp_path / "other"), "weight": 1},
    ]
    line = (
        f"data.mixture.web beside other: {both} of {len(ours)} validation documents are also in the training"
    )
    message = complaint(open_data, data_config(tmp_path, *parts), None, 0, False)
    assert line in message and "data.max_overlap" in message
    notes = opened(data_config(tmp_path, *parts, max_overlap=1.0)).notes
    assert any(note.startswith(line) for note in notes)
    parts[1]["weight"] = 0  # then nobody is trained on it
    assert not any("also in" in note for note in opened(data_config(tmp_path, *parts)).notes)


@pytest.fixture
def stream_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DataConfig, Path]:
    """A stream of about five blocks with a limit of one epoch, and a folder."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(opening_module, "BLOCK_TOKENS", 700)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub-set").mkdir()
    write_source(tmp_path / "hub-set" / "train.jsonl", 60, 5)
    text = write_source(tmp_path / "text.jsonl", 150, 6)
    stream = {"source": f"hf:{tmp_path / 'hub-set'}", "weight": 0.5, "epochs": 1, "name": "stream"}
    return data_config(tmp_path, stream, {"source": str(text), "weight": 0.5}), text


def test_a_stream_with_a_limit(stream_parts: tuple[DataConfig, Path], tmp_path: Path) -> None:
    """Its end is met when it comes, and then all is as if it had been known."""
    config, _ = stream_parts
    data = opened(config, 280)
    assert data.ends() == [] and data.over is None and data.train_tokens is None
    found = [data.batch(step, 16) for step in range(120)]
    assert data.train_tokens is not None
    data.close()
    known = opened(config, 280)
    while known.train_tokens is None:
        known.batch(120, 16)
    known.close()
    again = opened(config, 280)  # now it is complete from the start
    steps = list(range(120))
    random.Random(0).shuffle(steps)
    for step in steps:
        assert torch.equal(again.batch(step, 16), found[step])
    ((name, end),) = again.ends()
    assert name == "stream" and 0 < end < 120 * 16
    stream = next(part.data for part in again._parts if part.name == "stream")
    own = set(rows(stream.batch(0, stream.epoch(1 << 60) or 0)))
    assert Counter(row in own for row in rows(torch.cat(found)))[True] == len(own) == stream.epoch(1 << 60)
    again.close()


def test_bytes_that_a_stream_will_add(stream_parts: tuple[DataConfig, Path]) -> None:
    config, _ = stream_parts
    opened(config, 280).close()
    # half of the tokens, one block ahead, less what is there: at most all that
    assert 2 * 50_000 - 2 * 3000 < cache_bytes(config, 280, 100_000) <= 2 * (50_000 + 700)
    stream = config.mixture[0].model_copy(update={"weight": 0.0})
    assert cache_bytes(config.model_copy(update={"mixture": (stream, config.mixture[1])}), 280, 9**9) == 0


# ---------------------------------------------------------------------------- runs

RUN = """
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64
[data]
seq_len = 32
cache = "{cache}"
[[data.mixture]]
source = "{web}"
weight = 0.75
[[data.mixture]]
source = "{code}"
weight = 0.25
[schedule]
name = "constant"
warmup_steps = 0
[train]
steps = 12
batch_tokens = 256
micro_batch = 4
eval_every = 4
eval_tokens = 0
checkpoint_every = 4
keep_checkpoints = 0
[log]
progress = false
"""


@pytest.fixture
def run_config(folders: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "mixed.toml"
    path.write_text(RUN.format(cache=tmp_path / "cache", web=folders["web"], code=folders["code"]))
    return path


def logged(run: Path) -> list[dict[str, Any]]:
    """What does not depend on time."""
    kept = ("step", "tokens", "loss", "val_loss")
    return [
        {key: value for key, value in record.items() if key in kept or "/" in key}
        for record in metrics.read(run / "metrics.jsonl")
    ]


def test_a_killed_run_goes_on_exactly_and_weights_may_change(
    run_config: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = lowres_here("train", run_config, "--run", straight)
    assert "note: data.mixture: web 0.75 (" in done.stderr
    train_and_kill([run_config, "--run", killed], after=6)
    lowres_here("train", run_config, "--run", killed, "--resume")
    assert logged(killed) == logged(straight)

    last = logged(straight)[-1]
    assert (last["share/web"], last["share/code"]) == (0.75, 0.25)
    assert (last["tokens/web"], last["tokens/code"]) == (12 * 192, 12 * 64)
    printed = (
        r"^step 12: validation: \S+ bits per byte, loss (\S+), perplexity \S+ \(web: (\S+) bits per byte, "
    )
    said = re.search(printed + r"loss (\S+), 75.0%; code: ", done.stderr, re.M)
    shown = (last["val_loss"], last["val_bits_per_byte/web"], last["val_loss/web"])
    assert said and said.groups() == tuple(f"{number:.4f}" for number in shown)
    # each part's loss is what `lowres eval` finds on its own validation text
    sizes = {}
    for name in ("web", "code"):
        own = json.loads(lowres_here("eval", straight, "--data", folders[name], "--json").stdout)
        for score in ("val_loss", "val_bits_per_byte"):
            assert last[f"{score}/{name}"] == pytest.approx(own[score], rel=1e-6)
        sizes[name] = (
            sum(e["tokens"] for e in json.loads((folders[name] / "data.json").read_text())["val"]) - 1
        )
    mean = sum(last[f"val_loss/{name}"] * n for name, n in sizes.items()) / sum(sizes.values())
    assert last["val_loss"] == pytest.approx(mean, rel=1e-6)
    whole = json.loads(lowres_here("eval", straight, "--json").stdout)
    scores = [key for key in last if key.startswith("val_")]
    assert {key: whole[key] for key in scores} == pytest.approx({key: last[key] for key in scores}, rel=1e-6)

    # another mixture from step 12 on, in one go and with a stop
    more = ["--set", "data.mixture.code.weight=0.75", "--resume"]
    done = lowres_here("train", run_config, "--run", straight, *more, "--set", "train.steps=20")
    assert "note: data.mixture: web 0.75, code 0.25 -> web 0.5, code 0.5 from step 12 on" in done.stderr
    (changed,) = [e["changed"] for e in events.read(straight) if e.get("changed")]
    assert changed == {"data.mixture": {"before": "web 0.75, code 0.25", "after": "web 0.5, code 0.5"}}
    for steps in (14, 20):
        lowres_here("train", run_config, "--run", killed, *more, "--set", f"train.steps={steps}")
    steps_of = [[r for r in logged(run) if "loss" in r] for run in (straight, killed)]
    assert steps_of[0][:14] == steps_of[1][:14]
    last = logged(straight)[-1]
    assert (last["share/code"], last["tokens/code"]) == (0.5, 12 * 64 + 8 * 128)
    assert last["tokens/web"] == 12 * 192 + 8 * 128
    assert logged(killed)[-1]["tokens/web"] == last["tokens/web"]


def test_runs_that_are_refused(run_config: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    limits = ["--set", "data.mixture.web.epochs=0.1", "--set", "data.mixture.code.epochs=0.1"]
    ended = lowres_here(
        "train", run_config, "--run", tmp_path / "r", *limits, "--set", "train.steps=99", code=2
    )
    windows = sum(max(1, int(0.1 * (TokenData(folders[n], 32, 0).epoch(0) or 0))) for n in ("web", "code"))
    assert f"last {windows // 8} of the 99 steps" in ended.stderr
    assert not (tmp_path / "r").exists()

    run = tmp_path / "run"
    short = ["--set", "train.steps=2", "--set", "train.eval_every=0"]
    lowres_here("train", run_config, "--run", run, *short)
    on = ["--run", run, "--resume", "--set", "train.steps=3"]
    code = ["--set", "data.mixture.code.name=code", "--set", f"data.mixture.code.source={folders['math']}"]
    ended = lowres_here("train", run_config, *on, *code, code=2)
    assert "data.mixture.code: is not what the run was trained on" in ended.stderr
    ended = lowres_here("train", run_config, *on, "--set", f"data.source={folders['web']}", code=2)
    assert "was trained on a mixture" in ended.stderr
