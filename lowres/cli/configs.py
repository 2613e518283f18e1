"""The config that a command was given, and `lowres config`."""

from __future__ import annotations

import argparse
import json

from lowres import ranks
from lowres.config import Config
from lowres.config_file import load_config, to_toml
from lowres.exchange import open_model, with_model_of


def load(parsed: argparse.Namespace) -> Config:
    if getattr(parsed, "init_from", None):
        parsed.overrides.append(f"run.init_from={json.dumps(parsed.init_from)}")
    config, notes = load_config(parsed.config, parsed.overrides)
    for note in notes:
        ranks.say(f"note: {note}")
    return config


def load_with_model(parsed: argparse.Namespace) -> Config:
    """The config with the model of `run.init_from`, which a run reads when it starts."""
    config = load(parsed)
    return with_model_of(config, open_model(config.run.init_from)) if config.run.init_from else config


def run_config(parsed: argparse.Namespace) -> None:
    print(to_toml(load(parsed) if parsed.config else Config()), end="")
