"""Patterns for names of files, in any case."""

from __future__ import annotations

import re
from functools import lru_cache


def matches(name: str, pattern: str, whole: bool = False) -> bool:
    """Whether a path relative to the source matches. `*` and `?` stay inside a folder, `**` does not. A
    pattern without / is for the last part of the path, unless `whole`; one that ends with / is for all below
    that folder.
    """
    pattern = pattern.lower().removeprefix("./")
    if pattern.endswith("/"):
        pattern += "**"
    if "/" not in pattern and not whole:
        name = name.rsplit("/", 1)[-1]
    return bool(_compiled(pattern).fullmatch(name.lower()))


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    made, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            made, at = made + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            made, at = made + ".*", at + 2
        elif pattern[at] == "*":
            made, at = made + "[^/]*", at + 1
        elif pattern[at] == "?":
            made, at = made + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inner = pattern[at + 1 : end].replace("\\", "\\\\")
            made, at = made + "[" + ("^" + inner[1:] if inner[0] == "!" else inner) + "]", end + 1
        else:
            made, at = made + re.escape(pattern[at]), at + 1
    return re.compile(made, re.DOTALL)
