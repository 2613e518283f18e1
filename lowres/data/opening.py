"""From the configuration to the data of a run: prepare it if needed, and open it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowres.config import Config, DataConfig
from lowres.data.batches import TokenData, consecutive_windows
from lowres.data.chat.encoder import ChatEncoder
from lowres.data.folder import OF_TRAINING, OF_VALIDATION, SHARD_TOKENS, Job, left_out_notes
from lowres.data.hashes import common, read_hashes
from lowres.data.manifest import (
    DATA,
    Entry,
    Progress,
    found_in,
    read_complete,
    read_progress,
    recorded_tokenizer,
)
from lowres.data.prepare import LARGEST_DEFAULT_VOCAB, run
from lowres.data.shards import token_dtype
from lowres.data.stream import BLOCK_TOKENS, BlockStream
from lowres.data.tokenised import ids_of, open_corpus
from lowres.data.tokenizer import Tokenizer, open_tokenizer
from lowres.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lowres.data.validation import VAL_SOURCE, check_overlap, size_notes
from lowres.errors import UserError
from lowres.ranks import say
from lowres.text import Listing, Source, documents, is_stream, list_files, with_form
from lowres.text.listing import part_to_evaluate
from lowres.text.source import TEXT, as_source
from lowres.text.words import summary
from lowres.wording import command

# how many tokens to read from a val_source that is a stream
_VAL_STREAM_TOKENS = 1 << 22
# where token ids must have the one that begins documents, if it is needed
_SEARCHED = 1 << 22


def open_source(
    config: DataConfig,
    vocab_size: int | None,
    seed: int,
    progress: bool,
    of_validation: DataConfig | None = None,
) -> TokenData:
    """The data of the config's source, prepared first if needed; see `mixing.open_data`. of_validation: says
    how data.val_source is read, if it is not this config."""
    of_validation = of_validation or config
    if (listing := token_listing(source_of(config))) is not None:
        return _open_ids(config, listing, vocab_size, seed, progress, of_validation)
    refuse_ends(config)
    if given := given_tokenizer(config):
        check_pieces(given.vocab_size, vocab_size)
    elif config.vocab_size and as_prepared(config.source) is None:
        check_pieces(config.vocab_size, vocab_size)
    if not is_stream(config.source):
        folder = ensure_prepared(config, vocab_size, progress)
        manifest = read_complete(folder)
        check_pieces(manifest.vocab_size, vocab_size)
        validation = validation_folder(of_validation, recorded_tokenizer(folder, manifest), progress)
        data = TokenData(folder, config.seq_len, seed, validation)
        data.tokenizer = given or data.tokenizer  # the same ids, but more may have come along with it now
        data.notes += validation_notes(config, folder, manifest.train, validation)
        if config.vocab_size not in (None, data.vocab_size) and folder == as_prepared(config.source):
            data.notes.append(
                f"data.vocab_size is not used: {folder} has a tokenizer with {data.vocab_size} pieces"
            )
        return data
    job = training_job(config, vocab_size, BLOCK_TOKENS)
    stream = BlockStream(job, cache_folder(config, job), progress)
    try:
        tokenizer = recorded_tokenizer(stream.folder, stream.state)
        validation = validation_folder(of_validation, tokenizer, progress)
        data = TokenData(
            *(stream.folder, config.seq_len, seed, validation, stream), shuffle_blocks=config.shuffle_blocks
        )
        data.tokenizer = given or data.tokenizer
        data.notes += validation_notes(config, stream.folder, stream.entries, validation)
        return data
    except BaseException:
        stream.close()
        raise


def refuse_ends(config: DataConfig) -> None:
    """Raise UserError if the config of text says how documents begin or end, and has no tokenizer of which
    that could be."""
    for key in ("bos", "eos"):
        if config.tokenizer is None and getattr(config, key) is not None:
            raise UserError(f"data.{key}: is for data.tokenizer, or for a source of token ids; leave it out")


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that the config names; None if it names none."""
    if not config.tokenizer:
        return None
    return open_tokenizer(config.tokenizer, config.tokenizer_form, config.bos, config.eos)


