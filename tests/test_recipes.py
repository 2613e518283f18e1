"""Tuned runs in use: `lowres eval`, a sweep with scores of tasks, and the chat template of an export."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowres import metrics
from lowres.config_file import load_config, parse_config, to_toml
from lowres.data import ChatData, open_data
from lowres.data.batches import IGNORED, inputs_and_targets
from tests.helpers import lowres_here
from tests.test_tokenizers import llama3

WORDS = ("cat", "mat", "sat", "other", "return", "naive")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, chats, pairs, and a task of lm_eval."""
    folder = tmp_path_factory.mktemp("recipes")
    llama3().save(str(folder / "tokenizer.json"))
    draw = random.Random(0)
    rows = [(f"say {a} {b}", f"{a} {b}", f"{b} {a}") for a, b in (draw.sample(WORDS, 2) for _ in range(60))]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a, _ in rows
    ]
    pairs = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in rows]
    questions = [{"q": q, "choices": [a, b], "gold": 0} for q, a, b in rows[:3]]
    for name, found in (("chats", chats[9:]), ("val_chats", chats[:9]), ("pairs", pairs[9:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "val_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs[:9]))
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "order.yaml").write_text(
        f"""
task: order
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "q.jsonl"}}}, cache_dir: {folder / "lm_eval"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    )
    return folder


def config_of(place: Path, objective: str, **sections: dict[str, Any]) -> Path:
    form = {"sft": "chats", "dpo": "pairs"}[objective]
    values: dict[str, Any] = {
        "run": {"device": "cpu"},
        "model": {"dim": 32, "n_layers": 1, "n_heads": 2, "ffn_dim": 64},
        "memory": {"weights": "fp32", "compute": "fp32"},
        "data": {
            "source": str(place / f"{form}.jsonl"),
            "val_source": str(place / f"val_{form}.jsonl"),
            "tokenizer": str(place / "tokenizer.json"),
            "chat_template": "tulu",
            "seq_len": 64,
            "max_overlap": 1.0,
            "cache": str(place / "cache"),
        },
        "objective": {"name": objective},
        "optim": {"name": "adamw", "lr": 0.01},
        "schedule": {"name": "linear", "warmup_ratio": 0.1, "min_ratio": 0.0},
        "train": {"batch_tokens": 8 * 64, "epochs": 1.0},
        "log": {"progress": False},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    path = place / f"{objective}.toml"
    path.write_text(to_toml(parse_config(values)[0]))
    return path


def last_scores(run: Path) -> dict[str, float]:
    records = [one for one in metrics.read(run / "metrics.jsonl") if "val_loss" in one]
    return {key: value for key, value in records[-1].items() if key.startswith("val_")}


@pytest.fixture(scope="module")
def sft(place: Path) -> Path:
    lowres_here("train", config_of(place, "sft"), "--run", place / "sft")
    return place / "sft"


def test_preferences_are_judged_as_in_the_run(place: Path, sft: Path, tmp_path: Path) -> None:
    """And the reference that a run has lost, or never had for these pairs, is computed anew."""
    run = tmp_path / "dpo"
    lowres_here("train", config_of(place, "dpo"), "--init-from", sft, "--run", run)
    expected = last_scores(run)
    assert {"val_accuracy", "val_margin", "val_drift"} < expected.keys() and expected["val_margin"] != 0
    assert json.loads(lowres_here("eval", run, "--json").stdout) == expected
    (run / "baseline.json").unlink()
    for arguments in ([], ["--data", place / "val_pairs.jsonl"]):
        assert json.loads(lowres_here("eval", run, *arguments, "--json").stdout) == pytest.approx(expected)
    shown = lowres_here("eval", run, "--data", place / "val_pairs.jsonl").stdout
    assert shown.startswith(
        f"loss {expected['val_loss']:.4f}, accuracy {expected['val_accuracy']:.1%}, margin"
    )
    sft.rename(tmp_path / "elsewhere")
    refused = lowres_here("eval", run, code=2).stderr.splitlines()[-1]
    (tmp_path / "elsewhere").rename(sft)
    assert refused.startswith("lowres: run.init_from: ") and refused.endswith("no such folder); put it back")


def test_an_export_writes_the_ids_that_were_trained(place: Path, sft: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    lowres_here("export", sft, out)
    scores = json.loads(lowres_here("eval", sft, "--json").stdout)
    assert scores.pop("val_tokens") > 0 and scores == last_scores(sft)
    theirs = AutoTokenizer.from_pretrained(out)
    asked = load_config(place / "sft.toml")[0]
    data = open_data(asked.data, None, 0, False, asked.objective)
    assert isinstance(data, ChatData)
    rows = [json.loads(line) for line in (place / "val_chats.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        inputs, targets = inputs_and_targets(data.of_validation([number]).windows)
        whole = theirs.apply_chat_template(row["messages"], return_dict=False)
        trained = targets[targets != IGNORED].tolist()
        asked_for = theirs.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        assert inputs[0, : len(asked_for)].tolist() == asked_for
        assert trained == whole[len(asked_for) : len(asked_for) + len(trained)]
        assert trained[-1] == theirs.eos_token_id


def test_a_sweep_of_preferences_with_tasks(place: Path, sft: Path, tmp_path: Path, points_here: None) -> None:
    out, config = tmp_path / "sweep", config_of(place, "dpo", run={"init_from": str(sft)})
    arguments: list[object] = ["sweep", config, "--run", out, "--epochs", 1]
    arguments += ["--grid", "train.batch_tokens=512,1024"]
    arguments += ["--tasks", "order", "--include-path", place / "tasks"]
    shown = lowres_here(*arguments).stdout
    head, *rows = (line.split() for line in shown.splitlines()[:3])
    assert head[-5:] == ["loss", "accuracy", "order", "acc", "tokens/s"] and len(rows) == 2
    found = json.loads((out / "sweep.json").read_text())
    assert found["epochs"] == 1 and len(found["points"]) == 2
    for point in found["points"]:
        # every point has seen every pair once, up to the last batch
        assert point["steps"] == -(-51 // point["batch_sequences"])
        assert point["lr_over_batch"] == point["lr"] / point["batch_sequences"]
        assert point["val_accuracy"] == last_scores(Path(point["run"]))["val_accuracy"]
        assert point["tasks"]["order"]["acc"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    for name in ("loss", "lr_over_batch", "lr_over_batch_order"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    # nothing is computed again, and nothing of another length is compared
    times = [path.stat().st_mtime_ns for path in sorted(out.glob("*/tasks.json"))]
    assert len(times) == 2 and lowres_here(*arguments).stdout.splitlines()[0] == shown.splitlines()[0]
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*/tasks.json"))] == times
    refused = lowres_here(*arguments, "--epochs", 2, code=2).stderr
    assert "--epochs:" in refused and "was started with another length" in refused
