"""`lowres sample` and `eval`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from lowres import harness, ranks
from lowres.cli.tasks import refuse_without_tasks
from lowres.config_file import data_config
from lowres.conversation import Conversation
from lowres.data.chat import open_template
from lowres.errors import UserError
from lowres.runs import open_run
from lowres.sample import Sampling, sample
from lowres.scoring import score_run
from lowres.wording import counted


def run_sample(parsed: argparse.Namespace) -> None:
    if parsed.prompt is None and not parsed.chat:
        raise UserError("--prompt: give the text that is continued, or talk to the model with --chat")
    if parsed.system is not None and not parsed.chat:
        raise UserError("--system: only chats have it; give it with --chat")
    config, engine, tokenizer = open_run(parsed.run)
    how = Sampling(parsed.tokens, config.data.seq_len, parsed.temperature, parsed.top_k, parsed.seed)
    if parsed.chat:
        # what a run was tuned with came along with its tokenizer
        asked = config.data.chat_template if config.objective.name == "pretrain" else None
        if asked is None and tokenizer.has_text and tokenizer.chat_template is None:
            raise UserError(f"--chat: {parsed.run} was not tuned, and has no chat template; leave it out")
        template = open_template(asked, tokenizer)
        for note in template.notes:
            print(f"note: {note}", file=sys.stderr)
        _talk(Conversation(engine, tokenizer, template, how, parsed.system), parsed.prompt)
        return
    if not tokenizer.has_text:
        print(f"note: {parsed.run} has no tokenizer for text; a sample is ids", file=sys.stderr)
    print(sample(engine, tokenizer, parsed.prompt, how))


def _talk(conversation: Conversation, question: str | None) -> None:
    """Print the answer to a question, or to each line of the input."""
    noted = False
    for text in _lines() if question is None else [question]:
        print(conversation.answer(text), flush=True)
        if conversation.cut_off and not noted:
            noted = True
            note = "this is longer than data.seq_len, so the model no longer sees the beginning"
            print(f"note: {note}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """The lines of the input that are not blank."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("the input is not UTF-8; give it as that") from None
        if line.strip():
            yield line


def run_eval(parsed: argparse.Namespace) -> None:
    if parsed.tasks:
        _eval_tasks(parsed)
        return
    refuse_without_tasks(parsed, "include_path", "limit", "num_fewshot")
    if parsed.set and not parsed.data:
        raise UserError("--set: says how to read a source; give it with --data")
    asked = data_config(parsed.data, parsed.set) if parsed.data else None
    scores = score_run(parsed.run, asked)
    print(json.dumps(scores) if parsed.json else _scores_text(scores))


def _scores_text(scores: dict[str, float]) -> str:
    if "val_accuracy" in scores:
        told = ("margin", "reward_chosen", "reward_rejected", "drift")
        shown = (f"{name.replace('_', ' ')} {scores[f'val_{name}']:.4f}" for name in told)
        return f"loss {scores['val_loss']:.4f}, accuracy {scores['val_accuracy']:.1%}, {', '.join(shown)}"
    bits = scores.get("val_bits_per_byte")
    return f"loss {scores['val_loss']:.4f}, perplexity {scores['val_ppl']:.3f} per token, " + (
        "no text, so no bits per byte" if bits is None else f"{bits:.4f} bits per byte"
    )


def _eval_tasks(parsed: argparse.Namespace) -> None:
    for option in ("data", "set"):
        if getattr(parsed, option):
            raise UserError(f"--{option}: tasks have data of their own; leave it out, or leave --tasks out")
    tasks = harness.load_tasks(parsed.tasks, parsed.include_path)
    config, engine, tokenizer = open_run(parsed.run, packed=False)
    found = harness.score(tasks, config, engine, tokenizer, parsed.limit, parsed.num_fewshot)
    if found.shortened:
        ranks.say(
            f"note: {counted(found.shortened, 'request is', 'requests are')} longer than the context of the "
            f"model, which saw their last {found.context:,} tokens"
        )
    print(json.dumps(found.as_dict()) if parsed.json else found.table())