def _open_ids(
    config: DataConfig,
    listing: Listing,
    vocab_size: int | None,
    seed: int,
    progress: bool,
    of_validation: DataConfig,
) -> TokenData:
    """The data of a source that holds token ids. vocab_size: as in `open_data`, and also that of the ids if
    nothing else says it."""
    say(f"data: {summary(listing)}")
    tokenizer = given_tokenizer(config)
    validation, folder = None, None
    if config.val_source is not None:
        validation = token_listing(source_of(of_validation, config.val_source))
        if validation is None and tokenizer is None:
            raise UserError(
                f"data.val_source: {config.val_source} is text, and {config.source} holds token ids; set "
                "data.tokenizer to what they were made with"
            )
        if validation is None and tokenizer is not None:
            folder = validation_folder(of_validation, tokenizer, progress)
    corpus = open_corpus(
        listing,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size or vocab_size,
        bos=config.bos,
        eos=config.eos,
        seq_len=config.seq_len,
        cache=Path(config.cache).expanduser(),
        validation=validation,
        hold_out=folder is None,
    )
    check_pieces(corpus.tokenizer.vocab_size, vocab_size)
    if config.vocab_size not in (None, corpus.tokenizer.vocab_size):
        corpus.notes.append(
            f"data.vocab_size is not used: data.tokenizer has {corpus.tokenizer.vocab_size} pieces"
        )
    if config.document_mask and corpus.tokenizer.bos_id not in corpus.train.head(_SEARCHED):
        raise UserError(
            f"data.document_mask: the ids of {config.source} do not show where documents begin; set it "
            "to false" + ("" if tokenizer else ", or data.bos to the id that begins them")
        )
    return TokenData(corpus.folder, config.seq_len, seed, folder, corpus=corpus)


@contextmanager
def named(key: str) -> Iterator[None]:
    """Let an error say which part or text it is of."""
    try:
        yield
    except UserError as error:
        said = str(error).removeprefix("data.source: ")
        error.args = (said if said.startswith(key) else f"{key}: {said}",)
        raise


def own_tokenizer(source: str) -> Tokenizer | None:
    """The tokenizer of a prepared folder; None for another source."""
    folder = as_prepared(source)
    return recorded_tokenizer(folder, read_complete(folder)) if folder else None


def holds_ids(config: DataConfig) -> bool:
    """Whether the config's source holds token ids."""
    return token_listing(source_of(config)) is not None


def ensure_prepared(
    config: DataConfig, vocab_size: int | None, progress: bool, chats: ChatEncoder | None = None
) -> Path:
    """The prepared folder for the config's source: the source itself if it is a prepared folder, otherwise a
    folder in config.cache, which is filled if needed. Its name depends on all that determines its content.
    chats: how they are encoded; None for text."""
    folder = as_prepared(config.source)
    if folder is None:
        job = training_job(config, vocab_size, SHARD_TOKENS, chats)
        if not job.source.on_hub:
            listing = list_files(job.source)
            say(f"data: {summary(listing)}")
            listing.check()
        folder = cache_folder(config, job)
        run(job, folder, progress)
        return folder
    if chats:
        raise UserError(f"data.source: {folder} holds the tokens of text; give {chats.arguments.form}")
    given = given_tokenizer(config)
    if given and given.fingerprint != read_complete(folder).tokenizer:
        raise UserError(
            f"data.source: {folder} was prepared with another tokenizer than {given.path}; "
            f"{prepared_again(folder, given, 'data.source')}; or, unless it belongs to weights that the run "
            "begins with, leave data.tokenizer out"
        )
    return folder


def prepared_again(folder: Path, tokenizer: Tokenizer, key: str) -> str:
    """How to prepare the text of a folder with another tokenizer, for the user. key: of the config, whose
    value is this folder."""
    source = read_complete(folder).arguments.source
    words = ["lowres", "data", "prepare", source, "OUT", "--tokenizer", str(tokenizer.path)]
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.form == "own":
        words += ["--set", "data.tokenizer_form=own"]
    return f"prepare its text again: {command(*words)}, and set {key}=OUT"


