"""`lowres doctor` and `presets`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from lowres import doctor, presets
from lowres.catalogue import find_card, read_planned
from lowres.errors import UserError


def run_doctor(parsed: argparse.Namespace) -> int:
    findings = doctor.examine()
    if parsed.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print("\n".join([*(finding.line for finding in findings), doctor.verdict(findings)]))
    return int(any(finding.state == doctor.MEND for finding in findings))


def run_presets(parsed: argparse.Namespace) -> None:
    found, card = read_planned(), find_card(parsed.card) if parsed.card else None
    if card not in (None, *(row.card for row in found.planned)):
        raise UserError(f"--card: nothing was planned for an {card}; use `lowres plan CONFIG --card {card}`")
    if parsed.json:
        rows = [asdict(row) for row in (*found.planned, *found.measured) if card in (None, row.card)]
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(presets.lines(found, card)))
