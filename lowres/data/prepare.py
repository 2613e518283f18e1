"""From a source to a folder of token shards, in two passes over the text.

The first pass (survey.py) decides on the tokenizer and the validation data; the second pass writes the
training shards. Every document is stored with its ends (`Tokenizer.with_ends`). Files are written under a
temporary name and then renamed, and everything is a pure function of the source and the arguments. So a
preparation that was killed at any moment continues after its last shard and produces the same bytes.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowres.data.ahead import read_ahead
from lowres.data.chat.encoder import targets
from lowres.data.encoders import Encoder
from lowres.data.folder import (
    LOCK,
    OF_VALIDATION,
    SHARD_TOKENS,
    Job,
    chat_notes,
    find_manifest,
    finish,
    forget_progress,
    store_shard,
)
from lowres.data.hashes import Seen, content_hash, read_hashes
from lowres.data.manifest import (
    FORMAT,
    PROGRESS,
    Complete,
    Dropped,
    End,
    Entry,
    HeldOutRecord,
    Position,
    Progress,
    Started,
    read_complete,
    recorded_tokenizer,
    write,
)
from lowres.data.shards import shard_name, token_dtype, write_file
from lowres.data.survey import Survey, survey
from lowres.data.tokenizer import Tokenizer, open_tokenizer, train
from lowres.data.tokenizer.base import check_lost
from lowres.data.tokenizer.sentencepiece_model import Form, SentencePieceTokenizer
from lowres.data.validation import HeldOut, Validation, check_overlap, size_notes
from lowres.errors import UserError
from lowres.lock import held
from lowres.progress import Bar
from lowres.ranks import say
from lowres.text import Marks, Source, list_files, numbered_documents, pinned
from lowres.text.documents import Skipped, places
from lowres.text.source import as_source

LARGEST_DEFAULT_VOCAB = 32000
_BATCH_CHARS = 1 << 21
# while no more than this is in memory, another batch is read: beside an ordinary one, not beside a huge one
_AHEAD_CHARS = 2 * _BATCH_CHARS


def prepare(
    source: Source | str,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    tokenizer_form: Form | None = None,
    bos: str | int | None = None,
    eos: str | int | None = None,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
    drop_duplicates: bool = False,
    max_overlap: float = 0.01,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenise a source into the folder `out`; returns the content of its data.json.

    `tokenizer`, `tokenizer_form`, `bos`, `eos`: as the keys of the section data; without a tokenizer, one
    with `vocab_size` pieces is trained (the default depends on the size of the text). `max_tokens`: limit on
    the training tokens; then what is held out, and what the tokenizer is trained on, come from the beginning
    of the source, 8 characters for each token and at least LOOKAHEAD_CHARS. `drop_duplicates` and
    `max_overlap`: the keys of [data]. The key `notes` of the result lists notes for the user. Raises
    UserError if the folder holds something else; if the source cannot be used, nothing is written.
    """
    job = Job(
        as_source(source),
        open_tokenizer(tokenizer, tokenizer_form, bos, eos) if tokenizer else None,
        vocab_size,
        max_tokens=max_tokens,
        shard_tokens=shard_tokens,
        drop_duplicates=drop_duplicates,
        max_overlap=max_overlap,
    )
    return run(job, Path(out), progress).model_dump()


def run(job: Job, out: Path, progress: bool) -> Complete:
    """Do the whole job; see `prepare`."""
    with started(job, out, progress) as state:
        found = []
        if isinstance(state, Complete):
            now = [] if job.source.on_hub else list_files(job.source).warnings()
            found = [line for line in now if line not in state.notes]
            found.append(f"{out} is already prepared; nothing was done")
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
    if not job.source.on_hub:
        # what is there already may have been allowed by another data.max_left_out, or before more was there
        list_files(job.source).check()
    state = find_manifest(job, out)
    if isinstance(state, Complete):
        forget_progress(out)
        yield state
        return
    # the long part comes before anything is written: it finds every error of a local source
    plan = None if isinstance(state, Progress) else _plan(job, progress)
    with held(out, "is being prepared", LOCK) as lock:
        if lock.note:
            say(f"note: {lock.note}")
        # another process may have worked here in the meantime
        state = find_manifest(job, out)
        if plan is not None and not isinstance(state, Progress | Complete):
            state = _write_plan(job, out, plan)
        del plan  # it has text
        assert isinstance(state, Progress | Complete), "the plan was written, but its manifest is missing"
        yield state


