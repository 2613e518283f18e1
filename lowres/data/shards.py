"""Shards: memory-mapped files of token ids.

offset  size  little-endian
0       8     magic "lowres\\0\\0"
8       4     version of the format
12      4     bytes per token: 2, or 4 if the vocabulary has more than 65,536 pieces
16      8     number of tokens
24      8     vocabulary size
32      4     CRC-32 of the tokens
36      28    zeros
64            the tokens
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np

from lowres.errors import UserError

MAGIC = b"lowres\0\0"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sIIQQI28x")
_AGAIN = "remove the folder and prepare the data again"


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_name(part: str, number: int) -> str:
    return f"{part}_{number:05}.bin"


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that it is complete or absent after a crash at any moment."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); check its disk and try again"
        ) from None


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> int:
    """Write token ids (any integer type, all < vocab_size); returns their CRC-32."""
    payload = np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size)).view(np.uint8).data
    checksum = zlib.crc32(payload)
    header = _HEADER.pack(MAGIC, VERSION, token_dtype(vocab_size).itemsize, len(tokens), vocab_size, checksum)
    write_atomically(path, header, payload)
    return checksum


def open_shard(path: Path, verify: bool = True, recorded: int | None = None) -> np.ndarray:
    """uint16 or uint32 [tokens], read-only and memory-mapped.

    `verify`: read all tokens once to compare their checksum. `recorded`: the checksum that the file should
    have. Raises UserError, which names the file and the remedy, if the file is missing, truncated, changed,
    in another format or not the recorded one.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from None
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise UserError(f"{path}: not a token file; {_AGAIN}")
    _, version, token_bytes, count, _, checksum = _HEADER.unpack(header)
    if version != VERSION:
        raise UserError(
            f"{path}: format version {version}, but this lowres reads version {VERSION}; {_AGAIN}"
        )
    if token_bytes not in (2, 4) or size != HEADER_BYTES + count * token_bytes:
        raise UserError(f"{path}: damaged: its size does not match its {count} tokens; {_AGAIN}")
    if recorded not in (None, checksum):
        raise UserError(f"{path}: not the file listed in data.json; {_AGAIN}")
    dtype = np.dtype(f"<u{token_bytes}")
    # an empty file cannot be mapped
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,)) if count else np.empty(0, dtype)
    if verify and zlib.crc32(tokens.view(np.uint8).data) != checksum:
        raise UserError(f"{path}: damaged: its checksum is wrong; {_AGAIN}")
    return tokens
