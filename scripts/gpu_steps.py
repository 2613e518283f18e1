"""Optimizer steps of a config on random tokens, as in a run: does it fit, how fast is it, is the plan right?
Every result is passed on at once, because the next part may end the process."""

from __future__ import annotations

import importlib.util
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_rates
import torch

from lowres import checkpoint, speed
from lowres import memory as planning
from lowres.config import Config
from lowres.config_file import load_config
from lowres.memory import GIB
from lowres.meter import LiveTensors, rss_gib
from lowres.rooms import GPU, HOST, Homes, Rooms

# micro-batches in the steps that are timed first, if the batch has so many
SHORT = (2, 4)
# a whole step needs at most this multiple of its extrapolated time
CAUTION = 1.25


def load(path: Path, device: torch.device, overrides: list[str]) -> tuple[Config, list[str]]:
    """A config for a device, and notes on changes because a package is missing."""
    notes = []
    config, _ = load_config(path, [*overrides, f"run.device={device.type}"])
    if config.memory.moments == "int8" and not importlib.util.find_spec("bitsandbytes"):
        notes.append("bitsandbytes is not installed: memory.moments=bf16 instead of int8")
        config, _ = load_config(path, [*overrides, f"run.device={device.type}", "memory.moments=bf16"])
    return speed.with_random_tokens(config), notes


class PhaseRooms(Rooms):
    """Rooms that record the allocator's peak by phase of the step. The allocator counts when kernels are
    enqueued, and `phase` is also set then, so nothing has to wait for the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}
        self.reserved = 0
        if device.type == "cuda":
            self.on_phase.append(lambda _: self.note())

    def note(self) -> None:
        """Add the peak since the last call to the phase that ends."""
        peak = torch.cuda.max_memory_allocated(self.device)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)


class Subject(speed.Subject):
    """A run without data that also measures its memory by phase."""

    rooms: PhaseRooms

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device, PhaseRooms(device))

    def rehearse(self) -> float:
        """Do what a run does before its first step; returns the loss."""
        batch = self.batch(2, 0)
        loss = self.engine.step(batch, 0, 0.0, rehearsal=True).loss
        self.engine.evaluate(batch)
        with tempfile.TemporaryDirectory() as folder:
            some = itertools.islice(self.engine.units(), 2)  # embedding and a block
            stored = ((unit.spec.name, unit.tensors()) for unit in some)
            state = checkpoint.State(step=0, tokens=0, data="", start=checkpoint.Start(batch_tokens=1))
            checkpoint.write(checkpoint.step_folder(Path(folder), 0), stored, state, {})
        return loss


def cap_allocator(device: torch.device, cap_gib: float | None) -> int | None:
    """Limit PyTorch's allocator to this size; returns it in bytes."""
    if device.type != "cuda" or not cap_gib:
        return None
    cap, total = int(cap_gib * GIB), torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    return cap