# ---------------------------------------------------------------------------- first pass


@dataclass(frozen=True)
class _Plan:
    """The result of the first pass; `tokenizer`: name and content of its file; `commit`: see
    `manifest.Manifest`."""

    survey: Survey
    tokenizer: tuple[str, bytes]
    notes: list[str]
    commit: str | None


def _plan(job: Job, progress: bool) -> _Plan:
    fixed = pinned(job.source)
    commit = fixed.source.commit
    accepts = job.chats.accepts if job.chats else None
    seen = survey(fixed.source, job.hold_out, progress, job.part, job.max_tokens, accepts)
    notes = [*fixed.notes, *seen.notes]
    if fixed.validation and job.hold_out:
        notes.append(
            f'data.val_source = "{fixed.validation}" validates on the split of the data set instead of '
            "documents that are held out"
        )
    if seen.validation:
        documents = len(seen.validation.held_out.hashes)
        notes += check_overlap(seen.overlap, documents, job.max_overlap, job.source.name)
    if job.tokenizer:
        given = job.tokenizer
        notes += check_lost(given, seen.sample)
        return _Plan(seen, (given.file_name, given.content), notes + given.notes, commit)
    asked = job.vocab_size or default_vocab(seen, job.max_tokens)
    model, pieces = train(seen.sample, asked, exact=job.exact_vocab and job.vocab_size is not None)
    if pieces != asked:
        notes.append(f"vocab_size: the text gives only {pieces} pieces instead of {asked}")
    return _Plan(seen, (SentencePieceTokenizer.file_name, model), notes, commit)


def default_vocab(seen: Survey, max_tokens: int | None = None) -> int:
    """A vocabulary size for a model of a size that fits the amount of text."""
    characters = seen.characters if seen.complete else 4 * (max_tokens or sys.maxsize)
    if characters >= 200_000_000:
        return LARGEST_DEFAULT_VOCAB
    return 4096 if characters < 20_000_000 else 8192


def _write_plan(job: Job, out: Path, plan: _Plan) -> Progress:
    """Write tokenizer, validation data and progress.json."""
    # marks the folder as this job's, in case the next lines are interrupted
    write(out / PROGRESS, Started(format=FORMAT, arguments=job.arguments))
    name, content = plan.tokenizer
    write_file(out / name, content)
    tokenizer = open_tokenizer(out / name, form="own")
    val, notes, validation = list[Entry](), plan.notes, plan.survey.validation
    if validation:
        val, found = _validation_shard(job, out, tokenizer, validation)
        notes = notes + found
    held_out = validation.held_out if validation else HeldOut()
    state = Progress(
        format=FORMAT,
        arguments=job.arguments,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        notes=list(dict.fromkeys(notes)),
        val=val,
        train=[],
        characters=plan.survey.characters if plan.survey.complete else None,
        held_out=HeldOutRecord(
            hashes=sorted(f"{hash:016x}" for hash in held_out.hashes),
            own_split=validation is not None and validation.own_split,
            ends=[End(row=row, start=start) for row, start in sorted(held_out.ends.items())],
        ),
        next=Position(row=0, offset=0),
        skipped=plan.survey.skipped,
        commit=plan.commit,
    )
    write(out / PROGRESS, state)
    return state


