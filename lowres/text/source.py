"""What to read, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lowres.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class BadFileError(UserError):
    """A file that cannot be read to its end as what it is. With damaged = "skip" the rest of it is left
    out."""


@dataclass(frozen=True)
class Source:
    """name: stdlib, a path, a glob, or hf:<dataset>[:<config>[:<split>]]. The rest are the keys of [data] of
    the same names."""

    name: str
    text_key: str | None = None
    separator: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    damaged: str = "refuse"
    max_left_out: float = 0.1
    token_dtype: str | None = None

    def settings(self) -> dict[str, Any]:
        """What determines the documents, besides the name: all that is not its default."""
        plain = {field.name: field.default for field in fields(self)}
        checked_only = ("name", "max_left_out")
        return {k: v for k, v in asdict(self).items() if k not in checked_only and v != plain[k]}

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()


@dataclass(frozen=True)
class File:
    """A file that is read. name: relative to the source, for sorting and messages. kind: see `kinds`.
    compression: suffix or "". part: TRAIN, VALIDATION or TEST. column: of the text, or the ids, in a table;
    data.text_key until it is chosen. separator: between the documents of a text. token_dtype: of ids without
    a header. archive, at: the archive that it is in, and where; `path` is then for messages only."""

    name: str
    path: Path
    size: int
    kind: str
    compression: str = ""
    part: str = TRAIN
    column: str | None = None
    separator: str | None = None
    token_dtype: str | None = None
    archive: Path | None = None
    at: int = 0

    @property
    def on_disk(self) -> Path:
        """The file that is opened: its own, or that of its archive."""
        return self.archive or self.path


def is_stream(source: Source | str) -> bool:
    """Whether the source is a data set of unknown length that is expensive to read twice."""
    return (source if isinstance(source, str) else source.name).startswith("hf:")


def as_source(source: Source | str) -> Source:
    return Source(source) if isinstance(source, str) else source
