"""`lowres config` prints a file to edit: with the documentation of every key, and the same config."""

import tomllib
from pathlib import Path

import pytest

from lowres.config import Config
from lowres.config_file import load_config, parse_config, to_values
from lowres.reference import commented, keys
from tests.helpers import lowres_here

CHANGED = [
    "",
    # what another key implies, but is not so here
    "memory.engine=autograd memory.weights=int8",
    "objective.name=dpo train.tokens=100000",
    "optim.name=scale optim.norm_lr=0.5 optim.lr_over_batch=0.001",
    "relora.enabled=true schedule.name=constant",
]


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_read_back(path: Path, tmp_path: Path) -> None:
    same_after_reading(load_config(path)[0], tmp_path)


@pytest.mark.parametrize("changed", CHANGED)
def test_changed_configs_read_back(changed: str, tmp_path: Path) -> None:
    same_after_reading(load_config("configs/tiny.toml", changed.split())[0], tmp_path)


@pytest.mark.parametrize(
    "changed, given, following",
    [
        ("", {"preset", "batch_tokens"}, {"dim", "ffn_dim", "lr", "lr_over_batch", "batch_policy"}),
        ("optim.lr=0.002", {"lr", "batch_tokens"}, {"lr_over_batch", "batch_policy"}),
        ("optim.lr_over_batch=0.001", {"lr_over_batch", "batch_tokens"}, {"lr", "batch_policy"}),
    ],
)
def test_what_follows_from_other_keys_is_a_comment(
    changed: str, given: set[str], following: set[str]
) -> None:
    """So whoever edits the file changes a key in one place."""
    text = commented(load_config("configs/llama_1b_8gb.toml", changed.split())[0])
    live = {key for section in tomllib.loads(text).values() for key in section}
    assert given <= live and not following & live


def same_after_reading(config: Config, folder: Path) -> None:
    text = commented(config)
    (folder / "written.toml").write_text(text)
    found, notes = load_config(folder / "written.toml")
    assert found == config and to_values(found) == to_values(config)
    assert not [note for note in notes if "is not used" in note]


def test_a_mixture_reads_back(tmp_path: Path) -> None:
    parts = [{"source": "stdlib", "weight": 1}, {"source": "a b.txt", "weight": 0.5, "separator": "\n#"}]
    same_after_reading(parse_config({"data": {"mixture": parts}})[0], tmp_path)


def test_every_key_has_its_words_and_its_value(config: Path) -> None:
    text = lowres_here("config", config, "--set", "train.steps=77").stdout
    lines = text.splitlines()
    for key in keys():
        assert any(line.removeprefix("# ").startswith(f"{key.partition('.')[2]} = ") for line in lines), key
    assert "steps = 77" in lines and "# seed = 0" in lines and "# head_dim = ..." in lines
    assert "# Width of the residual stream." in lines and max(map(len, lines)) <= 110
    # whoever takes the # from the keys that are comments changes nothing
    section, every = "", list[str]()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        section = line[1:-1] if line.startswith("[") else section
        key, _, value = line.removeprefix("# ").partition(" = ")
        known = f"{section}.{key}" in keys() and value != "..." and not after
        every += [f"{key} = {value}" if known else line]
    values = tomllib.loads("\n".join(every))
    assert set(values["schedule"]) > {"name", "min_ratio", "cycle_steps"}
    assert parse_config(values)[0] == load_config(config, ["train.steps=77"])[0]
