"""`lowres export`: a model of ours, or one that is converted, as files that other programs read."""

from __future__ import annotations

import re
from pathlib import Path

from lowres import checkpoint
from lowres.errors import UserError
from lowres.exchange import gguf_file
from lowres.exchange.casts import DTYPES
from lowres.exchange.huggingface import SHARD_BYTES, export_folder
from lowres.exchange.stored import open_model

HF, GGUF = "hf", "gguf"
# formats and the number formats that they have
FORMATS = {HF: tuple(DTYPES), GGUF: tuple(gguf_file.DTYPES)}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    path: Path,
    out: Path,
    file_format: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    shard_size: str | None = None,
) -> list[str]:
    """Write the model of a run, a checkpoint or a Hugging Face folder to `out`; returns lines for the user.

    file_format: of FORMATS; default: gguf if the name of `out` ends so, otherwise hf. dtype: default: as the
    matrices are stored, or bf16 if that is int8. step: of the checkpoint, default the newest. Raises
    UserError, DoesNotFit.
    """
    file_format = file_format or (GGUF if out.suffix.lower() == f".{GGUF}" else HF)
    if dtype is not None and dtype not in FORMATS[file_format]:
        known = ", ".join(FORMATS[file_format])
        other = next((f", or --format {name}" for name, dtypes in FORMATS.items() if dtype in dtypes), "")
        raise UserError(f"--dtype {dtype}: {file_format} does not have it; use one of {known}{other}")
    if shard_size is not None and file_format != HF:
        raise UserError(f"--shard-size: a {file_format} file is one file; leave it out")
    limit = bytes_of(shard_size) if shard_size is not None else SHARD_BYTES
    checkpoint.require_outside(out, "OUT")
    model = open_model(path, step)
    dtype = dtype or ("bf16" if model.kind == "int8" else model.kind)
    if file_format == GGUF:
        return gguf_file.export_gguf(model, out, dtype)
    return export_folder(model, out, dtype, limit)


def bytes_of(size: str) -> int:
    """A size such as 5GB, 500MB or 2GiB. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", size.strip().upper())
    count = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= count < 2**63:
        raise UserError(f"--shard-size {size}: write it as 5GB, 500MB or 2GiB")
    return int(count)
