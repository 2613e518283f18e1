"""Compare all optimizers, and INT8 with fp32 weights, on the same text with equal numbers of tokens.

    python scripts/compare_optimizers.py [SOURCE] [--only NAME ...] [--jobs 2] [--set section.key=value ...]

SOURCE: as for `lowres train`, default stdlib. Each optimizer's learning rate comes from a sweep on the first
seed over all tokens, or is given with `--lr NAME=RATE`: factors of two around a guess, continued until the
best rate lies between two others, so every arm has its best rate and both neighbours. A shorter sweep is not
fair: over a quarter of the tokens APOLLO-Mini's best rate is half of what it is over all of them. AdamW is
the baseline, so it is tuned further: weight decay, beta2, clipping and the batch are tried one after the
other, and kept where they help (`TRIED`).

Where AdamW updates embedding and head beside another optimizer, they get the rate that is best for AdamW
alone. An arm in another memory format uses the settings of its fp32 arm. Then all arms are trained on the
same seeds (arms without a claim only on the first; the best run of a sweep counts as its seed's), and do
timed steps in turn. Prints a table and writes benchmarks/results/optimizers.json and .png. Runs are kept in
runs/compare_optimizers; finished runs are not repeated, interrupted runs continue.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comparison
import records
import torch
from torch import Tensor

from lowres.catalogue import RULES
from lowres.config_file import load_config
from lowres.engine import Choice, make_engine
from lowres.model import empty_units, initialize
from lowres.optim import Optimizer, make_optimizer
from lowres.rooms import Rooms
from lowres.storage import EMBEDDING, Unit


@dataclass(frozen=True)
class Arm:
    """lr: the middle of its sweep, or the arm whose rate it uses. against: the arm that it is compared with.
    claimed: if False, train only on the first seed."""

    optimizer: str
    lr: float | str
    against: str | None
    overrides: tuple[str, ...] = ()
    claimed: bool = True


# with INT8 weights, embedding and head are bf16 by default
INT8 = ("memory.weights=int8", "memory.embeddings=auto")
ARMS = {
    "adamw": Arm("adamw", 0.002, None),
    "adamw8bit": Arm("adamw8bit", "adamw", "adamw", claimed=False),
    "adam-mini": Arm("adam-mini", 0.001, "adamw"),
    "apollo": Arm("apollo", 0.01, "adamw"),
    "apollo-mini": Arm("apollo-mini", 0.0025, "adamw"),
    "galore": Arm("galore", 0.02, "adamw", claimed=False),
    "fira": Arm("fira", 0.01, "adamw", claimed=False),
    "sgd": Arm("sgd", 0.25, "adamw", claimed=False),
    "scale": Arm("scale", 0.002, "adamw"),
    "muon": Arm("muon", 0.004, "adamw"),
    "muon8": Arm("muon", "muon", "muon", ("memory.moments=int8",), claimed=False),
    "sinkgd": Arm("sinkgd", 0.001, "adamw", claimed=False),
    "racs": Arm("racs", 0.001, "adamw", claimed=False),
    "adamw, int8": Arm("adamw", "adamw", "adamw", INT8),
    "adam-mini, int8": Arm("adam-mini", "adam-mini", "adam-mini", INT8),
    "apollo-mini, int8": Arm("apollo-mini", "apollo-mini", "apollo-mini", INT8),
    "apollo-mini, int8, master": Arm(
        "apollo-mini", "apollo-mini", "apollo-mini", (*INT8, "memory.master=host")
    ),
    "scale, int8": Arm("scale", "scale", "scale", INT8),
    "scale, int8, master": Arm("scale", "scale", "scale", (*INT8, "memory.master=host")),
    "muon8, int8": Arm("muon", "muon", "muon", (*INT8, "memory.moments=int8")),
}
# what is tried for AdamW beside its rate: beta2 for moments of 100 steps, of which one batch is 1 %
TRIED = ("optim.weight_decay=0.1", "optim.betas=[0.9,0.99]", "optim.grad_clip=1.0")


def main() -> None:
    parsed = arguments()
    common = [f"data.source={parsed.source}", *parsed.overrides]
    arms = {name: arm for name, arm in ARMS.items() if parsed.only is None or name in parsed.only}

    # ---- learning rates: AdamW's first, because other arms use it
    rates: dict[str, float] = dict(parsed.lr)
    tuned = list(parsed.adamw)  # settings of AdamW beside its rate

    def tune(name: str) -> dict[str, Any]:
        overrides = [*common, *ARMS[name].overrides, *embed_lr(name, rates), f"run.seed={parsed.seeds[0]}"]
        overrides += [f"optim.name={ARMS[name].optimizer}"]
        folder, lr = parsed.runs / "rates" / comparison.folder_of(name), ARMS[name].lr
        assert isinstance(lr, float)
        return comparison.best_rate(parsed.config, overrides, lr, parsed.tokens, folder)

    best: dict[str, dict[str, Any]] = {}
    tried: dict[str, float | None] = {}
    needed = {arm.lr if isinstance(arm.lr, str) else name for name, arm in arms.items()} - rates.keys()
    for names in ({"adamw"} - rates.keys(), needed - {"adamw"}):
        best |= comparison.in_parallel(tune, sorted(names), parsed.jobs)
        if "adamw" in names and not tuned:
            tuned, tried, best["adamw"] = tune_further(parsed, common, best["adamw"])
        rates |= {name: point["lr"] for name, point in best.items()}

    # ---- runs
    settings: dict[str, list[str]] = {}
    for name, arm in arms.items():
        lr = rates[arm.lr if isinstance(arm.lr, str) else name]
        settings[name] = [*common, f"optim.name={arm.optimizer}", f"optim.lr={lr}"]
        settings[name] += [*arm.overrides, *embed_lr(name, rates)]
        settings[name] += tuned if arm.optimizer == "adamw" else []

    def train(name: str) -> list[dict[str, Any]]:
        folder = parsed.runs / comparison.folder_of(name)
        if not arms[name].claimed:
            return comparison.over_seeds(
                parsed.config, settings[name], parsed.seeds[:1], parsed.tokens, folder
            )
        first = [best[name]] if name in best else []
        rest = parsed.seeds[len(first) :]
        if not rest:
            return first
        return first + comparison.over_seeds(parsed.config, settings[name], rest, parsed.tokens, folder)

    runs = comparison.in_parallel(train, arms, parsed.jobs)
    against = {name: arm.against for name, arm in arms.items() if arm.against in arms}
    summaries = comparison.summarise(runs, {name: other for name, other in against.items() if other})

    # ---- cost of a step
    torch.set_num_threads(1)
    costs = measure({name: [*overrides, "run.device=cpu"] for name, overrides in settings.items()}, parsed)
    for name, arm in arms.items():
        summaries[name] |= {"lr": runs[name][0]["lr"], "optimizer": arm.optimizer, **costs[name]}

    head = ["optimizer", "lr", "val. loss", "perplexity", "against", "state, bytes/param.", "step", "update"]
    rows = [row(name, summaries[name]) for name in arms]
    table = comparison.markdown(head, rows)
    print(table)
    config, _ = load_config(parsed.config, common)
    # before the plot, which git may track: it would mark the commit as dirty
    record = records.provenance(torch.device("cpu")) | {
        "source": parsed.source,
        "model": config.model.model_dump(),
        "parameters": costs[next(iter(arms))]["parameters"],
        "tokens": runs[next(iter(arms))][0]["tokens"],
        "batch_tokens": config.train.batch_tokens,
        "rates": {name: point["rates"] for name, point in best.items()},
        "adamw": {"tried": tried, "kept": tuned},
        "seeds": parsed.seeds,
        "arms": summaries,
        "table": table.splitlines(),
    }
    picture = comparison.draw_curves(
        parsed.out.with_suffix(".png"), runs, f"{parsed.tokens / 1e6:.1f} M tokens per run"
    )
    records.write(parsed.out, record)
    print(f"compare_optimizers: {parsed.out}{f', {picture}' if picture else ''}", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare all optimizers on the same text with equal tokens.")
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--config", type=Path, default=Path("configs/compare.toml"))
    parser.add_argument("--tokens", type=comparison.above_zero, default=1 << 20, help="of a run")
    parser.add_argument(
        "--lr", action="append", default=[], type=given_rate, metavar="NAME=RATE", help="instead of a sweep"
    )
    parser.add_argument(
        "--adamw", nargs="*", default=[], metavar="section.key=value", help="for AdamW, instead of trying"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ARMS, metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--timed-steps", type=comparison.above_zero, default=15)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--jobs", type=comparison.above_zero, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_optimizers"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/optimizers.json"))
    return parser.parse_args()


def given_rate(text: str) -> tuple[str, float]:
    """Parse `adamw=0.002` from the command line."""
    name, _, rate = text.partition("=")
    if name not in ARMS or isinstance(ARMS[name].lr, str):
        raise argparse.ArgumentTypeError(f"{name!r} has no learning rate to set")
    try:
        return name, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rate!r} is not a number") from None


def embed_lr(name: str, rates: Mapping[str, float]) -> list[str]:
    """AdamW's rate for embedding and head, if AdamW updates them."""
    kinds = RULES[ARMS[name].optimizer].kinds
    return [f"optim.embed_lr={rates['adamw']}"] if EMBEDDING not in kinds else []


