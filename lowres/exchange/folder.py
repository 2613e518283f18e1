"""The weights of a Hugging Face folder: safetensors files, read a piece of a tensor at a time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lowres import disk
from lowres.checkpoint import DTYPES, PIECE_BYTES, Place, read_header
from lowres.errors import UserError
from lowres.exchange.own import OWN
from lowres.exchange.scales import FILE, codes_of, read_scales
from lowres.ranks import say
from lowres.sealed import Damaged, parse
from lowres.storage import all_finite

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_FILE = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)  # no path: nothing outside the folder
_START = 1 << 10  # bytes that show what a file is


class WeightsFolder:
    """The tensors of a folder by name. Raises UserError if a file is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Path] = {}
        self._places: dict[str, Place] = {}
        for file, names in self._listed().items():
            found = self._header(file)
            for name in names:
                if name not in found:
                    raise UserError(
                        f"{path / INDEX}: says that {name:.100} is in {file.name}, which does not have it; "
                        "get both files again"
                    )
            for name in found.keys() - self._files.keys() | set(names):
                self._files[name], self._places[name] = file, found[name]
        self._scales = self._recorded()

    def require(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        unused: Collection[str],
        zeros: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Raise UserError unless the folder has exactly these tensors, in these shapes and a floating-point
        format. unused: endings of the names of others that it may have. zeros: others that it must have, all
        zero."""
        shapes = {**shapes, **zeros}
        missing = [name for name in shapes if name not in self]
        others = [n for n in self._places if n not in shapes and not n.endswith(tuple(unused))]
        if others:
            without = f", and no {missing[0]}" if missing else ""
            raise UserError(
                f"{self.path}: has a tensor {others[0]!r:.100}{without}, so it is not the model of its "
                "config.json that transformers has; such models are not supported"
            )
        if missing:
            raise UserError(f"{self.path}: the tensor {missing[0]} is missing; get the folder again")
        for name, shape in shapes.items():
            place = self._places[name]
            if tuple(place.shape) != shape:
                raise UserError(
                    f"{self.path}: {name} has the shape {place.shape}, but config.json means {list(shape)}; "
                    "get the folder again"
                )
            if place.dtype not in KINDS:
                raise UserError(
                    f"{self.path}: {name} is stored as {place.dtype}, which is not supported; give weights "
                    "in bf16, fp16 or fp32"
                )
        for name in zeros:
            if any(bool(rows.any()) for _, rows in self.weight(name).rows()):
                raise UserError(f"{self.path}: {name} is not zero; such biases are not supported")

    @property
    def kinds(self) -> list[str]:
        """The number formats of its tensors that this program reads."""
        return sorted({KINDS[place.dtype] for place in self._places.values() if place.dtype in KINDS})

    def kind_of(self, name: str) -> str:
        """The number format of a tensor in its file."""
        return KINDS[self._places[name].dtype]

    def _recorded(self) -> dict[str, Tensor]:
        """The scales of weights that were exported from INT8."""
        try:
            return read_scales(self.path / OWN)
        except (OSError, Damaged) as error:
            say(f"note: {self.path / OWN / FILE}: {error}; INT8 codes will be rounded anew")
            return {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def weight(self, name: str) -> FolderWeight:
        return FolderWeight(name, self._files[name], self._places[name], self._scales.get(name))

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors are stored alike and hold the same numbers."""
        places = self._places[one], self._places[other]
        if (places[0].dtype, places[0].shape) != (places[1].dtype, places[1].shape):
            return False
        pieces = zip(self.weight(one).rows(), self.weight(other).rows(), strict=True)
        return all(torch.equal(a, b) for (_, a), (_, b) in pieces)

    def _listed(self) -> dict[Path, list[str]]:
        """The files, and the tensors that each must have. As in transformers, one file goes before an
        index."""
        if os.path.lexists(self.path / ONE):  # also a link into a cache that has lost the file
            return {self.path / ONE: []}
        if os.path.lexists(self.path / INDEX):
            return self._of_index()
        pickles = [file for ending in ("bin", "pth", "pt") for file in sorted(self.path.glob(f"*.{ending}"))]
        if pickles:
            raise UserError(
                f"{pickles[0]}: a pickle can run any program, so it is not read; get the safetensors files "
                "of this model, or load it with transformers where you trust it and use save_pretrained"
            )
        raise UserError(f"{self.path}: has neither {ONE} nor {INDEX}; get the folder again")

    def _of_index(self) -> dict[Path, list[str]]:
        path = self.path / INDEX
        found: dict[Path, list[str]] = {}
        with disk.named(path, "read"):
            text = disk.read_whole(path)
        try:
            names = parse(text).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise Damaged("has no weight_map")
            for name, file in names.items():
                if not isinstance(file, str) or not _FILE.fullmatch(file):
                    raise Damaged(f"names {file!r:.100}, which is no safetensors file of its folder")
                found.setdefault(self.path / file, []).append(name)
        except Damaged as error:
            raise UserError(f"{path}: {error}; {disk.instead(text) or 'get the file again'}") from None
        return found

    def _header(self, file: Path) -> dict[str, Place]:
        if not file.exists():
            why = (
                "is a link to a file that is gone"
                if file.is_symlink()
                else f"is missing, but {INDEX} names it"
            )
            raise UserError(f"{file}: {why}; get the file again")
        try:
            with disk.named(file, "read"), disk.open_regular(file) as opened:
                start = opened.read(_START)
                opened.seek(0)
                return read_header(opened)
        except Damaged as error:
            raise UserError(f"{file}: {error}; {disk.instead(start) or 'get the file again'}") from None


@dataclass(frozen=True)
class FolderWeight:
    """A tensor in a file; see `stored.StoredWeight`. scales: with which it was exported from INT8. Where they
    explain it, it counts as INT8."""

    name: str
    file: Path
    place: Place
    scales: Tensor | None = None

    @property
    def kind(self) -> str:
        return KINDS[self.place.dtype] if self._codes is None else "int8"

    @property
    def merged(self) -> float:
        return 0.0

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        for first, rows in self._pieces():
            yield first, rows.float()

    def tensors(self) -> dict[str, Tensor]:
        if self._codes is not None and self.scales is not None:
            return {"": self._codes, ".scales": self.scales}
        whole = torch.empty(self.place.shape, dtype=_DTYPES[self.place.dtype])
        for first, rows in self._pieces():
            whole[first : first + len(rows)] = rows
        return {"": whole}

    @cached_property
    def _codes(self) -> Tensor | None:
        shape = tuple(self.place.shape)
        if self.scales is None or self.scales.shape != (*shape[:1], 1) or len(shape) != 2:
            return None
        return codes_of(self._pieces(), shape, self.scales)

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as stored)."""
        count, *rest = self.place.shape
        dtype = _DTYPES[self.place.dtype]
        step = max(1, PIECE_BYTES // (math.prod(rest) * dtype.itemsize))
        with disk.named(self.file, "read"), disk.open_regular(self.file) as file:
            file.seek(self.place.start)
            for first in range(0, count, step):
                rows = torch.empty((min(step, count - first), *rest), dtype=dtype)
                wanted = rows.view(-1).view(torch.uint8).numpy().data
                if file.readinto(wanted) != len(wanted):  # type: ignore[attr-defined]
                    raise UserError(f"{self.file}: ends too early; get the file again")
                if not all_finite([rows]):
                    raise UserError(
                        f"{self.file}: {self.name} holds a number that is not finite; get the file again"
                    )
                yield first, rows
