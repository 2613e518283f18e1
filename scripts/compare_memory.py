"""Do memory-saving number formats train as well as full precision?

    python scripts/compare_memory.py SUBJECT [CONFIG] [--seeds 0 1 2] [--set section.key=value ...]

weights: INT8 against fp32 weights. products: INT8 weights that are multiplied in INT8 or in fp32. stash: the
inputs of the layers stored in INT8 instead of the format of the computation; the forward pass continues from
the stored or from the exact values. Trains the config once per seed with each variant, prints a table and
writes benchmarks/results/int8_SUBJECT.json, with the training curves as .png. Runs are kept in
runs/compare_memory and are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import comparison
import records
import torch

from lowres.config_file import load_config

# subject -> overrides by name; the others are compared with the first
SUBJECTS = {
    "products": {
        "fp32 products": ["memory.weights=int8", "memory.compute=fp32"],
        "int8 products": ["memory.weights=int8", "memory.compute=int8"],
        "int8, fp32 for weight gradients": [
            "memory.weights=int8",
            "memory.compute=int8",
            "memory.compute_wgrad=dense",
        ],
    },
    "weights": {"fp32": ["memory.weights=fp32"], "int8": ["memory.weights=int8"]},
    "stash": {
        "exact": ["memory.stash_dtype=auto"],
        "int8": ["memory.stash_dtype=int8"],
        "int8, exact forward": ["memory.stash_dtype=int8", "memory.exact_forward=true"],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Do memory-saving number formats train as well?")
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/tiny.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--jobs", type=comparison.above_zero, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_memory"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/int8_SUBJECT.json")
    parsed = parser.parse_args()
    arms = SUBJECTS[parsed.subject]
    config, _ = load_config(parsed.config, parsed.overrides)
    tokens = config.train.tokens or config.train.total_steps * config.train.batch_tokens

    def train(name: str) -> list[dict[str, Any]]:
        folder = parsed.runs / parsed.subject / comparison.folder_of(name)
        overrides = [*parsed.overrides, *arms[name]]
        return comparison.over_seeds(parsed.config, overrides, parsed.seeds, tokens, folder)

    runs = comparison.in_parallel(train, arms, parsed.jobs)
    first, *others = arms
    summaries = comparison.summarise(runs, dict.fromkeys(others, first))
    rows = [
        [
            name,
            comparison.loss_text(found),
            f"{found['perplexity']:.2f}",
            comparison.change_text(found),
        ]
        for name, found in summaries.items()
    ]
    table = comparison.markdown([parsed.subject, "val. loss", "perplexity", f"against {first}"], rows)
    print(table)
    record = records.provenance(torch.device("cpu")) | {
        "source": config.data.source,
        "tokens": runs[first][0]["tokens"],
        "seeds": parsed.seeds,
        "arms": summaries,
        "table": table.splitlines(),
    }
    out = parsed.out or Path(f"benchmarks/results/int8_{parsed.subject}.json")
    records.write(out, record)
    comparison.draw_differences(out.with_suffix(".png"), runs, first, f"int8 {parsed.subject}")


if __name__ == "__main__":
    main()