def open_text(
    source: Source | str,
    tokenizer: Tokenizer,
    seq_len: int,
    cache: Path = Path("data"),
) -> Tensor:
    """All text of a source, or its own validation split, as windows in the form of `TokenData.validation`.
    For a prepared folder: its validation tokens, which must come from this tokenizer. Of token ids: all, or
    those for validation."""
    source = as_source(source)
    folder = as_prepared(source.name)
    if folder is not None:
        if read_complete(folder).tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{folder}: was prepared with another tokenizer than the model's; give its text instead"
            )
        return TokenData(folder, seq_len, seed=0).validation(0)
    if (listing := token_listing(source)) is not None:
        return consecutive_windows(torch.from_numpy(ids_of(listing, tokenizer, cache).head(None)), seq_len)
    texts = list(documents(source, part_to_evaluate(source)))
    tokens = [tokenizer.with_ends(ids) for ids in tokenizer.encode_batch(texts)]
    return consecutive_windows(torch.from_numpy(np.concatenate(tokens)), seq_len)


def cache_bytes(config: DataConfig, vocab_size: int | None, tokens: int) -> int:
    """Bytes that a run of `tokens` training tokens in all, from its first step on, will still add to
    config.cache: the blocks of a stream that are not there yet. 0 for other sources, which are prepared
    before a run starts.

    It is an upper bound: a stream that ends earlier is repeated, and its length is not known before.
    `vocab_size` as in `open_data`. Raises UserError.
    """
    if not is_stream(config.source):
        return 0
    job = training_job(config, vocab_size, BLOCK_TOKENS)
    folder = cache_folder(config, job)
    there = 0
    found = found_in(folder)
    if found == DATA:
        return 0
    if found is not None and isinstance(state := read_progress(folder), Progress):
        there = sum(entry.tokens for entry in state.train)
    pieces = job.tokenizer.vocab_size if job.tokenizer else job.vocab_size or LARGEST_DEFAULT_VOCAB
    # one block is written before it is wanted, and the first ones are wanted earlier
    ahead = BLOCK_TOKENS * (config.shuffle_blocks + 1) // 2
    return max(0, tokens + ahead - there) * token_dtype(pieces).itemsize


def source_of(config: DataConfig, name: str | None = None, form: str = TEXT) -> Source:
    """What the config says of its source, or of another of this name."""
    return Source(
        name or config.source,
        config.text_key,
        config.separator,
        config.include,
        config.exclude,
        config.damaged,
        config.max_left_out,
        config.token_dtype,
        form=form,
        encoding=config.encoding,
    )


def source_as_asked(config: Config) -> Source:
    """The config's source, in the form of objective.name; or, if that is not set, in the form that its rows
    have. Raises UserError."""
    source = source_of(config.data, form=config.objective.form)
    return source if "name" in config.objective.model_fields_set else with_form(source)


def training_job(
    config: DataConfig, vocab_size: int | None, shard_tokens: int, chats: ChatEncoder | None = None
) -> Job:
    return Job(
        source_of(config, form=chats.arguments.form if chats else TEXT),
        given_tokenizer(config),
        config.vocab_size or vocab_size,
        # the model may have more rows than the tokenizer has pieces
        exact_vocab=config.vocab_size is not None,
        shard_tokens=shard_tokens,
        hold_out=config.val_source is None,
        drop_duplicates=config.drop_duplicates,
        max_overlap=config.max_overlap,
        chats=chats,
    )


