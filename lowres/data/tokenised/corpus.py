"""A source of token ids as the data of a run: its files, its vocabulary, what is held out for validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lowres.data.manifest import hash_of
from lowres.data.tokenised import columns, documents, llm_c, megatron, npy, raw
from lowres.data.tokenised.documents import Convention
from lowres.data.tokenised.files import Part, Seen, Span, TokenFile
from lowres.data.tokenizer import Tokenizer, Vocabulary
from lowres.errors import UserError
from lowres.text import TEST, TRAIN, VALIDATION, Listing
from lowres.text.kinds import KINDS, Rank
from lowres.text.kinds.tokens import ARROW, LLM_C, LLM_C_MAGIC, MEGATRON, MEGATRON_INDEX, NPY, PARQUET, RAW
from lowres.text.source import BadFileError, File

# larger corpora are read in samples before the first step
READ_AT_ONCE_BYTES = 4 << 30
# without validation files, this share is held out, with limits in tokens
_HELD_OUT, _LEAST_HELD_OUT, _MOST_HELD_OUT, _LARGEST_SHARE = 0.005, 50_000, 10_000_000, 0.05
_SHOWN = 24  # ids whose text is shown
# vocabularies of this size, with rows added so that it is a multiple, are those of GPT-2
_GPT2, _GPT2_PADDED = llm_c.VOCABULARIES[2][0], 50304


@dataclass(frozen=True)
class Corpus:
    """train, validation: see `Part`. notes: for the user. folder: of the source."""

    tokenizer: Tokenizer
    train: Part
    validation: Part
    notes: list[str]
    folder: Path

    def fingerprint(self) -> str:
        """Changes whenever the batches may change."""
        return hash_of(self.tokenizer.fingerprint, self.train.fingerprint())


def open_corpus(
    listing: Listing,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    bos: str | int | None = None,
    eos: str | int | None = None,
    seq_len: int,
    cache: Path,
    validation: Listing | None = None,
    hold_out: bool = True,
) -> Corpus:
    """listing: of token ids. validation: the same, instead of what would be held out. vocab_size: of the ids
    if there is no tokenizer; default: what the files say; so are bos and eos. cache: for what cannot
    be read in place. hold_out: whether there must be validation data. Raises UserError.
    """
    listing.check()
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size or _known_vocabulary(listing)
    notes, elsewhere = list[str](), list[File]()
    if validation is not None:
        validation.check()
        elsewhere = _own(validation, VALIDATION) or _own(validation, TRAIN)
    taken = {os.path.realpath(file.path) for file in elsewhere}
    train = [file for file in _own(listing, TRAIN) if os.path.realpath(file.path) not in taken]
    if len(train) < len(_own(listing, TRAIN)):
        notes.append("data.val_source: its files are also in data.source; they are not trained on")
    if not train:
        raise UserError(
            f"{listing.source.name}: all its ids are validation data; set data.val_source to others"
        )
    opener = _Opener(listing.source.token_dtype, listing.source.damaged, vocab_size, cache)
    training = opener.open(train)
    held = opener.open(elsewhere if validation is not None else _own(listing, VALIDATION))
    if not sum(map(len, training)):
        raise UserError(f"{listing.source.name}: has no ids; give it files with some")
    convention = documents.of_files(training)
    if tokenizer is None:
        tokenizer = _ids_only(vocab_size, _as_asked(convention, bos, eos, vocab_size), train, training)
    if not convention.known:
        convention = documents.of_separator(training + held, tokenizer.bos_id, tokenizer.eos_id)
    separator = convention.last if convention.first is None else convention.first
    if separator is None and tokenizer.bos_id >= 0:
        separator = tokenizer.bos_id

    files = training + held
    small = _is_small(files)
    seen = [file.look(small, separator) for file in files]
    spans = [Span(file, 0, len(file)) for file in training]
    own = [Span(file, 0, len(file)) for file in held]
    how = "its own validation files" if hold_out and validation is None else "data.val_source"
    if not own and hold_out:
        spans, own = _held_out(spans, seq_len, separator, at_the_start=convention.first is not None)
        how = "held out at the end"
    corpus = Corpus(tokenizer, Part(spans), Part(own), notes, listing.source.path)
    notes += [_summary(listing, corpus, files, seen, how)]
    notes += [documents.describe(convention, separator, *_counted(files, seen))]
    notes += _text_of_them(tokenizer, training[0])
    notes += opener.left_out
    notes += listing.warnings()
    return corpus


def ids_of(listing: Listing, tokenizer: Tokenizer, cache: Path) -> Part:
    """The validation files of a source of token ids, or all of it if it has none. Raises UserError."""
    listing.check()
    opener = _Opener(listing.source.token_dtype, listing.source.damaged, tokenizer.vocab_size, cache)
    files = opener.open(_own(listing, VALIDATION) or _own(listing, TRAIN))
    for file in files:
        file.look(_is_small(files), None)
    return Part([Span(file, 0, len(file)) for file in files])


def _is_small(files: Sequence[TokenFile]) -> bool:
    return sum(len(file) * file.dtype.itemsize for file in files) < READ_AT_ONCE_BYTES


def count_ids(file: File, token_dtype: str | None) -> tuple[int, int, list[int]]:
    """(documents, or 0 if they are not known; ids; the first ones) of a file. Nothing is written, and ids are
    not checked. Raises UserError."""
    if file.kind == MEGATRON_INDEX:
        return 0, 0, []
    if file.kind in (PARQUET, ARROW):
        return columns.count(file, _SHOWN)
    opened = _Opener(token_dtype, "refuse", None, None).open([file])[0]
    return len(opened.documents or ()), len(opened), opened.read(0, _SHOWN).tolist()


class _Opener:
    """left_out: files that were damaged, with damaged = "skip". vocab_size, cache: None if ids are only
    counted."""

    def __init__(
        self, token_dtype: str | None, damaged: str, vocab_size: int | None, cache: Path | None
    ) -> None:
        self._token_dtype, self._damaged, self._vocab_size, self._cache = (
            token_dtype,
            damaged,
            vocab_size,
            cache,
        )
        self.left_out: list[str] = []

    def open(self, files: Sequence[File]) -> list[TokenFile]:
        made = list[TokenFile]()
        for file in files:
            try:
                opened = self._open(file)
            except BadFileError as error:
                if self._damaged == "refuse":
                    raise
                self.left_out.append(f"left out: {error}")
                continue
            opened.vocab_size = self._vocab_size
            made.append(opened)
        return made

    def _open(self, file: File) -> TokenFile:
        if file.kind == RAW:
            return raw.open_file(file, self._token_dtype, self._vocab_size)
        if file.kind in (PARQUET, ARROW):
            assert self._vocab_size is not None and self._cache is not None
            return columns.open_file(file, self._vocab_size, self._cache)
        opened = {
            LLM_C: llm_c.open_file,
            NPY: npy.open_file,
            MEGATRON: lambda file: megatron.open_pair(file.path),
        }[file.kind](file)
        if self._token_dtype not in (None, opened.dtype.name):
            raise UserError(
                f"data.token_dtype: {self._token_dtype}, but {file.path} says that its ids are "
                f"{opened.dtype.name}; leave it out"
            )
        return opened


def _own(listing: Listing, part: str) -> list[File]:
    """The files of a part that hold ids. Raises UserError if there is text among them."""
    text = [file.name for file in listing.files if KINDS[file.kind].rank != Rank.TOKENS and file.part != TEST]
    if text:
        raise UserError(
            f"{listing.source.name}: holds token ids, and text ({text[0]}); let data.include take one"
        )
    return [file for file in listing.part(part) if file.kind != MEGATRON_INDEX]


def _known_vocabulary(listing: Listing) -> int:
    """The vocabulary that the files say. Raises UserError if they do not."""
    for file in listing.files:
        if file.kind == LLM_C:
            with file.path.open("rb") as stream:
                magic = int.from_bytes(stream.read(4), "little")
            return llm_c.VOCABULARIES[LLM_C_MAGIC[magic]][0]
    raw_files = any(file.kind == RAW for file in listing.files)
    asks_for_type = raw_files and listing.source.token_dtype is None
    raise UserError(
        f"data.vocab_size: {listing.source.name} holds token ids, and does not say of which vocabulary; set "
        "data.tokenizer to what they were made with, or data.vocab_size to the number of its pieces"
        + (", and data.token_dtype" if asks_for_type else "")
    )


def _as_asked(
    convention: Convention, bos: str | int | None, eos: str | int | None, vocab_size: int
) -> Convention:
    """What begins and ends documents, as the user says. Raises UserError if that is no id."""
    if bos is None and eos is None:
        return convention
    for key, asked in (("bos", bos), ("eos", eos)):
        if asked is not None and not (str(asked).isdecimal() and int(asked) < vocab_size):
            raise UserError(
                f"data.{key}: {asked!r} is no id below {vocab_size:,}; without data.tokenizer, give an id"
            )
    first, last = (None if asked is None else int(asked) for asked in (bos, eos))
    return replace(convention, first=first, last=last)


def _ids_only(
    vocab_size: int, convention: Convention, files: Sequence[File], opened: Sequence[TokenFile]
) -> Vocabulary:
    """A vocabulary with the ids that begin and end documents, as far as they are known."""
    first, last = convention.first, convention.last
    if first is None and last is None:
        llm = next((o for f, o in zip(files, opened, strict=False) if f.kind == LLM_C), None)
        if llm is not None:
            first = llm_c.VOCABULARIES[llm.dtype.itemsize][1]
        elif _GPT2 <= vocab_size <= _GPT2_PADDED:
            first = llm_c.VOCABULARIES[2][1]
    bos = last if first is None else first
    if bos is not None and bos >= vocab_size:
        bos = None
    content = Vocabulary.content_of(vocab_size, bos, last if last != bos else None)
    return Vocabulary(Path(Vocabulary.file_name), content)


def _held_out(
    spans: list[Span], seq_len: int, separator: int | None, at_the_start: bool
) -> tuple[list[Span], list[Span]]:
    """(for training, for validation): the last ids of the corpus, from the start of a document on if there is
    one near."""
    total = sum(map(len, spans))
    wanted = min(max(int(_HELD_OUT * total), _LEAST_HELD_OUT), _MOST_HELD_OUT, int(_LARGEST_SHARE * total))
    # two windows are the least that can be shared out
    wanted = min(max(wanted, seq_len + 1), total // 2)
    train, held = list(spans), list[Span]()
    while train and wanted > 0:
        span = train.pop()
        start = max(0, len(span) - wanted)
        start = _start_of_document(span, start, wanted, separator, at_the_start) if start else 0
        if start:
            train.append(Span(span.file, span.start, start))
        held.insert(0, Span(span.file, span.start + start, len(span) - start))
        wanted -= len(span) - start
    return train, held


def _start_of_document(span: Span, start: int, near: int, separator: int | None, at_the_start: bool) -> int:
    """The last start of a document at or before an id, at most `near` before it; else the id itself."""
    known = span.file.document_at(span.start + start)
    if known is not None:
        return known if start - known <= near and known > 0 else start
    if separator is None:
        return start
    first = max(0, start - near)
    # a separator at the end of a document must leave an id after it
    found = np.flatnonzero(span.read(first, start - first + at_the_start) == separator)
    if not len(found):
        return start
    return (first + int(found[-1]) + (not at_the_start)) or start


def _summary(
    listing: Listing, corpus: Corpus, files: Sequence[TokenFile], seen: Sequence[Seen], how: str
) -> str:
    largest = max(one.largest for one in seen)
    sampled = "" if all(one.whole for one in seen) else " in a sample"
    test = listing.part(TEST)
    return (
        f"{listing.source.path.name}: {', '.join(dict.fromkeys(file.what for file in files))}: "
        f"{sum(corpus.train.lengths()):,} training tokens in {len(corpus.train.spans):,} "
        f"file{'s' * (len(corpus.train.spans) != 1)}, "
        f"{sum(corpus.validation.lengths()):,} for validation ({how})"
        + (f", {len(test):,} test files that are not read" if test else "")
        + f"; largest id {largest:,}{sampled}, vocabulary {corpus.tokenizer.vocab_size:,}"
    )


def _counted(files: Sequence[TokenFile], seen: Sequence[Seen]) -> tuple[int, int]:
    """(separators, ids among which they were counted), if all ids were."""
    if not all(one.whole for one in seen):
        return 0, 0
    return sum(one.separators for one in seen), sum(map(len, files))


def _text_of_them(tokenizer: Tokenizer, file: TokenFile) -> list[str]:
    """What the first ids say, so that another tokenizer than theirs is noticed."""
    if not tokenizer.has_text:
        return []
    return [f"data.tokenizer: the first ids say {tokenizer.decode(file.read(0, _SHOWN).tolist())!r}"]
