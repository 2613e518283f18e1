"""Checkpoints: a folder of safetensors and JSON files, written under a temporary name, renamed, and verified.

    checkpoints/step_00001000/
        embed.safetensors, layers.0.safetensors, ..., head.safetensors    weights and optimizer state
        state.json                                                        step, tokens, fingerprints
        manifest.json                                                     size and BLAKE2b of each file

One file per unit of the model. Tensors in host memory are written and read in place, without mapped pages or
a second copy, so saving and resuming need no more memory than training. Tensors on another device pass
through a buffer of PIECE_BYTES in host memory. The safetensors library is not used because it first collects
everything that it saves, in older releases as a copy of the whole file. Its format is simple: 8 bytes for
the length of the header (little-endian), the header in JSON, and the data without gaps. A folder is a
checkpoint only if its manifest agrees with its files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowres.errors import DoesNotFit, UserError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
PREFIX, UNFINISHED = "step_", ".unfinished"
# size of the pieces that are hashed, written or moved between devices
PIECE_BYTES = 8 << 20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder for the checkpoint of a step."""
    return checkpoints / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix(PREFIX))


def save(
    checkpoints: Path,
    step: int,
    units: Iterable[tuple[str, dict[str, Tensor]]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep` (0 = keep all).

    units: name and tensors of each unit, consumed one at a time. Raises UserError if writing fails; older
    checkpoints are then unchanged.
    """
    target = step_folder(checkpoints, step)
    temporary = target.with_name(target.name + UNFINISHED)
    try:
        for left in _unfinished(checkpoints):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        bounce = _bounce()
        files = {}
        for name, tensors in units:
            path = temporary / f"{name}.safetensors"
            files[path.name] = _write(path, _safetensors(tensors, bounce))
        files[STATE] = _write(temporary / STATE, [_json(state | {"step": step})])
        _write(temporary / MANIFEST, [_json({"format": FORMAT, "files": files})])
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(checkpoints)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint {target}: cannot be written ({error.strerror or error}); "
            "make room on the disk and continue with --resume"
        ) from None
    _delete_old(checkpoints, keep)
    return target


def require_disk(checkpoints: Path, bytes_per_checkpoint: int, keep: int) -> None:
    """Raise DoesNotFit if the disk of a folder, which need not exist yet, cannot hold the checkpoints.

    A run that keeps K checkpoints needs room for K + 1, because the new one is complete before the oldest is
    deleted. Checkpoints that exist already are subtracted. With keep = 0 (never delete) only the next one is
    checked.
    """
    place = checkpoints.absolute()
    while not place.exists():
        place = place.parent
    # the next save first deletes the remains of an interrupted one
    free = shutil.disk_usage(place).free + _bytes_in(_unfinished(checkpoints))
    all_kept = (keep + 1) * bytes_per_checkpoint - _bytes_in(find(checkpoints)) if keep else 0
    needed = max(bytes_per_checkpoint, all_kept)
    if free < needed:
        # not for keep = 1: the next lower value, 0, keeps all
        fewer = f" or lower train.keep_checkpoints = {keep}" if keep > 1 and all_kept == needed else ""
        raise DoesNotFit(
            f"checkpoints {checkpoints}: the disk has {_size(free)} free, but "
            f"{_size(needed)} are needed; make room, choose another --run DIR{fewer}"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 28 else f"{nbytes / 2**20:.2f} MiB"


def _bytes_in(folders: Iterable[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def _unfinished(checkpoints: Path) -> list[Path]:
    """Folders of saves that were interrupted."""
    return list(checkpoints.glob(f"{PREFIX}*{UNFINISHED}"))


def _delete_old(checkpoints: Path, keep: int) -> None:
    if keep:
        for old in find(checkpoints)[:-keep]:
            # delete the manifest first: without it, a half-deleted folder is not a checkpoint
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def find(checkpoints: Path) -> list[Path]:
    """All checkpoint folders, oldest first, valid or not."""
    folders = checkpoints.glob(f"{PREFIX}*") if checkpoints.is_dir() else []
    return sorted(p for p in folders if p.is_dir() and p.name.removeprefix(PREFIX).isdigit())


def verify(folder: Path) -> list[str]:
    """Problems of a checkpoint, one line each; empty if every file is as it was written."""
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
    """The newest valid checkpoint, and a note for each newer one that is damaged."""
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

    all_used: require that `tensors` names every tensor of the file. If the file is truncated, or a tensor is
    missing or has another shape or type, raises UserError and overwrites nothing.
    """
    path = folder / f"{unit}.safetensors"
    with path.open("rb") as file:
        start, header = _read_header(file, path)
        if all_used and header.keys() != tensors.keys():
            odd = sorted(header.keys() ^ tensors.keys())
            raise UserError(f"checkpoint {path}: has other tensors than the run, such as {odd[0]}")
        for name, tensor in tensors.items():
            entry = header.get(name)
            if (
                entry is None
                or entry["shape"] != list(tensor.shape)
                or entry["dtype"] != DTYPES[tensor.dtype]
            ):
                raise UserError(f"checkpoint {path}: {name} is missing or has another shape or type")
        bounce = _bounce()
        for name, tensor in tensors.items():
            file.seek(start + header[name]["data_offsets"][0])
            _read_into(file, tensor, bounce)


def _read_header(file: BufferedReader, path: Path) -> tuple[int, dict[str, Any]]:
    """The offset of the data in a safetensors file, and the entry of each tensor. Checks the file's size."""
    size = path.stat().st_size
    start = 8 + int.from_bytes(file.read(8), "little")
    if start <= size:
        header: dict[str, Any] = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        if start + max((entry["data_offsets"][1] for entry in header.values()), default=0) <= size:
            return start, header
    raise UserError(
        f"checkpoint {path}: is truncated at {size} bytes; delete its folder and use an older one"
    )


def _read_into(file: BufferedReader, tensor: Tensor, bounce: Tensor) -> None:
    """Fill a tensor from the file's position. A tensor that is not contiguous needs a copy."""
    whole = tensor.detach().contiguous()
    for piece in whole.view(-1).view(torch.uint8).split(PIECE_BYTES):
        host = piece if _on_host(piece) else bounce[: len(piece)]
        if file.readinto(host.numpy().data) != len(piece):
            raise UserError(f"checkpoint {file.name}: ends too early")
        if host is not piece:
            piece.copy_(host)
    if not tensor.is_contiguous():
        tensor.detach().copy_(whole)


def _safetensors(tensors: dict[str, Tensor], bounce: Tensor) -> Iterator[bytes | memoryview]:
    """A safetensors file of the tensors, piece by piece; a piece is valid until the next is requested."""
    # widest elements first, so that every tensor is aligned, which some readers need
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in ordered.values():
        for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(PIECE_BYTES):
            host = piece if _on_host(piece) else bounce[: len(piece)].copy_(piece)
            yield host.numpy().data


def _bounce() -> Tensor:
    """Host memory for pieces of tensors on another device."""
    # mmap allocates pages at first use and frees them afterwards; malloc would keep them
    return torch.frombuffer(mmap.mmap(-1, PIECE_BYTES), dtype=torch.uint8)


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and sync it to the disk; returns its size and BLAKE2b for the manifest."""
    size, digest = 0, hashlib.blake2b()
    with path.open("wb") as file:
        for piece in pieces:
            size += file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _digest(path: Path) -> str:
    """BLAKE2b as `b2sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
