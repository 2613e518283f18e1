"""`lowres sample` and `eval`."""

from __future__ import annotations

import argparse
import json

from lowres import harness, ranks, session
from lowres.cli.tasks import refuse_without_tasks
from lowres.config_file import data_config
from lowres.errors import UserError
from lowres.exchange import find_model
from lowres.scoring import score
from lowres.wording import counted


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
    print(json.dumps(scores) if parsed.json else _scores_text(scores))


def _scores_text(scores: dict[str, float]) -> str:
    if "val_accuracy" in scores:
        told = ("margin", "reward_chosen", "reward_rejected", "drift")
        shown = (f"{name.replace('_', ' ')} {scores[f'val_{name}']:.4f}" for name in told)
        return f"loss {scores['val_loss']:.4f}, accuracy {scores['val_accuracy']:.1%}, {', '.join(shown)}"
    bits = scores.get("val_bits_per_byte")
    return (
        f"loss {scores['val_loss']:.4f}, perplexity {scores['val_ppl']:.3f} per token, "
        + ("no text, so no bits per byte" if bits is None else f"{bits:.4f} bits per byte")
        + f", over {scores['val_tokens']:,} tokens"
    )


def _eval_tasks(parsed: argparse.Namespace) -> None:
    for option in ("data", "set"):
        if getattr(parsed, option):
            raise UserError(f"--{option}: tasks have data of their own; leave it out, or leave --tasks out")
    tasks = harness.load_tasks(parsed.tasks, parsed.include_path)
    config, engine, tokenizer = find_model(parsed.model, packed=False).open(harness.TEXTS)
    texts = engine.settings.texts
    found = harness.score(tasks, config, engine, tokenizer, parsed.limit, parsed.num_fewshot, texts)
    if found.shortened:
        ranks.say(
            f"note: {counted(found.shortened, 'request is', 'requests are')} longer than the context of the "
            f"model, which saw their last {found.context:,} tokens"
        )
    print(json.dumps(found.as_dict()) if parsed.json else found.table())
