"""Whether a tokenizer that is taken elsewhere has its ids and its text there: every document of a source, by
the library `tokenizers` beside our own.

    python scripts/compare_exported.py tokenizer.model books.jsonl.xz [--form own]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokenizers

from lowres.data.tokenizer import exported, open_tokenizer
from lowres.text import documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tokenizer", type=Path, help="a file, or a folder with one")
    parser.add_argument("source", help="text: a path as data.source")
    parser.add_argument("--form", choices=("exact", "own"), help="as data.tokenizer_form")
    parsed = parser.parse_args()
    tokenizer = open_tokenizer(parsed.tokenizer, parsed.form)
    found = exported(tokenizer)
    for note in (*tokenizer.notes, *found.notes):
        print(note)
    theirs = tokenizers.Tokenizer.from_str(found.files["tokenizer.json"].decode())
    theirs.encode_special_tokens = True
    count = tokens = other_ids = other_text = 0
    for text in documents(parsed.source):
        ours, ids = tokenizer.encode(text), theirs.encode(text, add_special_tokens=False).ids
        count, tokens = count + 1, tokens + len(ours)
        other_ids += ids != ours
        other_text += theirs.decode(ours) != tokenizer.decode(ours)
    print(f"{count} documents of {tokens} tokens: {other_ids} have other ids, {other_text} another text")


if __name__ == "__main__":
    main()
