"""Which column of a table is the text, or which are a chat.

data.text_key names the column of the text: a column, or a path of keys with dots into nested objects. By
default it is the first of COLUMNS that there is, in any case; or else the only column of strings.

A chat is a list of messages, in the column that data.text_key names or else the first of MESSAGES; or a
prompt and its completion. A pair is a chosen and a rejected answer, with or without the prompt beside them.
Such a row becomes a text too: a JSON object with the keys messages, or prompt and completion, or prompt,
chosen and rejected, as far as the row has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lowres.text.source import CHATS, PAIRS, TEXT, BadFileError, File

COLUMNS = (
    "text", "content", "raw_content", "markdown", "document", "body", "article", "story", "passage", "code",
)  # fmt: skip
# where corpora of token ids have them
IDS_COLUMNS = ("input_ids", "token_ids", "tokens", "ids")
STRING, IDS, OTHER = "string", "ids", "other"
_ARROW_STRING = re.compile(r"(dictionary<values=)?(large_)?string(_view)?(,|$)")
_LIST_OF_IDS = re.compile(r"(large_|fixed_size_)?list<[^<>]*: u?int(16|32|64)( not null)?>(\[\d+\])?")
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
PROMPT, COMPLETION, CHOSEN, REJECTED = "prompt", "completion", "chosen", "rejected"
_MISSING = object()
_LONGEST_NAME = 40
_MOST_NAMES = 20
_MISSED = {TEXT: "column of text", CHATS: "column of messages", PAIRS: "pairs of answers"}
_REMEDY = {
    CHATS: f"name the one with the messages in data.text_key, or give the columns {PROMPT} and {COMPLETION}",
    PAIRS: f"give the columns {CHOSEN} and {REJECTED}",
}


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


def fields(columns: Iterable[str], text_key: str | None, form: str) -> tuple[str, ...]:
    """The columns of a chat or of a pair; none if no rule finds them."""
    there = set(columns)
    if form == PAIRS:
        pair = (CHOSEN, REJECTED)
        return ((PROMPT, *pair) if PROMPT in there else pair) if there.issuperset(pair) else ()
    if text_key is not None:
        return (text_key,) if text_key in there or text_key.split(".")[0] in there else ()
    if found := next((name for name in MESSAGES if name in there), None):
        return (found,)
    return (PROMPT, COMPLETION) if there.issuperset((PROMPT, COMPLETION)) else ()


def chosen(file: File, columns: dict[str, str]) -> File | None:
    """The file with the columns of its documents; None if no rule finds them. file.column: data.text_key."""
    if file.form == TEXT:
        column = choose(columns, file.column)
        return replace(file, column=column) if column else None
    found = fields(columns, file.column, file.form)
    return replace(file, fields=found) if found else None


def assumed(form: str, text_key: str | None) -> dict[str, str]:
    """The columns of a table without a row."""
    if form == PAIRS:
        return {CHOSEN: OTHER, REJECTED: OTHER}
    return {text_key or (COLUMNS if form == TEXT else MESSAGES)[0]: STRING}


def taken(file: File) -> tuple[str, ...]:
    """The columns that are read of a file for which they are chosen."""
    assert file.fields or file.column is not None
    return file.fields or (str(file.column),)


def ids(columns: dict[str, str], text_key: str | None) -> str | None:
    """The column of token ids: the one that data.text_key names, or else that of a table without text."""
    if text_key is not None:
        return text_key if columns.get(text_key) == IDS else None
    if choose(columns, None) is not None:
        return None
    return next((name for name in IDS_COLUMNS if columns.get(name) == IDS), None)


def document_of(row: dict[str, Any], file: File, place: str) -> str:
    """The document of a row of a file for which the columns are chosen. Raises BadFileError."""
    if file.fields:
        return chat_of(row, file.fields, place)
    assert file.column is not None
    return text_of(row, file.column, place)


def chat_of(row: dict[str, Any], fields: tuple[str, ...], place: str) -> str:
    """The chat or pair of a row in JSON, with the keys that the row has. Raises BadFileError."""
    found = {}
    for column in fields:
        value = _value_of(row, column, place)
        if value is not _MISSING:
            _require_unique(value, place)
            found[column if len(fields) > 1 else MESSAGES[0]] = value
    # what is no JSON, such as a time, is beside the messages
    return json.dumps(found, ensure_ascii=False, default=str)


def _require_unique(value: Any, place: str) -> None:
    if isinstance(value, Repeated) and value.keys_repeated:
        raise BadFileError(f'{place}: the key "{min(value.keys_repeated)}" comes twice; keep one')
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _require_unique(inner, place)


def _value_of(row: dict[str, Any], column: str, place: str) -> Any:
    """What a row has in a column; _MISSING if it has no such column. Raises BadFileError."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        if isinstance(value, Repeated) and key in value.keys_repeated:
            raise BadFileError(f'{place}: the key "{key}" comes twice; keep one')
        value = value[key]
        if value is None:
            break
    return value


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    """The text of a row; "" if it is null. Raises BadFileError."""
    value = _value_of(row, column, place)
    if value is _MISSING:
        raise BadFileError(f"{place}: {no_column(row, column)}")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadFileError(
            f'{place}: the column "{column}" holds a {type(value).__name__}, which is no string; correct it, '
            "or name another column in data.text_key"
        )
    return value


def no_column(columns: Any, column: str | None, form: str = TEXT) -> str:
    """What to say where there is no document of a form."""
    names = [str(name) for name in columns]
    if column is None and "input_ids" in names:
        return 'token ids ("input_ids") and no text'
    if column is None and form != PAIRS and fields(names, None, PAIRS):
        use = 'which are for preference tuning (objective.name = "dpo")'
        return f'pairs ("{CHOSEN}" and "{REJECTED}"), {use}; no {_MISSED[form]}'
    if column is None and form != CHATS and (chat := fields(names, None, CHATS)):
        use = 'which are for supervised tuning (objective.name = "sft")'
        return f'chats ("{chat[0]}"), {use}; no {_MISSED[form]}'
    short = [name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..." for name in names]
    found = ", ".join(short[:_MOST_NAMES] + ["..."] * (len(short) > _MOST_NAMES)) or "none"
    found = " ".join(found.split())
    if form != TEXT and not column:
        return f"no {_MISSED[form]}; found {found}; {_REMEDY[form]}"
    missing = f'no column "{column}"' if column else 'no column "text"'
    what = "messages" if form == CHATS else "text"
    return f"{missing}; found {found}; name the one with the {what} in data.text_key"
