"""Where training text comes from: the name of a source, and how it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lowres.errors import UserError

# what a row is
TEXT, CHATS, PAIRS = "text", "chats", "pairs"


@dataclass(frozen=True)
class Source:
    """name: stdlib, a path, a glob, or hf:<dataset>[:<config>[:<split>]]. commit: of a data set on the hub;
    None: its newest. form: what its rows are: text, chats, or pairs of a chosen and a rejected answer. The
    rest are the keys of [data] of the same names."""

    name: str
    text_key: str | None = None
    separator: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    damaged: str = "refuse"
    max_left_out: float = 0.1
    token_dtype: str | None = None
    commit: str | None = None
    form: str = TEXT
    encoding: str | None = None

    def settings(self) -> dict[str, Any]:
        """What determines the documents, besides the name: all that is not its default."""
        plain = {field.name: field.default for field in fields(self)}
        others = ("name", "max_left_out", "commit")
        return {k: v for k, v in asdict(self).items() if k not in others and v != plain[k]}

    @property
    def path(self) -> Path:
        return Path(hub_name(self.name).dataset if is_stream(self) else self.name).expanduser()

    @property
    def on_hub(self) -> bool:
        """Whether it is a data set on the hub: hf: before anything that is no local path."""
        if not is_stream(self):
            return False
        written = hub_name(self.name).dataset
        return not (written.startswith(("/", ".", "~")) or self.path.exists())


@dataclass(frozen=True)
class HubName:
    """The parts of hf:<dataset>[:<config>[:<split>]]; None where they are left out."""

    dataset: str
    config: str | None
    split: str | None


def hub_name(name: str) -> HubName:
    """Raises UserError."""
    dataset, config, split = (name.removeprefix("hf:") + "::").split(":")[:3]
    if not dataset or name.count(":") > 3:
        raise UserError(f"{name}: write it as hf:<dataset>[:<config>[:<split>]]")
    return HubName(dataset, config or None, split or None)


def is_stream(source: Source | str) -> bool:
    """Whether the source is a data set of unknown length that is expensive to read twice."""
    return (source if isinstance(source, str) else source.name).startswith("hf:")


def as_source(source: Source | str) -> Source:
    return Source(source) if isinstance(source, str) else source
