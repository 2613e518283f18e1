"""From a source to a folder of token shards, in two passes over the text.

The first pass (survey.py) decides on the tokenizer and the validation data; the second pass writes the
training shards. Every document is stored as bos, its tokens, eos. Files are written under a temporary name
and then renamed, and everything is a pure function of the source and the arguments. So a preparation that
was killed at any moment continues after its last shard and produces the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lowres.data.folder import (
    SHARD_TOKENS,
    Job,
    find_manifest,
    finish,
    forget_progress,
    locked,
    store_shard,
)
from lowres.data.manifest import (
    FORMAT,
    PROGRESS,
    TOKENIZER,
    Complete,
    Entry,
    HeldOutRecord,
    Position,
    Progress,
    Started,
    open_tokenizer,
    read_complete,
    write,
)
from lowres.data.shards import shard_name, token_dtype, write_file
from lowres.data.survey import HeldOut, Survey, quiet_bar, survey
from lowres.data.tokenizer import Tokenizer, train
from lowres.errors import UserError
from lowres.text import Marks, Source, numbered_documents, pinned
from lowres.text.source import as_source

LARGEST_DEFAULT_VOCAB = 32000
_BATCH_CHARS = 1 << 21


def prepare(
    source: Source | str,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenise a source into the folder `out`; returns the content of its data.json.

    `tokenizer`: path of a SentencePiece model; without it, one with `vocab_size` pieces is trained (the
    default depends on the size of the text). `max_tokens`: limit on the training tokens. The key `notes` of
    the result lists notes for the user. Raises UserError if the folder holds something else; if the source
    cannot be used, nothing is written.
    """
    job = Job(as_source(source), tokenizer, vocab_size, max_tokens=max_tokens, shard_tokens=shard_tokens)
    return run(job, Path(out), progress).model_dump()


def run(job: Job, out: Path, progress: bool) -> Complete:
    """Do the whole job; see `prepare`."""
    with started(job, out, progress) as state:
        found = []
        if isinstance(state, Complete):
            found = [f"{out} is already prepared; nothing was done"]
        elif state.train:
            found = [f"{out}: continued after shard {len(state.train)} of an interrupted preparation"]
        for _ in write_shards(job, out, state, progress):
            pass
        finished = read_complete(out)
    return finished.model_copy(update={"notes": finished.notes + found})


@contextmanager
def started(job: Job, out: Path, progress: bool) -> Iterator[Progress | Complete]:
    """The manifest of a job that has at least its tokenizer and validation data.

    Unless the job is complete, the folder is locked against other processes in the meantime.
    """
    state = find_manifest(job, out)
    if isinstance(state, Complete):
        forget_progress(out)
        yield state
        return
    # the long part comes before anything is written: it finds every error of a local source
    plan = None if isinstance(state, Progress) else _plan(job, progress)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror})") from None
    with locked(out):
        # another process may have worked here in the meantime
        state = find_manifest(job, out)
        if plan is not None and not isinstance(state, Progress | Complete):
            state = _write_plan(job, out, plan)
        assert isinstance(state, Progress | Complete), "the plan was written, but its manifest is missing"
        yield state


# ---------------------------------------------------------------------------- first pass


@dataclass(frozen=True)
class _Plan:
    """The result of the first pass; `model`: the content of the tokenizer's file; `commit`: see
    `manifest.Manifest`."""

    survey: Survey
    model: bytes
    notes: list[str]
    commit: str | None


def _plan(job: Job, progress: bool) -> _Plan:
    fixed = pinned(job.source)
    seen = survey(fixed.source, job.hold_out, progress)
    known = [*fixed.notes, *seen.notes]
    if fixed.validation and job.hold_out:
        known.append(
            f'data.val_source = "{fixed.validation}" validates on the split of the data set instead of '
            "documents that are held out"
        )
    commit = fixed.source.commit
    if job.tokenizer:
        return _Plan(seen, Path(job.tokenizer).read_bytes(), known, commit)
    asked = job.vocab_size or _default_vocab(seen)
    model, pieces = train(seen.sample, asked, exact=job.exact_vocab and job.vocab_size is not None)
    notes = [] if pieces == asked else [f"vocab_size: the text gives only {pieces} pieces instead of {asked}"]
    return _Plan(seen, model, known + notes, commit)


def _default_vocab(seen: Survey) -> int:
    """A vocabulary size for a model of a size that fits the amount of text."""
    if not seen.complete or seen.characters >= 200_000_000:
        return LARGEST_DEFAULT_VOCAB
    return 4096 if seen.characters < 20_000_000 else 8192


