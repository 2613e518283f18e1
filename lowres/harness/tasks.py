"""Which tasks, their scores, and what can be wrong with them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lowres.config import Config
from lowres.data import Tokenizer
from lowres.engine import Engine
from lowres.errors import UserError, first_line
from lowres.scores import TASK
from lowres.wording import counted

if TYPE_CHECKING:
    from lowres.harness.model import RunModel

PACKAGE = "lm_eval>=0.4.12"
# continuations that are written together, if there is memory
TEXTS = 8
# of samples from which the standard error of a perplexity is estimated; that of an accuracy needs none
_BOOTSTRAPS = 1000

Tasks = dict[str, Any]  # what `lm_eval` makes of names, with their data


class Keys(NamedTuple):
    """How the user names tasks, and a folder with more of them."""

    tasks: str
    folder: str


OPTIONS = Keys("--tasks", "--include-path")
SETTINGS = Keys("train.eval_tasks", "train.eval_tasks_folder")


@dataclass(frozen=True)
class Scores:
    """found: what `lm_eval` found. shortened: number of requests whose beginning was left out, because they
    are longer than `context` tokens."""

    found: dict[str, Any]
    shortened: int
    context: int

    def as_dict(self) -> dict[str, Any]:
        """The parts of lm_eval's own results, under its names."""
        parts = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
        return {part: self.found[part] for part in parts if self.found.get(part)}

    def numbers(self) -> dict[str, float]:
        """For the metrics: task/<task>/<metric>, and the same with _stderr where lm_eval knows its standard
        error. A group that has scores of its own stands for its tasks."""
        subtasks, groups = self.found.get("group_subtasks", {}), list(self.found.get("groups", {}))
        inside, found = set[str](), dict[str, float]()
        while groups:
            below = subtasks.get(groups.pop(), [])
            groups += [name for name in below if name not in inside]
            inside |= set(below)
        for task, values in self.found["results"].items():
            for key, value in values.items():
                metric, comma, kind = key.partition(",")
                if task not in inside and comma and isinstance(value, int | float):
                    found[f"{TASK}{task}/{metric if kind == 'none' else key}"] = float(value)
        return found

    def note(self) -> str:
        """On the requests that were too long."""
        return (
            f"{counted(self.shortened, 'request is', 'requests are')} longer than the context of the model, "
            f"which saw their last {self.context:,} tokens"
        )

    def table(self) -> str:
        from lm_eval.utils import make_table

        tables = [make_table(self.found)]
        if self.found.get("groups"):
            tables.append(make_table(self.found, "groups"))
        return "\n".join(table.strip("\n") for table in tables)


def load_tasks(names: Sequence[str], include: Path | None, keys: Keys = OPTIONS) -> Tasks:
    """Tasks, groups, tags or YAML files by their names. include: a folder with more of them. Raises UserError
    if one of them is unknown or wrong, or lacks its data or a package."""
    with _naming(keys):
        return _loaded(names, include, keys)


def _loaded(names: Sequence[str], include: Path | None, keys: Keys) -> Tasks:
    try:
        from lm_eval.tasks.manager import TaskManager
    except ImportError:
        raise UserError(f"--tasks: needs the package lm_eval: pip install '{PACKAGE}'") from None
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    if include is not None and not include.is_dir():
        raise UserError(f"{keys.folder}: {include} is not a folder")
    with _to_stderr():
        # as lm_eval's own command does, for tasks that shuffle
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        manager = _manager(TaskManager, names, include)
        for name in names:
            if name not in manager.all_tasks and not Path(name).is_file():
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                hint = f"; near it: {', '.join(near)}" if near else f"; {keys.folder} adds a folder of tasks"
                raise UserError(f"--tasks: {name!r} is neither a task, group or tag nor a YAML file{hint}")
        try:
            return dict(manager.load(list(names)))
        except Exception as error:
            raise _fault(error) from None


def _manager(make: Callable[..., Any], names: Sequence[str], include: Path | None) -> Any:
    """The index of tasks; only of those in the folder, if they are enough: that of all takes seconds."""
    if include is not None:
        own = make(include_path=str(include), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return make(include_path=None if include is None else str(include))


def score(
    tasks: Tasks,
    config: Config,
    engine: Engine,
    tokenizer: Tokenizer,
    limit: int | None = None,
    examples: int | None = None,
    texts: int = 1,
) -> Scores:
    """The scores of the model of a run. limit: questions of each task, at most. examples: shown before each
    question, instead of the number that a task says (a task that says 0 keeps it). texts: continuations that
    are written together. Raises UserError."""
    context = config.model.max_positions or config.data.seq_len
    model = _model(config, engine, tokenizer, context, texts)
    with _to_stderr():
        return _scored(tasks, model, context, limit, examples)


def score_in_training(tasks: Tasks, config: Config, engine: Engine, tokenizer: Tokenizer) -> Scores:
    """The scores of the model that is trained, which sees no more than in training. They need no more memory
    than a step, and the keys and values of one text. Raises UserError."""
    context, limit = config.data.seq_len, config.train.eval_tasks_limit or None
    with _naming(SETTINGS), open(os.devnull, "w") as nowhere:
        model = _model(config, engine, tokenizer, context, 1, shown=config.log.progress)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return _scored(tasks, model, context, limit)


def _model(
    config: Config, engine: Engine, tokenizer: Tokenizer, context: int, texts: int, shown: bool = True
) -> RunModel:
    if not tokenizer.has_text:
        raise UserError("--tasks: the run has ids without text, and the questions of tasks are text")
    from lowres.harness.model import RunModel

    window, batch_tokens = config.data.seq_len, config.batch_sequences * config.data.seq_len
    return RunModel(engine, tokenizer, context, batch_tokens, texts, window, shown)


def _scored(
    tasks: Tasks, model: RunModel, context: int, limit: int | None, examples: int | None = None
) -> Scores:
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no fork of this process
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (examples is not None and own != 0):
            task.set_config(key="num_fewshot", value=examples or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        found = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )
    except Exception as error:
        if model.at_work and not isinstance(error, ImportError):
            raise  # not of a task
        raise _fault(error) from None
    return Scores(found, model.shortened, context)


def _fault(error: Exception) -> UserError:
    """What is wrong with a task, from an error of a library."""
    if isinstance(error, ImportError):
        return UserError(f"--tasks: a task needs a package ({first_line(error)}); install it with pip")
    if isinstance(error, OSError):
        return UserError(
            f"--tasks: the data of a task are not here ({first_line(error)}); lm_eval downloads them once, "
            "with a connection"
        )
    said = f"{type(error).__name__}: {first_line(error)}"
    if error.__cause__ is not None:
        said += f": {first_line(error.__cause__)}"
    return UserError(f"--tasks: a task cannot be used ({said}); correct it, or leave it out")


@contextlib.contextmanager
def _naming(keys: Keys) -> Iterator[None]:
    """Let an error name the tasks as the user does."""
    try:
        yield
    except UserError as error:
        error.args = (str(error).replace(f"{OPTIONS.tasks}: ", f"{keys.tasks}: ", 1),)
        raise


@contextlib.contextmanager
def _to_stderr() -> Iterator[None]:
    """What lm_eval prints goes to stderr, and its log only tells errors: stdout is for the scores."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield
