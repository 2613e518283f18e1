"""`lowres import` and `export`."""

from __future__ import annotations

import argparse

from lowres.exchange import export, import_model


def run_import(parsed: argparse.Namespace) -> None:
    print("\n".join(import_model(parsed.model, parsed.run, parsed.overrides).lines()))


def run_export(parsed: argparse.Namespace) -> None:
    found = export(
        *(parsed.run, parsed.out, parsed.format, parsed.dtype, parsed.checkpoint, parsed.shard_size)
    )
    print("\n".join(found))
