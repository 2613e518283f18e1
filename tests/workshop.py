"""What the pages of tests/documented.py start from: runs, models and data, each made once, and small.

KINDS has all of them. A config is made small and keeps its features.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lowres.config_file import is_list_of_tables, overridden
from tests.commands import HERE, PageError, lowres

# what configs/smoltulu_*.toml say of their model
LIKE_SMOLLM2 = ("model.tie_embeddings=true", "model.rope_theta=130000.0", "model.max_positions=8192")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Workshop:
    """Makes what pages start from, each thing once, and small."""

    def __init__(self, folder: Path, text: Path) -> None:
        """text: a folder with some files."""
        self.folder, self.text = folder, text
        self._made: dict[str, Path] = {}

    def make(self, kind: str) -> Path:
        """kind: one of KINDS, or a shipped config. A config and a run may have other settings: run --set
        schedule.name=wsd."""
        if kind not in self._made:
            name, *changes = kind.split(" --set ")
            name = "configs/tiny.toml" if name == "config" else name
            if name.startswith("configs/"):
                there = self.folder / str(len(self._made)) / Path(name).name
                self._made[kind] = self.shrink((HERE / name).read_text("utf-8"), there, changes)
            elif name not in KINDS:
                raise PageError(f"[has]: no kind {name!r}; known are config, configs/..., {', '.join(KINDS)}")
            elif name == "run":
                self._made[kind] = self._run(changes)
            else:
                self._made[kind] = KINDS[name](self)
        return self._made[kind]

    def new_page(self, has: Mapping[str, str]) -> Path:
        """A folder like a clone, with what the page begins with: kinds by name."""
        at = self.folder / f"page-{len(list(self.folder.glob('page-*')))}"
        at.mkdir()
        for path in HERE.glob("configs/*.toml"):
            name = f"configs/{path.name}"
            (at / "configs").mkdir(exist_ok=True)
            shutil.copy(self.make(name), at / name)
        for name, kind in has.items():
            made, there = HERE / name if kind == "shipped" else self.make(kind), at / name
            there.parent.mkdir(parents=True, exist_ok=True)
            if made.is_dir():
                shutil.copytree(made, there)
            else:
                shutil.copy(made, there)
        return at

    def shrink(self, text: str, to: Path, changes: Sequence[str] = ()) -> Path:
        """Write a config whose run takes a moment, with the features of this one, and then with changes."""
        values = tomllib.loads(text)
        values.get("run", {}).pop("device", None)
        model, data, train = (values.setdefault(name, {}) for name in ("model", "data", "train"))
        for key in ("preset", "vocab_size", "n_kv_heads", "head_dim"):
            model.pop(key, None)
        if not (values.get("run", {}).get("init_from")):
            model |= {"dim": 32, "n_layers": 2, "n_heads": 2, "ffn_dim": 64}
        objective = values.get("objective", {}).get("name", "pretrain")
        known = {"pretrain": "text", "sft": "chats", "dpo": "pairs"}
        parts = data.get("mixture", [])
        for part, file in zip(parts, sorted(self.text.iterdir()), strict=False):
            part["source"] = str(self.folder / "parts" / file.stem)
            Path(part["source"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, part["source"])
        if not parts and not Path(data.get("source", "stdlib")).exists():
            data["source"] = str(self.make(known[objective]))
        data.pop("val_source", None)
        data |= {"seq_len": 64, "vocab_size": 400, "cache": str(self.folder / "cache")}
        for key in ("tokens", "epochs", "micro_batch"):
            train.pop(key, None)
        train |= {
            "steps": 6,
            "batch_tokens": 256,
            "eval_every": 3,
            "eval_tokens": 1024,
            "checkpoint_every": 3,
        }
        if values.get("relora", {}).get("enabled"):
            values["relora"] |= {"rank": 4, "start_step": 2, "cycle_steps": 2, "rewarmup_steps": 1}
        if values.get("log", {}).get("sample_tokens", 1):
            values.setdefault("log", {})["sample_tokens"] = 5
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(_to_toml(overridden(values, list(changes))), "utf-8")
        return to

    def _text(self) -> Path:
        return self.text

    def _data(self) -> Path:
        return self._done("data", "prepare", self.make("text"), at="data", more=["--vocab-size", "400"])

    def _chats(self) -> Path:
        rows = [{"messages": [_says("user", q), _says("assistant", a)]} for q, a, _ in _questions()]
        return self._rows("chats.jsonl", rows)

    def _pairs(self) -> Path:
        return self._rows(
            "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in _questions()]
        )

    def _run(self, changes: Sequence[str] = ()) -> Path:
        options = [word for change in changes for word in ("--set", change)]
        return self._done("train", self.make("config"), *options, "--run", at=f"run-{len(self._made)}")

    def _model(self) -> Path:
        run = self._run(LIKE_SMOLLM2)
        folder = self._done("export", run, at="model")
        shutil.rmtree(folder / "lowres")  # as if another program had written it
        return folder

    def _chat_model(self) -> Path:
        folder = self.folder / "chat-model"
        shutil.copytree(self.make("model"), folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    def _sweep(self) -> Path:
        grid = ["--grid", "optim.lr=0.001,0.002", "--tokens", "512"]
        return self._done("sweep", self.make("config"), *grid, "--run", at="sweep")

    def _tasks(self) -> Path:
        folder = self.folder / "tasks"
        folder.mkdir()
        row = {"country": "Chad", "cities": ["Rome", "Lima"], "answer": 1}
        (folder / "capitals.jsonl").write_text(json.dumps(row) + "\n")
        files = {"data_files": {"test": str(folder / "capitals.jsonl")}}
        task = {"task": "capitals", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        task |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{country}}",
            "doc_to_target": "{{answer}}",
        }
        (folder / "capitals.yaml").write_text(yaml.safe_dump(task | {"doc_to_choice": "{{cities}}"}))
        return folder

    def _tuned(self, objective: str) -> Path:
        config = self.make(f"configs/smoltulu_{objective}.toml")
        start = self.make("model" if objective == "sft" else "sft run")
        return self._done("train", config, "--init-from", start, "--run", at=f"{objective}-run")

    def _rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.folder / name

    def _done(self, *words: object, at: str, more: list[str] | None = None) -> Path:
        """What a command writes to the folder `at`."""
        code, said = lowres([*map(str, words), str(self.folder / at), *(more or [])], "")
        if code:
            raise PageError(f"{words} ended with {code}\n{said}")
        return self.folder / at


def _says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _questions() -> Iterator[tuple[str, str, str]]:
    """A question, its answer, and a wrong one."""
    words = ("red", "blue", "green", "small", "large", "old", "new", "cold")
    for first, second in itertools.permutations(words, 2):
        yield f"say {first} then {second}", f"{first} {second}", f"{second} {first}"


def _to_toml(values: dict[str, Any]) -> str:
    lines = []
    for section, keys in values.items():
        tables = {key: rows for key, rows in keys.items() if is_list_of_tables(rows)}
        lines += [
            f"[{section}]",
            *(f"{key} = {json.dumps(value)}" for key, value in keys.items() if key not in tables),
        ]
        for key, rows in tables.items():
            for row in rows:
                lines += [
                    f"[[{section}.{key}]]",
                    *(f"{name} = {json.dumps(value)}" for name, value in row.items()),
                ]
    return "\n".join(lines) + "\n"


KINDS: dict[str, Callable[[Workshop], Path]] = {
    "text": Workshop._text,  # a folder with files
    "data": Workshop._data,  # the same, prepared
    "chats": Workshop._chats,  # JSON lines
    "pairs": Workshop._pairs,
    "run": Workshop._run,  # trained on the text
    "sweep": Workshop._sweep,  # of two runs
    "tasks": Workshop._tasks,  # of lm-evaluation-harness: "capitals", with a question
    "model": Workshop._model,  # a Hugging Face folder
    "chat model": Workshop._chat_model,  # with a chat template
    "sft run": lambda shop: shop._tuned("sft"),
    "dpo run": lambda shop: shop._tuned("dpo"),
}