def _validation_shard(
    job: Job, out: Path, tokenizer: Tokenizer, validation: Validation
) -> tuple[list[Entry], list[str]]:
    """Write the validation data, if there are any; notes on them."""
    encoder = job.encoder(tokenizer)
    made = list(encoder.encode_batch(list(validation.texts), validation.places.__getitem__))
    dropped = reduce(Dropped.plus, (each.dropped for each in made), Dropped())
    notes = chat_notes(job.arguments, dropped, OF_VALIDATION)
    documents = [
        (each.words, hash) for each, hash in zip(made, validation.hashes, strict=True) if len(each.words)
    ]
    if not documents:
        return [], notes
    words = np.concatenate([of_document for of_document, _ in documents])
    hashes = [hash for _, hash in documents]
    entry = store_shard(out, shard_name("val", 0), words, hashes, tokenizer, encoder.flag_bits)
    if job.chats:
        size = size_notes(int(targets(words).sum()), validation.what, "tokens of answers")
    else:
        size = size_notes(len(words), validation.what)
    return [entry], notes + size


# ---------------------------------------------------------------------------- second pass


class _Document(NamedTuple):
    """words: of a document, none if it is dropped or at the end of the source. dropped: before this row."""

    row: int
    words: np.ndarray
    hash: int
    dropped: Dropped


class _Part(NamedTuple):
    """Training data for a shard. hashes: of the documents that begin in it. following: the position after
    it."""

    words: np.ndarray
    hashes: list[int]
    following: Position
    dropped: Dropped


def write_shards(job: Job, out: Path, state: Progress | Complete, progress: bool) -> Iterator[list[Entry]]:
    """Write the missing training shards, and data.json at the end.

    Yields the entries of all shards so far after each one. `state` comes from `started`.
    """
    if isinstance(state, Complete):
        return
    tokenizer = recorded_tokenizer(out, state)
    size = state.arguments.shard_tokens
    left = (job.max_tokens or sys.maxsize) - sum(shard.tokens for shard in state.train)
    with Bar("tokenising", "chars", state.characters, shown=progress) as bar:
        # what damaged files hold is compared with the first pass, so all of them are read again
        whole = job.source.damaged == "skip" and state.characters is not None
        marks = Marks() if whole else Marks(state.next.file_row, state.next.file)
        encoder = job.encoder(tokenizer)
        documents = _encoded(job, out, encoder, state, bar, marks)
        dtype = token_dtype(tokenizer.vocab_size << encoder.flag_bits)
        for words, hashes, following, dropped in _cut(documents, state, size, left, dtype):
            state = state.model_copy(update={"dropped": dropped})
            if not len(words):
                break  # the end of the source
            name = shard_name("train", len(state.train))
            shard = store_shard(out, name, words, hashes, tokenizer, encoder.flag_bits)
            first, file = marks.before(following.row)
            place = following.model_copy(update={"file": file, "file_row": first})
            state = state.model_copy(update={"train": [*state.train, shard], "next": place})
            write(out / PROGRESS, state)
            yield state.train
    finish(out, state)


