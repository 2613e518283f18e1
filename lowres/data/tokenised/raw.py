"""Nothing but ids: the .bin files of nanoGPT and llama2.c, and the .npy files of OLMo without a header."""

from __future__ import annotations

import numpy as np

from lowres.data.tokenised.files import TokenFile
from lowres.errors import UserError
from lowres.text.source import BadFileError, File

# what a file may be if it is not what the config says
_OTHERS = {"uint16": "<u2", "uint32": "<u4", "int64": "<i8"}
_BIG_ENDIAN = {"uint16": ">u2", "uint32": ">u4", "int64": ">i8"}
_PIECES, _PIECE_BYTES = 64, 1 << 12


def open_file(file: File, given: str | None, vocab_size: int | None) -> TokenFile:
    """given: data.token_dtype. vocab_size: if it is known. Raises UserError if the type is missing, or if the
    file looks like another one."""
    if given is None:
        raise UserError(
            f"{file.path}: ids without a header, so their type is not known; set data.token_dtype (nanoGPT "
            "writes uint16, which is enough for a vocabulary of 65,536)"
        )
    dtype = np.dtype(given).newbyteorder("<")
    if file.size % dtype.itemsize:
        raise BadFileError(
            f"{file.path}: {file.size:,} bytes are no whole number of {given} ids; it was cut short, or "
            "data.token_dtype is another"
        )
    made = TokenFile(file.path, f"{given} without a header", dtype, [(0, file.size // dtype.itemsize)])
    if vocab_size is not None:
        _check_dtype(file, given, vocab_size)
    return made


def _check_dtype(file: File, given: str, vocab_size: int) -> None:
    """Raise UserError if another type explains the bytes better."""
    pieces = _sample(file)

    def fits(dtype: str) -> bool:
        size = np.dtype(dtype).itemsize
        whole = (np.frombuffer(p[: len(p) // size * size], dtype) for p in pieces)
        return file.size % size == 0 and all(
            ids.min() >= 0 and ids.max() < vocab_size for ids in whole if len(ids)
        )

    def fail(why: str, remedy: str) -> None:
        raise UserError(f"{file.path}: {why}; {remedy}")

    if not fits(np.dtype(given).newbyteorder("<").str):
        why = f"as {given}, it has ids that are not in the vocabulary of {vocab_size:,}"
        for name, dtype in _OTHERS.items():
            if name != given and fits(dtype):
                fail(f"{why}, as {name} it has none", f"set data.token_dtype to {name}")
        for name, dtype in _BIG_ENDIAN.items():
            if fits(dtype):
                fail(f"{why}, as big-endian {name} it has none", "write it again in little-endian order")
    elif any(any(piece) for piece in pieces):
        # wider ids read as narrow ones: every other one is zero
        wide = [n for n, d in _OTHERS.items() if np.dtype(d).itemsize > np.dtype(given).itemsize and fits(d)]
        if wide:
            fail(
                f"as {given}, most of its ids are 0; it looks like {wide[-1]}",
                f"set data.token_dtype to {wide[-1]}",
            )


def _sample(file: File) -> list[bytes]:
    last = max(0, file.size - _PIECE_BYTES) // 8 * 8
    with file.path.open("rb") as stream:
        found = []
        for offset in sorted({last * i // (_PIECES - 1) // 8 * 8 for i in range(_PIECES)}):
            stream.seek(offset)
            found.append(stream.read(_PIECE_BYTES))
    return found
