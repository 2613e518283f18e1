"""Files of token ids. Here they are only recognised; `lowres.data.tokenised` reads them.

A .bin or .npy without a header could be anything. It counts as ids if data.token_dtype says so, or if its
name is that of a split: train.bin, and val.bin beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError

import numpy as np

from lowres.errors import UserError
from lowres.text import splits
from lowres.text.kinds.plain import is_text
from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import faults_of
from lowres.text.source import TRAIN, BadFileError, File, Source

RAW, LLM_C, MEGATRON, MEGATRON_INDEX, NPY = (
    "raw ids", "llm.c's ids", "Megatron's ids", "Megatron's index", "npy array",
)  # fmt: skip
PARQUET, ARROW = "parquet of ids", "Arrow table of ids"
# magic number of llm.c's header -> bytes of an id
LLM_C_MAGIC = {20240520: 2, 20240801: 4}
LLM_C_HEADER_BYTES = 1024
MEGATRON_MAGIC, OLD_MEGATRON_MAGIC = b"MMIDIDX\0\0", b"TNTIDX"
NPY_MAGIC = b"\x93NUMPY"
_HEAD = 4096
_OURS = b"lowres\0\0"
# beginnings of other files that are called .bin: archives, pickles, programs, models
_FOREIGN = (
    b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"\x7fELF", b"MZ\x90", b"\x1f\x8b", b"BZh",
    b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"GGUF", b"lmgg", b"tjgg", b"\x89PNG", b"\x89HDF", b"SQLite", b"%PDF",
    b"ARROW1", b"PAR1",
)  # fmt: skip


def _no_documents(file: File, source: Source) -> Iterator[str]:
    raise UserError(
        f"{file.path}: holds token ids already, so there is no text to prepare; train on it as it is, as "
        "data.source"
    )


def _bin(file: File) -> File | str:
    if file.compression:
        return "unknown type; if it holds token ids, decompress it: they are read in place"
    head = _head(file.path)
    index = _head(file.path.with_suffix(".idx"))
    if index.startswith(MEGATRON_MAGIC):
        return replace(file, kind=MEGATRON)
    if index.startswith(OLD_MEGATRON_MAGIC):
        return _old_index(file.path.with_suffix(".idx").name)
    if (magic := _llm_c_magic(head)) is not None:
        known = " and ".join(map(str, LLM_C_MAGIC))
        other = (
            f"a file of llm.c with the magic number {magic}, which has no token ids or is newer; known are "
        )
        return replace(file, kind=LLM_C) if magic in LLM_C_MAGIC else other + known
    if file.path.stem.endswith("_document") and not file.token_dtype:
        return f"ids of Megatron-LM without their index {file.path.stem}.idx; put it beside them"
    return _raw(file, head)


def _npy(file: File) -> File | str:
    if file.compression:
        return "a compressed array; decompress it"
    head = _head(file.path)
    if not head.startswith(NPY_MAGIC):
        return _raw(file, head)
    shape, _, dtype, _ = npy_header(file.path)
    if dtype.kind not in "ui" or len(shape) not in (1, 2):
        what = "objects" if dtype.hasobject else dtype.name
        return f"an array of {what} with {len(shape)} dimensions, no token ids"
    return replace(file, kind=NPY)


def _index(file: File) -> File | str:
    head = b"" if file.compression else _head(file.path)
    if head.startswith(OLD_MEGATRON_MAGIC):
        return _old_index(file.name)
    if not head.startswith(MEGATRON_MAGIC):
        return "unknown type"
    if not file.path.with_suffix(".bin").exists():
        return f"an index of Megatron-LM without its ids; put {file.path.stem}.bin beside it"
    return replace(file, kind=MEGATRON_INDEX)


def npy_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether columns come first, type, bytes of the header) of a .npy file. Nothing is unpickled.
    Raises BadFileError."""
    with faults_of(path), path.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"version {version[0]}.{version[1]} is not known")
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, columns_first, dtype = read(stream)
            return shape, columns_first, dtype, stream.tell()
        # numpy lets the errors of the parsers that it uses pass
        except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
            raise BadFileError(
                f"{path}: not a complete .npy file ({str(error).splitlines()[0]}); get the file again"
            ) from None


def _raw(file: File, head: bytes) -> File | str:
    if head.startswith(_OURS):
        return "a shard of a prepared folder; give the folder"
    if head.startswith(_FOREIGN) or (head.strip(b"\0") and is_text(head)):
        return "unknown type"
    if file.token_dtype or _is_named_as_a_split(file.path):
        return replace(file, kind=RAW)
    return "unknown type; if it holds token ids, data.token_dtype takes it"


def _is_named_as_a_split(path: Path) -> bool:
    beside = [p.name for p in path.parent.glob(f"*{path.suffix}")]
    return splits.has_word(path.name, TRAIN) or (
        splits.parts([path.name, "train.bin"])[0] != TRAIN and any(splits.has_word(n, TRAIN) for n in beside)
    )


def _llm_c_magic(head: bytes) -> int | None:
    """The first number of what looks like a header of llm.c: a date, a version, a count, and nothing else."""
    header = np.frombuffer(head[:LLM_C_HEADER_BYTES].ljust(LLM_C_HEADER_BYTES, b"\0"), "<i4")
    dated = 20240101 <= header[0] <= 20351231
    return int(header[0]) if dated and 0 < header[1] < 100 and not header[3:].any() else None


def _old_index(name: str) -> str:
    return (
        f"the index {name} has the old form of Megatron-LM (TNTIDX); make both files again with its mmap form"
    )


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with faults_of(path), path.open("rb") as stream:
        return stream.read(_HEAD)


register(Kind(RAW, (".bin",), Rank.TOKENS, _no_documents, look=_bin))
register(Kind(NPY, (".npy",), Rank.TOKENS, _no_documents, look=_npy))
register(Kind(MEGATRON_INDEX, (".idx",), Rank.TOKENS, _no_documents, look=_index))
for _name in (LLM_C, MEGATRON, PARQUET, ARROW):
    register(Kind(_name, (), Rank.TOKENS, _no_documents))
register(
    Kind(
        "npz", (".npz",), Rank.PROSE, _no_documents, refused=lambda file: "several arrays; save each as .npy"
    )
)
