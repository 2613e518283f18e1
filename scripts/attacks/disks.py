"""Disks that are full, or report errors, from any write on."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attacks.children import Case, Done, run
from attacks.faults import TAKE_ROOM, Faults, count
from attacks.kills import BESIDE, SHORT
from attacks.world import DETECTED, EXACT, Verdict, World, WrongError, at_step
from lowres import disk

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
SIZES = (100, 1_000, 2_000, 5_000, 20_000, 40_000)


def failing(
    world: World, name: str, stride: int, lasting: bool = True, beside: bool = False
) -> Iterator[Case]:
    """An error at every stride-th operation that it may meet; lasting: at all later ones too."""
    keys = (*SHORT, BESIDE) if beside else SHORT
    kinds = TAKE_ROOM if name == "ENOSPC" else ()
    world.truth(*SHORT)
    with world.place() as place:
        log = place / "operations"
        run(world.train(place / "run", *keys), partial(Faults, place / "run", kinds=kinds, log=log))
        operations = count(log)
    how = "from" if lasting else "once at"
    for number in range(1, len(operations) + 1, stride):
        retried = not lasting and _is_of_a_save(operations[number - 1])
        action = partial(_one, world, name, number, kinds, lasting, keys, retried)
        yield f"{name} {how} {number}{' beside' * beside}: {operations[number - 1]}", action


def _is_of_a_save(operation: str) -> bool:
    """Whether an operation writes a checkpoint or a record, so that it must be tried again."""
    ends = (".safetensors", " state.json", " manifest.json", " tokenizer.model", " checkpoints")
    return operation.endswith(ends) or operation == "write metrics.jsonl" or " step_" in operation


def _one(
    world: World,
    name: str,
    number: int,
    kinds: tuple[str, ...],
    lasting: bool,
    keys: tuple[str, ...],
    retried: bool,
) -> Verdict:
    error = ERRORS[name]
    with world.place() as place:
        folder = place / "run"
        own = (*keys, f"run.rescue={place}/rescue")
        fault = partial(Faults, folder, number, error, lasting, kinds)
        return judged(world, run(world.train(folder, *own), fault), folder, error, own, retried)


def judged(
    world: World, done: Done, folder: Path, error: int, keys: tuple[str, ...], must_retry: bool = False
) -> Verdict:
    """The verdict on a run that met an error: it went on and is exact; or it ended with one line that names a
    file and the remedy, and is exact after making room and doing what the line says."""
    truth = world.truth(*SHORT)
    if wrong := done.ill():
        raise WrongError(wrong)
    if done.code == 0:
        wrong = world.differs(folder, truth)
        if wrong:
            raise WrongError(f"exit 0, but {wrong}")
        return EXACT, ""
    if done.code != 2:
        raise WrongError(f"exit {done.code}: {done.line}")
    if must_retry:
        raise WrongError(f"is not tried again: {done.line}")
    if not re.search(rf"{re.escape(str(folder))}\S*", done.line):
        raise WrongError(f"names no file: {done.line}")
    remedy = disk.remedy(OSError(error, ""))
    if remedy not in done.line:
        raise WrongError(f"another remedy than {remedy!r}: {done.line}")
    if wrong := world.move_rescued(done.line, folder):
        raise WrongError(f"{wrong}: {done.line}")
    wrong = world.finish(folder, truth, *keys)
    if wrong:
        raise WrongError(f"{wrong}; after {done.line}")
    return DETECTED, ""


def full_everywhere(world: World, stride: int) -> Iterator[Case]:
    """The disk of the rescue folder is full as well."""
    world.truth(*SHORT)
    for number in range(1, 80, stride):
        yield f"ENOSPC everywhere from {number}", partial(_everywhere, world, number)


def _everywhere(world: World, number: int) -> Verdict:
    with world.place() as place:
        folder, own = place / "run", (*SHORT, f"run.rescue={place}/rescue")
        fault = partial(Faults, place, number, errno.ENOSPC, True, TAKE_ROOM)
        return judged(world, run(world.train(folder, *own), fault), folder, errno.ENOSPC, own)


def limited(world: World, stride: int) -> Iterator[Case]:
    """A real limit of the system on the size of files."""
    world.truth(*SHORT)
    for size in SIZES[::stride]:
        yield f"files of at most {size} bytes", partial(_limited, world, size)


def _limited(world: World, size: int) -> Verdict:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it from its start
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        # what the child prints may be longer
        for descriptor in (1, 2):
            os.dup2(pipes[descriptor], descriptor)

    with world.place() as place:
        folder, own = place / "run", (*SHORT, f"run.rescue={place}/rescue")
        pipes = {}
        ends = []
        for descriptor in (1, 2):
            reading, pipes[descriptor] = os.pipe()
            ends.append(reading)
        done = run(world.train(folder, *own), limit)
        texts = []
        for descriptor, reading in zip((1, 2), ends, strict=True):
            os.close(pipes[descriptor])
            with os.fdopen(reading, "rb") as file:
                texts.append(file.read().decode())
        return judged(world, Done(done.code, *texts), folder, errno.EFBIG, own)


# ---- folders that go away


def folders(world: World) -> Iterator[Case]:
    for name in GONE:
        yield f"the folder is {name} in the middle", partial(_gone, world, name)


def _gone(world: World, name: str) -> Verdict:
    world.truth()
    with world.place() as place:
        folder, own = place / "run", (f"run.rescue={place}/rescue",)
        done = run(world.train(folder, *own), at_step(4, partial(GONE[name], folder)))
        if wrong := done.ill():
            raise WrongError(wrong)
        if done.code != 2:
            raise WrongError(f"exit {done.code}: {done.line}")
        if str(folder) not in done.line:
            raise WrongError(f"names no folder: {done.line}")
        if wrong := world.move_rescued(done.line, folder):
            raise WrongError(f"{wrong}: {done.line}")
        if found := re.search(r"to go on: lowres train (\S+) --resume", done.line):
            folder = Path(found[1])
        # the records of a folder that was deleted are gone, which the run says
        wrong = world.finish(folder, world.truth(), *own, metrics=name != "deleted", resume=True)
        if wrong:
            raise WrongError(f"{wrong}; after {done.line}")
        return DETECTED, done.line[:200]


def _deleted(folder: Path) -> None:
    shutil.rmtree(folder)


def _moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def _replaced(folder: Path) -> None:
    _moved(folder)
    folder.mkdir()


def _read_only(folder: Path) -> None:
    Faults(folder, 1, errno.EROFS, lasting=True)


GONE: dict[str, Callable[[Path], None]] = {
    "deleted": _deleted,
    "moved": _moved,
    "replaced by an empty one": _replaced,
    "made read-only": _read_only,
}
