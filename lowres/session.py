"""`lowres sample`: text from a model in the terminal, while it is written.

Prompts are continued, or each line of the input: by itself, or in a conversation as what a user says. Where a
person types the lines, Ctrl-C ends what is being written, and between answers the session.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lowres import disk, terminal
from lowres.conversation import Conversation
from lowres.data.chat import Template, open_template
from lowres.engine import LayerwiseEngine
from lowres.errors import UserError
from lowres.exchange import find_model
from lowres.memory import GIB
from lowres.runs import OpenRun, Trained
from lowres.sample import Part, Sampling, room_for
from lowres.stopping import Left

_LARGEST = 1 << 30  # bytes of a file of prompts


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a model. prompts: none if they are the lines of the input. file: with further prompts,
    one a line, or - for the input. interactive: a person types the lines, whatever the input is. as_json:
    print an object for each prompt. The others: see `OpenRun.generate` and `Conversation`."""

    prompts: Sequence[str] = ()
    file: Path | None = None
    interactive: bool = False
    chat: bool = False
    system: str | None = None
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    stop: Sequence[str] = ()
    seed: int = 0
    as_json: bool = False

    @property
    def typed(self) -> bool:
        """Whether a person types the lines."""
        return self.interactive or (not (self.prompts or self.file) and sys.stdin.isatty())


def write(path: Path, asked: Asked) -> None:
    """Print what the model of a run, a checkpoint or a Hugging Face folder writes. Raises UserError, or
    DoesNotFit."""
    prompts = [*asked.prompts, *(_prompts_in(asked.file) if asked.file else ())]
    _require_sense(asked, prompts)
    model = find_model(path)
    length = model.config.data.seq_len
    how = Sampling(asked.tokens, length, asked.temperature, asked.top_k, asked.seed)
    if asked.chat:
        template = _template(path, model)
        opened = _opened(model, 1, length)
        talk = Conversation(opened.engine, opened.tokenizer, template, how, asked.system, asked.stop)
        _talk(talk, prompts, asked)
        return
    if not model.tokenizer.has_text:
        _note(f"{path} has no tokenizer for text; a sample is ids")
    ids = [model.tokenizer.prompt(prompt) for prompt in prompts]
    opened = _opened(model, len(ids) or 1, room_for(ids, how) if ids else length)
    if asked.as_json or len(prompts) > 1:
        _write_all(opened, prompts, asked)
        return
    for prompt in prompts or _lines(asked):
        with _going_on(asked):
            begun = opened.tokenizer.stream().begin(opened.tokenizer.prompt(prompt))
            _show(chain([begun], (part.text for part in _generated(opened, [prompt], asked))))


def _require_sense(asked: Asked, prompts: Sequence[str]) -> None:
    if asked.file is not None and not prompts:
        raise UserError(f"--prompts: {asked.file} has no line with a prompt")
    if not (prompts or asked.chat or asked.interactive):
        raise UserError(
            "--prompt: give the text that is continued, --interactive to type some, or talk to the model "
            "with --chat"
        )
    if prompts and asked.interactive:
        raise UserError("--interactive: prompts are typed; leave --prompt and --prompts out")
    if asked.system is not None and not asked.chat:
        raise UserError("--system: only chats have it; give it with --chat")
    if asked.as_json and (asked.chat or not prompts):
        raise UserError("--json: it is for prompts that are given with --prompt or --prompts, without --chat")
    if "" in asked.stop:
        raise UserError("--stop: an empty string is everywhere; give a text")


def _template(path: Path, model: Trained) -> Template:
    config, tokenizer = model.config, model.tokenizer
    # what a run was tuned with came along with its tokenizer
    asked = config.data.chat_template if config.objective.name == "pretrain" else None
    if asked is None and tokenizer.has_text and tokenizer.chat_template is None:
        raise UserError(f"--chat: {path} was not tuned, and has no chat template; leave it out")
    template = open_template(asked, tokenizer)
    for note in template.notes:
        _note(note)
    return template


