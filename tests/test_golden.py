"""What users rely on stays as it is, unless a diff of tests/golden and CHANGELOG.md say otherwise.

`make golden` writes the files anew.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from lowres import metrics
from lowres.cli import configs, main
from lowres.stopping import Left
from tests.helpers import lowres_here
from tests.surface import command_line, config_keys, records_of

GOLDEN = Path(__file__).parent / "golden"
Compare = Callable[[str, str], None]
Keys = dict[str, Any]

# a plan of this takes little time
SMALL: Keys = {
    "run.device": "cpu",
    "model.dim": 32,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.ffn_dim": 64,
    "model.vocab_size": 500,
    "data.seq_len": 32,
    "train.batch_tokens": 256,
    "train.micro_batch": 8,
    "train.steps": 4,
    "train.eval_every": 2,
    "train.eval_tokens": 512,
    "memory.weights": "fp32",
    "memory.compute": "fp32",
    "memory.kernels": "plain",
    "optim.name": "sgd",
    "log.progress": False,
}


def options(keys: Keys) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Compare:
    """Compare a text with a golden file, or write it."""

    def compare(name: str, found: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--write-golden"):
            path.write_text(found, "utf-8")
        before = path.read_text("utf-8")
        changes = difflib.unified_diff(before.splitlines(), found.splitlines(), "before", "now", lineterm="")
        hint = f"if this is meant, run `make golden`, and let CHANGELOG.md say so ({name})"
        assert before == found, "\n".join([*changes, hint])

    return compare


def test_the_command_line(golden: Compare) -> None:
    golden("command_line.txt", command_line())


def test_the_keys_of_a_config(golden: Compare) -> None:
    golden("config_keys.txt", config_keys())


@pytest.fixture(scope="module")
def place(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty config, one with a mixture, and texts, chats and pairs."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "empty.toml").write_text("")
    (folder / "more.txt").write_text("\n".join(f"line {i} of a text" for i in range(2000)))
    parts = (
        f'[[data.mixture]]\nsource = "{path}"\nweight = 1.0\n' for path in (prepared, folder / "more.txt")
    )
    (folder / "mixture.toml").write_text("".join(parts))
    questions = [(f"say {i}", f"{i}", f"{i + 1}") for i in range(60)]
    for name, rows in {
        "chats": [{"prompt": q, "completion": a} for q, a, _ in questions],
        "pairs": [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in questions],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def runs(place: Path, prepared: Path) -> dict[str, Path]:
    """A run of every kind."""
    found: dict[str, Path] = {}

    def train(name: str, keys: Keys, *more: object, config: str = "empty", code: int = 0) -> None:
        found[name] = place / name
        given = options(SMALL | {"data.cache": str(place / "cache")} | keys)
        lowres_here("train", place / f"{config}.toml", "--run", found[name], *more, *given, code=code)

    text = {"data.source": str(prepared)}
    train("text", text | {"log.update_every": 2, "log.sample_tokens": 4, "train.sample_every": 2})
    lowres_here("train", place / "text", "--resume", *options({"train.steps": 6, "optim.lr": 0.009}))
    adapters = {"enabled": True, "rank": 4, "start_step": 2, "cycle_steps": 2, "rewarmup_steps": 1}
    train("relora", text | {f"relora.{key}": value for key, value in adapters.items()})
    train("mixture", {}, config="mixture")
    train("stopped", text | {"train.max_minutes": 1e-9})
    train("ruined", text | {"health.patience": 1, "optim.lr": 1e30}, code=1)
    for name, source in (("sft", "chats"), ("dpo", "pairs")):
        keys = {"data.source": str(place / f"{source}.jsonl"), "data.chat_template": "tulu"}
        train(name, keys | {"objective.name": name}, "--init-from", place / "text")
    return found


def test_the_records_of_runs(golden: Compare, runs: dict[str, Path]) -> None:
    golden("records.txt", records_of(runs))


class Lost(io.StringIO):
    """A terminal that is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def code_of(*arguments: object) -> int:
    """How the command line ends."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            return main([*map(str, arguments)])
        except SystemExit as end:  # of argparse
            return int(end.code or 0)


def test_the_exit_codes(
    golden: Compare, runs: dict[str, Path], place: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How each kind of ending is told to a script. What is damaged or lost is made so here."""
    text, empty, missing = runs["text"], place / "empty.toml", place / "nothing"
    small = options(SMALL | {"data.source": str(prepared)})
    damaged = place / "damaged"
    shutil.copytree(text, damaged)
    weights = max((damaged / "checkpoints").iterdir()) / "head.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (place / "blank.txt").write_text("\n")
    other = options({"model.dim": 64, "train.steps": 9})
    little = [*small, "--set", "memory.budget_gib=1e-6"]
    cases: list[tuple[str, list[object]]] = [
        ("help", ["train", "--help"]),
        ("no command, which prints help", []),
        ("a run that is finished already", ["train", text, "--resume"]),
        ("a run that was asked to stop, and has saved", ["train", runs["stopped"], "--resume"]),
        ("checkpoints that are as they were written", ["checkpoint", "verify", text]),
        ("a damaged checkpoint", ["checkpoint", "verify", damaged]),
        ("a run whose numbers are ruined", ["train", runs["ruined"], "--resume"]),
        ("an unknown command", ["trian"]),
        ("an unknown option", ["train", empty, "--steps", 3]),
        ("an option that needs another value", ["sample", text, "--tokens", "many"]),
        ("an argument is missing", ["train"]),
        ("no shell to complete for", ["completion"]),
        ("no such config", ["train", place / "nothing.toml"]),
        ("a run instead of a config", ["train", text]),
        ("an unknown key", ["plan", empty, "--set", "model.width=3"]),
        ("a value that is not allowed", ["plan", empty, "--set", "optim.name=best"]),
        ("keys that contradict each other", ["plan", empty, "--set", "data.seq_len=100"]),
        ("no such text", ["train", empty, "--run", missing, "--set", "data.source=nowhere.txt"]),
        ("a text without a word", ["data", "prepare", place / "blank.txt", missing]),
        ("no such device", ["train", empty, *small, "--run", missing, "--set", "run.device=tpu"]),
        ("a run is there already", ["train", empty, *small, "--run", text]),
        ("no run to resume", ["train", empty, *small, "--run", missing, "--resume"]),
        ("a resumed run with another model", ["train", text, "--resume", *other]),
        ("no such checkpoint", ["export", text, missing, "--checkpoint", 3]),
        ("what would be overwritten", ["export", text, place / "empty.toml"]),
        ("no model to import", ["import", place, missing]),
        ("no model to sample from", ["sample", place]),
        ("a folder that cannot be written", ["train", empty, *small, "--run", empty / "run"]),
        ("a run that does not fit", ["train", empty, *little, "--run", missing]),
        ("a plan that does not fit", ["plan", empty, *little]),
    ]
    table = [(what, code_of(*arguments)) for what, arguments in cases]
    assert not missing.exists()

    for name, error in (("Ctrl-C", KeyboardInterrupt()), ("SIGTERM", Left(signal.SIGTERM))):
        with monkeypatch.context() as patch:
            patch.setattr(configs, "run_config", Mock(side_effect=error))
            table.append((f"{name} before a run has begun", code_of("config")))
    with redirect_stdout(Lost()):
        table.append(("what it printed is lost", main(["config"])))
    golden("exit_codes.txt", "".join(f"{code:3}  {what}\n" for what, code in table))


