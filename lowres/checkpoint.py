"""Checkpoints: a folder of safetensors and JSON, written beside and renamed, and verified.

    checkpoints/step_00001000/
        embed.safetensors, layers.0.safetensors, ..., head.safetensors    weights and optimizer state
        state.json                                                        step, tokens, fingerprints
        manifest.json                                                     size and BLAKE2b of each file

A file a unit of the model, so saving and loading need host memory for one unit. Loading reads into
the tensors that are there already: no mapped pages, no second copy, so a resumed run peaks where a
fresh one does. A folder without a manifest that agrees with its files is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowres.errors import UserError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
PREFIX, UNFINISHED = "step_", ".unfinished"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return checkpoints / f"{PREFIX}{step:08d}"


def save(
    checkpoints: Path,
    step: int,
    units: Iterable[tuple[str, dict[str, Tensor]]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep` (0 = keep all).

    units: name and tensors of each unit, taken one at a time. Raises UserError if the disk fails; what
    was there before is then untouched.
    """
    target = step_folder(checkpoints, step)
    beside = target.with_name(target.name + UNFINISHED)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        files = {}
        for name, tensors in units:
            path = beside / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
            files[path.name] = _seal(path)
        (beside / STATE).write_text(json.dumps(state | {"step": step}, indent=1))
        files[STATE] = _seal(beside / STATE)
        manifest = {"format": FORMAT, "files": files}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync(beside / MANIFEST)
        _sync(beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        _sync(checkpoints)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"checkpoint {target}: cannot be written ({error.strerror or error}); "
            "make room on the disk and continue with --resume"
        ) from None
    _delete_old(checkpoints, keep)
    return target


def _delete_old(checkpoints: Path, keep: int) -> None:
    for left in checkpoints.glob(f"{PREFIX}*{UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)
    if keep:
        for old in find(checkpoints)[:-keep]:
            # without its manifest a half-deleted folder is no checkpoint
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def find(checkpoints: Path) -> list[Path]:
    """All checkpoint folders, oldest first, valid or not."""
    folders = checkpoints.glob(f"{PREFIX}*") if checkpoints.is_dir() else []
    return sorted(p for p in folders if p.is_dir() and p.name.removeprefix(PREFIX).isdigit())


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty if every file is as it was written."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{MANIFEST} cannot be read"]
    problems = []
    for name, seal in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != seal["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {seal['bytes']}")
        elif _digest(path) != seal["blake2b"]:
            problems.append(f"{name} does not match its checksum")
    return problems


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a note for each newer one that does not."""
    notes: list[str] = []
    for folder in reversed(find(checkpoints)):
        problems = verify(folder)
        if not problems:
            return folder, notes
        notes.append(f"{folder} is damaged ({problems[0]}); using an older one")
    return None, notes


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_unit(folder: Path, unit: str, tensors: dict[str, Tensor], all_used: bool = True) -> None:
    """Read a unit's tensors from a checkpoint into `tensors`, in place.

    all_used: every tensor of the file must be asked for. Raises UserError on a tensor that is missing
    or has another shape or type.
    """
    path = folder / f"{unit}.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if all_used and header.keys() != tensors.keys():
            odd = sorted(header.keys() ^ tensors.keys())
            raise UserError(f"checkpoint {path}: holds other tensors than the run needs, such as {odd[0]}")
        for name, tensor in tensors.items():
            entry = header.get(name)
            if (
                entry is None
                or entry["shape"] != list(tensor.shape)
                or entry["dtype"] != DTYPES[tensor.dtype]
            ):
                raise UserError(f"checkpoint {path}: {name} is missing or of another shape or type")
            file.seek(8 + length + entry["data_offsets"][0])
            _read_into(file, tensor)


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def _read_into(file: Any, tensor: Tensor) -> None:
    """Fill a tensor from the file's position; one on another device goes through a host copy of itself."""
    host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
    flat = host.view(-1).view(torch.uint8).numpy()
    if file.readinto(flat.data) != flat.nbytes:
        raise UserError(f"checkpoint {file.name}: ends too early")
    if host is not tensor:
        tensor.copy_(host)


def _seal(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "blake2b": _digest(path)}


def _digest(path: Path) -> str:
    """BLAKE2b as `b2sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