def measure(
    path: Path, device: torch.device, overrides: list[str], cap_gib: float | None, until: float
) -> Iterator[dict[str, Any]]:
    """The results, one part at a time. until: time.perf_counter() by which a whole step must end."""
    config, notes = load(path, device, overrides)
    cap = cap_allocator(device, cap_gib)
    peak_tflops = gpu_rates.gemm_peak(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield {"config": str(path), "overrides": overrides, "notes": notes, "cap_bytes": cap}
    began = time.perf_counter()
    subject = Subject(config, device)
    live = LiveTensors(subject.rooms) if device.type == "cpu" else None
    with live or nullcontext():
        losses = [subject.rehearse()]
    yield {"gemm_tflops": peak_tflops, "setup_seconds": time.perf_counter() - began, **chosen(subject)}
    yield memory(subject, live)

    whole = subject.micro_batches
    counts = sorted({min(count, whole) for count in SHORT})
    timed = {}
    for step, count in enumerate(counts):
        timed[count], loss = subject.step(count, step)
        losses.append(loss)
    if whole not in timed:
        expected = extrapolated(timed, whole)
        yield {"short": speeds(subject, timed, peak_tflops), "losses": losses}
        tokens = config.train.batch_tokens
        yield {"extrapolated_seconds_per_step": expected, "extrapolated_tokens_per_s": tokens / expected}
        if time.perf_counter() + CAUTION * expected > until:
            yield {"whole": f"left out: about {expected:.0f} s are needed", **memory(subject, live)}
            return
        timed = {whole: 0.0}
        timed[whole], loss = subject.step(whole, len(counts))
        losses.append(loss)
    yield {"whole": speeds(subject, {whole: timed[whole]}, peak_tflops), "losses": losses}
    yield memory(subject, live)
    if not all(math.isfinite(loss) for loss in losses):
        yield {"error": f"a loss is not finite: {losses}"}


def extrapolated(timed: dict[int, float], whole: int) -> float:
    """Seconds of a step of `whole` micro-batches, on the line through two shorter ones."""
    (few, first), (many, last) = sorted(timed.items())
    each = max(0.0, (last - first) / (many - few))
    return last + each * (whole - many)


def speeds(subject: Subject, timed: dict[int, float], peak_tflops: float) -> dict[str, Any]:
    """Speed of steps, by number of micro-batches, and their share of the peak rate of matrix products."""
    config, found, work = subject.config, {}, subject.hardware_flops_per_token
    for count, seconds in timed.items():
        tokens = subject.sequences(count) * config.data.seq_len
        found[str(count)] = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "tflops": work * tokens / seconds / 1e12,
            "share_of_gemm_peak": work * tokens / seconds / 1e12 / peak_tflops,
        }
    return found


def chosen(subject: Subject) -> dict[str, Any]:
    choice = subject.plan.choice
    return {
        "micro_batch": choice.micro_batch,
        "micro_batches": subject.micro_batches,
        "band": choice.band,
        "on_host": count_homes(choice.homes),
        "tokens_per_step": subject.config.train.batch_tokens,
        "components": [vars(c) for c in subject.plan.components],
    }


def count_homes(homes: Homes) -> dict[str, int]:
    return {
        "weights": len(homes.weights),
        "state": len(homes.state),
        "stash": homes.stash,
        "carry": int(homes.carry),
    }


def memory(subject: Subject, live: LiveTensors | None) -> dict[str, Any]:
    """Peak memory so far, compared with the plan: in total, by phase and by component."""
    plan, rooms = subject.plan, subject.rooms
    if live is None:
        rooms.note()
        free, total = torch.cuda.mem_get_info(subject.device)
        phases, peak, reserved, used = rooms.peaks, max(rooms.peaks.values()), rooms.reserved, total - free
    else:
        phases, peak, reserved, used = live.phases, live.peak[GPU], live.peak[GPU], 0
    planned = phase_plans(plan)
    slabs = {f"{component}, {room}": size for (component, room), size in rooms.held().items()}
    held = sum(size for (_, room), size in rooms.held().items() if room == HOST)
    found = {
        "gpu_plan_bytes": plan.peak(GPU),
        "gpu_peak_bytes": peak,
        "gpu_reserved_bytes": reserved,
        "gpu_used_bytes": used,  # of the whole device, including CUDA's own
        "gpu_plan_over_peak": plan.peak(GPU) / peak,
        "gpu_peak_bytes_by_phase": dict(phases),
        "gpu_plan_bytes_by_phase": planned,
        "gpu_plan_over_peak_by_phase": {p: planned[p] / phases[p] for p in planned if phases.get(p)},
        "slabs_bytes": slabs,
        "host_plan_bytes": plan.peak(HOST),
        "host_held_bytes": held,
        "peak_rss_bytes": int(rss_gib() * GIB),
    }
    return {"memory": found}


def phase_plans(plan: planning.Plan) -> dict[str, int]:
    """Planned bytes on the GPU by phase, including what is always there."""
    own = [c for c in plan.components if c.room == GPU]
    always = sum(c.bytes for c in own if not c.phase)
    phases = dict.fromkeys(c.phase for c in own if c.phase)
    return {phase: always + sum(c.bytes for c in own if c.phase == phase) for phase in phases}
