"""metrics.jsonl: one JSON object per line, written as a whole and flushed.

A step has step, tokens, loss, lr, lr_over_batch, grad_norm, tokens_per_s, peak_mem_gib, host_mem_gib,
peak_rss_gib (`lowres.meter`), skipped; an evaluation has step, val_loss, val_ppl, val_bits_per_byte. lr is
the learning rate of the update that led to `step`; lr_over_batch is lr divided by the sequences in a batch;
skipped is the number of units (embedding, blocks, head) that a step did not update because its loss or a
gradient was not finite. A number that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from lowres import ranks


class MetricsLog:
    """Appends to a run's metrics, on the first rank only. Opening it removes records after `step` (-1: all
    records), so a resumed run has every step exactly once."""

    def __init__(self, path: Path, step: int) -> None:
        self._file: TextIO | None = None
        if not ranks.is_first():
            return
        kept = [record for record in read(path) if record["step"] <= step]
        temporary = path.with_suffix(".unfinished")
        temporary.write_text("".join(_line(record) for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; an incomplete last line is ignored."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
