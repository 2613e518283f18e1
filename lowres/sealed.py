"""JSON records that are read back: sealed by a checksum of their own, and checked against a model.

A seal is the BLAKE2b of the record's content without it, so a changed byte is found wherever it is, except
where it changes nothing (white space). What a record must hold is a pydantic model; nothing that is read back
is used before it has passed both.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

SEAL = "seal"


class Damaged(ValueError):  # noqa: N818
    """A record is not what was written. The text says what is wrong with it."""


class Record(BaseModel):
    """Base of the models: exact types, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


M = TypeVar("M", bound=BaseModel)


def seal(content: dict[str, Any]) -> bytes:
    """A record as JSON text, with its seal."""
    return json.dumps(content | {SEAL: _seal_of(content)}, indent=1).encode()


def unseal(text: bytes, model: type[M], sealed: bool = True) -> M:
    """The record in a JSON text. sealed: it must have a seal; otherwise it may, as older versions wrote none.
    Raises Damaged."""
    content = parse(text)
    found = content.pop(SEAL, None)
    if found is None and sealed:
        raise Damaged("has no seal")
    if found is not None and found != _seal_of(content):
        raise Damaged("does not match its seal")
    return checked(content, model)


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises Damaged."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise Damaged("is not JSON") from None
    if not isinstance(content, dict):
        raise Damaged("is not a JSON object")
    return content


def checked(content: Any, model: type[M]) -> M:
    """The content as a model. Raises Damaged."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Damaged(f"{key}: {first['msg']}" if key else first["msg"]) from None


def _seal_of(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
