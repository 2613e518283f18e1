"""Commands as README.md and docs/ show them: taken apart, run, or checked as far as that goes."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from lowres.cli import main
from lowres.cli.parser import make_parser
from lowres.config_file import load_config, source_config

HERE = Path(__file__).parent.parent.absolute()
# programs of the system that only touch the folder of the page
HARMLESS = {"cat", "cp", "echo", "grep", "head", "ls", "mkdir", "mv", "printf", "tail", "wc"}


class PageError(AssertionError):
    """A page, or its table, says what is not so."""


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


def split(command: str) -> list[str]:
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
        return lowres(words[1:], typed)
    at = words.index(">")
    code, said = lowres(words[1:at], typed, to=Path(words[at + 1]))
    return code, said


def lowres(words: list[str], typed: str, to: Path | None = None) -> tuple[int, str]:
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
