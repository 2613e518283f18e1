"""Run folders that no run has written: other types, pipes, links, impossible names and numbers, other
checkpoints, missing parts.

No command may raise, hang or change anything outside the run folder; and a run that ends well has the right
weights, unless somebody has forged a checkpoint with a valid seal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attacks.children import Case, Done, run
from attacks.world import DETECTED, HARMLESS, Verdict, World, WrongError, no_picture, noticed, verdict
from lowres.cli import main
from lowres.sealed import seal

FORGED = "forged "  # mutations with a valid seal may change the result
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 63, 1 << 200, -(1 << 70), 0.5, 1e308, -0.0),
    *("", "x", "\x1b[2J", "\x00", "../../x", "/etc/passwd", "\ud800", "é" * 300, "9" * 5000),
    *([], {}, [[]], [None], {"": {}}, [1, 2, 3], {"step": {}}, float("nan"), float("inf")),
)
NAMES = (
    *(
        "step_²",
        "step_99999999999999999999",
        "step_0000000\uff16",
        "step_",
        "step_-0000001",
        "step_00000006.x",
    ),
    *(
        "step_00000006 ",
        "step_6",
        "step_000000006",
        "STEP_00000009",
        "step_00000012\n",
        "step_4611686018427387904",
    ),
)
NOT_POSSIBLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
Mutation = Callable[[random.Random, Path, "World"], str]


def cases(world: World, count: int, every: int, seed: int) -> Iterator[Case]:
    """So many mutations. All commands are tried with one of `every`; with the others, those that only look at
    the folder. Twenty mutations make a case."""
    _sentinel(world)
    for start in range(0, count, 20):
        numbers = range(start, min(count, start + 20))
        yield f"mutations {numbers[0]} to {numbers[-1]}", partial(_several, world, numbers, every, seed)


def _several(world: World, numbers: range, every: int, seed: int) -> list[Verdict]:
    return [verdict(partial(_one, world, number, number % every == 0, seed)) for number in numbers]


def _one(world: World, number: int, whole: bool, seed: int) -> Verdict:
    draw = random.Random(f"{seed} {number}")
    known = [*MUTATIONS]
    name = known[number % len(known)]
    with world.place() as place:
        folder = world.copy_of_mid(place)
        outside = Path(shutil.copytree(world.root / "sentinel", place / "outside"))
        text = f"{name}: {MUTATIONS[name](draw, folder, world)}"
        if draw.random() < 0.3:
            second = draw.choice(known)
            # the first may have left nothing for it
            with contextlib.suppress(*NOT_POSSIBLE):
                text += f"; {second}: {MUTATIONS[second](draw, folder, world)}"
        before = contents(outside)  # a mutation may go through a link of another
        try:
            kind, found = (_judge_whole if whole else _judge_look)(world, folder, FORGED in text)
        except WrongError as error:
            raise WrongError(f"{number}: {text}: {error}") from None
        after = contents(outside)
        # in a linked folder of checkpoints, a damaged one is set aside under another name
        aside = {re.sub(r"\.damaged(-\d+)?/", "/", key): value for key, value in after.items()}
        lost = [key for key, value in before.items() if value not in (after.get(key), aside.get(key))]
        if lost:
            raise WrongError(f"{number}: {text}: changed outside of the run's folder: {lost}")
    return kind, f"{number}: {text}: {found}"


def _look_at(folder: Path) -> list[list[object]]:
    return [["checkpoint", "verify", folder], ["checkpoint", "list", folder]]


def _judge_look(world: World, folder: Path, forged: bool) -> Verdict:
    """Commands that only look; the last is refused once everything has been read."""
    commands = [*_look_at(folder), world.train(folder, "run.seed=1", resume=True)]

    def all_of_them() -> None:
        for command in commands:
            print(f"\nexit {main([str(part) for part in command])}")

    done = run(all_of_them, no_picture, patience=40)
    _require_well(done)
    codes = [int(line[5:]) for line in done.out.splitlines() if line.startswith("exit ")]
    told = [line for line in done.err.splitlines() if line.startswith("lowres: ")]
    if len(codes) != len(commands) or not {*codes} <= {0, 1, 2} or len(told) != sum(map(bool, codes)):
        raise WrongError(f"exits {codes} with {told}")
    return (DETECTED if noticed(done) or any(codes[:2]) else HARMLESS), ""


def _judge_whole(world: World, folder: Path, forged: bool) -> Verdict:
    commands = [*_look_at(folder), ["eval", folder], ["sample", folder, "--prompt", "a", "--tokens", 2]]
    found: list[Done] = []
    for command in [*commands, world.train(folder, resume=True)]:
        found.append(run(command, no_picture, patience=40))
        try:
            _require_well(found[-1])
        except WrongError as error:
            raise WrongError(f"{' '.join(map(str, command[:2]))}: {error}") from None
    last = found[-1]
    if last.code == 0 and not forged:
        if wrong := world.differs(folder, world.truth(), metrics=False):
            raise WrongError(f"ends well with {wrong}")
        if (wrong := world.differs(folder, world.truth())) and not noticed(last):
            raise WrongError(f"says nothing, but {wrong}")
    return (DETECTED if last.code or noticed(*found) else HARMLESS), last.line if last.code else ""


def _require_well(done: Done) -> None:
    if wrong := done.ill():
        raise WrongError(wrong)
    if any(ord(character) < 32 and character not in "\n\t\r" for character in done.text):
        raise WrongError("prints control characters")


def _sentinel(world: World) -> None:
    folder = world.root / "sentinel"
    if not folder.exists():
        shutil.copytree(world.mid, folder)
        (folder / "text").write_text("do not touch", "utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- mutations; each returns what it has done


def _json_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/*/*.json"))


def _keys(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    yield path
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield from _keys(value, (*path, key))


def _changed(draw: random.Random, content: Any, drop: bool) -> tuple[Any, str]:
    """A JSON value with one of its values missing or strange."""
    path = draw.choice([*_keys(content)][1:] or [()])
    value = draw.choice(STRANGE)
    if not path:
        return value, repr(value)[:40]
    target = content
    for key in path[:-1]:
        target = target[key]
    if drop:
        del target[path[-1]]
        return content, f"without {path}"
    if draw.random() < 0.1 and isinstance(target, dict):
        target["more"] = value
        return content, f"more = {repr(value)[:40]}"
    target[path[-1]] = value
    return content, f"{path} = {repr(value)[:40]}"


def _rewrite(draw: random.Random, folder: Path, drop: bool) -> str:
    path = draw.choice(_json_files(folder))
    content = json.loads(path.read_bytes())
    if drop or draw.random() < 0.95:
        content, text = _changed(draw, content, drop)
    else:
        content = draw.choice(STRANGE)
        text = repr(content)[:40]
    path.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
    return f"{path.parent.name}/{path.name} {text}"


def other_value(draw: random.Random, folder: Path, world: World) -> str:
    return _rewrite(draw, folder, False)


def missing_key(draw: random.Random, folder: Path, world: World) -> str:
    return _rewrite(draw, folder, True)


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make the manifest right again after files have changed, and change it."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest.pop("seal", None)
    for name in manifest["files"]:
        if (checkpoint / name).is_file():
            content = (checkpoint / name).read_bytes()
            manifest["files"][name] = {
                "bytes": len(content),
                "blake2b": hashlib.blake2b(content).hexdigest(),
            }
    change(manifest)
    path.write_bytes(seal(manifest))


def _newest(folder: Path) -> Path:
    return folder / "checkpoints/step_00000006"


def forged_manifest(draw: random.Random, folder: Path, world: World) -> str:
    name = draw.choice(
        ("../outside/text", "..", "/etc/passwd", "a/b", ".", "", "\x1b[2J", "x" * 300, "manifest.json")
    )
    entry = {"bytes": 12, "blake2b": "0" * 128}
    kind = draw.randrange(4)
    what = draw.choice(STRANGE)

    def change(manifest: dict[str, Any]) -> None:
        if kind == 0:
            manifest["files"][name] = entry
        elif kind == 1:
            manifest["format"] = what
        elif kind == 2:
            manifest["step"] = what
        else:
            manifest["files"] = what

    try:
        reseal(_newest(folder), change)
    except (UnicodeEncodeError, ValueError):
        return "nothing"
    return f"{FORGED}{('name ' + repr(name)[:30], 'format', 'step', 'files')[kind]} {repr(what)[:30]}"


def forged_state(draw: random.Random, folder: Path, world: World) -> str:
    path = _newest(folder) / "state.json"
    content, text = _changed(draw, json.loads(path.read_bytes()), draw.random() < 0.2)
    path.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
    reseal(_newest(folder))
    return f"{FORGED}state {text}"


def forged_tensors(draw: random.Random, folder: Path, world: World) -> str:
    """Headers of safetensors files: offsets that overlap or are impossible, other shapes and names."""
    path = draw.choice(sorted(_newest(folder).glob("*.safetensors")))
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if draw.random() < 0.15:
        size = draw.choice((0, 1, 7, 1 << 32, (1 << 63) + 5, length + 1, length - 1, 100_000_001))
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        text = f"a header of {size} bytes"
    else:
        header, text = _changed(draw, header, draw.random() < 0.15)
        if draw.random() < 0.3 and isinstance(header, dict):
            name = draw.choice([key for key in header if key != "__metadata__"] or ["x"])
            offsets = [draw.choice((-8, 0, 4, 1 << 62, 1 << 64)), draw.choice((0, 8, -4, 1 << 62))]
            if isinstance(header.get(name), dict):
                header[name]["data_offsets"] = offsets
                text += f"; {name} at {offsets}"
        new = json.dumps(header).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    reseal(_newest(folder))
    return f"{FORGED}{path.name} {text}"


def foreign_checkpoint(draw: random.Random, folder: Path, world: World) -> str:
    """A checkpoint under the name of another step, alone or with its step in the manifest changed."""
    old, new = (
        folder / "checkpoints/step_00000003",
        folder / f"checkpoints/step_{draw.choice((9, 12, 99)):08d}",
    )
    shutil.copytree(old, new)
    if draw.random() < 0.5:
        return f"step 3 as {new.name}"
    reseal(new, lambda manifest: manifest.update(step=int(new.name[5:])))
    return f"{FORGED}step 3 as {new.name}"


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name != "checkpoints")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def deleted(draw: random.Random, folder: Path, world: World) -> str:
    paths = _paths(folder)
    gone = draw.sample(paths, draw.choice((1, 1, 1, 2, 3, len(paths) // 2)))
    for path in gone:
        if os.path.lexists(path):
            _remove(path)
    return f"{[str(path.relative_to(folder)) for path in gone[:4]]} of {len(gone)}"


def replaced(draw: random.Random, folder: Path, world: World) -> str:
    """A file or folder becomes something else."""
    path = draw.choice([*_paths(folder), folder / "checkpoints"])
    name, outside = path.relative_to(folder), folder.parent / "outside"
    if not os.path.lexists(path):
        return "nothing"
    same = outside / name
    kind = draw.choice(
        ("folder", "pipe", "empty", "link", "link to the same", "broken link", "loop", "device", "long")
    )
    _remove(path)
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("x", "utf-8")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "link":
        path.symlink_to(outside / "text")
    elif kind == "link to the same" and same.exists():
        path.symlink_to(same)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to(draw.choice(("/dev/zero", "/dev/full", "/dev/null")))
    elif kind == "long":
        path.write_bytes(
            draw.choice((b"[" * 200_000, b"\xff" * 5000, b"9" * 100_000, b"\n" * 3000, b'{"a":' * 9999))
        )
    else:
        path.symlink_to("nowhere")
    return f"{name} is now: {kind}"


def names(draw: random.Random, folder: Path, world: World) -> str:
    """Folders, files and links with names like those of checkpoints."""
    name, old = draw.choice(NAMES), folder / "checkpoints/step_00000003"
    path = folder / "checkpoints" / name
    kind = draw.choice(("copy", "empty", "file", "link", "rename"))
    if os.path.lexists(path):
        return "nothing"
    if kind == "copy":
        shutil.copytree(old, path)
    elif kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("x", "utf-8")
    elif kind == "link":
        path.symlink_to(folder.parent / "outside/checkpoints/step_00000003")
    elif old.exists():
        old.rename(path)
    return f"{name!r}: {kind}"


def lines(draw: random.Random, folder: Path, world: World) -> str:
    """metrics.jsonl, events.jsonl and config.toml with strange lines."""
    path = folder / draw.choice(("metrics.jsonl", "events.jsonl", "config.toml"))
    if not path.is_file() or path.is_symlink():
        return "nothing"
    found = path.read_bytes().splitlines(keepends=True)
    at = draw.randrange(len(found) + 1)
    strange = draw.choice(
        (
            *(b"\xff\n", b"{}\n", b"[1]\n", b"null\n", b'{"step": 1e999}\n', b'{"step": true, "loss": 1}\n'),
            *(
                b'{"step": 99999999999999999999, "loss": 1, "tokens": 1}\n',
                b"[" * 100_000 + b"\n",
                b"\n",
                b"\x00" * 50,
            ),
            *(
                b'{"step": "x", "event": "saved"}\n',
                b'{"step": -5, "val_loss": 1}\n',
                b'{"step": 4, "val_loss": "a"}\n',
            ),
            *(
                b'{"step": 2, "loss": {}, "tokens": 1}\n',
                b"x = [\n",
                b"[run]\nname = 3\n",
                b"\r\n",
                b"\xef\xbb\xbf\n",
            ),
        )
    )
    path.write_bytes(b"".join([*found[:at], strange, *found[at:]]))
    return f"{path.name}, line {at}: {strange[:40]!r}"


def remains(draw: random.Random, folder: Path, world: World) -> str:
    """What interrupted saves leave, but as links to elsewhere or of the wrong kind."""
    suffix = draw.choice((".unfinished", ".deleted", ".damaged", ".damaged-2"))
    path = folder / f"checkpoints/step_{draw.choice((3, 6, 9, 12)):08d}{suffix}"
    kind = draw.choice(("link", "file", "folder", "pipe"))
    if not path.parent.is_dir() or path.parent.is_symlink():
        return "nothing"
    if kind == "link":
        path.symlink_to(folder.parent / "outside/checkpoints/step_00000003")
    elif kind == "file":
        path.write_text("x", "utf-8")
    elif kind == "folder":
        path.mkdir()
        (path / "link").symlink_to(folder.parent / "outside")
    else:
        os.mkfifo(path)
    return f"{path.name}: {kind}"


def linked(draw: random.Random, folder: Path, world: World) -> str:
    """A checkpoint, or all of them, is a link to those of another run."""
    whole = draw.random() < 0.4
    name = Path(
        "checkpoints" if whole else draw.choice(("checkpoints/step_00000003", "checkpoints/step_00000006"))
    )
    path = folder / name
    if not os.path.lexists(path):
        return "nothing"
    _remove(path)
    path.symlink_to(folder.parent / "outside" / name)
    return str(name)


MUTATIONS: dict[str, Mutation] = {
    one.__name__: one
    for one in (
        *(other_value, missing_key, forged_manifest, forged_state, forged_tensors, foreign_checkpoint),
        *(deleted, replaced, names, lines, remains, linked),
    )
}
