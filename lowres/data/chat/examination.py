"""What a chat template does to a small chat, before it is used: which tokens end an answer, and what the user
should know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowres.data.chat.answers import Messages, Rendered, controls, find
from lowres.data.chat.pieces import Piece, unused
from lowres.data.chat.records import ASSISTANT, SYSTEM, USER, BadRow
from lowres.errors import UserError

if TYPE_CHECKING:
    from lowres.data.chat.template import Template

_ROLES = {"s": SYSTEM, "u": USER, "a": ASSISTANT}


def small_chat(template: Template) -> Messages:
    """A chat that the template accepts, with texts that occur nowhere else. Raises UserError if it accepts
    none."""
    letter = unused(template.source)
    problem = None
    for roles in ("uaua", "suaua", "ua", "sua"):
        messages = [{"role": _ROLES[role], "content": f"{letter}{i}"} for i, role in enumerate(roles)]
        try:
            text = template.render(messages)
        except BadRow as error:
            problem = problem or error
            continue
        missing = [m["role"] for m in messages if text.count(m["content"]) != 1]
        if not missing:
            return messages
        problem = problem or BadRow(f"{template.name}: a message of role {missing[0]} is not written once")
    raise UserError(f"{problem}; give another template")


def ends(template: Template, messages: Messages) -> frozenset[int]:
    """The ids of the tokens that end an answer: the first one behind it, and behind the last answer also what
    follows directly. Raises UserError if there are none."""
    text = template.render(messages)
    tokens = controls(template.cutter.cut(text, unused(text)))
    places = [text.index(message["content"]) for message in messages]
    behind = [
        [piece for piece in tokens if place < piece.start < limit]
        for message, place, limit in zip(messages, places, [*places[1:], len(text)], strict=True)
        if message["role"] == ASSISTANT
    ]
    last = behind.pop()
    if not last:
        raise UserError(
            f"{template.name}: no token ends an answer, so a model would not learn to stop; give a template "
            "that writes eos_token, or another token of the tokenizer, after each answer"
        )
    found = [piece for pieces in behind for piece in pieces[:1]]
    for piece in last:
        if piece is not last[0] and piece.start != found[-1].end:
            break
        found.append(piece)
    return frozenset(piece.token.id for piece in found if piece.token)


def notes(template: Template, messages: Messages) -> list[str]:
    """What is odd about a template. Raises UserError if it cannot be trained on."""
    try:
        chat = find(template, messages, unused(template.source, *(m["content"] for m in messages)))
    except BadRow as error:
        raise UserError(f"{error}; give another template") from None
    found = [
        *_start(template, chat.pieces),
        *_prompt(template, messages, chat),
        *_marks(template, messages, chat),
    ]
    return [f"{template.name}: {note}" for note in found]


def _start(template: Template, pieces: list[Piece]) -> Iterator[str]:
    bos = template.variables.get("bos_token")
    first = [piece.text for piece in pieces[:2] if piece.token]
    if bos and first == [bos, bos]:
        raise UserError(f"{template.name}: it begins a chat with {bos} twice; take one out")
    if bos and first[:1] != [bos]:
        yield f"chats do not begin with {bos}, as documents do"


def _prompt(template: Template, messages: Messages, chat: Rendered) -> Iterator[str]:
    before = template.render(messages[:-1])
    prompted = template.render(messages[:-1], add_generation_prompt=True)
    header = chat.text[chat.answers[-1][0] : chat.text.index(messages[-1]["content"])].strip()
    if not chat.text.startswith(prompted):
        asked = prompted.removeprefix(before)
        yield f"it asks for an answer with {asked!r}, but no answer in a chat follows that"
    elif header and before == prompted:
        yield f"it ignores add_generation_prompt, so {header!r} is trained too, and a model writes it"


def _marks(template: Template, messages: Messages, chat: Rendered) -> Iterator[str]:
    """Compare answers with what the template marks by {% generation %}."""
    mark = unused(template.source, chat.text)
    parts = template.render(messages, around=mark).split(mark)
    if len(parts) == 1:
        return
    marked, unmarked = "".join(parts[1::2]), "".join(parts[0::2])
    for message in messages:
        if message["content"] not in (marked if message["role"] == ASSISTANT else unmarked):
            raise UserError(
                f"{template.name}: its generation marks are not around what the assistant says, and nothing "
                "else; correct them, or take them out"
            )
    ours = [chat.text[start:end] for start, end in chat.answers]
    if ours != parts[1::2]:
        said = next(message["content"] for message in messages if message["role"] == ASSISTANT)
        theirs, own = (text.replace(said, "...") for text in (parts[1], ours[0]))
        yield f"its generation marks have {theirs!r} where {own!r} is trained"
