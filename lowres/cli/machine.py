"""`lowres doctor` and `presets`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from lowres import doctor


def run_doctor(parsed: argparse.Namespace) -> int:
    findings = doctor.examine()
    if parsed.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print("\n".join([*(finding.line for finding in findings), doctor.verdict(findings)]))
    return int(any(finding.state == doctor.MEND for finding in findings))
