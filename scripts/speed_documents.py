"""The price of data.document_mask: a training step with documents that do not see each other, against the
ordinary one and against a mask over whole sequences, which take turns on the same random documents.

    python scripts/speed_documents.py [--turns 5] [--out benchmarks/results/documents.json]

Sequences of 1,024 tokens, two blocks of the 60m preset, fp32 products, a step of 4 sequences on one thread.
Lengths of documents are exponential, with a mean of 200 and of 2,000 tokens. Times are those that the process
has on its core, so that other programs disturb them less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comparison
import records
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as on a machine where lowres is not installed

from lowres.config_file import parse_config  # noqa: E402
from lowres.engine import Engine, make_engine  # noqa: E402
from lowres.memory import GIB, make_plan  # noqa: E402
from lowres.meter import Meter  # noqa: E402
from lowres.model import Lengths, block, empty_units, initialize, starting_with  # noqa: E402
from lowres.optim import make_optimizer  # noqa: E402
from lowres.rooms import GPU, Rooms  # noqa: E402

BOS, VOCABULARY, LENGTH, SEQUENCES, LAYERS = 1, 2000, 1024, 4, 2
MEANS = (200, 2000)
TOGETHER, APART, MASKED = "together (default)", "apart (data.document_mask)", "apart, by a mask"
CPU = torch.device("cpu")


def documents(mean: int, seed: int) -> Tensor:
    """Windows [SEQUENCES, LENGTH + 1] of random documents in a row."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(3, VOCABULARY, (SEQUENCES * LENGTH + 1,), generator=generator)
    at = 0
    while at < len(stream):
        stream[at] = BOS
        at += 1 + int(torch.empty(1).exponential_(1 / mean, generator=generator))
    return stream.unfold(0, LENGTH + 1, LENGTH)


def masked(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None) -> Tensor:
    """`lowres.model.documents.attend` by a boolean mask [B, 1, T, T] over whole sequences."""
    assert lengths is not None
    ends = torch.tensor(lengths).cumsum(0)
    of = torch.bucketize(torch.arange(len(q) * q.shape[2]), ends, right=True).view(len(q), -1)
    mask = (of[:, :, None] == of[:, None, :]).tril()[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return y.transpose(1, 2).reshape(len(q), q.shape[2], -1)


@contextmanager
def with_mask(wanted: bool) -> Iterator[None]:
    inside: Any = sys.modules[block.__module__]
    before = inside.attend
    inside.attend = masked if wanted else before
    try:
        yield
    finally:
        inside.attend = before


def arm(apart: bool) -> tuple[Engine, Meter, float]:
    """An engine, what measures its memory, and the GiB that its plan has for the GPU."""
    config, _ = parse_config(
        {
            "model": {"preset": "60m", "n_layers": LAYERS, "vocab_size": VOCABULARY},
            "data": {"seq_len": LENGTH, "document_mask": apart},
            "train": {"batch_tokens": SEQUENCES * LENGTH, "micro_batch": SEQUENCES, "steps": 100},
            "memory": {"compute": "fp32"},
        }
    )
    plan, rooms = make_plan(config, CPU), Rooms(CPU)
    units = empty_units(config.model, config.memory.weights, config.memory.embeddings_kept_in, rooms)
    optimizer = make_optimizer(config)
    optimizer.attach(units.values(), rooms)
    initialize(units.values(), 0, CPU)
    starts = starting_with(BOS) if apart else None
    engine = make_engine(config, units, optimizer, rooms, plan.choice, starts)
    return engine, Meter(rooms), plan.peak(GPU) / GIB


def measure(mean: int, turns: int) -> dict[str, Any]:
    """Seconds on the core of a step by arm, and the ratio to the ordinary step of the same turn."""
    arms = {TOGETHER: arm(False), APART: arm(True), MASKED: arm(True)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    count = 0
    for turn in range(-1, turns):
        batch = documents(mean, turn + 1)
        count += int((batch[:, :-1] == BOS).sum()) if turn >= 0 else 0
        for name, (engine, meter, _) in arms.items():
            began = time.process_time()
            with with_mask(name == MASKED), meter.watch("step"):
                engine.step(batch, turn + 1, 0.1)
            if turn >= 0:
                seconds[name].append(time.process_time() - began)
    found: dict[str, Any] = {}
    for name, own in seconds.items():
        ratios = [mine / other for mine, other in zip(own, seconds[TOGETHER], strict=True)]
        found[name] = {
            "seconds": own,
            "tokens_per_s": SEQUENCES * LENGTH / statistics.median(own),
            "time_over_together": statistics.median(ratios),
            "spread_time_over_together": [min(ratios), max(ratios)],
            "planned_gpu_gib": arms[name][2],
            "measured_gpu_gib": arms[name][1].readings()["peak_mem_gib"],
        }
    return {"mean_tokens": mean, "documents_per_step": count / turns, "arms": found}


def main() -> int:
    parser = argparse.ArgumentParser(description="The price of data.document_mask.")
    parser.add_argument("--turns", type=int, default=5, help="steps of every arm")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "documents.json")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    origin = records.provenance(CPU) | {"cpu": records.cpu()}
    results = [measure(mean, parsed.turns) for mean in MEANS]
    rows = [
        [
            f"{one['mean_tokens']:,}",
            name,
            f"{own['tokens_per_s']:,.0f}",
            f"{own['time_over_together']:.2f}",
            f"{own['spread_time_over_together'][0]:.2f} to {own['spread_time_over_together'][1]:.2f}",
            f"{own['measured_gpu_gib']:.3f}",
        ]
        for one in results
        for name, own in one["arms"].items()
    ]
    head = ["mean document", "documents", "tokens/s", "time / together", "least to most", "GiB on the GPU"]
    table = comparison.markdown(head, rows)
    shape = {"seq_len": LENGTH, "sequences": SEQUENCES, "layers": LAYERS, "preset": "60m"}
    records.write(parsed.out, origin | shape | {"turns": parsed.turns, "results": results, "table": table})
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
