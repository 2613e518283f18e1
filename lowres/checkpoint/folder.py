"""One checkpoint: a folder that is complete, and as it was written, or else is not used.

    step_00001000/
        embed.safetensors, layers.0.safetensors, ..., head.safetensors    weights and optimizer state
        tokenizer.model (or .json)                                        as in the run
        state.json                                                        `State`
        manifest.json                                                     size and BLAKE2b of each, sealed

It is written under a temporary name, synced, renamed, and read back from the disk. Nothing in it is trusted
when it is read: any failure means that it is damaged, and an older one is used. A link or a path that leaves
the folder is not followed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from lowres import disk
from lowres.checkpoint.tensors import PIECE_BYTES, pieces_of, read_header, read_into
from lowres.errors import UserError
from lowres.sealed import Damaged, Record, checked, parse, seal, unseal

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
PREFIX, UNFINISHED, DELETED, DAMAGED = "step_", ".unfinished", ".deleted", ".damaged"
TENSORS = ".safetensors"
_NAME = re.compile(r"step_(\d{8,18})", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*", re.ASCII)
_MOST_JSON = 1 << 28

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Positive = Annotated[int, Field(ge=1, le=1 << 62)]


class _Seal(Record):
    """What the manifest says about a file. blake2b: as `b2sum` prints it."""

    bytes: Count
    blake2b: str


class _Manifest(Record):
    format: int
    step: Count
    files: dict[str, _Seal]


class _Format1(Record):
    """A manifest of lowres 0.1, which had no seal and did not name its step."""

    format: int
    files: dict[str, _Seal]


class Passed(Record):
    """Sequences that were passed over: before the update after `step` completed ones."""

    step: Count
    sequences: Count


class Start(Record):
    """The batch and the rates from which rates follow if the batch changes. Older versions know fewer."""

    batch_tokens: Positive
    lr: float | None = None
    embed_lr: float | None = None
    norm_lr: float | None = None


class Windows(Record):
    """What `lowres.health` remembers between steps. losses, norms (of the gradient): of accepted steps, the
    latest last. bad: steps in a row. spikes: in a row. learnt: whether the loss was ever better than
    guessing."""

    losses: list[float] = Field(default_factory=list)
    norms: list[float] = Field(default_factory=list)
    bad: Count = 0
    spikes: Count = 0
    learnt: bool = False


class Best(Record):
    """The checkpoint with the lowest validation loss so far."""

    step: Count
    val_loss: float


class MixedPart(Record):
    """A part of a mixture. before, read: sequences it gave until the present weights began, and until this
    checkpoint. A part that the run does not have any more has weight 0."""

    name: str
    fingerprint: str
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    before: Count
    read: Count


class Mixture(Record):
    """The mixture of a run. since: the sequence of the run from which on the present weights count."""

    since: Count
    parts: list[MixedPart]


class State(Record):
    """What a run needs besides weights and optimizer state.

    tokens: trained on so far. data, validation: fingerprints; data is empty for a model that was imported,
    and has neither data nor optimizer state. config: the resolved config of the run, sections of keys.
    texts: fingerprints of the validation texts with names that the run has had. mixture: None if there is one
    source. passed: batches that rollbacks left out.
    micro_batch: if it was lowered because memory ran out. val_loss: of an evaluation at this step. run: its
    identity, which tells its checkpoints from others. baseline: the key of the one that the run has, see
    `lowres.baseline`. metrics: digest of the records up to this step. pending: records that the metrics
    and the samples could not take.
    """

    step: Count
    tokens: Count
    data: str
    start: Start
    config: dict[str, dict[str, Any]] | None = None
    validation: str | None = None
    texts: dict[str, str] = Field(default_factory=dict)
    mixture: Mixture | None = None
    passed: list[Passed] = Field(default_factory=list)
    watch: Windows = Field(default_factory=Windows)
    micro_batch: Positive | None = None
    val_loss: float | None = None
    best: Best | None = None
    run: str | None = None
    baseline: str | None = None
    metrics: str | None = None
    pending: list[dict[str, int | float | str | None]] = Field(default_factory=list)


def passed_before(step: int, passed: Iterable[Passed]) -> int:
    """Sequences that rollbacks left out before the update after `step` completed ones."""
    return sum(one.sequences for one in passed if one.step <= step)


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder for the checkpoint of a step."""
    return checkpoints / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if it is not such a name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found and folder.name == f"{PREFIX}{int(found[1]):08d}" else None


def clear(rest: Path) -> None:
    """Remove what is left of something, whatever it is; of a link, the link. Errors are ignored, as what
    needs the place will meet them."""
    if rest.is_dir() and not rest.is_symlink():
        shutil.rmtree(rest, ignore_errors=True)
        return
    with suppress(OSError):  # rmtree would open it, and wait for ever for a named pipe
        rest.unlink()