def tune_further(
    parsed: argparse.Namespace, common: list[str], best: dict[str, Any]
) -> tuple[list[str], dict[str, float | None], dict[str, Any]]:
    """Other settings for AdamW, each kept if the loss is lower: what is kept, the loss of everything that was
    tried, and the best point. Half the batch gets rates of its own, and a beta2 that averages over as many
    tokens."""
    kept: list[str] = []
    tried: dict[str, float | None] = {}
    fixed = [*common, "optim.name=adamw", f"run.seed={parsed.seeds[0]}"]

    def attempt(settings: list[str], lrs: list[float]) -> None:
        nonlocal kept, best
        folder = parsed.runs / "adamw" / comparison.folder_of(" ".join(settings))
        values = ",".join(f"{lr:g}" for lr in lrs)
        for point in comparison.points(
            parsed.config, [*fixed, *settings], f"optim.lr={values}", parsed.tokens, folder
        ):
            tried[f"{' '.join(settings)}, lr {point['lr']:g}"] = point["val_loss"]
            if comparison.best_of([best, point]) is point:
                kept, best = settings, point | {"rates": best["rates"]}

    for setting in TRIED:
        attempt([*kept, setting], [best["lr"]])
    config, _ = load_config(parsed.config, [*fixed, *kept])
    assert config.optim.betas is not None
    first, second = config.optim.betas
    half = [
        f"train.batch_tokens={config.train.batch_tokens // 2}",
        f"optim.betas=[{first},{second**0.5:.6g}]",
    ]
    others = [setting for setting in kept if not setting.startswith("optim.betas")]
    attempt([*others, *half], [best["lr"] / 2, best["lr"] / 2**0.5, best["lr"]])
    print(f"adamw: {' '.join(kept) or 'nothing else helps'}", file=sys.stderr, flush=True)
    return kept, tried, best


