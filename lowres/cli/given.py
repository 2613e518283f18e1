"""What a user gave where a config is expected, and what to type instead."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from lowres.errors import UserError
from lowres.wording import command


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run. By name only, so that it costs nothing."""
    return path.is_dir() and any((path / name).exists() for name in ("config.toml", "checkpoints"))


def require_config(parsed: argparse.Namespace) -> None:
    """Raise UserError if the config of a command is something else that lowres knows."""
    path, verb = parsed.config, parsed.command.rpartition("_")[2]
    if path.exists() and (found := _found(path, verb)):
        what, remedy = found
        raise UserError(f"{path} is {what}, not a config; {remedy}")


def _found(path: Path, verb: str) -> tuple[str, str] | None:
    """What is there, and what to type; None for a config."""
    if not path.is_dir():
        return None if path.suffix == ".toml" or _is_toml(path) else ("text or data", _on_data(path, verb))
    if is_run(path):
        return "a run", _on_run(path, verb)
    names = {entry.name for entry in path.iterdir()}
    if "manifest.json" in names and path.parent.name == "checkpoints":
        return "a checkpoint", f"{_on_run(path.parent.parent, verb)}; {_on_model(path)}"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "a Hugging Face folder", _on_model(path)
    what = "a folder with prepared data" if "data.json" in names else "a folder"
    return what, _on_data(path, verb)


def _is_toml(path: Path) -> bool:
    try:
        return isinstance(tomllib.loads(path.read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


def _on_run(run: Path, verb: str) -> str:
    if verb in ("train", "launch"):
        return f"to continue it: {command('lowres', verb, run, '--resume')}"
    return f"its config is {run / 'config.toml'}"


def _on_model(path: Path) -> str:
    again = command("lowres", "train", "CONFIG", "--init-from", path, "--run", "DIR")
    return f"to begin a new run with its weights: {again}"


def _on_data(path: Path, verb: str) -> str:
    again = command("lowres", verb, "CONFIG", "--set", f"data.source={path}")
    return f"if it is what to train on: {again} (configs are in configs/; `lowres config` prints one)"
