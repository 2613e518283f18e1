"""What a page names in its text, outside of blocks: commands, keys of configs, files, other pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from lowres.config import Config
from lowres.errors import UserError
from lowres.reference import keys
from tests.commands import HERE, PageError, check, commands_of
from tests.documented import pages

# look like keys of a config, and are functions of the project
FUNCTIONS = {"memory.choice", "memory.plan_use"}
SUFFIXES = {"bin", "json", "lock", "log", "safetensors"}
SECTIONS = "|".join(Config.model_fields)
FILES = re.compile(
    r"(?<![\w/.-])(?:tests|scripts|lowres|configs|benchmarks|findings)/[\w/]+\.(?:py|toml|sh|md|json|png)"
)
SPANS = re.compile(r"(?<!`)`(?!`)([^`]+)`")


def absent(page: str, text: str) -> Iterator[str]:
    """What a page names and is not there, each with its line."""
    text = re.sub(r"^```.*?^```", lambda found: "\n" * found[0].count("\n"), text, flags=re.S | re.M)
    known = set(keys()) | FUNCTIONS

    def at(found: re.Match[str], problem: str) -> str:
        return f"{page}:{text[: found.start()].count(chr(10)) + 1}: {problem}"

    for found in SPANS.finditer(text):
        span = " ".join(found[1].split())
        if span.startswith(("lowres ", "python scripts/", "make ")):
            for command in commands_of(span):
                if problem := _wrong(command):
                    yield at(found, f"`{command}`: {problem}")
        key = re.match(rf"(?:{SECTIONS})\.[a-z_0-9]+\b", span)
        if key and key[0] not in known and key[0].partition(".")[2] not in SUFFIXES:
            yield at(found, f"`{key[0]}` is no key of a config")
    for found in FILES.finditer(text):
        if not (HERE / found[0]).exists():
            yield at(found, f"there is no {found[0]}")
    for found in re.finditer(r"\]\((?!http)([^)#\s]*)(?:#([\w-]+))?\)", text):
        there = (HERE / page).parent / found[1] if found[1] else HERE / page
        if not there.exists() or (found[2] and found[2] not in _anchors(there.read_text("utf-8"))):
            yield at(found, f"nothing is at {found[0][2:-1]}")


def _anchors(text: str) -> set[str]:
    headings = (line.lower() for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    made = {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'id="([\w-]+)"', text))


def _wrong(command: str) -> str:
    """Why a command could not be typed; "" if it could, once capitals and ... stand for something, or if it
    has no arguments and is only named."""
    words = shlex.split(command)
    words = ["1" if word == "N" else "configs/tiny.toml" if word == "CONFIG" else word for word in words]
    while "..." in words:
        del words[words.index("...") - 1 : words.index("...") + 1]
    if words[:2] == ["lowres", "train"] and words[2:3] in (["RUN"], ["DIR"]):
        words[2] = "configs/tiny.toml"
    try:
        check(words)
    except (PageError, UserError) as error:
        said = str(error).strip().splitlines()[-1]
        named = "arguments are required" in said or (words[-1][:2] == "--" and "expected one" in said)
        return "" if named else said
    return ""


def unlinked() -> list[str]:
    """Pages of docs/ to which no other page leads."""
    texts = {page: (HERE / page).read_text("utf-8") for page in pages()}
    return [
        page
        for page in texts
        if page.startswith("docs/")
        and not any(
            f"({page})" in text or f"({page[5:]}" in text for other, text in texts.items() if other != page
        )
    ]
