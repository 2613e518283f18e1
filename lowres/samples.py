"""samples.jsonl: what a run writes on its way, one JSON object per line, kept like its metrics.

A sample has step (after so many), prompt, and text: the prompt and what follows it, or of a run that is tuned
the answer. A step has one of every prompt, in their order: each that train.sample_every says, and the last.
"""

from __future__ import annotations

from pathlib import Path

from lowres import metrics
from lowres.metrics import Record, StepLog


class SampleLog(StepLog):
    """The samples of a run."""

    @staticmethod
    def is_record(record: Record) -> bool:
        return all(isinstance(record.get(key), str) for key in ("prompt", "text"))


def read(path: Path) -> list[Record]:
    """All samples in a file; lines that cannot be read are left out."""
    return metrics.read(path, SampleLog)