class TimedOptimizer:
    """An optimizer that measures the time of its updates."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.seconds = optimizer, 0.0

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None:
        start = time.perf_counter()
        self.optimizer.update(unit, grads, step, schedule, accepted)
        self.seconds += time.perf_counter() - start


def measure(settings: Mapping[str, list[str]], parsed: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The cost of a step for each arm: allocated state in bytes per parameter, seconds per step, and the
    update's share of it. Medians over steps that the arms do in turn, on one CPU thread."""
    device = torch.device("cpu")
    engines, timers, found = {}, {}, {}
    for name, overrides in settings.items():
        config, _ = load_config(parsed.config, overrides)
        config = config.with_vocab(config.model.vocab_size or config.data.vocab_size or 2048)
        optimizer, rooms = make_optimizer(config), Rooms(device)
        kept = config.memory
        units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms)
        optimizer.attach(units.values(), rooms)
        initialize(units.values(), 0, device)
        timers[name] = TimedOptimizer(optimizer)
        engines[name] = make_engine(config, units, timers[name], rooms, Choice(config.batch_sequences))
        parameters = sum(spec.numel for unit in units.values() for spec in unit.spec.tensors)
        state = sum(t.nbytes for unit in units.values() for own in unit.state.values() for t in own.values())
        found[name] = {"parameters": parameters, "state_bytes_per_parameter": state / parameters}
    batch = torch.randint(config.model.vocab_size or 0, (config.batch_sequences, config.data.seq_len + 1))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for step, name in itertools.product(range(-2, parsed.timed_steps), settings):
        before, timers[name].seconds = time.perf_counter(), 0.0
        engines[name].step(batch, step + 2, 0.1)
        if step >= 0:
            times[name].append((time.perf_counter() - before, timers[name].seconds))
    for name, pairs in times.items():
        whole, update = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[name] |= {"seconds_per_step": whole, "update_share": update / whole}
    return found


def row(name: str, found: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{found['lr']:g}",
        comparison.loss_text(found),
        f"{found['perplexity']:.1f}",
        f"{comparison.change_text(found)} ({found['against']})" if "against" in found else "",
        f"{found['state_bytes_per_parameter']:.2f}",
        f"{found['seconds_per_step']:.2f} s",
        f"{found['update_share']:.1%}",
    ]


if __name__ == "__main__":
    comparison.run_script(main)
