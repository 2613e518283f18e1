"""SIGKILL: at random moments, and before every file operation of a run or a preparation."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attacks.children import Case, Done, run, start
from attacks.faults import Faults, count
from attacks.world import EXACT, Verdict, World, WrongError, at_step, both, no_picture
from lowres.checkpoint import saving
from lowres.data import prepare

BESIDE = "train.save_beside=yes"  # a thread writes the checkpoints
OFTEN = "train.checkpoint_every=2"
SHORT = ("train.steps=4", OFTEN, "train.eval_every=2", "train.keep_checkpoints=1")


def at_random(world: World, kills: int, sessions: int, seed: int) -> Iterator[Case]:
    """Runs that are killed and resumed, again and again, until they have been killed so often altogether."""
    keys = (OFTEN,)
    world.truth(*keys)
    began = time.monotonic()
    with world.place() as place:
        run(world.train(place / "run", *keys), no_picture)
    whole = time.monotonic() - began
    for session in range(sessions):
        number = kills // sessions + (session < kills % sessions)
        yield f"{number} kills, session {session}", partial(_session, world, number, whole, seed + session)


def _session(world: World, kills: int, whole: float, seed: int) -> Verdict:
    draw, killed, runs = random.Random(seed), 0, 0
    keys = (OFTEN, BESIDE) if seed % 2 else (OFTEN,)
    truth = world.truth(OFTEN)
    with world.place() as place:
        while killed < kills:
            runs += 1
            folder, finished = place / f"run-{runs}", False
            while killed < kills and not finished:
                child = start(world.again(folder, *keys), no_picture)
                time.sleep(draw.uniform(0, whole))
                child.send(signal.SIGKILL)
                done = child.wait()
                if finished := done.code == 0:
                    continue
                killed += 1
                if done.code != -signal.SIGKILL:
                    raise WrongError(
                        f"seed {seed}, kill {killed}: exit {done.code}: {done.ill() or done.line}"
                    )
            if wrong := world.finish(folder, truth, *keys):
                raise WrongError(f"seed {seed}, after {killed} kills, run {runs}: {wrong}")
    return EXACT, f"{killed} kills in {runs} runs"


def in_slow_saves(world: World) -> Iterator[Case]:
    """A kill while a thread still writes the first checkpoint, or the second, some steps later."""
    for number in (1, 2):
        yield f"in slow save {number}, beside training", partial(_in_slow_save, world, number)


def _in_slow_save(world: World, number: int) -> Verdict:
    inside: Any = saving
    original, saves = saving.write, 0

    def write(*arguments: Any) -> int:
        nonlocal saves
        saves += 1
        if saves == number:
            time.sleep(1000)
        return original(*arguments)

    def slow() -> None:
        inside.write = write

    with world.place() as place:
        folder = place / "run"
        kill = at_step(3 * number + 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        done = run(world.train(folder, BESIDE), both(no_picture, slow, kill))
        if done.code != -signal.SIGKILL:
            raise WrongError(f"was not killed: exit {done.code}: {done.line}")
        if wrong := world.finish(folder, world.truth(), BESIDE):
            raise WrongError(wrong)
    return EXACT, ""


# ---- before every file operation


def _fresh(world: World, place: Path) -> tuple[Path, list[object]]:
    return place / "run", world.train(place / "run", *SHORT)


def _resumed(world: World, place: Path) -> tuple[Path, list[object]]:
    """A resumed run, with a damaged checkpoint, an incomplete line, and remains of an interrupted save."""
    folder = world.copy_of_mid(place)
    damaged = folder / "checkpoints/step_00000006/head.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    shutil.copytree(damaged.parent, damaged.parent.with_name("step_00000009.unfinished"))
    return folder, world.train(folder, resume=True)


def _restarted(world: World, place: Path) -> tuple[Path, list[object]]:
    folder = world.copy_of_mid(place)
    return folder, world.train(folder, *SHORT, more=["--restart"])


RUNS = {"a new run": _fresh, "a resumed run": _resumed, "a restarted run": _restarted}


def _keys(name: str) -> tuple[str, ...]:
    """The settings of a run of RUNS."""
    return () if RUNS[name] is _resumed else SHORT


def at_operations(world: World, name: str, stride: int) -> Iterator[Case]:
    """A kill before every stride-th operation, and one in the middle of every stride-th write."""
    make = RUNS[name]
    world.truth(*_keys(name))
    with world.place() as place:
        folder, command = make(world, place)
        log = place / "operations"
        run(command, both(no_picture, partial(Faults, folder, log=log)))
        operations = count(log)
    for number in range(1, len(operations) + 1, stride):
        text = operations[number - 1]
        yield f"{name}, before {number}: {text}", partial(_one, world, name, number, "kill")
        if text.startswith("write"):
            yield f"{name}, half of {number}: {text}", partial(_one, world, name, number, "torn")


def _one(world: World, name: str, number: int, how: str) -> Verdict:
    make = RUNS[name]
    keys = _keys(name)
    with world.place() as place:
        folder, command = make(world, place)
        done = run(command, both(no_picture, partial(Faults, folder, number, how)))
        if done.code != -signal.SIGKILL:
            raise WrongError(f"was not killed: exit {done.code}: {done.line}")
        again = world.again(folder, *keys)
        if make is _restarted and not (folder / "old-1/checkpoints").exists():
            again = command  # not everything has been moved aside
        done = run(again, no_picture)
        if done.code != 0 or done.ill():
            raise WrongError(f"going on gives exit {done.code}: {done.ill() or done.line}")
        wrong = world.differs(folder, world.truth(*keys))
    if wrong:
        raise WrongError(wrong)
    return EXACT, ""


# ---- preparation


def _prepare(world: World, out: Path) -> None:
    prepare(str(world.corpus), out, vocab_size=300, shard_tokens=20_000, progress=False)


def prepared(world: World, stride: int) -> Iterator[Case]:
    """`data prepare` killed before every stride-th operation, and in the middle of writes."""
    with world.place() as place:
        log = place / "operations"
        run(partial(_prepare, world, place / "data"), partial(Faults, place / "data", log=log))
        operations, expected = count(log), _content(place / "data")
    assert len(expected) > 5
    for number in range(1, len(operations) + 1, stride):
        text = operations[number - 1]
        for how in ("kill", "torn") if text.startswith("write") else ("kill",):
            action = partial(_one_preparation, world, number, how, expected)
            yield f"data prepare, {how} at {number}: {text}", action


def _one_preparation(world: World, number: int, how: str, expected: dict[str, bytes]) -> Verdict:
    with world.place() as place:
        out = place / "data"
        command: Callable[[], None] = partial(_prepare, world, out)
        done = run(command, partial(Faults, out, number, how))
        if done.code != -signal.SIGKILL:
            raise WrongError(f"was not killed: exit {done.code}: {done.line}")
        done = run(command)
        if done.code != 0:
            raise WrongError(f"again: {_short(done)}")
        found = _content(out)
        left = sorted(name for name in found if name.endswith(".unfinished"))
        if {name: text for name, text in found.items() if name not in left} != expected:
            other = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
            raise WrongError(f"other files: {sorted(other)}")
    return EXACT, f"{left} are left" if left else ""


def _short(done: Done) -> str:
    return f"exit {done.code}: {done.ill() or done.line}"


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
