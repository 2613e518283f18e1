"""Arrays of numpy: ids in one dimension, or a document per row. Nothing is unpickled."""

from __future__ import annotations

import math

import numpy as np

from lowres.data.tokenised.files import Rows, TokenFile
from lowres.text.kinds.tokens import npy_header
from lowres.text.source import BadFileError, File


def open_file(file: File) -> TokenFile:
    shape, columns_first, dtype, offset = npy_header(file.path)
    if columns_first and min(shape) > 1 and len(shape) > 1:
        raise BadFileError(
            f"{file.path}: its columns come first (fortran_order), so no document is in one piece; save "
            "numpy.ascontiguousarray of it"
        )
    count, there = math.prod(shape), (file.size - offset) / dtype.itemsize
    if there != count:
        what = "cut short" if there < count else "damaged"
        raise BadFileError(
            f"{file.path}: {what}: it has {there:,.15g} ids, its header says {count:,}; get it again"
        )
    rows = Rows(np.arange(shape[0] + 1, dtype=np.int64) * shape[1]) if len(shape) == 2 else None
    order = ", big-endian" if dtype.str.startswith(">") else ""
    return TokenFile(file.path, f".npy {dtype.name}{order}", dtype, [(offset, count)], rows)