def write(
    target: Path, units: Iterable[tuple[str, Mapping[str, Tensor]]], state: State, more: Mapping[str, bytes]
) -> int:
    """Write a checkpoint into a folder that does not exist, and read it back; returns its size in bytes.

    units: name and tensors of each unit, consumed one at a time. more: other files. Raises OSError, also if
    the disk does not return what was written; then there is no such folder. Raises NotFinite.
    """
    temporary = target.with_name(target.name + UNFINISHED)
    clear(temporary)
    try:
        temporary.mkdir(parents=True)
        files = {}
        for name, tensors in units:
            path = temporary / f"{name}{TENSORS}"
            files[path.name] = _write(path, pieces_of(tensors))
        for name, content in (*more.items(), (STATE, _text(state))):
            files[name] = _write(temporary / name, [content])
        manifest = {"format": FORMAT, "step": state.step, "files": files}
        _write(temporary / MANIFEST, [seal(manifest)])
        disk.sync_folder(temporary)
        _read_back(temporary, files)
        temporary.rename(target)
        try:
            disk.sync_folder(target.parent)
        except BaseException:
            target.rename(temporary)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(one["bytes"] for one in files.values())


def _text(state: State) -> bytes:
    return state.model_dump_json(indent=1, exclude_none=True).encode()


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file to the disk; returns its `_Seal`."""
    size, digest = 0, hashlib.blake2b()

    def counted() -> Iterator[bytes | memoryview]:
        nonlocal size
        for piece in pieces:
            size += len(piece)
            digest.update(piece)
            yield piece

    disk.write_synced(path, counted())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _read_back(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise OSError unless the disk returns what was written."""
    for name, written in files.items():
        if _digest(folder / name, from_disk=True) != (written["bytes"], written["blake2b"]):
            raise OSError(5, f"{name} reads back differently")


def _digest(path: Path, from_disk: bool = False) -> tuple[int, str]:
    """Size and BLAKE2b of an ordinary file. from_disk: not from the system's cache, if it can be emptied."""
    size, digest, buffer = 0, hashlib.blake2b(), memoryview(bytearray(PIECE_BYTES))
    with disk.open_regular(path, follow=False) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            size += count
            digest.update(buffer[:count])
    return size, digest.hexdigest()


def load(folder: Path) -> State:
    """The state of a checkpoint that is as it was written. Raises Damaged, which says what is wrong."""
    problems = verify(folder)
    if problems:
        raise Damaged(problems[0])
    return load_state(folder)


def verify(folder: Path) -> list[str]:
    """Problems of a checkpoint, one line each; empty if every file is as it was written."""
    try:
        files = _manifest(folder).files
    except (OSError, Damaged) as error:
        return [f"{MANIFEST} {_reason(error)}"]
    problems = []
    for name, written in files.items():
        try:
            _check(folder / name, written)
        except (OSError, Damaged) as error:
            problems.append(f"{name} {_reason(error)}")
    if not problems:
        try:
            load_state(folder)
        except (OSError, Damaged) as error:
            problems.append(f"{STATE} {_reason(error)}")
    return problems


def _reason(error: OSError | Damaged) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return str(error) if isinstance(error, Damaged) else f"cannot be read ({disk.what_failed(error)})"


def _manifest(folder: Path) -> _Manifest:
    text = disk.read_whole(folder / MANIFEST, follow=False, limit=_MOST_JSON)
    version = parse(text).get("format")
    step = step_of(folder)
    if version == 1 and isinstance(version, int) and step is not None:
        found = _Manifest(format=1, step=step, files=unseal(text, _Format1, sealed=False).files)
    elif version == FORMAT:
        found = unseal(text, _Manifest)
    else:
        raise Damaged(f"has format {version!r}, but this lowres reads {FORMAT}")
    if step is not None and found.step != step:
        raise Damaged(f"is of step {found.step}")
    for name in found.files:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise Damaged(f"names {name!r}, which cannot be in a checkpoint")
    if STATE not in found.files or not any(name.endswith(TENSORS) for name in found.files):
        raise Damaged("does not list the files of a checkpoint")
    return found


def _check(path: Path, written: _Seal) -> None:
    size, digest = _digest(path)
    if size != written.bytes:
        raise Damaged(f"has {size} bytes instead of {written.bytes}")
    if digest != written.blake2b:
        raise Damaged("does not match its checksum")
    if path.name.endswith(TENSORS):
        with disk.open_regular(path, follow=False) as file:
            read_header(file)


def load_state(folder: Path) -> State:
    """The content of state.json. Raises OSError or Damaged."""
    state = checked(parse(disk.read_whole(folder / STATE, follow=False, limit=_MOST_JSON)), State)
    if step_of(folder) not in (None, state.step):
        raise Damaged(f"is of step {state.step}")
    return state


def load_unit(
    folder: Path, unit: str, tensors: Mapping[str, Tensor], all_used: bool = True, new: str = ""
) -> None:
    """Read a unit's tensors from a checkpoint into `tensors`, in place.

    all_used: require that `tensors` names every tensor of the file. new: tensors whose names end so may be
    missing on either side. If the file is damaged, or a tensor is missing or has another shape or type,
    raises UserError and overwrites nothing.
    """
    path = folder / f"{unit}{TENSORS}"
    try:
        with disk.open_regular(path, follow=False) as file:
            read_into(file, tensors, path, all_used, new)
    except OSError as error:
        raise UserError(
            f"checkpoint {path}: {_reason(error)}; delete its folder and use an older one"
        ) from None
