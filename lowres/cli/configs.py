"""The config that a command was given, and `lowres config`."""

from __future__ import annotations

import argparse
import json

from lowres import ranks
from lowres.cli.given import require_config
from lowres.config import Config
from lowres.config_file import load_config
from lowres.reference import commented


def load(parsed: argparse.Namespace) -> Config:
    """The config that a command names, with --set and --init-from; prints its notes. Raises UserError."""
    require_config(parsed)
    if getattr(parsed, "init_from", None):
        parsed.overrides.append(f"run.init_from={json.dumps(parsed.init_from)}")
    config, notes = load_config(parsed.config, parsed.overrides)
    for note in notes:
        ranks.say(f"note: {note}")
    return config


def run_config(parsed: argparse.Namespace) -> None:
    print(commented(load(parsed) if parsed.config else Config()), end="")
