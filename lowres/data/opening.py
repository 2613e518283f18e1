"""From the configuration to the data of a run: prepare it if needed, and open it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowres.config import DataConfig
from lowres.data.batches import TokenData, consecutive_windows
from lowres.data.folder import SHARD_TOKENS, Job
from lowres.data.manifest import (
    DATA,
    Manifest,
    Progress,
    found_in,
    open_tokenizer,
    read_complete,
    read_progress,
)
from lowres.data.prepare import LARGEST_DEFAULT_VOCAB, run, with_ends
from lowres.data.shards import token_dtype
from lowres.data.stream import BLOCK_TOKENS, BlockStream
from lowres.data.tokenizer import Tokenizer
from lowres.errors import UserError
from lowres.text import Source, documents, is_stream

# how many tokens to read from a val_source that is a stream
_VAL_STREAM_TOKENS = 1 << 22


def open_data(config: DataConfig, vocab_size: int | None, seed: int, progress: bool) -> TokenData:
    """The data that the config names, prepared first if needed.

    `vocab_size`: model.vocab_size, None if the config does not set it. A tokenizer that is trained has at
    most this many pieces; an existing tokenizer with more raises UserError.
    """
    if config.tokenizer:
        _check_pieces(Tokenizer(config.tokenizer).vocab_size, vocab_size)
    elif config.vocab_size and _as_prepared(config.source) is None:
        _check_pieces(config.vocab_size, vocab_size)
    if not is_stream(config.source):
        folder = ensure_prepared(config, vocab_size, progress)
        manifest = read_complete(folder)
        _check_pieces(manifest.vocab_size, vocab_size)
        validation = _validation_folder(config, folder, manifest, progress)
        data = TokenData(folder, config.seq_len, seed, validation)
        if config.vocab_size not in (None, data.vocab_size) and folder == _as_prepared(config.source):
            data.notes.append(
                f"data.vocab_size is not used: {folder} has a tokenizer with {data.vocab_size} pieces"
            )
        return data
    job = _training_job(config, vocab_size, BLOCK_TOKENS)
    stream = BlockStream(job, _cache_folder(config, job), progress)
    try:
        validation = _validation_folder(config, stream.folder, stream.state, progress)
        return TokenData(stream.folder, config.seq_len, seed, validation, stream, config.shuffle_blocks)
    except BaseException:
        stream.close()
        raise


def ensure_prepared(config: DataConfig, vocab_size: int | None, progress: bool) -> Path:
    """The prepared folder for the config's source: the source itself if it is a prepared folder, otherwise a
    folder in config.cache, which is filled if needed. Its name depends on all that determines its content."""
    folder = _as_prepared(config.source)
    if folder is None:
        job = _training_job(config, vocab_size, SHARD_TOKENS)
        folder = _cache_folder(config, job)
        run(job, folder, progress)
        return folder
    recorded = read_complete(folder).tokenizer
    if config.tokenizer and Tokenizer(config.tokenizer).fingerprint != recorded:
        raise UserError(f"data.tokenizer: {folder} was prepared with another one; leave data.tokenizer out")
    return folder


def open_text(source: str, tokenizer: Tokenizer, seq_len: int) -> Tensor:
    """All text of a source as windows, in the form of `TokenData.validation`. For a prepared folder: its
    validation tokens, which must come from this tokenizer."""
    folder = _as_prepared(source)
    if folder is not None:
        if read_complete(folder).tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{folder}: was prepared with another tokenizer than the model's; give its text instead"
            )
        return TokenData(folder, seq_len, seed=0).validation(0)
    tokens = [with_ends(tokenizer, ids) for ids in tokenizer.encode_batch(list(documents(source)))]
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
    job = _training_job(config, vocab_size, BLOCK_TOKENS)
    folder = _cache_folder(config, job)
    there = 0
    found = found_in(folder)
    if found == DATA:
        return 0
    if found is not None and isinstance(state := read_progress(folder), Progress):
        there = sum(entry.tokens for entry in state.train)
    if config.tokenizer:
        pieces = Tokenizer(config.tokenizer).vocab_size
    else:
        pieces = job.vocab_size or LARGEST_DEFAULT_VOCAB
    # one block is written before it is wanted, and the first ones are wanted earlier
    ahead = BLOCK_TOKENS * (config.shuffle_blocks + 1) // 2
    return max(0, tokens + ahead - there) * token_dtype(pieces).itemsize


def source_of(config: DataConfig, name: str | None = None) -> Source:
    """What the config says of its source, or of another of this name."""
    return Source(
        name or config.source,
        config.text_key,
        config.separator,
        config.include,
        config.exclude,
        config.damaged,
        config.max_left_out,
    )


def _training_job(config: DataConfig, vocab_size: int | None, shard_tokens: int) -> Job:
    return Job(
        source_of(config),
        config.tokenizer,
        config.vocab_size or vocab_size,
        # the model may have more rows than the tokenizer has pieces
        exact_vocab=config.vocab_size is not None,
        shard_tokens=shard_tokens,
        hold_out=config.val_source is None,
    )


def _validation_folder(config: DataConfig, training: Path, manifest: Manifest, progress: bool) -> Path | None:
    """The prepared folder of config.val_source, with the tokenizer of the training data."""
    if config.val_source is None:
        return None
    tokenizer = open_tokenizer(training, manifest)
    folder = _as_prepared(config.val_source)
    if folder is None:
        limit = _VAL_STREAM_TOKENS if is_stream(config.val_source) else None
        job = Job(source_of(config, config.val_source), str(tokenizer.path), max_tokens=limit, hold_out=False)
        folder = _cache_folder(config, job)
        run(job, folder, progress)
    elif read_complete(folder).tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"data.val_source: {folder} was prepared with another tokenizer than the training data; "
            f"prepare it with --tokenizer {tokenizer.path}"
        )
    return folder


def _as_prepared(source: str) -> Path | None:
    """The source as a prepared folder; None if it is text that is not prepared yet."""
    folder = Path(source).expanduser()
    if source == "stdlib" or is_stream(source):
        return None
    found = found_in(folder)
    if found is None:
        return None
    if found == DATA:
        return folder
    raise UserError(
        f"{folder}: its preparation was interrupted; run `lowres data prepare` again to finish it"
    )


def _cache_folder(config: DataConfig, job: Job) -> Path:
    name = job.source.name.removeprefix("hf:") if is_stream(job.source) else Path(job.source.name).name
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40] or "data"
    return Path(config.cache).expanduser() / f"{readable}-{job.content_hash()}"


def _check_pieces(pieces: int, vocab_size: int | None) -> None:
    if vocab_size is not None and pieces > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} is less than the {pieces} pieces of the tokenizer; "
            f"set it to {pieces} or leave it out"
        )
