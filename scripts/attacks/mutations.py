"""Bits that flip and files that end early, in the folder of a run and in prepared data."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from attacks.children import Case, Done, run
from attacks.world import DETECTED, HARMLESS, Verdict, World, WrongError, no_picture, noticed


def flips(world: World, count: int, seed: int) -> Iterator[Case]:
    """So many damaged files, each file equally often."""
    draw = random.Random(seed)
    known = _answers(world, world.mid)
    older = _answers(world, _older(world))
    files = [("run", path.relative_to(world.mid)) for path in _files(world.mid)]
    files += [("data", path.relative_to(world.data)) for path in _files(world.data)]
    order: list[tuple[str, Path]] = []
    for number in range(count):
        if not order:
            order = draw.sample(files, len(files))
        where, name = order.pop()
        how = "cut" if number % 5 == 4 else "flip"
        if number == 0:  # still a record
            where, name, how = "run", Path("metrics.jsonl"), "digit"
        yield f"{how} {where}/{name}", partial(_one, world, where, name, how, seed + number, [known, older])


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _older(world: World) -> Path:
    """The run in the middle without its newest checkpoint."""
    folder = world.root / "older"
    if not folder.exists():
        shutil.copytree(world.mid, folder)
        shutil.rmtree(folder / "checkpoints/step_00000006")
    return folder


def _use(folder: Path, data: Path) -> list[list[object]]:
    """The commands that use a run; the data are given because the run knows where they were."""
    return [
        ["eval", folder, "--data", data, "--json"],
        ["sample", folder, "--prompt", "def ", "--tokens", 8],
    ]


def _answers(world: World, folder: Path) -> list[str]:
    return [world._must(*command).out for command in _use(folder, world.data)]


def damage(path: Path, how: str, draw: random.Random) -> str:
    """Flip one bit of a file, one of a loss, or cut it; returns what was done."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        size = draw.choice((0, 1, len(content) // 2, len(content) - 1, draw.randrange(len(content))))
        path.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    if how == "digit":
        at = content.index(b'"loss": ') + len('"loss": ')
        content[at] ^= 1
        path.write_bytes(content)
        return "a digit of the first loss"
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at}"


def _one(world: World, where: str, name: Path, how: str, seed: int, answers: list[list[str]]) -> Verdict:
    with world.place() as place:
        folder, data = world.copy_of_mid(place), Path(shutil.copytree(world.data, place / "data"))
        path = (folder if where == "run" else data) / name
        before = path.read_bytes()
        done = damage(path, how, random.Random(seed))
        text = _judge(world, folder, data, path, before, answers, name.parts[0] == "checkpoints")
    return (text[0], f"{done}: {text[1]}")


def _judge(
    world: World,
    folder: Path,
    data: Path,
    path: Path,
    before: bytes,
    answers: list[list[str]],
    of_checkpoint: bool,
) -> Verdict:
    found: list[Done] = [run(["checkpoint", "verify", folder])]
    if wrong := found[0].ill():
        raise WrongError(f"verify: {wrong}")
    if of_checkpoint != (found[0].code == 1) and not _same_json(path, before):
        raise WrongError(f"verify gives exit {found[0].code}")
    for number, command in enumerate(_use(folder, data)):
        done = run(command)
        found.append(done)
        if wrong := done.ill():
            raise WrongError(f"{command[0]}: {wrong}")
        allowed = {answers[0][number]} | ({answers[1][number]} if noticed(done) else set())
        if done.code == 0 and done.out.splitlines()[-1] not in {one.splitlines()[-1] for one in allowed}:
            raise WrongError(f"{command[0]} gives another result: {done.out!r}")
    keys = (f"data.source={data}",)
    done = run(world.train(folder, *keys, resume=True), no_picture)
    found.append(done)
    if wrong := done.ill():
        raise WrongError(f"train: {wrong}")
    if done.code == 0:
        if wrong := world.differs(folder, world.truth()):
            # records that cannot be read are lost, and changed ones stay, but the run says so
            only = not world.differs(folder, world.truth(), metrics=False)
            if not (only and path.name == "metrics.jsonl" and noticed(done)):
                raise WrongError(f"silently different: {wrong}")
        return (DETECTED if noticed(*found) else HARMLESS), ""
    if done.code not in (1, 2):
        raise WrongError(f"exit {done.code}: {done.line}")
    path.write_bytes(before)
    if wrong := world.finish(folder, world.truth(), *keys):
        raise WrongError(f"after putting {path.name} back: {wrong}; it was refused with {done.line}")
    return DETECTED, done.line


def _same_json(path: Path, before: bytes) -> bool:
    """Whether a file of JSON says what it said, in other white space."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(before))
    except ValueError:
        return False
