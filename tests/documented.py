"""README.md and docs/ as a reader uses them: commands are run, Python is executed, configs are read.

A page is run in a folder of its own that looks like a clone: `configs/` has every shipped config, made small.
What else the page needs, and what is too large for a test, stands in tests/documents/<page>.toml:

[has]      name = kind       what the reader has when the page begins: a key of `Workshop.KINDS`, a config, or
                             "shipped" for a file of the project as it is
[instead]  words = words     what stands for a command, or for words of one, also behind =; "" for nothing. A
                             word in capitals is also found inside others: OUT.gguf
[checked]  command = reason  what cannot be run. It is checked as far as that goes, see `check`. A command
                             that ends with * stands for all that begin so
[exits]    command = code    other exit codes than 0; a list if it depends on the machine
[typed]    command = text    what the reader types; otherwise the input ends at once
[printed]  text = text       what a small run prints instead of a part of a line; "" for nothing
[python]   before = code     what the first Python block finds

An entry that nothing uses is an error. In a page

```sh        every command is run, or named in [checked]. [--option X] may be given, so it is given. one|other
             in a command stands for two commands
```output    what the block before has printed: each line is there, with any numbers and paths; ... for lines
             left out. With its numbers: ```output exact
```toml      is read as a part of a config. With a name (```toml my.toml) it is also that file, made small
```python    is executed; all blocks of a page together are one program
```yaml, ```text, ```json   with a name, the block is that file; without one, nothing is done with it
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import yaml

from lowres.cli import main
from lowres.cli.parser import make_parser
from lowres.config_file import is_list_of_tables, load_config, overridden, parse_config, source_config
from lowres.errors import UserError

HERE = Path(__file__).parent.parent.absolute()
TABLES = HERE / "tests" / "documents"
# programs of the system that only touch the folder of the page
HARMLESS = {"cat", "cp", "echo", "grep", "head", "ls", "mkdir", "mv", "printf", "tail", "wc"}
LANGUAGES = {"sh", "output", "toml", "python", "yaml", "text", "json"}
# what configs/smoltulu_*.toml say of their model
LIKE_SMOLLM2 = ("model.tie_embeddings=true", "model.rope_theta=130000.0", "model.max_positions=8192")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COMMANDS = ("lowres ", "make ", "pip ", "python ", "git ", "hf ", "torchrun ")


class PageError(AssertionError):
    """A page, or its table, says what is not so."""


@dataclass(frozen=True)
class Block:
    """line: of its first line in the page, from 1. name: of the file that it is, or ""."""

    line: int
    language: str
    name: str
    text: str


@dataclass
class Table:
    """What tests/documents/ says of a page; see above."""

    has: dict[str, str] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)
    exits: dict[str, int | list[int]] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    python: dict[str, str] = field(default_factory=dict)
    used: set[tuple[str, str]] = field(default_factory=set)

    def find(self, section: str, command: str) -> Any:
        """The value that a section has for a command, or None."""
        for key, value in getattr(self, section).items():
            if key == command or (section == "checked" and key[-1:] == "*" and command.startswith(key[:-1])):
                self.used.add((section, key))
                return value
        return None

    def replaced(self, command: str) -> str:
        """The command with what stands for its words."""
        whole = self.find("instead", command)
        if whole is not None:
            return str(whole)
        for key, value in self.instead.items():
            edges = (r"\b", r"\b") if re.fullmatch("[A-Z_]+", key) else (r"(?<![^\s=])", r"(?!\S)")
            found = re.sub(re.escape(key).join(edges), lambda _, value=value: value, command)  # type: ignore[misc]
            if found != command:
                self.used.add(("instead", key))
            command = found
        return command

    def expected(self, line: str) -> str:
        """What a test expects instead of a line of output."""
        for key, value in self.printed.items():
            if key in line:
                self.used.add(("printed", key))
                line = line.replace(key, value) if value else ""
        return line

    def unused(self, text: str) -> list[str]:
        """Entries that nothing has used. text: of all blocks."""
        sections = ("instead", "checked", "exits", "typed", "printed", "python")
        every = {(section, key) for section in sections for key in getattr(self, section)}
        text = "\n".join([text, *self.instead.values()])
        every |= {("has", key) for key in self.has if key not in text}
        return [f'[{section}] "{key}"' for section, key in sorted(every - self.used)]


def table_of(page: str) -> Table:
    """The table of a page, such as "README" or "docs/data"; empty if it needs none."""
    path = TABLES / f"{Path(page).stem}.toml"
    return Table(**tomllib.loads(path.read_text("utf-8"))) if path.exists() else Table()


def pages() -> list[str]:
    """README.md and the files of docs/, from the folder of the project."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (HERE / "docs").glob("*.md"))]


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page. Raises PageError for one that nobody would look at."""
    found: list[Block] = []
    lines, start, language, name = text.split("\n"), 0, "", ""
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            if not start and line.startswith("    ") and line.lstrip().startswith(COMMANDS):
                raise PageError(f"{page}:{number}: a command in an indented block; write it as ```sh")
        elif not start:
            start, (language, _, name) = number + 1, line.lstrip().removeprefix("```").partition(" ")
            if language not in LANGUAGES:
                raise PageError(
                    f"{page}:{number}: a block of {language!r}; known are {', '.join(sorted(LANGUAGES))}"
                )
        else:
            inside = textwrap.dedent("\n".join(lines[start - 1 : number - 1]))
            found.append(Block(start, language, name.strip(), inside + "\n"))
            start = 0
    if start:
        raise PageError(f"{page}:{start - 1}: a block that does not end")
    return found


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """(line, command) of a sh block: comments left out, lines that go on joined, optional parts taken."""
    number, whole = block.line, ""
    for line in block.text.split("\n"):
        whole += line.rstrip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        for command in commands_of(whole):
            yield number, command
        number, whole = number + whole.count("\n") + 1, ""


def commands_of(line: str) -> Iterator[str]:
    """The commands of a line, with their optional parts, and each for its alternatives."""
    for part in _parts(line):
        yield from _alternatives(re.sub(r"\[(-[^\]]*)\]", r"\1", part))


def _parts(line: str) -> Iterator[str]:
    """The commands of a line, between ; and &&, without a comment. Quotes protect."""
    part, quote = "", ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            break
        elif letter == ";" or line[i : i + 2] == "&&" or line[i - 1 : i + 1] == "&&":
            if part.strip():
                yield " ".join(part.split())
            part = ""
            continue
        part += letter
    if part.strip():
        yield " ".join(part.split())


def _alternatives(command: str) -> Iterator[str]:
    words = [
        word.split("|") if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else [word] for word in command.split(" ")
    ]
    for chosen in itertools.product(*words):
        yield " ".join(chosen)


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
            elif name not in self.KINDS:
                raise PageError(
                    f"[has]: no kind {name!r}; known are config, configs/..., {', '.join(self.KINDS)}"
                )
            elif name == "run":
                self._made[kind] = self._run(changes)
            else:
                self._made[kind] = self.KINDS[name](self)
        return self._made[kind]

    def new_page(self, table: Table) -> Path:
        """A folder like a clone, and with what the table says."""
        at = self.folder / f"page-{len(list(self.folder.glob('page-*')))}"
        at.mkdir()
        for path in HERE.glob("configs/*.toml"):
            name = f"configs/{path.name}"
            (at / "configs").mkdir(exist_ok=True)
            shutil.copy(self.make(name), at / name)
        for name, kind in table.has.items():
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
        code, said = _lowres([*map(str, words), str(self.folder / at), *(more or [])], "")
        if code:
            raise PageError(f"{words} ended with {code}\n{said}")
        return self.folder / at

    KINDS: ClassVar[dict[str, Callable[[Workshop], Path]]] = {
        "text": _text,  # a folder with files
        "data": _data,  # the same, prepared
        "chats": _chats,  # JSON lines
        "pairs": _pairs,
        "run": _run,  # trained on the text
        "sweep": _sweep,  # of two runs
        "tasks": _tasks,  # of lm-evaluation-harness: "capitals", with a question
        "model": _model,  # a Hugging Face folder
        "chat model": _chat_model,  # with a chat template
        "sft run": lambda self: self._tuned("sft"),
        "dpo run": lambda self: self._tuned("dpo"),
    }


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


class Page:
    """A page that is used, in a folder that is the current one."""

    def __init__(self, page: str, text: str, table: Table, workshop: Workshop) -> None:
        self.page, self.table, self.workshop = page, table, workshop
        self.blocks = blocks(page, text)
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.said = ""  # by the last block

    def use(self) -> None:
        """Use every block, in order. Raises PageError with page and line of what is not so."""
        for block in self.blocks:
            if block.language == "output":
                self._compare(block)
                continue
            if block.name and block.language != "python":
                self._write(block)
            if block.language == "sh":
                self.said = ""
                for line, command in commands(block):
                    self._told(line, command, lambda command=command: self._command(command))  # type: ignore[misc]
            elif block.language == "python":
                self._told(block.line, "python", lambda block=block: self._python(block))  # type: ignore[misc]
            elif block.language == "toml":
                self._told(block.line, "toml", lambda block=block: parse_config(tomllib.loads(block.text)))  # type: ignore[misc]
            elif block.language == "yaml":
                yaml.safe_load(block.text)
        if unused := self.table.unused("\n".join(block.text for block in self.blocks)):
            raise PageError(
                f"tests/documents/{Path(self.page).stem}.toml: used by nothing: {', '.join(unused)}"
            )

    def _told(self, line: int, what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except (PageError, UserError, ValueError) as error:
            raise PageError(f"{self.page}:{line}: {what}\n{error}") from None

    def _write(self, block: Block) -> None:
        path = Path(block.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "toml":
            self.workshop.shrink(block.text, path)
        else:
            path.write_text(block.text, "utf-8")

    def _command(self, command: str) -> None:
        if self.table.find("checked", command) is not None:
            check(_split(command))
            return
        codes = self.table.find("exits", command)
        expected = [codes or 0] if not isinstance(codes, list) else codes
        typed = str(self.table.find("typed", command) or "")
        instead = self.table.replaced(command)
        if instead:
            code, said = run(_split(instead), typed)
            self.said += said
            if code not in expected:
                raise PageError(f"({instead}) ended with {code}\n{said}")

    def _python(self, block: Block) -> None:
        said = io.StringIO()
        before = self.table.find("python", "before") if "__file__" not in self.names else ""
        self.names["__file__"] = self.page
        with redirect_stdout(said), redirect_stderr(said):
            for origin, code in (
                (f"before {self.page}", before or ""),
                (self.page, "\n" * (block.line - 1) + block.text),
            ):
                try:
                    exec(compile(code, origin, "exec"), self.names)
                except Exception:
                    raise PageError(f"{traceback.format_exc()}\n{said.getvalue()}") from None
        self.said = said.getvalue()

    def _compare(self, block: Block) -> None:
        form = " ".join if block.name == "exact" else _numberless
        said = {form(line.split()) for line in self.said.splitlines()}
        for number, line in enumerate(block.text.splitlines(), block.line):
            expected = form(self.table.expected(line).split())
            if expected not in ("", "...") and expected not in said:
                raise PageError(f"{self.page}:{number}: this was not printed: {expected}\nbut:\n{self.said}")


def _numberless(words: Iterable[str]) -> str:
    """A line of output without what differs from run to run: numbers with their unit, and paths."""
    line = re.sub(r"(?<!\S)[\w.-]*/[^\s:;,]+", "PATH", " ".join(words))
    return re.sub(r"[\d.,]*\d([eE][+-]\d+)?( ?[kMG]i?B?\b| billion)?", "#", line)


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise PageError(f"no command of a shell: {error}") from None


def run(words: list[str], typed: str = "") -> tuple[int, str]:
    """(exit code, output) of a command. `lowres` runs in this process. typed: its input."""
    if words[:3] == ["python", "-m", "lowres"]:
        words = words[2:]
    if words[0] == "cd":
        os.chdir(words[1])
        return 0, ""
    if words[0] in HARMLESS:
        command = " ".join(
            word if re.fullmatch(r"[\w./*?~=:+>-]+", word) else shlex.quote(word) for word in words
        )
        done = subprocess.run(
            ["bash", "-c", command], input=typed, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr
    if words[0] != "lowres":
        raise PageError(
            f"{words[0]} is not run in a test: name the command in [checked] or [instead] of the page's table"
        )
    if ">" not in words:
        return _lowres(words[1:], typed)
    at = words.index(">")
    code, said = _lowres(words[1:at], typed, to=Path(words[at + 1]))
    return code, said


def _lowres(words: list[str], typed: str, to: Path | None = None) -> tuple[int, str]:
    """to: a file for what goes to stdout."""
    said = io.StringIO()
    out = io.StringIO() if to else said
    with redirect_stdout(out), redirect_stderr(said), mock.patch("sys.stdin", io.StringIO(typed)):
        try:
            code = main(words)
        except SystemExit as end:  # of the parser
            code = int(end.code or 0)
    if to:
        to.write_text(out.getvalue(), "utf-8")
    return code, said.getvalue()


def check(words: list[str]) -> None:
    """Look at a command that is not run, as far as that goes: options and configs of lowres, targets of make
    and the lowres commands that they run, options of scripts, extras of packages. Raises PageError, or
    UserError."""
    first = words[0]
    if first == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=HERE, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise PageError(f"make -n ended with {done.returncode}\n{done.stderr}")
        for line in done.stdout.replace("\\\n", " ").splitlines():
            if re.match(r"\S*bin/lowres ", line):
                check_lowres(shlex.split(line)[1:])
    elif first == "pip" or words[1:3] == ["-m", "pip"]:
        known = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in (extra for word in words for extra in re.findall(r"^(?:lowres|\.)\[([^\]]+)\]$", word)):
            if wrong := set(asked.split(",")) - known.keys():
                raise PageError(f"pyproject.toml has no extra {', '.join(sorted(wrong))}")
    elif first == "python" and words[1].startswith("scripts/"):
        check_script(words[1], words[2:])
    elif "lowres" in words:  # also behind torchrun
        end = words.index(">") if ">" in words else None
        check_lowres(words[words.index("lowres") + 1 : end])


def check_lowres(words: list[str]) -> None:
    """Parse a command, and read its config with what --set changes."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            parsed = make_parser().parse_args(words)
        except SystemExit as end:
            if end.code:
                raise PageError(said.getvalue()) from None
            return
    config = getattr(parsed, "config", None)
    if config is not None and not config.is_dir():
        load_config(HERE / config if (HERE / config).exists() else config, parsed.overrides)
    elif getattr(parsed, "source", None):
        source_config(parsed.source, parsed.set)


class _Parsed(BaseException):
    """A script has understood its arguments."""


def check_script(script: str, words: list[str]) -> None:
    """Let a script parse its arguments, and stop it then."""
    path, said, parse = HERE / script, io.StringIO(), argparse.ArgumentParser.parse_args
    if not path.exists():
        raise PageError(f"there is no {script}")
    if "parse_args" not in path.read_text("utf-8"):
        if words:
            raise PageError(f"{script} takes no arguments")
        return

    def stop(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
        parse(parser, *given, **more)
        raise _Parsed

    with (
        redirect_stdout(said),
        redirect_stderr(said),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch("sys.argv", [str(path), *words]),
        mock.patch("sys.path", [str(path.parent), str(HERE), *sys.path]),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Parsed:
            return
        except SystemExit:
            pass
    raise PageError(f"{script} does not take these arguments\n{said.getvalue()}")
