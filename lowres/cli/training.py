"""`lowres train`, `launch` and `sweep`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lowres import ranks
from lowres.cli.configs import load
from lowres.cli.given import is_run, require_config
from lowres.cli.tasks import refuse_without_tasks
from lowres.config import Config
from lowres.config_file import changed_config, load_config
from lowres.errors import UserError
from lowres.runs import CONFIG, config_in
from lowres.sweep import sweep
from lowres.trainer import train


def run_train(parsed: argparse.Namespace) -> None:
    config, folder = _config_and_folder(parsed)
    train(config, folder, parsed.resume, parsed.profile, parsed.restart)


def _config_and_folder(parsed: argparse.Namespace) -> tuple[Config, Path]:
    """What to train, and where. A run that is resumed may be given instead of its config."""
    if not (parsed.resume and is_run(parsed.config)):
        config = load(parsed)
        return config, parsed.run or Path("runs") / config.run.name
    folder = parsed.config
    if parsed.run is not None and parsed.run.resolve() != folder.resolve():
        raise UserError(f"--run: {folder} is the run to resume; leave --run out, or give a config")
    if parsed.init_from:
        raise UserError(f"--init-from: {folder} has begun, so it goes on from its own weights; leave it out")
    config, notes = changed_config(config_in(folder), parsed.overrides, f"{folder / CONFIG}")
    for note in notes:
        ranks.say(f"note: {note}")
    return config, folder


def run_launch(parsed: argparse.Namespace) -> int:
    if not (parsed.resume and is_run(parsed.config)):
        require_config(parsed)
        config, _ = load_config(parsed.config, parsed.overrides)  # the ranks print its notes
    else:
        config = changed_config(config_in(parsed.config), parsed.overrides, f"{parsed.config / CONFIG}")[0]
    if config.memory.engine != "deepspeed":
        raise UserError(
            f"memory.engine: {config.memory.engine} uses one GPU; set it to deepspeed, or use `lowres train`"
        )
    arguments = ["train", str(parsed.config.absolute())]
    arguments += [part for override in parsed.overrides for part in ("--set", override)]
    arguments += ["--run", str(parsed.run)] if parsed.run else []
    arguments += ["--init-from", parsed.init_from] if parsed.init_from else []
    arguments += ["--resume"] if parsed.resume else []
    arguments += ["--restart"] if parsed.restart else []
    return ranks.launch(arguments, parsed.gpus, parsed.hostfile)


def run_sweep(parsed: argparse.Namespace) -> None:
    require_config(parsed)
    if parsed.init_from:
        parsed.overrides.append(f"run.init_from={json.dumps(parsed.init_from)}")
    length = {"tokens": parsed.tokens} if parsed.tokens else {"epochs": parsed.epochs}
    sweep(parsed.config, parsed.grid, length, parsed.run, parsed.overrides, _scoring(parsed))


def _scoring(parsed: argparse.Namespace) -> list[str]:
    """The arguments of `lowres eval` for the tasks of a sweep."""
    if not parsed.tasks:
        refuse_without_tasks(parsed, "include_path", "limit")
        return []
    found = ["--tasks", ",".join(parsed.tasks)]
    found += ["--include-path", str(parsed.include_path)] if parsed.include_path else []
    return found + (["--limit", str(parsed.limit)] if parsed.limit else [])
