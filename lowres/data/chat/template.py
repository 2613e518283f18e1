"""A chat as text, by a template in Jinja: the tokenizer's own, one that is built in, or a file.

Templates give what `transformers` makes of them. They come with models from anywhere, so they run in Jinja's
sandbox. `strftime_now` gives the same day at all times, as the same chats must become the same tokens
tomorrow.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowres.data.chat import examination
from lowres.data.chat.pieces import Cutter
from lowres.data.chat.records import BadRow
from lowres.data.tokenizer import Tokenizer
from lowres.data.tokenizer.companions import CONFIG
from lowres.disk import DiskError, read_whole
from lowres.errors import UserError, first_line

# the day in the templates of Llama 3, for those that know no other
TODAY = datetime(2024, 7, 26)
# of older versions, ways out of the sandbox are known
_SAFE = (3, 1, 6)
_GENERATION = "lowres_generation"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_LARGEST = 1 << 20

# As published with Tulu 3, after the bos that its trainer adds; there, other roles vanish without a word.
TULU = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('tulu has no role ' ~ message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\\n' + message.content }}
    {%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
    {%- if message.role != 'assistant' or not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
BUILT_IN = {"tulu": TULU, "chatml": CHATML}


class Template:
    """A chat template for the tokens of a tokenizer.

    `name` for messages; `source`, its text; `variables`, the special tokens that it may write, such as
    bos_token; `fingerprint` of all that decides what it writes. `cutter` finds the special tokens in that.
    `ends`: ids of the tokens that end an answer. `notes`: what the user should know.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer) -> None:
        """Raises UserError if no chat of this template can be trained on."""
        self.name, self.source = name, source
        self.variables = _variables(tokenizer)
        self.fingerprint = hashlib.blake2b(
            json.dumps([source, self.variables, TODAY.isoformat()]).encode(), digest_size=16
        ).hexdigest()
        self.cutter = Cutter(tokenizer.specials)
        try:
            self._compiled = _environment().from_string(source)
        except UserError:
            raise
        except Exception as error:  # also other errors than those of Jinja
            line = getattr(error, "lineno", None)
            where = f" in line {line}" if line else ""
            raise UserError(f"{name}: not a Jinja template ({first_line(error)}{where})") from None
        messages = examination.small_chat(self)
        self.ends = examination.ends(self, messages)
        self.notes = examination.notes(self, messages)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, around: str = ""
    ) -> str:
        """The messages as text. add_generation_prompt: with what stands in front of the next answer. around:
        a mark that is put on both sides of what the template says is trained. Raises BadRow."""
        given: dict[str, Any] = {"messages": list(map(_given, messages)), "tools": None, "documents": None}
        try:
            text: str = self._compiled.render(
                {
                    **self.variables,
                    **given,
                    "add_generation_prompt": add_generation_prompt,
                    _GENERATION: around,
                }
            )
        except Exception as error:  # whatever an expression in it may raise
            raise BadRow(f"{self.name} fails: {first_line(error).rstrip('.')}") from None
        return text


def open_template(name: str | None, tokenizer: Tokenizer) -> Template:
    """The template of that name (`data.chat_template`): None for the tokenizer's own, one of BUILT_IN, or a
    file. Raises UserError if there is none, or it cannot be used."""
    if not tokenizer.has_text:
        raise UserError(
            f"tokenizer {tokenizer.path}: it has ids only, and chats are text; set data.tokenizer"
        )
    if name in BUILT_IN:
        return Template(f"data.chat_template {name}", BUILT_IN[name], tokenizer)
    if name is not None:
        path = Path(name).expanduser()
        return Template(f"data.chat_template {path}", _read(path), tokenizer)
    if tokenizer.chat_template is None:
        raise UserError(
            f"data.chat_template: the tokenizer {tokenizer.path} has none of its own; set it to "
            f"{', '.join(BUILT_IN)}, or the path of a Jinja template"
        )
    return Template(f"the chat template of {tokenizer.path}", tokenizer.chat_template, tokenizer)


def _read(path: Path) -> str:
    try:
        return read_whole(path, limit=_LARGEST).decode()
    except UnicodeDecodeError:
        raise UserError(f"data.chat_template {path}: not UTF-8; give the text of a Jinja template") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            names = ", ".join(BUILT_IN)
            raise UserError(f"data.chat_template {path}: no such file, and not one of {names}") from None
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise UserError(f"data.chat_template {path}: not the file of a Jinja template") from None
        raise DiskError(path, error, "read") from None


def _variables(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by their names in templates: those that files beside the tokenizer name, as others read
    them there, else bos and eos."""
    spelt = {special.id: token for token, special in tokenizer.specials.items()}
    beside = tokenizer.companions.content_of("special_tokens_map.json") | tokenizer.companions.content_of(
        CONFIG
    )
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in beside.items()}
    found = {key: value for key, value in named.items() if key.endswith("_token") and isinstance(value, str)}
    found.setdefault("eos_token", spelt[tokenizer.end_id])
    if "bos_token" not in named:  # null says that no text begins with one
        found["bos_token"] = spelt[tokenizer.bos_id]
    return found


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without keys that say nothing, and reasoning under all its names."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    if reasoning is not None:
        given["reasoning_content"] = reasoning
        given.setdefault("thinking", reasoning)
    return given


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja, set up as templates expect it. Raises UserError."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
        from jinja2.utils import Namespace
    except ImportError:
        raise UserError("chat templates need the package jinja2: pip install 'lowres[chat]'") from None
    found = version("jinja2")
    if tuple(int(part) for part in found.split(".")[:3] if part.isdecimal()) < _SAFE:
        raise UserError(
            f"chat templates need jinja2 {'.'.join(map(str, _SAFE))} or newer, as the sandbox of {found} has "
            "holes: pip install 'lowres[chat]'"
        )

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what a model learns to write."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_around", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _around(self, context: Any, caller: Any) -> str:
            mark = context.get(_GENERATION, "")
            return f"{mark}{caller()}{mark}"

    class Attributes(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*given: Any, **more: Any) -> Attributes:
        made = Attributes()
        for name, value in dict(*given, **more).items():
            made[name] = value
        return made

    def dictionary(*given: Any, **more: Any) -> dict[Any, Any]:
        return dict(*given, **more)

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": TODAY.strftime,
        "namespace": namespace,
        "dict": dictionary,
    }
    return environment
