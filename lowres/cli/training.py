"""`lowres train`, `launch` and `sweep`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lowres import ranks
from lowres.cli.configs import load
from lowres.cli.tasks import refuse_without_tasks
from lowres.config_file import load_config
from lowres.errors import UserError
from lowres.sweep import sweep
from lowres.trainer import train


def run_train(parsed: argparse.Namespace) -> None:
    config = load(parsed)
    folder = parsed.run or Path("runs") / config.run.name
    train(config, folder, parsed.resume, parsed.profile, parsed.restart)


def run_launch(parsed: argparse.Namespace) -> int:
    config, _ = load_config(parsed.config, parsed.overrides)  # the ranks print its notes
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
