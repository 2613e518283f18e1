"""The files of a source, and what is wrong with one. What to read, and how, is in `lowres.catalogue`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowres.catalogue.sources import CHATS, PAIRS, TEXT, HubName, Source, as_source, hub_name, is_stream
from lowres.errors import UserError
from lowres.text.remote import RemoteFile

__all__ = [
    "CHATS",
    "PAIRS",
    "TEST",
    "TEXT",
    "TRAIN",
    "VALIDATION",
    "BadFileError",
    "File",
    "HubName",
    "Source",
    "as_source",
    "hub_name",
    "is_stream",
]

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class BadFileError(UserError):
    """A file that cannot be read to its end as what it is. With damaged = "skip" the rest of it is left
    out."""


@dataclass(frozen=True)
class File:
    """A file that is read. name: relative to the source, for sorting and messages. kind: see `kinds`.
    compression: suffix or "". part: TRAIN, VALIDATION or TEST. column: of the text, or the ids, in a table;
    data.text_key until it is chosen. separator: between the documents of a text. token_dtype: of ids without
    a header. archive, at: the archive that it is in, and where. remote: where its bytes are; with one of
    these, `path` is for messages only. form: see `Source`. fields: the columns of a chat or a pair, which
    are chosen instead of `column`. encoding: of a line of a table that is not UTF-8."""

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
    remote: RemoteFile | None = None
    form: str = TEXT
    fields: tuple[str, ...] = ()
    encoding: str | None = None

    @property
    def on_disk(self) -> Path:
        """The file that is opened: its own, or that of its archive."""
        return self.archive or self.path
