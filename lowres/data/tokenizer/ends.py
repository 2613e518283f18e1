"""Which tokens of a tokenizer.json begin and end a document.

The file itself need not say it. A file of ours does: its post-processor is a template that names "bos" and
perhaps "eos", and puts bos in front of a text, as it is used by a model. For other files, in this order:
data.bos and data.eos, the files beside it that `transformers` reads, its post-processor, well-known names.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowres.data.tokenizer.companions import CONFIG, Companions
from lowres.disk import DiskError, read_whole
from lowres.errors import UserError
from lowres.sealed import Damaged, parse

_TEMPLATE = "TemplateProcessing"
_NAMES = {
    "bos": (
        "<s>",
        "<|begin_of_text|>",
        "<bos>",
        "<|startoftext|>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "[BOS]",
        "<|endoftext|>",
        "[CLS]",
    ),
    "eos": (
        "</s>",
        "<|end_of_text|>",
        "<eos>",
        "<|endoftext|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[EOS]",
        "[SEP]",
    ),
}


@dataclass(frozen=True)
class Ends:
    """eos: None if bos alone stands between documents."""

    bos: int
    eos: int | None


def find_ends(
    path: Path,
    description: dict[str, Any],
    companions: Companions,
    ids: dict[str, int],
    names: Collection[str],
    bos: str | int | None,
    eos: str | int | None,
) -> Ends:
    """The ends of a document for a tokenizer.json.

    description: the content of the file. companions: what stood beside it. ids: of all its tokens. names:
    tokens that may be found by their well-known names. bos, eos: as the user asks. Raises UserError if there
    are none.
    """
    ours = _of_ours(description)
    if ours is not None and bos is None and eos is None:
        return ours
    found: dict[str, int] = {}
    for key, asked in (("bos", bos), ("eos", eos)):
        if asked is not None:
            found[key] = _asked(path, key, asked, ids)
    known = set(ids.values())
    candidates = _candidates(path, description, companions, names)
    if ours is not None:
        candidates = iter([("bos", ours.bos), ("eos", ours.bos if ours.eos is None else ours.eos)])
    for key, candidate in candidates:
        value = ids.get(candidate, -1) if isinstance(candidate, str) else candidate
        if key not in found and value in known:
            found[key] = value
    first, last = found.get("bos", found.get("eos")), found.get("eos")
    if first is None:
        raise UserError(
            f"tokenizer {path}: nothing says which tokens begin and end a document; set data.bos and "
            "data.eos to tokens or ids"
        )
    return Ends(first, None if last == first else last)


def template(ends: Ends, tokens: dict[int, str]) -> dict[str, Any]:
    """The post-processor of a file of ours."""
    labels = {"bos": ends.bos} if ends.eos is None else {"bos": ends.bos, "eos": ends.eos}
    return _puts_in_front("bos", {label: (i, tokens[i]) for label, i in labels.items()})


def in_front(bos: int, token: str) -> dict[str, Any]:
    """A post-processor that puts bos in front of a text, as other programs write it."""
    return _puts_in_front(token, {token: (bos, token)})


def _puts_in_front(first: str, labels: dict[str, tuple[int, str]]) -> dict[str, Any]:
    def parts(names: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for kind, name in enumerate(names):
            found.append({"SpecialToken": {"id": first, "type_id": kind}})
            found.append({"Sequence": {"id": name, "type_id": kind}})
        return found

    return {
        "type": _TEMPLATE,
        "single": parts("A"),
        "pair": parts("AB"),
        "special_tokens": {
            label: {"id": label, "ids": [i], "tokens": [token]} for label, (i, token) in labels.items()
        },
    }


def _of_ours(description: dict[str, Any]) -> Ends | None:
    processor = description.get("post_processor") or {}
    labels = processor.get("special_tokens") if processor.get("type") == _TEMPLATE else None
    if not isinstance(labels, dict) or "bos" not in labels:
        return None
    return Ends(labels["bos"]["ids"][0], labels["eos"]["ids"][0] if "eos" in labels else None)


def _asked(path: Path, key: str, asked: str | int, ids: dict[str, int]) -> int:
    if isinstance(asked, str) and asked not in ids and asked.isdecimal():
        asked = int(asked)
    found = ids.get(asked) if isinstance(asked, str) else asked
    if found not in set(ids.values()):
        raise UserError(f"data.{key}: {asked!r} is no token of {path}; give one of its tokens, or an id")
    assert found is not None
    return found


def _candidates(
    path: Path, description: dict[str, Any], companions: Companions, names: Collection[str]
) -> Iterator[tuple[str, str | int]]:
    """("bos" or "eos", token or id), the most reliable first."""
    for beside in (companions.content_of(CONFIG), companions.content_of("special_tokens_map.json")):
        for key in ("bos", "eos"):
            token = beside.get(f"{key}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                yield key, token
    yield from _in_template(description.get("post_processor") or {})
    for file in ("generation_config.json", "config.json"):
        beside = _beside(path, file)
        for key in ("bos", "eos"):
            value = beside.get(f"{key}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                yield key, value
    for key, known in _NAMES.items():
        yield from ((key, name) for name in known if name in names)


def _in_template(processor: dict[str, Any]) -> Iterator[tuple[str, str | int]]:
    """What a post-processor puts in front of a text and behind it."""
    for part in processor.get("processors") or []:
        yield from _in_template(part)
    if processor.get("type") == _TEMPLATE:
        single = processor["single"]
        key = "bos"
        for part in single:
            if "Sequence" in part:
                key = "eos"
            else:
                label = part["SpecialToken"]["id"]
                yield key, processor["special_tokens"][label]["ids"][0]
    elif processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        yield "bos", processor["cls"][1]
        yield "eos", processor["sep"][1]


def _beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON object in the same folder; empty if there is none."""
    file = path.parent / name
    try:
        return parse(read_whole(file))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
            return {}
        raise DiskError(file, error, "read") from None
    except Damaged as error:
        raise UserError(f"{file}: {error}; get the file again, or remove it") from None
