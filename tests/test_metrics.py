"""metrics.jsonl is valid JSON, flushed line by line, and cut back on resume."""

import json
from pathlib import Path

from lowres.metrics import MetricsLog, read


def test_lines_are_flushed_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write({"step": 0, "val_loss": 3.0})
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    lines = path.read_text().splitlines()  # without closing
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "val_loss": 3.0},
        {"step": 1, "loss": None, "grad_norm": None},
    ]


def test_resuming_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(path, 3)
    log.write({"step": 4, "loss": 40.0})
    assert [r["loss"] for r in read(path)] == [1.0, 2.0, 3.0, 40.0]
