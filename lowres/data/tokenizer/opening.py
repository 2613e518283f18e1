"""Which kind of tokenizer a file is, and where the tokenizer of a folder is."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from lowres.data.tokenizer import huggingface, sentencepiece_file
from lowres.data.tokenizer.base import Tokenizer, digest
from lowres.data.tokenizer.huggingface import JsonTokenizer
from lowres.data.tokenizer.sentencepiece_model import Form, SentencePieceTokenizer
from lowres.data.tokenizer.vocabulary import Vocabulary
from lowres.disk import LFS_POINTER, DiskError, instead, read_whole, what_failed
from lowres.errors import UserError
from lowres.sealed import SEAL, Damaged, parse

# in folders of prepared data, runs and checkpoints; the first that is there counts
FILE_NAMES = (JsonTokenizer.file_name, SentencePieceTokenizer.file_name, Vocabulary.file_name)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")
_GIVE = "give a SentencePiece model, a tokenizer.json, or a folder with one"


def open_tokenizer(
    path: str | Path,
    form: Form | None = None,
    bos: str | int | None = None,
    eos: str | int | None = None,
    fingerprint: str | None = None,
    remedy: str | None = None,
) -> Tokenizer:
    """The tokenizer in a file, or in a folder that has one.

    form: of a SentencePiece model, see `sentencepiece_model`. "own" is as the file says, so that of a copy;
    None is "exact", with a note if the file says something else. bos, eos: tokens or ids that begin and end a
    document, where a tokenizer.json does not say it. fingerprint: that of the file, if it is known; then a
    changed file is never given to a library. remedy: what the user should do if the file is missing, changed
    or damaged. A tokenizer.json that was made of the tokenizer.model beside it stands for that. Raises
    UserError.
    """
    path, also = _file(Path(path).expanduser(), form)
    try:
        content = read_whole(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):  # or not an ordinary file
            raise DiskError(path, error, "read") from None
        problem = f"tokenizer {path}: cannot be read ({what_failed(error)})"
        raise UserError(f"{problem}; {remedy or _GIVE}") from None
    if bos is None and eos is None and (model := _made_of(path, content)) is not None:
        path, content, form, also = (
            path.with_name(SentencePieceTokenizer.file_name),
            model,
            form or "own",
            None,
        )
    if fingerprint is not None and fingerprint != digest(_core_of(content)):
        raise UserError(f"tokenizer {path}: changed; {remedy or 'put the original back'}")
    found = _opened(path, content, form, bos, eos, remedy)
    if also is not None:
        found.notes.append(f"tokenizer {path}: {also.name} in the same folder is not used")
    return found


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a folder of prepared data, a run or a checkpoint; None if there is none."""
    return next((folder / name for name in FILE_NAMES if os.path.lexists(folder / name)), None)


def _file(path: Path, form: Form | None) -> tuple[Path, Path | None]:
    """The file of a tokenizer, and another one that its folder has."""
    if not path.is_dir():
        return path, None
    there = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if form is not None:  # which only a SentencePiece model has
        there.sort(key=lambda file: file.name != SentencePieceTokenizer.file_name)
    if not there:
        names = ", ".join(FILE_NAMES[:-1]) + f" or {FILE_NAMES[-1]}"
        raise UserError(f"tokenizer {path}: the folder has no {names}; {_GIVE}")
    return there[0], there[1] if there[1:] else None


def _made_of(path: Path, content: bytes) -> bytes | None:
    """The content of the tokenizer.model of which a tokenizer.json was made, if it is beside it."""
    if not (_is_json(content) and (wanted := huggingface.made_of(content))):
        return None
    try:
        model = read_whole(path.with_name(SentencePieceTokenizer.file_name))
    except OSError:
        return None
    return model if digest(sentencepiece_file.core_of(model)) == wanted else None


def _is_json(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def _core_of(content: bytes) -> bytes:
    """The content without what came along."""
    return huggingface.core_of(content) if _is_json(content) else sentencepiece_file.core_of(content)


def _opened(
    path: Path,
    content: bytes,
    form: Form | None,
    bos: str | int | None,
    eos: str | int | None,
    remedy: str | None,
) -> Tokenizer:
    if _is_json(content):
        try:
            keys = parse(content).keys()
        except Damaged as error:
            problem = f"tokenizer {path}: damaged ({error})"
            raise UserError(f"{problem}; {remedy or 'get the file again'}") from None
        if SEAL in keys:
            return Vocabulary(path, content, remedy)
        if "model" in keys:
            return JsonTokenizer(path, content, bos, eos, remedy)
        raise UserError(f"tokenizer {path}: not a tokenizer.json (it has no model); {remedy or _GIVE}")
    if content.startswith(LFS_POINTER):
        raise UserError(f"tokenizer {path}: {instead(content)}")
    if _TIKTOKEN.match(content):
        raise UserError(
            f"tokenizer {path}: a list of tiktoken ranks, which says not how text is split; give the "
            "tokenizer.json of the same model"
        )
    for key, value in (("bos", bos), ("eos", eos)):
        if value is not None:
            raise UserError(f"data.{key}: the SentencePiece model {path} says it itself; leave it out")
    return SentencePieceTokenizer(path, content, form, remedy)
