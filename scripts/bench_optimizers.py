"""How long does the update of a layer take, compared with torch.optim.AdamW(fused=True)?

    python scripts/bench_optimizers.py [NAME ...] [--preset 7b] [--pairs 15] [--threads 2] [--device cpu]

Weights and gradients of one layer (7b: four 4096x4096, two 11008x4096, one 4096x11008 and two norms) in
fp32. Both optimizers update the same weights from the same gradients, one after the other, and take turns in
being first. The result is the median of the ratios of such pairs. No timed step computes new projections.
Prints a table and writes benchmarks/results/optimizer_time.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
import torch

from lowres.catalogue import RULES
from lowres.config import ModelConfig
from lowres.config_file import parse_config
from lowres.device import prepare_cuda
from lowres.model import empty_units, initialize
from lowres.optim import make_optimizer
from lowres.rooms import Rooms
from lowres.storage import Unit


def main() -> None:
    prepare_cuda()
    parser = argparse.ArgumentParser(description="Time of an update against torch.optim.AdamW(fused=True).")
    parser.add_argument("names", nargs="*", default=["apollo-mini"], help=", ".join(RULES))
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/optimizer_time.json"))
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    device = torch.device(parsed.device)

    model = ModelConfig.model_validate({"preset": parsed.preset, "n_layers": 1, "vocab_size": 2})
    units = empty_units(model, "fp32", "fp32", Rooms(device))
    initialize(units.values(), 0, device)
    results = {}
    for name in parsed.names:
        results[name] = measure(name, model, units["layers.0"], parsed.pairs, device)
        found = results[name]
        low, high = found["quartiles"]
        print(
            f"{name:<12} {found['ms']:8.1f} ms, AdamW {found['adamw_ms']:8.1f} ms, "
            f"ratio {found['ratio']:.3f} (quartiles {low:.3f} to {high:.3f})"
        )

    record = records.provenance(device) | {
        "preset": parsed.preset,
        "pairs": parsed.pairs,
        "results": results,
    }
    records.write(parsed.out, record)


def measure(name: str, model: ModelConfig, unit: Unit, pairs: int, device: torch.device) -> dict[str, Any]:
    """Medians over pairs of steps: times in ms, and their ratio."""
    config, _ = parse_config({"model": model.model_dump(), "optim": {"name": name}})
    optimizer = make_optimizer(config)
    optimizer.attach([unit], Rooms(device))
    grads = {spec.name: torch.randn(spec.shape, device=device) * 1e-3 for spec in unit.spec.tensors}
    kept = {key: grad.clone() for key, grad in grads.items()}  # most rules overwrite their gradients
    parameters = [
        torch.nn.Parameter(unit.weights[key].dense(torch.float32), requires_grad=True) for key in grads
    ]
    for p, grad in zip(parameters, kept.values(), strict=True):
        p.grad = grad
    adamw = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    accepted = torch.ones((), dtype=torch.bool, device=device)
    done = 0

    def ours() -> float:
        nonlocal done
        for key, grad in grads.items():
            grad.copy_(kept[key])
        seconds = timed(lambda: optimizer.update(unit, grads, done, 1e-4, accepted), device)
        done += 1
        return seconds

    def theirs() -> float:
        return timed(adamw.step, device)

    times = []
    with torch.no_grad():
        for i in range(-2, pairs):
            first, second = (ours, theirs) if i % 2 else (theirs, ours)
            pair = first(), second()
            if i >= 0:
                times.append(pair if i % 2 else pair[::-1])
    ratios = [mine / other for mine, other in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "ms": 1e3 * statistics.median(mine for mine, _ in times),
        "adamw_ms": 1e3 * statistics.median(other for _, other in times),
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
