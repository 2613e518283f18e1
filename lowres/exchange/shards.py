"""safetensors files of a Hugging Face folder, written a piece of a tensor at a time.

They are as `save_pretrained` of transformers writes them: the tensors go into files in the order of the
model, and lie in a file by size of their elements, then by name. So the place of each is known before the
first is read, and they may come in the order in which a run stores them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lowres import disk
from lowres.checkpoint import layout, read_header
from lowres.exchange.folder import INDEX, ONE
from lowres.sealed import Damaged
from lowres.storage import Fields

Rows = Iterable[tuple[int, Tensor]]  # (first row, rows), in order


def size_of(fields: Fields) -> int:
    """Bytes of the tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in fields.values())


def split(fields: Fields, limit: int) -> dict[str, Fields]:
    """The tensors by file. limit: bytes of tensors in a file; a larger tensor has a file of its own."""
    files: list[Fields] = [{}]
    for name, one in fields.items():
        if files[-1] and size_of(files[-1]) + size_of({name: one}) > limit:
            files.append({})
        files[-1][name] = one
    if not files[1:]:
        return {ONE: files[0]}
    stem, suffix = ONE.split(".")
    return {f"{stem}-{number:05d}-of-{len(files):05d}.{suffix}": own for number, own in enumerate(files, 1)}


def write(folder: Path, fields: Fields, limit: int, tensors: Iterable[tuple[str, Rows]]) -> int:
    """Write the files, and the index if there are several; returns how many. tensors: name and rows of each,
    in the order of `fields`. Raises OSError."""
    files, coming = split(fields, limit), iter(tensors)
    for file, own in files.items():
        head, places = layout(dict(sorted(own.items(), key=lambda item: (-item[1][0].itemsize, item[0]))))
        with disk.open_to_write(folder / file, os.O_TRUNC) as out:
            disk.write_all(out, head)
            for wanted in own:
                name, pieces = next(coming)
                assert name == wanted, f"{name} came instead of {wanted}"
                out.seek(places[name].start)
                for _, rows in pieces:
                    disk.write_all(out, rows.contiguous().view(-1).view(torch.uint8).numpy().data)
                assert out.tell() == places[name].end, f"{name} has another size than its description"
            os.fsync(out.fileno())
        _look_at(folder / file)
    if len(files) > 1:
        disk.write_whole(folder / INDEX, _index(fields, files))
    return len(files)


def _look_at(path: Path) -> None:
    """Raise OSError unless a file that was written has its tensors."""
    with disk.open_regular(path) as file:
        try:
            read_header(file)
        except Damaged as error:
            raise OSError(5, f"{path.name} {error}") from None


def _index(fields: Fields, files: dict[str, Fields]) -> bytes:
    numbers = sum(math.prod(shape) for _, shape in fields.values())
    index = {
        "metadata": {"total_parameters": numbers, "total_size": size_of(fields)},
        "weight_map": {name: file for file, own in files.items() for name in own},
    }
    return f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode()