def _encoded(
    job: Job, out: Path, encoder: Encoder, state: Progress, bar: Bar, marks: Marks
) -> Iterator[_Document]:
    """The training documents from row `state.next.row` on, and at last the end of the source."""
    record, following = state.held_out, state.next
    ends = {end.row: end.start for end in record.ends}
    if record.tail_row is not None:
        ends[record.tail_row] = record.tail_start
    held_out = HeldOut(frozenset(int(hash[:16], 16) for hash in record.hashes), ends)
    seen = _seen(out, state) if job.drop_duplicates else None
    skipped: Skipped = {}
    dropped, row = state.dropped, following.row
    source = replace(job.source, commit=state.commit)
    rows = numbered_documents(source, following.row, job.part, skipped, marks)
    place = places(source, job.part, marks)
    # a stream or a slow disk is waited for while a batch is tokenised
    for batch in read_ahead(_batches(rows), _characters, _AHEAD_CHARS):
        kept: list[tuple[int, int, Dropped]] = []
        parts: list[str] = []
        left_out = duplicates = 0  # since the last document that was kept
        while batch:
            row, text = batch.popleft()
            bar.update(len(text))
            hash = content_hash(text)
            part = held_out.training_part(row, hash, text)
            del text  # it may be large
            if not part:
                left_out += 1
            elif seen and hash in seen and not (row == following.row and following.offset):
                duplicates += 1
            else:
                kept.append((row, hash, Dropped(held_out=left_out, duplicates=duplicates)))
                parts.append(part)
                left_out = duplicates = 0
            del part
        _check_skipped(job.source, state, dict(skipped))  # the thread may add to it
        made = encoder.encode_batch(parts, partial(_nth, place, [row for row, _, _ in kept]))
        for (row, hash, before), (words, more) in zip(kept, made, strict=True):
            dropped = dropped.plus(before)
            # what is not stored is not known when this goes on after an interruption
            again = row == following.row and following.offset
            if seen and len(words) and not seen.add(hash) and not again:
                dropped = dropped.plus(Dropped(duplicates=1))
                continue
            yield _Document(row, words, hash, dropped)
            dropped = dropped.plus(more)
        dropped = dropped.plus(Dropped(held_out=left_out, duplicates=duplicates))
    _check_skipped(job.source, state, skipped, at_end=True)
    yield _Document(row, np.empty(0, np.int32), 0, dropped)


def _nth(place: Callable[[int], str], rows: list[int], number: int) -> str:
    return place(rows[number])


def _batches(rows: Iterator[tuple[int, str]]) -> Iterator[deque[tuple[int, str]]]:
    """Rows together: at least _BATCH_CHARS characters, except at the end."""
    batch, size = deque[tuple[int, str]](), 0
    for row, text in rows:
        batch.append((row, text))
        size += len(text)
        del text  # it may be large
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = deque(), 0
    if batch:
        yield batch


def _characters(batch: deque[tuple[int, str]]) -> int:
    return sum(len(text) for _, text in batch)


def _seen(out: Path, state: Progress) -> Seen:
    """The documents of the shards that are there."""
    seen = Seen()
    for hashes in read_hashes(out, state.train):
        seen.update(hashes)
    return seen


def _check_skipped(source: Source, state: Progress, skipped: Skipped, at_end: bool = False) -> None:
    """Raises UserError if other files are damaged than in the first pass: then the rows are others too. What
    the first pass did not read may be damaged."""
    if state.characters is None:
        return
    other = [name for name in skipped if skipped[name] != state.skipped.get(name)]
    other += [name for name in state.skipped if at_end and name not in skipped]
    if other:
        raise UserError(
            f"{source.name}: {other[0]} is damaged in another way than when it was first read"
            f" ({skipped.get(other[0], 'now it is whole')}); check the disk, and prepare into another folder"
        )


def _cut(
    documents: Iterator[_Document], state: Progress, size: int, left: int, dtype: np.dtype
) -> Iterator[_Part]:
    """At most `left` words of the documents, beginning at `state.next`, in parts of `size` words. The last
    ones may be shorter, and at the end of the source is one without any. A part is valid until the next one
    is requested."""
    if not left:
        return
    buffer = np.empty(min(size, left), dtype)
    filled, hashes = 0, list[int]()
    following, before, dropped = state.next, state.dropped, state.dropped
    for row, words, hash, dropped in documents:
        start = state.next.offset if row == state.next.row else 0
        if not start and len(words):
            hashes.append(hash)
        while start < len(words):
            take = min(len(words) - start, min(size, left) - filled)
            buffer[filled : filled + take] = words[start : start + take]
            filled += take
            start += take
            following, before = Position(row=row, offset=start), dropped
            if filled == min(size, left):
                yield _Part(buffer[:filled], hashes, following, before)
                left -= filled
                filled, hashes = 0, []
                if not left:
                    return
    if filled:
        # what is dropped after the last document is counted again if it is read again
        yield _Part(buffer[:filled], hashes, following, before)
    yield _Part(buffer[:0], [], following, dropped)
