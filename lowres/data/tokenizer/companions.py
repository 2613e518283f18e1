"""What stands beside a tokenizer in a folder, and comes along in the tokenizer's own file.

A run keeps one file of its tokenizer, and so do its checkpoints. A model that is taken elsewhere needs more:
the chat template, the names of special tokens, and the post-processor that a tokenizer.json had. So they are
a sealed record in that file, where its library skips it. They change no ids, so the fingerprint is without
them.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field

from lowres.disk import DiskError, read_whole
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, parse

Name = Literal["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"
# a folder of further templates, which no other tool needs
_FURTHER = "additional_chat_templates"
_LARGEST = 8 << 20  # bytes of each


class Companions(Record):
    """files: texts by name. post_processor: that of a tokenizer.json, before ours took its place. made_of:
    fingerprint of the SentencePiece model that a tokenizer.json was made of; then nothing else is here."""

    files: dict[Name, Annotated[str, Field(max_length=_LARGEST)]] = Field(default_factory=dict)
    post_processor: dict[str, Any] | None = None
    made_of: str | None = None

    @property
    def chat_template(self) -> str | None:
        """The template with which a conversation becomes text; of several, the default one."""
        if TEMPLATE in self.files:
            return self.files[TEMPLATE]
        found = self.content_of(CONFIG).get("chat_template")
        if isinstance(found, list):
            named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
            found = named[0].get("template") if named else None
        return found if isinstance(found, str) else None

    def content_of(self, name: Name) -> dict[str, Any]:
        """A file's JSON object; empty if there is no such file. Raises Damaged if it is none."""
        return parse(self.files[name].encode()) if name in self.files else {}


def read_beside(tokenizer: Path) -> tuple[Companions, list[str]]:
    """What stands beside a file, and notes on what is left behind. Raises UserError if a file is not what its
    name says, or larger than any that is needed."""
    files: dict[Name, str] = {}
    notes = []
    for name in get_args(Name):
        path = tokenizer.parent / name
        try:
            files[name] = read_whole(path, limit=_LARGEST).decode()
            if path.suffix == ".json":
                parse(files[name].encode())
        except OSError as error:
            if error.errno == errno.EINVAL:
                notes.append(
                    f"tokenizer {tokenizer}: {name} in the same folder is not an ordinary file; not used"
                )
            elif error.errno == errno.EFBIG:
                raise UserError(f"{path}: {error.strerror}; get the file again, or remove it") from None
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise DiskError(path, error, "read") from None
        except (Damaged, UnicodeDecodeError) as error:
            what = error if isinstance(error, Damaged) else "is not UTF-8"
            raise UserError(f"{path}: {what}; get the file again, or remove it") from None
    if (tokenizer.parent / _FURTHER).is_dir():
        notes.append(f"tokenizer {tokenizer}: {_FURTHER} in the same folder does not come along")
    return Companions(files=files), notes