def validation_folder(
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: bool,
    chats: ChatEncoder | None = None,
    key: str = VAL_SOURCE,
) -> Path | None:
    """The prepared folder of config.val_source, with the tokenizer of the training data. key: where the user
    has named this source."""
    if config.val_source is None:
        return None
    folder = as_prepared(config.val_source)
    if folder is not None and chats:
        raise UserError(f"{key}: {folder} holds the tokens of text; give {chats.arguments.form}")
    if folder is None:
        # no chat is cut in the middle, so a stream of them is taken as a whole
        limit = _VAL_STREAM_TOKENS if is_stream(config.val_source) and not chats else None
        source = source_of(config, config.val_source, chats.arguments.form if chats else TEXT)
        if not chats and token_listing(source) is not None:
            raise UserError(
                f"{key}: {config.val_source} holds token ids, and the training data are text; give text"
            )
        part = part_to_evaluate(source)
        job = Job(source, tokenizer, max_tokens=limit, hold_out=False, part=part, chats=chats)
        folder = cache_folder(config, job)
        run(job, folder, progress)
    elif read_complete(folder).tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{key}: {folder} was prepared with another tokenizer than the training data; "
            f"{prepared_again(folder, tokenizer, key)}"
        )
    return folder


def validation_notes(
    config: DataConfig,
    training: Path,
    entries: list[Entry],
    validation: Path | None,
    answers: int | None = None,
) -> list[str]:
    """`text_notes` of config.val_source, if there is one. entries: of the training shards so far."""
    if validation is None:
        return []
    known = all(entry.hashes is not None for entry in entries)
    trained = read_hashes(training, entries) if known else None
    return text_notes(validation, VAL_SOURCE, trained, config.max_overlap, answers)


def text_notes(
    folder: Path, key: str, trained: Iterable[np.ndarray] | None, allowed: float, answers: int | None = None
) -> list[str]:
    """How large a validation text is, what is not in it, and how much of it is in the training text, where
    that is known. folder: of the prepared text. key: where the user has named its source. trained: hashes of
    the training documents. answers: of chats, how many tokens are in them. Raises UserError if more of it
    than allowed is in the training text."""
    manifest = read_complete(folder)
    entries = manifest.train + manifest.val
    notes = left_out_notes(manifest, OF_TRAINING, OF_VALIDATION)
    if answers is None:
        notes += size_notes(sum(entry.tokens for entry in entries), key)
    else:
        notes += size_notes(answers, key, "tokens of answers")
    if trained is None or any(entry.hashes is None for entry in entries):
        return [*notes, f"an older version prepared the data, so overlap with {key} is unknown"]
    hashes = np.concatenate([np.empty(0, np.uint64), *read_hashes(folder, entries)])
    return notes + check_overlap(common(hashes, trained), len(np.unique(hashes)), allowed, key)


def as_prepared(source: str) -> Path | None:
    """The source as a prepared folder of text; None if it is not prepared yet."""
    folder = Path(source).expanduser()
    if source == "stdlib" or is_stream(source):
        return None
    found = found_in(folder)
    if found is None:
        return None
    if found == DATA and (chats := read_complete(folder).arguments.chats):
        raise UserError(
            f"{folder}: holds prepared {chats.form}, for one template and length; give their source"
        )
    if found == DATA:
        return folder
    raise UserError(
        f"{folder}: its preparation was interrupted; run `lowres data prepare` again to finish it"
    )


def is_prepared(source: str) -> bool:
    """Whether a source is a prepared folder of text. Raises UserError if it is one that was not finished."""
    return as_prepared(source) is not None


def token_listing(source: Source) -> Listing | None:
    """The files of a source that holds token ids; None if it is anything else."""
    if is_stream(source) or source.name == "stdlib" or as_prepared(source.name) is not None:
        return None
    listing = list_files(source)
    return listing if listing.tokens else None


def cache_folder(config: DataConfig, job: Job) -> Path:
    name = job.source.name.removeprefix("hf:") if is_stream(job.source) else Path(job.source.name).name
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40] or "data"
    return Path(config.cache).expanduser() / f"{readable}-{job.content_hash()}"


def check_pieces(pieces: int, vocab_size: int | None) -> None:
    if vocab_size is not None and pieces > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} is less than the {pieces} pieces of the tokenizer; "
            f"set it to {pieces} or leave it out"
        )
