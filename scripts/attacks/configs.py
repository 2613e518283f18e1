"""Settings at random, for new runs and for runs that are resumed with changed keys."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from attacks.children import Case, Done, run
from attacks.world import DETECTED, EXACT, HARMLESS, Verdict, World, WrongError, no_picture, verdict
from lowres import cli, terminal
from lowres.config import Config
from lowres.config_file import load_config
from lowres.start import decide

NUMBERS = (*range(-1, 9), 16, 31, 64, 100, 1000, 4096, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30)
REALS = ("0.0", "-0.0", "-1.5", "1e-300", "0.5", "0.9", "1.0", "1.5", "1e30", "1e308", "nan", "inf", "-inf")
TEXTS = (
    '""',
    '"x"',
    '"auto"',
    '"\\u0000"',
    '"\\u001b[2J"',
    "é",
    "a b",
    "../x",
    "/",
    "9" * 40,
    "x" * 5000,
    "=",
    "[",
)
OTHERS = ("true", "false", "[]", "[1, 2]", "[0.9, 0.999]", "{}", "{a = 1}", "1979-05-27", "null", "none")
PLACES = ('"."', '"/nonexistent/x"', '"/dev/zero"', '"/dev/null"', '"hf:"', '"hf:x"', '"stdlib "', '"~"')
# settings of the test itself, and those that would ask for a network
FIXED = ("data.cache", "run.rescue", "run.device")


def fields() -> list[tuple[str, Any]]:
    """Name and field of every key."""
    return [
        (f"{section}.{key}", field)
        for section, part in Config.model_fields.items()
        for key, field in part.annotation.model_fields.items()  # type: ignore[union-attr]
        if f"{section}.{key}" not in FIXED
    ]


def _words(annotation: Any) -> list[str]:
    """The words that a type allows."""
    if get_origin(annotation) is Literal:
        return [json.dumps(value) for value in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _words(part)]


def settings(draw: random.Random, most: int) -> list[str]:
    """A few keys with values that are often possible and sometimes not."""
    found = []
    for name, field in draw.sample(fields(), draw.randint(1, most)):
        pools: list[Any] = [_words(field.annotation)] * 4 + [NUMBERS] * 3 + [REALS, TEXTS, OTHERS]
        if name.startswith(("data.", "run.")):
            pools += [PLACES]
        found.append(f"{name}={draw.choice(draw.choice([pool for pool in pools if pool]))}")
    if draw.random() < 0.05:
        found.append(
            draw.choice(
                ("x", "x.y=1", "=", "train=3", "train.=1", ".x=1", "train.steps", "model.\x00=1", "a.b.c=1")
            )
        )
    return found


def cases(world: World, count: int, seed: int) -> Iterator[Case]:
    """So many settings, ten in a case; a third of them for a run that is resumed."""
    for start in range(0, count, 10):
        numbers = range(start, min(count, start + 10))
        yield f"settings {numbers[0]} to {numbers[-1]}", partial(_several, world, numbers, seed)


def _several(world: World, numbers: range, seed: int) -> list[Verdict]:
    return [verdict(partial(_one, world, random.Random(f"{seed} {number}"), number)) for number in numbers]


def _one(world: World, draw: random.Random, number: int) -> Verdict:
    resume = number % 3 == 0
    sets = settings(draw, 2 if resume else 4)
    with world.place() as place:
        if resume:
            folder = world.copy_of_mid(place)
            before = _content(folder)
            done = run(partial(_decide, world, sets, folder, True), patience=60)
            if _content(folder) != before:
                raise WrongError(f"{sets}: a decision changed the folder")
            if done.code == 0 and number % 9 == 0 and _is_small(sets):
                done = run(world.train(folder, *sets, resume=True), no_picture, patience=60)
        else:
            folder = place / "run"
            done = run(partial(_decide, world, sets, folder, False), patience=60)
            if done.code == 0 and number % 9 == 1 and _is_small(sets):
                done = run(world.train(folder, "train.steps=3", *sets), no_picture, patience=60)
    return _judge(done, f"{'resumed with ' if resume else ''}{sets}")


def _judge(done: Done, text: str) -> Verdict:
    if wrong := done.ill():
        raise WrongError(f"{text}: {wrong}")
    if done.code not in (0, 1, 2, 3):
        raise WrongError(f"{text}: exit {done.code}")
    if any(ord(character) < 32 and character not in "\n\t\r" for character in done.text):
        raise WrongError(f"{text}: prints control characters")
    if done.code == 0:
        return HARMLESS, text
    return DETECTED, done.line


def _decide(world: World, sets: list[str], folder: Path, resume: bool) -> int:
    """Everything that a run decides before it is built, with the errors of the command line."""

    def work() -> None:
        decide(load_config(world.config, sets)[0], folder, resume)

    with terminal.guard():
        return cli.explained(work)


def _is_small(sets: list[str]) -> bool:
    """Whether a run with these settings takes a moment."""
    big = ("model.", "train.steps", "train.tokens", "train.batch", "data.seq", "train.eval", "log.sample")
    return not any(one.startswith(big) for one in sets)


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- keys that change nothing in the result


NEUTRAL = (
    *("train.save_beside=yes", "train.checkpoint_every=2", "train.keep_checkpoints=0", "train.keep_every=3"),
    *("train.keep_best=true", "health.spikes=off", "health.patience=7", "run.name=other"),
    *("memory.stash_on=host", "train.checkpoint_minutes=0.001", "log.progress=true"),
)


def neutral(world: World) -> Iterator[Case]:
    """Keys that may change on resume and change nothing in the result."""
    for key in NEUTRAL:
        yield f"resumed with {key}", partial(_neutral, world, key)


def _neutral(world: World, key: str) -> Verdict:
    with world.place() as place:
        folder = world.copy_of_mid(place)
        wrong = world.finish(folder, world.truth(), key)
    if wrong:
        raise WrongError(wrong)
    return EXACT, ""
