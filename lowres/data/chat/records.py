"""From a row of a source to the messages of a chat, or of the two chats of a pair.

    messages                 a list of messages: role and content, or from and value as ShareGPT has them
    prompt, completion       lists of messages, or texts: what a user asks, and the answer
    chosen, rejected         the same: whole chats, or answers to the prompt beside them

A chat that begins with a system or user message is whole, and a prompt beside it is not read. Other keys of
a message are kept for the template.
"""

from __future__ import annotations

import json
from typing import Any

from lowres.text.columns import CHOSEN, COMPLETION, MESSAGES, PROMPT, REJECTED
from lowres.text.source import PAIRS

Message = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
_ROLES = {role: role for role in (SYSTEM, USER, ASSISTANT, TOOL)}
# names that other formats have for them
_ROLES |= {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT}
_SHOWN = 40


class BadRow(ValueError):  # noqa: N818
    """A row that is no chat or pair, or that a template refuses; says why."""


def parse(text: str, form: str) -> list[list[Message]]:
    """The messages of a chat, or of the chosen and the rejected chat of a pair. text: a document of a source
    of this form. Raises BadRow."""
    row: dict[str, Any] = json.loads(text)
    if form == PAIRS:
        pair = [_answered(row, CHOSEN), _answered(row, REJECTED)]
        if pair[0] == pair[1]:
            raise BadRow(f"{CHOSEN} is equal to {REJECTED}")
        for name, chat in zip((CHOSEN, REJECTED), pair, strict=True):
            if chat[-1]["role"] != ASSISTANT:
                raise BadRow(f"{name} does not end with an assistant turn")
        return pair
    return [_answered(row, COMPLETION) if PROMPT in row or COMPLETION in row else _messages(row)]


def shared(pair: list[list[Message]]) -> int:
    """How many messages both chats of a pair begin with: what their answers answer."""
    count = 0
    for one, other in zip(*pair, strict=False):
        if one != other:
            break
        count += 1
    return count


def _messages(row: dict[str, Any]) -> list[Message]:
    if row.get(MESSAGES[0]) is None:
        raise BadRow("no messages")
    return _with_answer(_chat(row[MESSAGES[0]], MESSAGES[0]))


def _answered(row: dict[str, Any], key: str) -> list[Message]:
    """A chat of which one column is the answer, or all."""
    answer = row.get(key)
    if answer is None:
        raise BadRow(f"no {key}")
    chat = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else _chat(answer, key)
    if chat[0]["role"] in (SYSTEM, USER):
        return _with_answer(chat)
    prompt = row.get(PROMPT)
    if prompt is None:
        raise BadRow(f"{key} answers nothing: no {PROMPT}")
    asked = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else _chat(prompt, PROMPT)
    return _with_answer(asked + chat)


def _with_answer(chat: list[Message]) -> list[Message]:
    if all(message["role"] != ASSISTANT for message in chat):
        raise BadRow("no assistant turn")
    return chat


def _chat(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow(f"{key} is {_kind(value)}, no list of messages")
    if not value:
        raise BadRow(f"{key} is empty")
    return [_message(one, f"message {number} of {key}") for number, one in enumerate(value, 1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{place} is {_kind(value)}, no object with role and content")
    names = ("role", "content") if "role" in value or "content" in value else ("from", "value")
    role, content = (value.get(name) for name in names)
    if not isinstance(role, str):
        raise BadRow(f'{place} has no "role"' if role is None else f"{place}: its role is {_kind(role)}")
    if role not in _ROLES:
        raise BadRow(f"{place} has the unknown role {_quoted(role)}; known are {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{place}: its {names[1]} is {_kind(content)}, no text")
    # tables give null for a key that only other messages have
    others = {key: kept for key, kept in value.items() if key not in names and kept is not None}
    return {"role": _ROLES[role], "content": content} | others


def _quoted(text: str) -> str:
    """The beginning of a text, in one line."""
    return json.dumps(text[:_SHOWN], ensure_ascii=False)


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")
