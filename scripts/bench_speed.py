"""Training speed on this machine's CPU against other trainers, as ratios in one run.

    python scripts/bench_speed.py [ARM ...] [--preset 60m ...] [--rounds 5] [--ours NAME:key=value,... ...]
    python scripts/bench_speed.py --update [--pairs 9]        # time of the update of a 7B layer
    python scripts/bench_speed.py --linear [--preset 20m ...] [--micro-batches 1,2,4,8]

Arms (default: all): fp32, bf16, int8, auto: ours with this memory.compute (int8 with activations in bf16);
bf16-fused: with fused kernels too; others of ours with --ours. plain:
transformers' LLaMA of the same shape with gradient checkpointing, fused AdamW and accumulated micro-batches.
hf-trainer: transformers' Trainer with layer-wise APOLLO-Mini. plain-bf16, hf-trainer-bf16: the same with bf16
autocast. Each arm is a process of its own; they take turns of one optimizer step on random tokens (A B C A B
C ...), after one untimed step each. A turn during which other processes used more than 5 % of the cores is
repeated (--tries). An arm that refuses is recorded with its reason. On a machine that is never quiet, --clock
cpu with one thread counts the seconds that the processor spent on the arm instead of those that passed.

Ratios are medians over turns of the same round. Shares are of the fastest large matrix product that was
measured between the rounds in the arm's own number format: in model FLOPs (6 per parameter of a product, plus
attention; the same for every arm) and in hardware FLOPs (with what is computed again). Writes
benchmarks/results/speed.json, or speed_update.json, or speed_linear.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as on a machine where lowres is not installed

import comparison  # noqa: E402
import records  # noqa: E402
import speed_arms  # noqa: E402
import speed_linear  # noqa: E402
import speed_update  # noqa: E402
import torch  # noqa: E402

from lowres.config.model import PRESETS  # noqa: E402
from lowres.errors import UserError  # noqa: E402
from lowres.probe import model_flops_per_token  # noqa: E402
from lowres.speed.peak import DTYPES, gemm_peak  # noqa: E402

CPU = torch.device("cpu")
OURS = {
    "fp32": ["memory.compute=fp32"],
    "bf16": ["memory.compute=bf16"],
    "bf16-fused": ["memory.compute=bf16", "memory.kernels=fused"],
    "int8": ["memory.compute=int8", "memory.activations=bf16"],
    "auto": ["memory.compute=auto"],
}
RESULTS = Path("benchmarks/results")
CLOCKS: dict[str, Callable[[], float] | None] = {"wall": None, "cpu": time.process_time}
QUIET = 0.05  # share of all cores that other processes may use during a turn


class Arm:
    """A trainer in its own process."""

    def __init__(self, name: str, asked: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("speed_arms.py")), json.dumps(asked)]
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 a full pipe would stop the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.facts = self._answer()
        self.steps: list[dict[str, Any]] = []

    @property
    def refused(self) -> str | None:
        found: str | None = self.facts.get("refused")
        return found

    def turn(self) -> dict[str, Any]:
        """One optimizer step. others_cpu: the share of all cores that other processes used meanwhile."""
        assert self._process.stdin is not None
        before = self._cpu_seconds()
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        found = self._answer()
        if "refused" in found:
            self.facts["refused"] = found["refused"]
            return found
        busy, own, whole = (b - a for a, b in zip(before, self._cpu_seconds(), strict=True))
        return found | {"others_cpu": max(0.0, busy - own) / whole if whole else 0.0}

    def quiet_turn(self, tries: int) -> dict[str, Any]:
        """A turn during which others used little of the machine, or the least disturbed of so many."""
        found = self.turn()
        for _ in range(tries - 1):
            if "refused" in found or found["others_cpu"] <= QUIET:
                break
            again = self.turn()
            found = min(found, again, key=lambda turn: turn.get("others_cpu", 1.0))
        return found

    def _cpu_seconds(self) -> tuple[float, float, float]:
        """So far: of all processes, of this one, and of all cores busy or idle. Zeros without /proc."""
        try:
            fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            own = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, 0.0, 0.0
        idle, tick = fields[3] + fields[4], 1 / os.sysconf("SC_CLK_TCK")
        return (sum(fields) - idle) * tick, (int(own[11]) + int(own[12])) * tick, sum(fields) * tick

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            if (code := self._process.wait()) < 0:
                return {"refused": f"its process was killed by signal {-code}; memory may have run out"}
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            return {"refused": f"its process ended: {last}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def compare(parsed: argparse.Namespace, preset: str) -> dict[str, Any]:
    """All arms on one preset."""
    common = {
        "preset": preset,
        "seq_len": parsed.seq_len,
        "batch_tokens": parsed.batch_tokens,
        "micro_batch": parsed.micro_batch,
        "threads": parsed.threads,
        "most_steps": parsed.rounds * parsed.tries + 1,
    }
    arms: list[Arm] = []
    peaks: list[dict[str, float | None]] = []
    try:
        for name in parsed.arms:
            asked = common | {"arm": name} | ({"set": parsed.ours[name]} if name in parsed.ours else {})
            arms.append(Arm(name, asked))
            if not arms[-1].refused:
                arms[-1].turn()
            print(f"{preset}, {name}: {arms[-1].refused or 'ready'}", file=sys.stderr)
        for done in range(parsed.rounds):
            peaks.append(
                {kind: gemm_peak(dtype, CPU, clock=CLOCKS[parsed.clock]) for kind, dtype in DTYPES.items()}
            )
            for arm in arms:
                if not arm.refused:
                    arm.steps.append(arm.quiet_turn(1 if parsed.clock == "cpu" else parsed.tries))
            print(f"{preset}, round {done + 1} of {parsed.rounds}", file=sys.stderr)
    finally:
        for arm in arms:
            arm.end()
    fastest = {kind: max((p[kind] or 0.0 for p in peaks), default=0.0) or None for kind in DTYPES}
    model = speed_arms.ours_config(preset, parsed.seq_len, parsed.batch_tokens, []).model
    flops = model_flops_per_token(model, parsed.seq_len)
    alive = [arm for arm in arms if not arm.refused]
    first = next((arm for arm in alive if arm.name == parsed.against), alive[0] if alive else None)
    return {
        "preset": preset,
        "gemm_peak_tflops": fastest,
        "gemm_peak_tflops_by_round": peaks,
        "model_flops_per_token": flops,
        "ratios_against": first.name if first else None,
        "arms": {
            arm.name: {"refused": arm.refused}
            if arm.refused or first is None
            else summary(arm, first, parsed.batch_tokens, flops, fastest, parsed.clock)
            for arm in arms
        },
    }


def summary(
    arm: Arm, first: Arm, tokens: int, flops: int, peaks: dict[str, float | None], clock: str
) -> dict[str, Any]:
    """Medians and spread of an arm, and its ratio to the first one."""
    key = {"wall": "seconds", "cpu": "cpu_seconds"}[clock]
    seconds = [step[key] for step in arm.steps]
    others = [step[key] for step in first.steps]
    median, facts = statistics.median(seconds), arm.facts
    ratios = [other / mine for mine, other in zip(seconds, others, strict=True)]
    peak = peaks[facts["compute"]]
    share = None if peak is None else tokens / median / (peak * 1e12)
    return facts | {
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_s": tokens / median,
        "spread_tokens_per_s": [tokens / max(seconds), tokens / min(seconds)],
        "speed_ratio": statistics.median(ratios),
        "spread_speed_ratio": [min(ratios), max(ratios)],
        "model_share_of_peak": None if share is None else share * flops,
        "hardware_share_of_peak": None if share is None else share * facts["hardware_flops_per_token"],
        "peak_rss_gib": arm.steps[-1]["peak_rss_gib"],
        "losses": [step["loss"] for step in arm.steps],
        "others_cpu": [round(step["others_cpu"], 3) for step in arm.steps],
    }


def table(found: dict[str, Any]) -> str:
    head = ["arm", "tokens/s", "slowest to fastest", f"speed / {found['ratios_against']}", "products in"]
    head += ["share of peak, model FLOPs", "hardware FLOPs", "resident, GiB"]
    rows = []
    for name, arm in found["arms"].items():
        if arm.get("refused"):
            rows.append([name, f"refused: {arm['refused']}", *[""] * 6])
            continue
        low, high = arm["spread_tokens_per_s"]
        worst, best = arm["spread_speed_ratio"]
        shares = [
            "" if arm[key] is None else f"{arm[key]:.0%}"
            for key in ("model_share_of_peak", "hardware_share_of_peak")
        ]
        row = [name, f"{arm['tokens_per_s']:,.0f}", f"{low:,.0f} to {high:,.0f}"]
        row += [f"{arm['speed_ratio']:.2f} ({worst:.2f} to {best:.2f})", arm["compute"], *shares]
        rows.append([*row, f"{arm['peak_rss_gib']:.1f}"])
    peaks = ", ".join(f"{kind} {1e3 * rate:,.0f}" for kind, rate in found["gemm_peak_tflops"].items() if rate)
    return f"{found['preset']}; fastest products (10^9 operations/s): {peaks}\n\n" + comparison.markdown(
        head, rows
    )


def bench(parsed: argparse.Namespace) -> None:
    found = []
    for preset in parsed.preset or ["60m", "130m"]:
        found.append(compare(parsed, preset))
        text = table(found[-1])
        print(f"{text}\n")
        found[-1]["table"] = text.splitlines()
        options = {k: v for k, v in vars(parsed).items() if k not in ("out", "update", "linear", "pairs")}
        record = records.provenance(CPU) | {"cpu": records.cpu(), "options": options, "presets": found}
        records.write(parsed.out or RESULTS / "speed.json", record)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed on this CPU against other trainers.")
    parser.add_argument("arms", nargs="*", metavar="ARM", help="default: all")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="default: 60m 130m")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="per step; default 8192")
    parser.add_argument(
        "--micro-batch", type=int, default=4, help="sequences, of the plain arms; ours: what the plan chooses"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tries", type=int, default=3, help="most steps of a turn, if other processes disturb it"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: needs --threads 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--against", default=speed_arms.PLAIN, metavar="ARM", help="default: plain")
    parser.add_argument(
        "--ours",
        action="append",
        default=[],
        metavar="NAME:section.key=value,...",
        help="one more arm of ours",
    )
    parser.add_argument("--update", action="store_true", help="time of the update of a layer instead")
    parser.add_argument("--pairs", type=int, default=9, help="with --update")
    parser.add_argument("--linear", action="store_true", help="speed over sizes and micro-batches instead")
    parser.add_argument("--micro-batches", default="1,2,4,8", help="with --linear: micro-batches a step")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args(arguments)
    own = {}
    for text in parsed.ours:
        name, colon, keys = text.partition(":")
        if not (name and colon and "=" in keys):
            parser.error(f"--ours {text}: write it as NAME:section.key=value,section.key=value")
        own[name] = keys.split(",")
    parsed.ours = {name: [*keys, *parsed.overrides] for name, keys in (OURS | own).items()}
    parsed.arms = parsed.arms or [*parsed.ours, *speed_arms.OTHERS]
    known = [*parsed.ours, *speed_arms.OTHERS]
    for name in parsed.arms:
        if name not in known:
            parser.error(f"there is no arm {name}; there are {', '.join(known)}")
    if parsed.clock == "cpu" and parsed.threads != 1:
        parser.error("--clock cpu: threads that wait for each other use the processor too; add --threads 1")
    if parsed.batch_tokens % parsed.seq_len:
        parser.error("--batch-tokens: must be a multiple of --seq-len")
    return parsed


def main() -> None:
    parsed = options()
    torch.set_num_threads(parsed.threads)
    clock = CLOCKS[parsed.clock] or time.perf_counter
    if parsed.update:
        record = speed_update.measure(parsed.pairs, clock=clock)
        print(record["table"])
        out = parsed.out or RESULTS / "speed_update.json"
    elif parsed.linear:
        counts = [int(n) for n in parsed.micro_batches.split(",")]
        out = parsed.out or RESULTS / "speed_linear.json"
        presets = parsed.preset or ["20m", "60m", "130m", "350m"]
        record = speed_linear.measure(presets, counts, parsed.seq_len, parsed.overrides, parsed.rounds, clock)
        print(record["table"])
        record["plot"] = speed_linear.draw(record, out.with_suffix(".png"))
    else:
        bench(parsed)
        return
    records.write(out, records.provenance(CPU) | {"cpu": records.cpu()} | record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench_speed: {error}")
