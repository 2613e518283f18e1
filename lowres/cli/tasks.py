"""Options for tasks of lm-evaluation-harness, which several commands have."""

from __future__ import annotations

import argparse

from lowres.errors import UserError


def refuse_without_tasks(parsed: argparse.Namespace, *options: str) -> None:
    """Raise UserError if an option says how to use tasks, but there are none."""
    for option in options:
        if getattr(parsed, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: says how to use tasks; give it with --tasks")
