"""The scales of INT8 weights beside a folder that has their values in another format.

Codes in [-127, 127] times a scale keep their order of magnitude in 16 bits, so with the scale the codes can
be found again: exporting INT8 weights and importing them gives the same codes. What is recorded of a tensor
is used only if it explains every value of it, so weights that were changed since then are rounded anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowres import disk
from lowres.checkpoint import pieces_of, read_header
from lowres.kernels.quantise import TOP_CODE
from lowres.sealed import Damaged

FILE = "int8_scales.safetensors"
_MOST_BYTES = 1 << 28  # 6 million for a 7B model


def write_scales(folder: Path, scales: Mapping[str, Tensor]) -> None:
    """Write fp32 [rows, 1] of each tensor, by name. Raises OSError."""
    disk.write_synced(folder / FILE, pieces_of(dict(sorted(scales.items()))))


def read_scales(folder: Path) -> dict[str, Tensor]:
    """fp32 [rows, 1] by name of a tensor; none if nothing is recorded. Raises OSError, Damaged."""
    path = folder / FILE
    if not path.is_file():
        return {}
    found = {}
    with disk.open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise Damaged(f"has more than {_MOST_BYTES:,} bytes")
        for name, place in read_header(file).items():
            if place.dtype != "F32" or len(place.shape) != 2 or place.shape[1] != 1:
                raise Damaged(f"has no scales for {name}")
            scales = torch.empty(place.shape)
            file.seek(place.start)
            if file.readinto(scales.view(-1).view(torch.uint8).numpy().data) != scales.nbytes:  # type: ignore[attr-defined]
                raise Damaged("ends too early")
            found[name] = scales
    return found


def codes_of(pieces: Iterable[tuple[int, Tensor]], shape: tuple[int, ...], scales: Tensor) -> Tensor | None:
    """int8 codes of this shape that give exactly these values with these scales; None if there are none.
    pieces: (first row, rows in the format in which they are stored)."""
    if not bool((scales > 0).all()):
        return None
    codes = torch.empty(shape, dtype=torch.int8)
    for first, rows in pieces:
        own = scales[first : first + len(rows)]
        found = (rows.float() / own).round_()
        if not bool((found.abs().amax() <= TOP_CODE) & ((found * own).to(rows.dtype) == rows).all()):
            return None
        codes[first : first + len(rows)] = found
    return codes
