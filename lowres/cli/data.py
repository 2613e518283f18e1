"""`lowres data inspect`, `overlap` and `prepare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lowres import ranks
from lowres.checkpoint import require_outside
from lowres.config_file import data_config, source_config
from lowres.data import inspect, overlap, prepare, refuse_ends, source_as_asked, source_of
from lowres.errors import UserError
from lowres.text import is_stream, list_files
from lowres.text.words import summary
from lowres.wording import counted


def run_inspect(parsed: argparse.Namespace) -> None:
    found = inspect(source_config(parsed.source, parsed.set))
    print(json.dumps(found.to_json()) if parsed.json else "\n".join(found.lines()))


def run_overlap(parsed: argparse.Namespace) -> None:
    sources = ((parsed.train, parsed.set), (parsed.evaluation, parsed.eval_set))
    train, evaluation = (source_as_asked(source_config(*given)) for given in sources)
    found = overlap(train, evaluation, parsed.ngram, progress=not parsed.json)
    print(json.dumps(found.to_json()) if parsed.json else "\n".join(found.lines()))


def _amount(made: dict[str, Any], part: str) -> str:
    tokens, documents = made[f"{part}_tokens"], made[f"{part}_documents"]
    return f"{counted(tokens, 'token')} in {counted(documents, 'document')}"


def run_prepare(parsed: argparse.Namespace) -> None:
    config = data_config(parsed.source, parsed.set)
    require_outside(parsed.out, "OUT")
    for key in ("val_source", "seq_len", "cache", "document_mask", "mixture", "validation"):
        if key in config.model_fields_set:
            raise UserError(
                f"--set data.{key}: data prepare does not use it; leave it to the config of a run"
            )
    if not parsed.tokenizer:
        refuse_ends(config)
    source = source_of(config)
    if not is_stream(source):
        ranks.say(f"data: {summary(list_files(source))}")
    made = prepare(
        source,
        parsed.out,
        tokenizer=parsed.tokenizer or config.tokenizer,
        tokenizer_form=config.tokenizer_form,
        bos=config.bos,
        eos=config.eos,
        vocab_size=parsed.vocab_size or config.vocab_size,
        max_tokens=parsed.max_tokens,
        drop_duplicates=config.drop_duplicates,
        max_overlap=config.max_overlap,
    )
    for note in made["notes"]:
        ranks.say(f"note: {note}")
    print(
        f"{parsed.out}: {_amount(made, 'train')} for training, {_amount(made, 'val')} for validation, "
        f"{made['vocab_size']:,} pieces"
    )
