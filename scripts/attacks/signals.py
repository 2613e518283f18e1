"""Signals at every part of a run, two processes at once, and output that goes nowhere."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attacks.children import Case, run, start
from attacks.kills import BESIDE
from attacks.world import EXACT, Verdict, World, WrongError, at_step, both, no_picture
from lowres import running, trainer
from lowres.checkpoint import saving

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Action = Callable[[], object]


def _at_call(holder: Any, name: str, number: int, action: Action) -> None:
    """Do something in the number-th call of a function."""
    original, calls = getattr(holder, name), 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*arguments, **named)

    setattr(holder, name, called)


def _after_call(holder: Any, name: str, number: int, action: Action) -> None:
    original, calls = getattr(holder, name), 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        found, calls = original(*arguments, **named), calls + 1
        if calls == number:
            action()
        return found

    setattr(holder, name, called)


# what installs an action at a moment, in a child
MOMENTS: dict[str, Callable[[Action], None]] = {
    "in the evaluation before the first step": lambda do: _at_call(running, "evaluate_parts", 1, do),
    "in the first step": lambda do: at_step(0, do)(),
    "in the second step": lambda do: at_step(1, do)(),
    "between two steps": lambda do: _at_call(trainer._Loop, "judge", 4, do),
    "in the step before a save": lambda do: at_step(5, do)(),
    "in an evaluation": lambda do: _at_call(running, "evaluate_parts", 2, do),
    "in the first save": lambda do: _at_call(saving, "write", 1, do),
    "after a save": lambda do: _after_call(running.Run, "save", 2, do),
    "in the last step": lambda do: at_step(11, do)(),
    "in the last evaluation": lambda do: _at_call(running, "evaluate_parts", 3, do),
    "in the last save": lambda do: _at_call(saving, "write", 4, do),
    "after the last save": lambda do: _at_call(trainer, "finish", 1, do),
}
# before the run listens
EARLY: dict[str, Callable[[Action], None]] = {
    "while it decides": lambda do: _at_call(trainer, "begin", 1, do),
    "while it is built": lambda do: _at_call(running.Run, "build", 1, do),
}


def once(world: World, stride: int) -> Iterator[Case]:
    """One signal: exit 0, and the line says how to go on unless the run has finished."""
    cases = [(moment, number) for moment in {**MOMENTS, **EARLY} for number in SIGNALS]
    for moment, number in cases[::stride]:
        keys = (BESIDE,) if moment in ("in the first save", "in the last save") and number == 15 else ()
        action = partial(_signalled, world, moment, number, keys)
        yield f"{number.name} {moment}{' (beside)' if keys else ''}", action


def _raise(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # another thread may get it


def _signalled(world: World, moment: str, number: int, keys: tuple[str, ...]) -> Verdict:
    early = moment in EARLY
    with world.place() as place:
        folder = place / "run"
        install = partial((EARLY if early else MOMENTS)[moment], partial(_raise, number))
        done = run(world.train(folder, *keys), both(no_picture, install))
        finished = (folder / "summary.json").exists()
        if early and done.code in (-number, 128 + number):
            pass  # nothing has begun
        elif done.code != 0 or done.ill():
            raise WrongError(f"exit {done.code}: {done.ill() or done.line}")
        elif not finished and "--resume" not in done.text:
            raise WrongError(f"does not say how to go on: {done.text[-200:]}")
        if wrong := world.finish(folder, world.truth(), *keys):
            raise WrongError(wrong)
    return EXACT, "it finished" if finished else ""


def twice(world: World, stride: int) -> Iterator[Case]:
    """Two signals: the run leaves at once with 128 + the number of the second."""
    for moment in [*MOMENTS][::stride]:
        for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
            action = partial(_signalled_twice, world, moment, first, second)
            yield f"{first.name} and {second.name} {moment}", action


def _signalled_twice(world: World, moment: str, first: int, second: int) -> Verdict:
    def both_signals() -> None:
        _raise(first)
        _raise(second)

    with world.place() as place:
        folder = place / "run"
        done = run(world.train(folder), both(no_picture, partial(MOMENTS[moment], both_signals)))
        if done.code != 128 + second:
            raise WrongError(f"exit {done.code}: {done.ill() or done.line}")
        if wrong := done.ill():
            raise WrongError(wrong)
        if wrong := world.finish(folder, world.truth()):
            raise WrongError(wrong)
    return EXACT, ""


# ---- two processes


def together(world: World) -> Iterator[Case]:
    for name, second in (("the same", False), ("with --resume", True), ("with --restart", None)):
        yield f"a second process, {name}", partial(_second, world, second)


def _second(world: World, resume: bool | None) -> Verdict:
    with world.place() as place:
        folder, gate = place / "run", place / "gate"
        os.mkfifo(gate)

        def hold() -> None:
            with gate.open("rb") as file:
                file.read()

        first = start(world.train(folder), both(no_picture, at_step(5, hold)))
        with gate.open("wb"):  # opens when the first is there, and lets it go on at the end
            more = ["--restart"] if resume is None else []
            other = run(world.train(folder, "run.seed=1", resume=bool(resume), more=more), no_picture)
        done = first.wait()
        if other.code != 2 or other.ill() or f"process {first.pid}" not in other.line:
            raise WrongError(f"the second: exit {other.code}: {other.ill() or other.line}")
        if done.code != 0 or done.ill():
            raise WrongError(f"the first: exit {done.code}: {done.ill() or done.line}")
        if wrong := world.differs(folder, world.truth()):
            raise WrongError(wrong)
    return EXACT, other.line


# ---- output


def _closed(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)


def _to_dead_reader(*descriptors: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in descriptors:
        os.dup2(writing, descriptor)
    os.close(writing)


def _to_full_device(*descriptors: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(full, descriptor)
    os.close(full)


def _to_reader_that_dies(*descriptors: int) -> None:
    """A reader that takes a few lines and ends, as `head` does."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 60)
        os._exit(0)
    os.close(reading)
    for descriptor in descriptors:
        os.dup2(writing, descriptor)
    os.close(writing)


OUTPUTS: dict[str, Callable[..., None]] = {
    "closed": _closed,
    "a pipe without a reader": _to_dead_reader,
    "a pipe whose reader dies": _to_reader_that_dies,
    "/dev/full": _to_full_device,
}


def outputs(world: World) -> Iterator[Case]:
    for name in OUTPUTS:
        for descriptors in ((1,), (2,), (1, 2)):
            streams = " and ".join("stdout" if one == 1 else "stderr" for one in descriptors)
            yield f"{streams}: {name}", partial(_without_output, world, name, descriptors)


def _without_output(world: World, name: str, descriptors: tuple[int, ...]) -> Verdict:
    with world.place() as place:
        folder = Path(place / "run")
        install = partial(OUTPUTS[name], *descriptors)
        # with the progress bar, which writes all the time
        done = run(world.train(folder, "log.progress=true"), both(no_picture, install))
        if done.code != 0 or "Traceback" in done.text:
            raise WrongError(f"exit {done.code}: {done.ill() or done.line}")
        if wrong := world.differs(folder, world.truth()):
            raise WrongError(wrong)
    return EXACT, ""
