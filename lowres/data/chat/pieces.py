"""A rendered chat as pieces: special tokens, and the text between them.

What a template writes as <|im_end|> is a token; what a user wrote so is text. The rendered chat does not
tell, so a mark is put in front of every special string of a message before it is rendered, and a string with
a mark is no token. The mark is a character that occurs nowhere, and is taken out when the pieces are made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lowres.data.chat.records import ASSISTANT
from lowres.data.tokenizer import Special

_BLANK = re.compile(r"\s*")
# private use first, then whatever there is
_MARKS = (range(0xE000, 0xF900), range(0xF0000, 0x110000), range(0x100, 0xD800))


@dataclass(frozen=True)
class Piece:
    """text [start, end) of a chat: without marks in it, but counted with them. token: the special token that
    it is; None for text."""

    text: str
    start: int
    end: int
    token: Special | None = None


def unused(*texts: str) -> str:
    """A character that is in none of the texts."""
    every = map(chr, chain(*_MARKS))
    return next(character for character in every if not any(character in text for text in texts))


class Cutter:
    """Finds special tokens in chats. specials: by their spelling."""

    def __init__(self, specials: Mapping[str, Special]) -> None:
        specials = {token: special for token, special in specials.items() if token}
        self._specials = specials
        self._control = _Strings([token for token, special in specials.items() if not special.is_text])
        self._every = _Strings([*specials])
        self._tokens = _any_of({token: special.single_word for token, special in specials.items()})

    def marked(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """The message with a mark in front of everything that could be taken for a special token. An
        assistant may write those that are text, such as <think>, as its model does."""
        strings = self._control if message.get("role") == ASSISTANT else self._every
        return {
            key: value if key == "role" else _each(value, strings, mark) for key, value in message.items()
        }

    def cut(self, chat: str, mark: str) -> list[Piece]:
        """The chat in pieces; no two pieces of text are neighbours, and none is empty."""
        found: list[Piece] = []
        end = place = 0  # of the pieces so far, and where to look
        while match := self._tokens.search(chat, place):
            start, place = match.span()
            if start and chat[start - 1] == mark:
                place = start + 1
                continue
            special = self._specials[match[0]]
            text = chat[end:start].rstrip() if special.lstrip else chat[end:start]
            if text:
                found.append(Piece(text.replace(mark, ""), end, end + len(text)))
            found.append(Piece(match[0], start, place, special))
            blank = _BLANK.match(chat, place) if special.rstrip else None
            end = place = blank.end() if blank else place
        if len(chat) > end:
            found.append(Piece(chat[end:].replace(mark, ""), end, len(chat)))
        return found


class _Strings:
    """Strings to be found in a text, also where they begin at its end and something else could end them."""

    def __init__(self, strings: list[str]) -> None:
        self._found = _any_of(dict.fromkeys(strings, False))
        self._places = re.compile(f"(?={self._found.pattern})")
        self._beginnings = {string[:length] for string in strings for length in range(1, len(string))}
        self._longest = max(map(len, self._beginnings), default=0)

    def marked(self, text: str, mark: str) -> str:
        kept = text.rstrip()  # as a template may do
        for length in range(1, min(self._longest, len(kept)) + 1):
            if kept[-length:] in self._beginnings:
                text = f"{text[: len(kept) - length]}{mark}{text[len(kept) - length :]}"
        return self._places.sub(mark, text) if self._found.search(text) else text


def _any_of(strings: Mapping[str, bool]) -> re.Pattern[str]:
    """The longest of the strings, each as a word of its own or anywhere."""
    longest_first = sorted(strings, key=len, reverse=True)
    escaped = {string: re.escape(string) for string in longest_first}
    words = {string: rf"(?<!\w){escaped[string]}(?!\w)" for string, word in strings.items() if word}
    return re.compile("|".join((escaped | words).values()) or "(?!)")


def _each(value: Any, strings: _Strings, mark: str) -> Any:
    """The value with all strings in it marked."""
    if isinstance(value, str):
        return strings.marked(value, mark)
    if isinstance(value, Mapping):
        return {key: _each(inner, strings, mark) for key, inner in value.items()}
    return [_each(inner, strings, mark) for inner in value] if isinstance(value, list) else value
