"""Looking at runs: a page, and the terminal. It imports no PyTorch."""

from __future__ import annotations

import argparse

from lowres.report import write_report
from lowres.watch import watch


def run_report(parsed: argparse.Namespace) -> None:
    print(f"report: {write_report(parsed.runs, parsed.out)}")


def run_watch(parsed: argparse.Namespace) -> None:
    watch(parsed.run, parsed.every, parsed.once)
