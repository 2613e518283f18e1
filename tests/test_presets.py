"""`lowres presets`: its rows are plans and predictions as they are today; and what the docs make of them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lowres import presets
from lowres.catalogue import CONSUMER, Planned, read_planned
from lowres.catalogue.planned import Everything
from lowres.cli import main
from lowres.config_file import load_config
from tests.helpers import lowres_here

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import write_presets  # noqa: E402


@pytest.fixture(scope="module")
def found() -> Everything:
    return read_planned()


def test_every_card_and_size_is_there(found: Everything) -> None:
    pairs = [(row.card, row.preset) for row in found.planned]
    assert pairs == [(card, preset) for card in CONSUMER for preset in write_presets.MODELS]
    assert {row.preset for row in found.measured} == {"60m", "130m"} and "EPYC" in found.cpu
    fits = {card: {row.preset for row in found.planned if row.card == card and row.int8} for card in CONSUMER}
    assert "7b" in fits["RTX 4060"] and "13b" not in fits["RTX 4060"] and "13b" in fits["RTX 4090"]


@pytest.mark.parametrize("card, preset", [("RTX 4060", "1b"), ("RTX 3060", "13b")])
def test_rows_are_up_to_date(found: Everything, card: str, preset: str) -> None:
    """Others follow from the same function; `scripts/write_presets.py --check` compares all of them."""
    (kept,) = (row for row in found.planned if (row.card, row.preset) == (card, preset))
    now = write_presets.planned(card, preset)
    if kept.int8 is None:
        assert now == kept
    else:
        assert now.int8 == pytest.approx(kept.int8, rel=0.01)
        assert now.gpu_gib == pytest.approx(kept.gpu_gib, abs=0.2)
        assert replace(now, int8=0, bf16=0, gpu_gib=0, host_gib=0) == (
            replace(kept, int8=0, bf16=0, gpu_gib=0, host_gib=0)
        )


def test_the_docs_have_the_same_tables(found: Everything) -> None:
    text = (ROOT / "docs" / "expectations.md").read_text("utf-8")
    assert text == write_presets.with_tables(text, found)


def test_cells() -> None:
    row = Planned("1b", 1_000_000_000, "RTX 4090", 10.04, 0.0, 20_000.0, 10_000.0)
    # 20 billion tokens at 20,000/s are 10^6 s
    assert presets.cells(row) == [
        *("1b", "1 billion", "10.0", "0.0", "20,000 to 10,000", "0.58 to 1.2 days", "12 to 23 days")
    ]
    assert presets.cells(replace(row, bf16=None))[4:] == ["20,000", "0.58 days", "12 days"]
    assert presets.cells(replace(row, bf16=100.0))[6] == "12 days to 6.3 years"
    assert presets.cells(replace(row, int8=None, bf16=None))[2] == "does not fit"


def test_the_command(found: Everything, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    everything = capsys.readouterr().out
    assert all(f"\n{card}, " in f"\n{everything}" for card in CONSUMER) and "measured on a CPU" in everything
    assert main(["presets", "--card", "4070"]) == 0
    one = capsys.readouterr().out
    assert "RTX 4070, 12 GB" in one and "RTX 3060" not in one and "configs/llama_7b_12gb.toml" in one
    # what it says to type is a config
    words = next(line for line in one.splitlines() if line.startswith("any of them")).split()
    values = [words[i + 1].replace("NAME", "7b") for i, word in enumerate(words) if word == "--set"]
    config, _ = load_config(ROOT / words[words.index("train") + 1], values)
    assert (config.model.dim, config.memory.budget_gib, config.memory.host_budget_gib) == (4096, 10.5, 28.0)
    assert all((ROOT / path).exists() for path in presets.SHIPPED.values())
    rows = json.loads(lowres_here("presets", "--card", "rtx 4070", "--json").stdout)
    assert rows == [vars(row) for row in found.planned if row.card == "RTX 4070"]
    assert "use one of RTX 3060" in lowres_here("presets", "--card", "x", code=2).stderr
    assert "lowres plan" in lowres_here("presets", "--card", "H100", code=2).stderr


def test_presets_are_there_at_once() -> None:
    code = "import sys; from lowres.cli import main; main(['presets']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