LR = 0.005
CURVES: dict[str, Keys] = {
    "fp32": {"memory.weights": "fp32", "optim.name": "adamw"},
    "int8": {"memory.weights": "int8", "optim.name": "apollo-mini"},
    "int8 products": {
        "memory.weights": "int8",
        "memory.compute": "int8",
        "memory.kernels": "auto",
        "optim.name": "apollo-mini",
    },
}
# Processors add in another order, by the width of their registers, so fp32 sums differ in their last bits.
# Where such a bit decides how a weight is rounded to a code, the loss changes by some 1e-5; before INT8
# products every activation is rounded. The products are exact themselves, with VNNI or AMX too. Measured with
# instructions from SSE to AVX-512 and six seeds: at most 2e-8, 9e-6 and 1.3e-4. A learning rate that is 1 %
# higher changes losses by 4e-3.
TOLERANCES = {"fp32": 1e-6, "int8": 1e-4, "int8 products": 1e-3}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids in which each follows from the one before it, seven times out of eight."""
    ids, state = [1], 1
    for _ in range(20_000):
        state = (1103515245 * state + 12345) % (1 << 31)
        noise = state >> 16
        ids.append((5 * ids[-1] + 3) % 64 if noise % 8 else noise // 8 % 64)
    path = tmp_path_factory.mktemp("numbers") / "ids.npy"
    np.save(path, np.array(ids, np.uint16))
    return path


def losses(numbers: Path, folder: Path, keys: Keys) -> list[float]:
    """Of ten steps on these ids."""
    (folder / "empty.toml").write_text("")
    here = {"data.source": str(numbers), "data.vocab_size": 64, "data.cache": str(folder / "cache")}
    length = {"model.vocab_size": 64, "model.n_layers": 2, "train.steps": 10, "train.eval_every": 0}
    given = options({**SMALL, **here, **length, **keys})
    lowres_here("train", folder / "empty.toml", "--run", folder / "run", *given)
    return [record["loss"] for record in metrics.read(folder / "run" / "metrics.jsonl")]


def test_short_loss_curves(golden: Compare, numbers: Path, tmp_path: Path) -> None:
    found = {}
    for name, keys in CURVES.items():
        (folder := tmp_path / name).mkdir()
        found[name] = losses(numbers, folder, {**keys, "optim.lr": LR})
        assert len(found[name]) == 10 and found[name][-1] < found[name][0] - 0.8
    rounded = {name: [round(loss, 7) for loss in values] for name, values in found.items()}
    if not same(found, frozen()):  # otherwise the file stays to the digit
        golden("losses.json", json.dumps(rounded, indent=1) + "\n")


def frozen() -> dict[str, list[float]]:
    values: dict[str, list[float]] = json.loads((GOLDEN / "losses.json").read_text("utf-8"))
    return values


def same(found: dict[str, list[float]], before: dict[str, list[float]]) -> bool:
    return all(
        values == pytest.approx(before.get(name), rel=0, abs=TOLERANCES[name])
        for name, values in found.items()
    )


def test_the_tolerance_is_less_than_what_a_little_change_makes(numbers: Path, tmp_path: Path) -> None:
    name = max(TOLERANCES, key=TOLERANCES.__getitem__)
    found = losses(numbers, tmp_path, {**CURVES[name], "optim.lr": 1.01 * LR})
    apart = max(abs(now - before) for now, before in zip(found, frozen()[name], strict=True))
    assert apart > 3 * TOLERANCES[name]
