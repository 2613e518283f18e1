"""[[data.validation]]: texts that are evaluated beside the validation data, and change nothing else."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowres import metrics
from lowres.config import DataConfig
from lowres.config_file import data_config, load_config, parse_config, to_toml, with_places
from lowres.data import Data, open_data, open_other_chats, open_text
from lowres.errors import UserError
from lowres.scoring import score
from tests.helpers import lowres_here
from tests.test_chat_data import chats, tokenizer, write  # noqa: F401

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "import", "return", "class"]


def words(path: Path, count: int, seed: int, column: str = "text") -> Path:
    draw = random.Random(seed)
    texts = [f"{i} {' '.join(draw.choices(WORDS, k=30))}" for i in range(count)]
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def scores(run: Path) -> list[dict[str, Any]]:
    """What does not depend on time."""
    kept, found = ("step", "loss", "grad_norm"), metrics.read(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k in kept or "val_" in k} for record in found]


def without_names(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if "/" not in key} for record in records]


def test_texts_are_evaluated_beside_and_change_nothing(config: Path, tmp_path: Path) -> None:
    wiki, notes = words(tmp_path / "wiki.jsonl", 40, 1, "body"), words(tmp_path / "notes.jsonl", 3, 2)
    text = config.read_text().replace("eval_every = 10", "eval_every = 2").replace("2048", "512")
    config.write_text(text.replace("steps = 30", "steps = 4\nkeep_best = true"))
    plain, run = tmp_path / "plain", tmp_path / "run"
    lowres_here("train", config, "--run", plain)
    tables = f'[[data.validation]]\nname = "wiki"\nsource = "{wiki}"\ntext_key = "body"\n'
    tables += f'[[data.validation]]\nsource = "{notes}"\nname = "my.notes"\n'
    config.write_text(config.read_text() + tables)
    done = lowres_here("train", config, "--run", run)
    # the run is the same, and so is the loss that chooses the best checkpoint
    found = scores(run)
    assert without_names(found) == scores(plain)
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {p.name for p in (plain / "checkpoints").iterdir()}

    last, told = found[-1], {}
    for name, source, key in (("wiki", wiki, "body"), ("my.notes", notes, "text")):
        told[name] = score(run, data_config(str(source), [f"data.text_key={key}"]))
        assert last.keys() >= {f"val_loss/{name}", f"val_bits_per_byte/{name}"}
        assert not any(key.startswith("val_ppl/") for key in last)
    # notes are evaluated as a whole, of wiki only the first train.eval_tokens
    assert told["my.notes"]["val_tokens"] < 512 < told["wiki"]["val_tokens"]
    for key in ("val_loss", "val_bits_per_byte"):
        assert last[f"{key}/my.notes"] == pytest.approx(told["my.notes"][key], rel=1e-6)
        assert last[f"{key}/wiki"] == pytest.approx(told["wiki"][key], rel=0.02)
        assert last[f"{key}/wiki"] != last[key] != told["wiki"][key]
    sizes = rf", wiki on 512, my.notes on {told['my.notes']['val_tokens']:,}$"
    assert re.search(r"^every 2 steps: evaluated on .*" + sizes, done.stderr, re.M)
    line = f"(wiki: {last['val_bits_per_byte/wiki']:.4f} bits per byte, loss {last['val_loss/wiki']:.4f}; my."
    assert line in done.stderr

    shown = lowres_here("eval", run).stdout.splitlines()
    own = score(run, None)
    assert own["val_tokens/wiki"] == told["wiki"]["val_tokens"]
    assert own["val_loss/wiki"] == pytest.approx(told["wiki"]["val_loss"], rel=1e-9)
    assert re.match(r"[\d.]+ bits per byte, loss [\d.]+, perplexity [\d.]+ per token, over ", shown[0])
    assert shown[1] == (
        f"  wiki: {own['val_bits_per_byte/wiki']:.4f} bits per byte, loss {own['val_loss/wiki']:.4f}, over "
        f"{own['val_tokens/wiki']:,} tokens"
    )

    # texts may come and go; a name stays what it was, also after it has been left out
    go_on = ["train", config, "--run", run, "--resume"]
    another = f'data.validation=[{{source = "{words(tmp_path / "more.jsonl", 9, 3)}"}}]'
    lowres_here(*go_on, "--set", "train.steps=5", "--set", another)
    assert "val_loss/more" in scores(run)[-1] and "val_loss/wiki" not in scores(run)[-1]
    changed = ["--set", "train.steps=6", "--set", f"data.validation.wiki.source={notes}"]
    changed += ["--set", "data.validation.wiki.text_key=text"]
    refused = lowres_here(*go_on, *changed, code=2).stderr
    assert refused.splitlines()[-1].startswith("lowres: data.validation.wiki: is not the text of this name")
    lowres_here(*go_on, *changed, "--set", "data.validation.wiki.name=other")
    assert "val_loss/other" in scores(run)[-1]


@pytest.mark.parametrize(
    "override, said",
    [
        ('[{source = "a/wiki.txt"}, {source = "wiki"}]', "2 texts or parts are called wiki; give them other"),
        ('[{source = "a/web.txt"}]', "data.validation: 2 texts or parts are called web"),
        ('[{name = "x"}]', "data.validation.0.source: "),
        (
            '[{source = "x", weight = 1}]',
            "data.validation.0.weight: unknown key; known are source, name,",
        ),
        ('[{source = "x", name = "a/b"}]', "data.validation.0.name: "),
    ],
)
def test_bad_tables_are_named(override: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[[data.mixture]]\nsource = "a/web.txt"\nweight = 1\n')
    with pytest.raises(UserError) as caught:
        load_config(path, [f"data.validation={override}"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_texts_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words(tmp_path / "wiki.jsonl", 3, 1)
    given = {"data": {"text_key": "body", "validation": [{"source": "wiki.jsonl", "include": ["*.jsonl"]}]}}
    config = with_places(parse_config(given)[0], None)
    assert [text.source for text in config.data.validation] == [str(tmp_path / "wiki.jsonl")]
    own = config.data.of_text(0)
    assert (own.val_source, own.text_key, own.include) == (str(tmp_path / "wiki.jsonl"), "body", ("*.jsonl",))
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config))
    assert load_config(path)[0] == config
    changed = load_config(path, ["data.validation.wiki.text_key=text", "data.source=other"])[0].data
    assert (changed.validation[0].text_key, changed.source) == ("text", "other")
    with pytest.raises(UserError, match=r"texts are wiki, 0$"):
        load_config(path, ["data.validation.web.text_key=text"])
    with pytest.raises(UserError, match=r"data\.validation: pairs have one validation set"):
        parse_config(given | {"objective": {"name": "dpo"}})


def opened(**keys: Any) -> Data:
    return open_data(DataConfig(seq_len=16, **keys), None, 0, False)


def test_text_that_is_trained_on(tmp_path: Path) -> None:
    """Of every part of a mixture; what is only evaluated does not count."""
    web, code = words(tmp_path / "web.jsonl", 60, 1), words(tmp_path / "code.jsonl", 60, 2)
    both = tmp_path / "both.jsonl"
    trained = code.read_text().splitlines(keepends=True)[:10]
    both.write_text(words(tmp_path / "new.jsonl", 10, 3).read_text() + "".join(trained))
    parts = [{"source": str(web), "weight": 1.0}, {"source": str(code), "weight": 1.0}]
    keys: dict[str, Any] = {"cache": str(tmp_path / "cache"), "validation": [{"source": str(both)}]}
    with pytest.raises(UserError) as caught:
        opened(mixture=parts, **keys)
    said = re.fullmatch(
        r"data\.validation\.both\.source: (\d+) of 20 validation documents are also in the training text, a "
        r"share of .*; give other validation text, or set data\.max_overlap = .* to allow it",
        str(caught.value),
    )
    assert said and 8 <= int(said[1]) <= 10  # some are held out
    data = opened(mixture=parts, max_overlap=1.0, **keys)
    assert any("data.validation.both.source: " in note and "also in" in note for note in data.notes)
    (text,) = data.texts
    assert text.name == "both" and torch.equal(text.windows(0), open_text(str(both), data.tokenizer, 16))
    assert torch.equal(text.windows(32), text.windows(0)[:2])
    assert int((text.windows(40)[:, 1:] >= 0).sum()) == 40
    parts[1]["weight"] = 0.0
    assert not any("also in" in note for note in opened(mixture=parts, **keys).notes)


def test_token_ids(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("train", 4000), ("val", 200), ("far", 300)):
        (tmp_path / name).mkdir()
        draw.integers(0, 50, count).astype("<u2").tofile(tmp_path / name / f"{name}.bin")
    far = np.fromfile(tmp_path / "far" / "far.bin", "<u2").astype(np.int64)
    ids: dict[str, Any] = {"source": str(tmp_path / "train"), "val_source": str(tmp_path / "val")}
    ids |= {"token_dtype": "uint16", "vocab_size": 50, "cache": str(tmp_path / "cache")}
    table: dict[str, Any] = {"source": str(tmp_path / "far"), "include": ["far*"]}
    (text,) = opened(**ids, validation=[table]).texts
    windows = text.windows(0)
    assert windows[:, :-1].flatten()[: len(far)].tolist() == far[: 16 * len(windows)].tolist()
    prose = words(tmp_path / "prose.jsonl", 60, 1)
    for source, said in ((tmp_path / "train", "train.bin is trained on"), (prose, "set data.tokenizer")):
        with pytest.raises(UserError, match=rf"^data\.validation\.[a-z]+: .*{said}"):
            opened(**ids, validation=[{"source": str(source)}])
    with pytest.raises(UserError, match=r"^data\.validation\.far: .* holds token ids, and the training data"):
        table |= {"token_dtype": "uint16"}
        opened(source=str(prose), cache=str(tmp_path / "cache"), validation=[table])


def test_chats(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue("tokenizer")
    data: dict[str, Any] = {"source": write(tmp_path / "a.jsonl", chats(60)), "chat_template": "tulu"}
    data |= {"tokenizer": str(found.path), "cache": str(tmp_path / "cache"), "seq_len": 128}
    other = write(tmp_path / "other.jsonl", chats(20, seed=9))
    config, _ = parse_config(
        {"data": data | {"validation": [{"source": other}]}, "objective": {"name": "sft"}}
    )
    (text,) = open_data(config.data, None, 0, False, config.objective).texts
    asked = config.data.model_copy(update={"source": other})
    wanted = open_other_chats(asked, config.data, config.objective, found).windows
    assert torch.equal(text.windows(0), wanted) and len(text.windows(300)) < len(wanted)