def _opened(model: Trained, texts: int, length: int) -> OpenRun:
    opened = model.open(texts, length, evaluates=False)
    if note := rate(opened.engine, texts):
        _note(note)
    return opened


def rate(engine: LayerwiseEngine, texts: int) -> str:
    """How fast texts will be written if weights are copied to the GPU for each token; empty if none are."""
    if not engine.fetched:
        return ""
    seconds, together = engine.seconds_to_fetch(), min(texts, engine.settings.texts)
    more = f", {together / seconds:,.3g} for {together} texts together" if together > 1 else ""
    return (
        f"{engine.fetched / GIB:,.3g} GiB of weights stay in host memory and pass through the GPU for every "
        f"token, at {engine.fetched / seconds / 1e9:,.3g} GB/s: at most {1 / seconds:,.3g} tokens/s{more}"
    )


def _generated(opened: OpenRun, prompts: Sequence[str], asked: Asked) -> Iterator[Part]:
    how: dict[str, Any] = {"temperature": asked.temperature, "top_k": asked.top_k, "seed": asked.seed}
    return opened.generate(prompts, asked.tokens, stop=asked.stop, **how)


def _write_all(opened: OpenRun, prompts: Sequence[str], asked: Asked) -> None:
    """Each text when it and all before it are complete."""
    texts, ends, shown = [""] * len(prompts), dict[int, str](), 0
    for part in _generated(opened, prompts, asked):
        texts[part.prompt] += part.text
        if part.end:
            ends[part.prompt] = part.end
        while shown in ends:
            prompt, text = prompts[shown], texts[shown]
            if asked.as_json:
                record = {"prompt": prompt, "text": text, "end": ends[shown]}
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                begun = opened.tokenizer.stream().begin(opened.tokenizer.prompt(prompt))
                print(f"--- {shown + 1} ---\n{begun}{text}", flush=True)
            shown += 1
        if "stdout" in terminal.lost():
            return


def _talk(talk: Conversation, prompts: Sequence[str], asked: Asked) -> None:
    """Print the answer to each prompt, or to each line of the input."""
    noted = False
    for text in prompts or _lines(asked):
        with _going_on(asked), closing(talk.answering(text)) as pieces:
            _show(pieces)
        if talk.cut_off and not noted:
            noted = True
            _note("this is longer than data.seq_len, so the model no longer sees the beginning")


def _show(pieces: Iterable[str]) -> None:
    """Print the pieces of a text as they come, and end the line whatever ends them."""
    begun = False
    try:
        for piece in pieces:
            begun = True
            # piece by piece: the guard lets through what alone would move the cursor
            print(terminal.clean(piece), end="", flush=True)
            if "stdout" in terminal.lost():
                return
        begun = True
    finally:
        if begun:
            print(flush=True)


@contextmanager
def _going_on(asked: Asked) -> Iterator[None]:
    """Where a person types the lines, neither Ctrl-C nor a line that is refused ends the session."""
    try:
        yield
    except (KeyboardInterrupt, UserError) as error:
        if not asked.typed or isinstance(error, Left):
            raise
        if isinstance(error, UserError):
            print(f"lowres: {error}", file=sys.stderr)


def _lines(asked: Asked) -> Iterator[str]:
    """The lines of the input that are not blank."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown)
        except (EOFError, KeyboardInterrupt) as error:
            if not (isinstance(error, EOFError) or asked.typed) or isinstance(error, Left):
                raise
            if shown:
                print()  # what follows is not on the line of the prompt
            return
        except UnicodeDecodeError:
            raise UserError("the input is not UTF-8; give it as that") from None
        if line.strip():
            yield line


def _prompts_in(file: Path) -> list[str]:
    """The lines of a file that are not blank; of the input, if its name is -."""
    if str(file) == "-":
        return [*_lines(Asked())]
    with disk.named(file, "read"):
        content = disk.read_whole(file.expanduser(), limit=_LARGEST)
    try:
        return [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--prompts: {file} is not UTF-8; give it as that") from None


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
