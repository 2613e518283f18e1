"""README.md and docs/ as a reader uses them: commands are run, Python is executed, configs are read.

A page is run in a folder of its own that looks like a clone: `configs/` has every shipped config, made small.
What else the page needs, and what is too large for a test, stands in tests/documents/<page>.toml:

[has]      name = kind       what the reader has when the page begins: a kind of `tests.workshop`, a config,
                             or "shipped" for a file of the project as it is
[instead]  words = words     what stands for a command, or for words of one, also behind =; "" for nothing. A
                             word in capitals is also found inside others: OUT.gguf
[checked]  command = reason  what cannot be run; it is checked as far as that goes (`tests.commands.check`). A
                             command that ends with * stands for all that begin so
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

import io
import re
import textwrap
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowres.config_file import parse_config
from lowres.errors import UserError
from tests.commands import HERE, PageError, check, commands_of, run, split
from tests.workshop import Workshop

TABLES = HERE / "tests" / "documents"
LANGUAGES = {"sh", "output", "toml", "python", "yaml", "text", "json"}
COMMANDS = ("lowres ", "make ", "pip ", "python ", "git ", "hf ", "torchrun ")


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
        text = "\n".join([text, *self.instead.values(), *self.python.values()])
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
            check(split(command))
            return
        codes = self.table.find("exits", command)
        expected = [codes or 0] if not isinstance(codes, list) else codes
        typed = str(self.table.find("typed", command) or "")
        instead = self.table.replaced(command)
        if instead:
            code, said = run(split(instead), typed)
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
