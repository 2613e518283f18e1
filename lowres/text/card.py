"""What a data set's card says of its files: the `configs` in the YAML at the head of README.md.

Source: the Hugging Face hub's documentation of manual configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowres.errors import UserError, first_line
from lowres.text.globs import matches
from lowres.text.source import TRAIN
from lowres.text.splits import part_of_word

CARD = "readme.md"
_HEAD = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_LARGEST = 1 << 22


@dataclass(frozen=True)
class Config:
    """files: (split, pattern) relative to `folder`, which ends with / or is empty. A split "" is not said.
    What is for training and, by another pattern, for something else is for that."""

    name: str
    default: bool
    folder: str
    files: tuple[tuple[str, str], ...]

    def splits(self, names: Sequence[str]) -> dict[str, str]:
        """name -> split, of the files that are this configuration's."""
        found = {}
        for name in names:
            of_it = [s for s, pattern in self.files if matches(name, self.folder + pattern, whole=True)]
            if of_it:
                found[name] = next((split for split in of_it if part_of_word(split) != TRAIN), of_it[0])
        return found


def configs(path: Path) -> list[Config]:
    """The configurations of a card that say which files they have. Raises UserError for a card that does and
    cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST).decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    head = _HEAD.match(text.replace("\r\n", "\n"))
    if not head or not re.search(r"^configs\s*:", head[1], re.MULTILINE):
        return []
    import yaml

    try:
        found = yaml.safe_load(head[1])["configs"]
        return [made for each in found or [] if (made := _config(each))]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: its configs cannot be understood ({first_line(error)}); correct them, or leave the "
            "card out with data.exclude: then the names of the files decide"
        ) from None


def _config(given: dict[str, Any]) -> Config | None:
    name, folder = str(given.get("config_name", "default")), str(given.get("data_dir") or "")
    files = given.get("data_files")
    if files is None and not folder:
        return None
    listed = files if isinstance(files, list) else [files] if files else []
    # a folder alone: all below it
    made = list[tuple[str, str]]() if files else [("", "**")]
    for each in listed:
        split, paths = ("train", each) if isinstance(each, str) else (str(each["split"]), each["path"])
        made += [(split, str(p)) for p in (paths if isinstance(paths, list) else [paths])]
    return Config(
        name,
        given.get("default") is True or name == "default",
        f"{folder.strip('/')}/" if folder else "",
        tuple(made),
    )
