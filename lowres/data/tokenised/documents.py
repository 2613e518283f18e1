"""How the documents of a corpus are separated, as far as its ids tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowres.data.tokenised.files import TokenFile

_LOOKED_AT = 256  # documents of a file


@dataclass(frozen=True)
class Convention:
    """first: the id that begins every document; last: the one that ends every one. block: the length of all
    rows, if it is the same. padded: the id that fills up rows. known: whether the files tell where documents
    begin."""

    first: int | None = None
    last: int | None = None
    block: int | None = None
    padded: int | None = None
    known: bool = False


def of_files(files: Sequence[TokenFile]) -> Convention:
    """From files that tell where their documents are."""
    firsts, lasts, lengths = set[int](), set[int](), set[int]()
    fillers = list[int]()
    seen = 0
    for file in files:
        if file.documents is None:
            continue
        count = len(file.documents)
        for number in sorted(
            {int(i) for i in np.linspace(0, count - 1, min(count, _LOOKED_AT))} if count else ()
        ):
            start, end = file.documents.start(number), file.documents.start(number + 1)
            lengths.add(end - start)
            if start == end:
                continue
            seen += 1
            firsts.add(int(file.read(start, 1)[0]))
            ending = file.read(max(start, end - 2), 2).tolist()
            lasts.add(ending[-1])
            fillers += ending[-1:] if len(set(ending)) < end - start and len(set(ending)) == 1 else []
    if not seen:
        return Convention()
    block = lengths.pop() if len(lengths) == 1 and seen > 1 else None
    # one document proves nothing
    first, last = (firsts, lasts) if seen > 1 else (set[int](), set[int]())
    filler = max(set(fillers), key=fillers.count, default=None)
    often = filler is not None and fillers.count(filler) > seen / 10
    return Convention(
        first=first.pop() if len(first) == 1 else None,
        last=last.pop() if len(last) == 1 else None,
        block=block,
        padded=filler if block and often else None,
        known=True,
    )


def of_separator(files: Sequence[TokenFile], bos: int | None, eos: int | None) -> Convention:
    """From files that do not tell, where the ids of a tokenizer are known: a corpus begins with what begins
    documents, or ends with what ends them."""
    ends = [(int(file.read(0, 1)[0]), int(file.read(len(file) - 1, 1)[0])) for file in files if len(file)]
    known = {i for i in (bos, eos) if i is not None}
    firsts, lasts = {first for first, _ in ends} & known, {last for _, last in ends} & known
    if firsts == lasts:  # a separator at both ends of shards says nothing
        lasts = lasts if len(firsts) > 1 else set()
    return Convention(first=min(firsts, default=None), last=min(lasts, default=None))


def describe(convention: Convention, separator: int | None, count: int, tokens: int) -> str:
    """A line for the user. count: how many of `tokens` ids, all or a sample, are the separator."""
    first, last = convention.first, convention.last
    often = f", {count:,} among {tokens:,} ids" if count else ""
    if convention.padded is not None:
        found = (
            f"rows of {convention.block:,} ids end with id {convention.padded} several times: they look "
            "padded, and padding is trained on like any id; make the corpus without it"
        )
    elif first is not None and last is not None:
        found = f"documents begin with id {first} and end with id {last}"
    elif first is not None:
        found = f"document separator {first} at the start of documents{often}"
    elif last is not None:
        found = f"document separator {last} at the end of documents{often}"
    elif convention.block:
        found = f"rows of {convention.block:,} ids, one after the other"
    elif separator is not None and count:
        found = f"document separator {separator}{often}"
    elif convention.known:
        found = "no id begins or ends all documents, so nothing separates them"
    else:
        found = "it is not known which id separates documents"
    return found
