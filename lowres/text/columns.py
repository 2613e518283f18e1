"""Which column of a table is the text.

data.text_key names it: a column, or a path of keys with dots into nested objects. By default it is the first
of COLUMNS that there is, in any case; or else the only column of strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lowres.text.source import BadFileError

COLUMNS = (
    "text", "content", "raw_content", "markdown", "document", "body", "article", "story", "passage", "code",
)  # fmt: skip
# where corpora of token ids have them
IDS_COLUMNS = ("input_ids", "token_ids", "tokens", "ids")
STRING, IDS, OTHER = "string", "ids", "other"
_ARROW_STRING = re.compile(r"(dictionary<values=)?(large_)?string(_view)?(,|$)")
_LIST_OF_IDS = re.compile(r"(large_|fixed_size_)?list<[^<>]*: u?int(16|32|64)( not null)?>(\[\d+\])?")
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
_LONGEST_NAME = 40
_MOST_NAMES = 20


class Repeated(dict[str, Any]):
    """An object in which keys come more than once, with the last value of each. `json` says nothing."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.keys_repeated = {key for key in self if keys.count(key) > 1}


def kinds_of(row: dict[str, Any]) -> dict[str, str]:
    """Column -> STRING or OTHER, from a row. A null may be either, so it counts as a string."""
    return {name: STRING if value is None or isinstance(value, str) else OTHER for name, value in row.items()}


def of_arrow(schema: Any) -> dict[str, str]:
    """The same from a schema of pyarrow; a column of lists of whole numbers is IDS."""
    return {field.name: _kind_of_type(str(field.type)) for field in schema}


def by_name_only(columns: Iterable[str], text_key: str | None) -> dict[str, str]:
    """Columns of which only those with a known name may be the text."""
    return {name: STRING if name == text_key or name.lower() in COLUMNS else OTHER for name in columns}


def _kind_of_type(name: str) -> str:
    if _ARROW_STRING.match(name):
        return STRING
    return IDS if _LIST_OF_IDS.fullmatch(name) else OTHER


def choose(columns: dict[str, str], text_key: str | None) -> str | None:
    """The column of the text; None if no rule finds one."""
    if text_key is not None:
        return text_key if text_key in columns or text_key.split(".")[0] in columns else None
    by_name = {name.lower(): name for name in reversed(columns)}
    for known in COLUMNS:
        if known in by_name and (known == COLUMNS[0] or columns[by_name[known]] == STRING):
            return by_name[known]
    strings = [name for name, kind in columns.items() if kind == STRING]
    return strings[0] if len(strings) == 1 and len(columns) == 1 else None


def ids(columns: dict[str, str], text_key: str | None) -> str | None:
    """The column of token ids: the one that data.text_key names, or else that of a table without text."""
    if text_key is not None:
        return text_key if columns.get(text_key) == IDS else None
    if choose(columns, None) is not None:
        return None
    return next((name for name in IDS_COLUMNS if columns.get(name) == IDS), None)


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    """The text of a row; "" if it is null. Raises BadFileError."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or key not in value:
            raise BadFileError(f"{place}: {no_column(row, column)}")
        if isinstance(value, Repeated) and key in value.keys_repeated:
            raise BadFileError(f'{place}: the key "{key}" comes twice; keep one')
        value = value[key]
        if value is None:
            break
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadFileError(
            f'{place}: the column "{column}" holds a {type(value).__name__}, which is no string; correct it, '
            "or name another column in data.text_key"
        )
    return value


def no_column(columns: Any, column: str | None) -> str:
    """What to say where there is no text."""
    names = [str(name) for name in columns]
    if column is None and "input_ids" in names:
        return 'token ids ("input_ids") and no text'
    if column is None and (chat := next((name for name in _CHATS if name in names), None)):
        return f'chats ("{chat}"), which are for supervised tuning; no column of text'
    short = [name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..." for name in names]
    found = ", ".join(short[:_MOST_NAMES] + ["..."] * (len(short) > _MOST_NAMES)) or "none"
    found = " ".join(found.split())
    missing = f'no column "{column}"' if column else 'no column "text"'
    return f"{missing}; found {found}; name the one with the text in data.text_key"
