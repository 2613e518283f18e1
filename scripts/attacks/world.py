"""A tiny model with its data, what undisturbed runs of it give, and whether a disturbed run is exact.

Exact: the tensors of the last checkpoint are those of the undisturbed run bit for bit, and metrics.jsonl has
every step and every evaluation once, with the same losses.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.children import Done, run
from lowres import checkpoint, summary, trainer

MODULES = ("csv", "bdb", "calendar")
STEPS, SAVED_EVERY = 12, 3
CONFIG = """
[run]
name = "torture"
device = "cpu"
rescue = "{root}/rescue"

[model]
dim = 32
n_layers = 2
n_heads = 2
n_kv_heads = 2
ffn_dim = 64

[data]
source = "{root}/data"
seq_len = 32

[optim]
name = "apollo-mini"
lr = 0.01

[train]
steps = 12
batch_tokens = 128
micro_batch = 2
eval_every = 6
eval_tokens = 256
checkpoint_every = 3
keep_checkpoints = 2

[memory]
weights = "int8"

[log]
progress = false
"""
EXACT, DETECTED, HARMLESS, FAILED = "exact", "detected", "without effect", "FAILED"
Verdict = tuple[str, str]  # one of the four, and details
# what a command prints about damage that it has seen
_NOTICED = (
    "damaged",
    "does not match its",
    "is truncated",
    "cannot be read",
    "missing",
    "set aside",
    "was changed",
)


class WrongError(Exception):
    """What is wrong, as found by a case."""


def verdict(case: Callable[[], Any]) -> Any:
    """What a case gives, or the verdict that it failed."""
    try:
        return case()
    except WrongError as error:
        return FAILED, str(error)


@dataclass(frozen=True)
class Truth:
    """What an undisturbed run gives: bytes of the files with tensors, and the losses in metrics.jsonl."""

    tensors: dict[str, bytes]
    losses: list[tuple[int, str, float]]


def losses_in(folder: Path) -> list[tuple[int, str, float]]:
    """(step, "loss" or "val_loss", value) of every line that can be read, in order."""
    found = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                found += [(record["step"], key, record[key]) for key in ("loss", "val_loss") if key in record]
    return found


def tensors_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class World:
    """Everything below one temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root, self._number = root, itertools.count()
        self._truths: dict[tuple[str, ...], Truth] = {}
        self.corpus, self.data, self.config = root / "corpus", root / "data", root / "tiny.toml"
        self.rescue, self.mid = root / "rescue", root / "mid"
        self.corpus.mkdir(parents=True)
        for module in MODULES:
            shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{module}.py", self.corpus)
        self.config.write_text(CONFIG.format(root=root), "utf-8")
        self._must("data", "prepare", self.corpus, self.data, "--vocab-size", 300)
        # in this process, so that its children have imported and traced everything
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
            from lowres.cli import main

            with contextlib.redirect_stderr(nothing):
                first = root / "first"
                assert main(list(map(str, self.train(first)))) == 0
                assert main(["eval", str(first)]) == main(["sample", str(first), "--prompt", "a"]) == 0
        shutil.rmtree(first)
        self.truth()
        self._make_mid()

    def _must(self, *command: object) -> Done:
        done = run(command)
        assert done.code == 0 and not done.ill(), f"{command}: exit {done.code}\n{done.text}"
        return done

    def train(
        self, folder: Path, *keys: str, resume: bool = False, more: Sequence[object] = ()
    ) -> list[object]:
        """The command that trains into a folder."""
        sets = [part for key in keys for part in ("--set", key)]
        return ["train", self.config, "--run", folder, *sets, *(["--resume"] if resume else []), *more]

    def again(self, folder: Path, *keys: str) -> list[object]:
        """The command that goes on, as the Makefile decides it."""
        return self.train(folder, *keys, resume=(folder / "config.toml").exists())

    def truth(self, *keys: str) -> Truth:
        """What an undisturbed run with other settings gives. A child should only ask for what its parent
        knows."""
        if keys not in self._truths:
            folder = self.root / f"straight-{len(self._truths)}"
            self._must(*self.train(folder, *keys))
            last = checkpoint.find(folder / "checkpoints")[-1]
            self._truths[keys] = Truth(tensors_in(last), losses_in(folder))
            assert len(self._truths[keys].tensors) == 4
        return self._truths[keys]

    def _make_mid(self) -> None:
        """A run that was killed in step 8 of 12: checkpoints 3 and 6."""
        done = run(self.train(self.mid), at_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        assert done.code == -signal.SIGKILL, done.text
        assert [p.name[-2:] for p in checkpoint.find(self.mid / "checkpoints")] == ["03", "06"]

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """A new folder. It stays if what is done in it raises."""
        folder = self.root / "cases" / f"{os.getpid()}-{next(self._number)}"
        folder.mkdir(parents=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def copy_of_mid(self, place: Path) -> Path:
        return Path(shutil.copytree(self.mid, place / "run"))

    def differs(self, folder: Path, truth: Truth, metrics: bool = True) -> str:
        """Why a finished run is not exact; "" if it is."""
        found = checkpoint.find(folder / "checkpoints")
        if not found:
            return "there is no checkpoint"
        tensors = tensors_in(found[-1])
        if tensors.keys() != truth.tensors.keys():
            return f"{found[-1].name} has the files {sorted(tensors)}"
        wrong = [name for name, content in tensors.items() if content != truth.tensors[name]]
        if wrong:
            return f"{found[-1].name}: other tensors in {', '.join(wrong)}"
        if problems := checkpoint.verify(found[-1]):
            return f"{found[-1].name}: {problems[0]}"
        losses = losses_in(folder)
        if metrics and losses != truth.losses:
            other = [one for one in [*losses, *truth.losses] if losses.count(one) != truth.losses.count(one)]
            return f"metrics.jsonl differs at {other[:3] or 'the order'}"
        return ""

    def finish(
        self, folder: Path, truth: Truth, *keys: str, metrics: bool = True, resume: bool = False
    ) -> str:
        """Go on until the end; why the result is not exact, or "". resume: with --resume in any case."""
        command = self.train(folder, *keys, resume=True) if resume else self.again(folder, *keys)
        done = run(command, no_picture)
        if done.code != 0 or done.ill():
            return f"going on gives exit {done.code}: {done.ill() or done.line}"
        return self.differs(folder, truth, metrics)

    def move_rescued(self, text: str, folder: Path) -> str:
        """Do what a message says about a checkpoint that was saved elsewhere; what is wrong with that."""
        found = re.search(r"is saved in (\S+): move this folder into (\S+)/ and", text)
        if not found:
            return ""
        saved, target = Path(found[1]), Path(found[2])
        if not saved.is_dir() or target != folder / "checkpoints":
            return f"the message names {saved} and {target}"
        target.mkdir(parents=True, exist_ok=True)
        place = target / saved.name
        if place.exists():  # the disk let it be finished, and then failed
            return "; ".join(checkpoint.verify(place))
        shutil.move(saved, place)
        return ""


def noticed(*done: Done) -> bool:
    """Whether one of the commands said that something is damaged or missing."""
    return any(word in one.text for one in done for word in _NOTICED)


def at_step(step: int, action: Callable[[], object]) -> Callable[[], None]:
    """For a child: do something before the update after `step` completed ones."""

    def install() -> None:
        loop: Any = trainer._Loop
        original = loop.take_step

        def take_step(self: Any, *more: Any) -> Any:
            if self.step == step:
                action()
            return original(self, *more)

        loop.take_step = take_step

    return install


def both(*actions: Callable[[], object]) -> Callable[[], None]:
    """Several actions, one after the other."""

    def install() -> None:
        for action in actions:
            action()

    return install


def no_picture() -> None:
    """For a child: leave out the picture of the loss, which takes most of its time."""
    summary.draw_loss = lambda folder: None  # type: ignore[assignment]
