"""The .bin files of llm.c and modded-nanogpt.

256 numbers of type int32 (magic, version, number of ids, zeros), then the ids: uint16 of GPT-2's tokenizer,
or uint32 of LLaMA-3's. A document begins with its separator.
"""

from __future__ import annotations

import numpy as np

from lowres.data.tokenised.files import TokenFile
from lowres.text.kinds.tokens import LLM_C_HEADER_BYTES, LLM_C_MAGIC
from lowres.text.source import BadFileError, File

_VERSION = {20240520: 1, 20240801: 7}
# bytes of an id -> (size of the vocabulary, separator)
VOCABULARIES = {2: (50257, 50256), 4: (128256, 128000)}


def open_file(file: File) -> TokenFile:
    with file.path.open("rb") as stream:
        header = stream.read(LLM_C_HEADER_BYTES)
    if len(header) < LLM_C_HEADER_BYTES:
        raise BadFileError(f"{file.path}: its header is cut short; get the file again")
    magic, version, count = map(int, np.frombuffer(header, "<i4", 3))
    if version != _VERSION[magic]:
        raise BadFileError(
            f"{file.path}: version {version} of the magic number {magic} is not known, only "
            f"{_VERSION[magic]}; write it with that version"
        )
    dtype = np.dtype(f"<u{LLM_C_MAGIC[magic]}")
    there = (file.size - LLM_C_HEADER_BYTES) / dtype.itemsize
    if there != count:
        what = "cut short" if there < count else "damaged"
        raise BadFileError(
            f"{file.path}: {what}: it has {there:,.15g} ids, its header says {count:,}; get it again"
        )
    return TokenFile(file.path, f"llm.c {dtype.name}", dtype, [(LLM_C_HEADER_BYTES, count)])
