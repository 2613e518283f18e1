"""Files that describe or make the data beside them: cards, licences, checksums, scripts."""

from __future__ import annotations

import fnmatch
import re

from lowres.text.kinds import KINDS, Rank, kind_of_name, plain
from lowres.text.left_out import LeftOut
from lowres.text.source import File, Source

_DESCRIBES = (
    "readme", "readme[-_.]*", "license", "license[-.]*", "licence", "licence[-.]*", "unlicense",
    *(
        f"{word}{rest}"
        for word in ("copying", "copyright", "notice", "citation", "changelog", "changes", "authors",
                     "contributors", "contributing", "code_of_conduct", "security", "manifest")
        for rest in ("", ".txt", ".md", ".rst", ".lesser", ".bib", ".cff")
    ),
    "dataset_info*.json", "dataset_dict.json", "state.json", "requirements*.txt",
    "*[-_.]sha1.txt", "*[-_.]sha256.txt", "*[-_.]md5.txt", "*sha1sum*", "*sha256sum*", "*sha512sum*",
    "*md5sum*", "*checksum*", "*.md5", "*.sha1", "*.sha256", "*.sha512", "*.asc", "*.sig",
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
)  # fmt: skip
_DESCRIBES_RE = re.compile("|".join(map(fnmatch.translate, _DESCRIBES)))
# rows beside so much source code, or source code beside so much text, belong to it
_TIMES, _MUCH = 10, 1 << 16


def describes(name: str) -> bool:
    """Whether a name is that of a card, a licence, a checksum and the like."""
    return _DESCRIBES_RE.match(name.rsplit("/", 1)[-1].lower()) is not None


def looks_like_data(name: str) -> bool:
    """Whether a file would be data by its name alone."""
    kind, _ = kind_of_name(name)
    return kind is not None and kind.rank < Rank.PROSE and not describes(name)


def without_descriptions(files: list[File], left_out: list[LeftOut], source: Source) -> list[File]:
    """The files without those that only describe or make the others."""
    if source.include:
        return files
    data = [f for f in files if not describes(f.name)]
    ranks = {KINDS[f.kind].rank for f in data}
    size = {rank: sum(f.size for f in files if KINDS[f.kind].rank == rank) for rank in Rank}
    code = sum(f.size for f in data if f.kind == plain.SOURCE_CODE)
    # a few ids among much text are its, like the expected values of a test
    beside = ranks & {Rank.ROWS, Rank.TEXT} or size[Rank.TOKENS] < size[Rank.PROSE]
    of_code = code >= _MUCH and 0 < _TIMES * size[Rank.ROWS] < code
    of_text = size[Rank.TEXT] >= _MUCH and _TIMES * code < size[Rank.TEXT]
    less = ({Rank.TOKENS} if beside else set()) | ({Rank.ROWS} if of_code else set())
    best = min(ranks - less, default=Rank.PROSE)
    # in a program, or where all is prose, a README is text like any other
    described = best < Rank.PROSE or (not code and any(f.kind == plain.OTHER for f in data))
    kept = list[File]()
    for f in files:
        rank = KINDS[f.kind].rank
        if describes(f.name) and rank >= Rank.TEXT and described:
            left_out.append(LeftOut(f.name, f.size, "describes the data"))
        elif rank == Rank.ROWS and of_code:
            reason = f"{f.kind} beside much more source code; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        elif f.kind == plain.SOURCE_CODE and best == Rank.TEXT and of_text:
            reason = "source code beside much more text; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        elif rank == Rank.PROSE and best <= Rank.ROWS:
            reason = f"{f.kind} beside data files; data.include takes it"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        elif rank == Rank.TOKENS and beside:
            reason = "token ids beside text; data.include takes one of them"
            left_out.append(LeftOut(f.name, f.size, reason, data=True))
        else:
            kept.append(f)
    return kept