def _write_plan(job: Job, out: Path, plan: _Plan) -> Progress:
    """Write tokenizer, validation data and progress.json."""
    # marks the folder as this job's, in case the next lines are interrupted
    write(out / PROGRESS, Started(format=FORMAT, arguments=job.arguments))
    write_file(out / TOKENIZER, plan.model)
    tokenizer = Tokenizer(out / TOKENIZER)
    val = []
    if plan.survey.validation:
        ids = tokenizer.encode_batch(plan.survey.validation)
        tokens = np.concatenate([with_ends(tokenizer, of_document) for of_document in ids])
        val = [store_shard(out, shard_name("val", 0), tokens, tokenizer)]
    held_out = plan.survey.held_out
    state = Progress(
        format=FORMAT,
        arguments=job.arguments,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        notes=plan.notes,
        val=val,
        train=[],
        characters=plan.survey.characters if plan.survey.complete else None,
        held_out=HeldOutRecord(
            hashes=sorted(held_out.hashes), tail_row=held_out.tail_row, tail_start=held_out.tail_start
        ),
        next=Position(row=0, offset=0),
        commit=plan.commit,
    )
    write(out / PROGRESS, state)
    return state


# ---------------------------------------------------------------------------- second pass


def write_shards(job: Job, out: Path, state: Progress | Complete, progress: bool) -> Iterator[list[Entry]]:
    """Write the missing training shards, and data.json at the end.

    Yields the entries of all shards so far after each one. `state` comes from `started`.
    """
    if isinstance(state, Complete):
        return
    tokenizer = open_tokenizer(out, state)
    record = state.held_out
    held_out = HeldOut(frozenset(record.hashes), record.tail_row, record.tail_start)
    left = (job.max_tokens or sys.maxsize) - sum(shard.tokens for shard in state.train)
    with tqdm(
        desc="tokenising", total=state.characters, unit=" chars", unit_scale=True, **quiet_bar(progress)
    ) as bar:
        source = replace(job.source, commit=state.commit)
        marks = Marks(state.next.file_row, state.next.file)
        documents = _encoded(source, tokenizer, held_out, state.next.row, bar, marks)
        for tokens, following in _cut(documents, state.next, job.shard_tokens, left, tokenizer.vocab_size):
            shard = store_shard(out, shard_name("train", len(state.train)), tokens, tokenizer)
            first, file = marks.before(following.row)
            place = following.model_copy(update={"file": file, "file_row": first})
            state = state.model_copy(update={"train": [*state.train, shard], "next": place})
            write(out / PROGRESS, state)
            yield state.train
    finish(out, state)


def _encoded(
    source: Source, tokenizer: Tokenizer, held_out: HeldOut, start: int, bar: tqdm, marks: Marks
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, tokens) of every training document, beginning with row `start`."""
    batch: list[tuple[int, str]] = []
    size = 0

    def encode_batch() -> Iterator[tuple[int, np.ndarray]]:
        for (row, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            yield row, with_ends(tokenizer, ids)

    for row, text in numbered_documents(source, start, marks=marks):
        bar.update(len(text))
        part = held_out.training_part(row, text)
        if part:
            batch.append((row, part))
            size += len(part)
        if size >= _BATCH_CHARS:
            yield from encode_batch()
            batch, size = [], 0
    yield from encode_batch()


def with_ends(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """A document as it is stored: bos, its tokens, eos."""
    return np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))


def _cut(
    documents: Iterator[tuple[int, np.ndarray]], position: Position, size: int, left: int, vocab_size: int
) -> Iterator[tuple[np.ndarray, Position]]:
    """At most `left` tokens of the documents, beginning at `position`, in parts of `size` tokens (the last
    may be shorter), each with the position after it. A part is valid until the next one is requested."""
    buffer = np.empty(min(size, left), token_dtype(vocab_size))
    filled = 0
    following = position
    for row, ids in documents:
        start = position.offset if row == position.row else 0
        while start < len(ids) and left:
            take = min(len(ids) - start, min(size, left) - filled)
            buffer[filled : filled + take] = ids[start : start + take]
            filled += take
            start += take
            following = Position(row=row, offset=start)
            if filled == min(size, left):
                yield buffer[:filled], following
                left -= filled
                filled = 0
        if not left:
            return
    if filled:
        yield buffer[:filled], following
