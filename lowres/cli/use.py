"""`lowres sample` and `eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from lowres import harness, ranks, session
from lowres.cli.tasks import refuse_without_tasks
from lowres.config_file import data_config
from lowres.errors import UserError
from lowres.exchange import find_model
from lowres.scores import BITS, by_part, in_words
from lowres.scoring import score


def run_sample(parsed: argparse.Namespace) -> None:
    keys = ("interactive", "chat", "system", "tokens", "temperature", "top_k", "stop", "seed")
    asked = {key: getattr(parsed, key) for key in keys}
    session.write(
        parsed.model,
        session.Asked(prompts=parsed.prompt, file=parsed.prompts, as_json=parsed.json, **asked),
    )


def run_eval(parsed: argparse.Namespace) -> None:
    if parsed.tasks:
        _eval_tasks(parsed)
        return
    refuse_without_tasks(parsed, "include_path", "limit", "num_fewshot")
    if parsed.set and not parsed.data:
        raise UserError("--set: says how to read a source; give it with --data")
    asked = data_config(parsed.data, parsed.set) if parsed.data else None
    scores = score(parsed.model, asked)
    print(json.dumps(scores) if parsed.json else "\n".join(_lines(scores)))


def _lines(scores: dict[str, float]) -> Iterator[str]:
    """The scores as text; those of each part on a line of its own."""
    if "val_accuracy" in scores:
        told = ("margin", "reward_chosen", "reward_rejected", "drift")
        shown = (f"{name.replace('_', ' ')} {scores[f'val_{name}']:.4f}" for name in told)
        yield f"{in_words(scores)}, {', '.join(shown)}"
        return
    no_text = "" if BITS in scores else ", no text, so no bits per byte"
    yield f"{in_words(scores)} per token{no_text}, over {scores['val_tokens']:,} tokens"
    for name, found in by_part(scores).items():
        yield f"  {name}: {in_words(found)}, over {found['val_tokens']:,} tokens"


def _eval_tasks(parsed: argparse.Namespace) -> None:
    for option in ("data", "set"):
        if getattr(parsed, option):
            raise UserError(f"--{option}: tasks have data of their own; leave it out, or leave --tasks out")
    tasks = harness.load_tasks(parsed.tasks, parsed.include_path)
    config, engine, tokenizer = find_model(parsed.model, packed=False).open(harness.TEXTS)
    texts = engine.settings.texts
    found = harness.score(tasks, config, engine, tokenizer, parsed.limit, parsed.num_fewshot, texts)
    if found.shortened:
        ranks.say(f"note: {found.note()}")
    print(json.dumps(found.as_dict()) if parsed.json else found.table())
