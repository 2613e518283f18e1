"""The messages of a row."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


class BadRow(ValueError):  # noqa: N818
    """A row that is no chat. The text says why, without file and row."""
