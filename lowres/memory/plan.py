"""The plan as a record: its components, compared with budgets and this machine, and messages for the user."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowres.engine import Choice
from lowres.errors import DoesNotFit
from lowres.rooms import GPU, HOST, Component
from lowres.wording import counted

GIB = 1 << 30
DISK = "disk"
# bytes a second that are assumed for the pause of a save: copies to memory that is not page-locked, and
# writing, or reading back, with a BLAKE2b, which one core computes at 1.0 to 1.4 GB/s
COPIED, WRITTEN = 8e9, 1e9


@dataclass(frozen=True)
class Crew:
    """The ranks of a run, and how many of them share the host memory of a machine."""

    ranks: int = 1
    here: int = 1


@dataclass(frozen=True)
class Plan:
    """All components of a run, or of one of its ranks, and the choice for it."""

    components: tuple[Component, ...]
    choice: Choice
    parameters: int
    batch_tokens: int
    budgets: dict[str, int | None]  # bytes by room; None is no limit
    crew: Crew = Crew()
    alternatives: tuple[tuple[str, Plan], ...] = ()  # settings that may fit if this does not
    kept_of_a_token: int = 0  # bytes of its keys and values when texts are sampled
    seq_len: int = 0

    @property
    def micro_batch(self) -> int:
        return self.choice.micro_batch

    def peak(self, room: str) -> int:
        """Bytes in a room when it is fullest."""
        own = [c for c in self.components if c.room == room]
        phases = {c.phase for c in own if c.phase}
        return sum(c.bytes for c in own if not c.phase) + max(
            (sum(c.bytes for c in own if c.phase == phase) for phase in phases), default=0
        )

    def size(self, name: str, room: str | None = None) -> int:
        """Bytes of a component, in one room or in all."""
        return sum(c.bytes for c in self.components if c.name == name and room in (None, c.room))

    @property
    def excess(self) -> int:
        """Bytes beyond the budgets."""
        limits = ((room, budget) for room, budget in self.budgets.items() if budget is not None)
        return sum(max(0, self.peak(room) - budget) for room, budget in limits)

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what to change; one line per problem."""
        found = []
        for room, key in ((GPU, "memory.budget_gib"), (HOST, "memory.host_budget_gib")):
            budget, peak = self.budgets[room], self.peak(room)
            if budget is not None and peak > budget:
                largest = max((c for c in self.components if c.room == room), key=lambda c: c.bytes)
                fitting = [name for name, other in self.alternatives if not other.problems]
                found.append(
                    f"{key}: {self._whose} needs {peak / GIB:.2f} GiB of {room} memory, but the budget is "
                    f"{budget / GIB:.2f} GiB; the largest part is the {largest.name} "
                    f"({largest.bytes / GIB:.2f} GiB); "
                    f"{_would_fit(fitting) or _REMEDIES.get(largest.name, _SMALLER)}"
                )
        return found

    @property
    def _whose(self) -> str:
        return "the run" if self.crew.ranks == 1 else f"each of {self.crew.ranks} ranks"

    def lacks(self, device: torch.device) -> dict[str, tuple[int, int]]:
        """Rooms in which this machine has too little memory right now: bytes needed and bytes free. For the
        host, the need of all ranks on this machine."""
        needs = {GPU: self.peak(GPU), HOST: self.peak(HOST) * self.crew.here}
        if device.type == "cpu":  # one memory for both
            needs = {HOST: needs[GPU] * self.crew.here + needs[HOST]}
        frees = {room: device_bytes(device) if room == GPU else host_bytes() for room in needs}
        return {room: (need, free) for room, need in needs.items() if (free := frees[room]) and need > free}

    def as_dict(self) -> dict[str, Any]:
        """The plan for `lowres plan --json`."""
        return {
            "gpu_peak_bytes": self.peak(GPU),
            "host_peak_bytes": self.peak(HOST),
            "disk_bytes_per_checkpoint": self.peak(DISK),
            "kv_bytes_per_token": self.kept_of_a_token,
            "save_pause_s": dict(zip(("beside", "waiting"), self.pauses(), strict=True)),
            "components": [vars(c) for c in self.components],
            "fits": not self.problems,
            "parameters": self.parameters,
            "tokens_per_step": self.batch_tokens,
            "micro_batch": self.choice.micro_batch,
            "band": self.choice.band,
            "ranks": self.crew.ranks,
            "on_host": self._on_host(),
        }

    def _on_host(self) -> dict[str, Any]:
        homes = self.choice.homes
        return {
            "weights": sorted(homes.weights),
            "state": sorted(homes.state),
            "stash": homes.stash,
            "carry": homes.carry,
        }

    def in_words(self, device: torch.device) -> str:
        """The peak of each memory that the device has."""
        gpu, host = self.peak(GPU) / GIB, self.peak(HOST) / GIB
        if device.type == "cpu":  # one memory for both
            return f"{gpu + host:.2f} GiB of memory"
        return f"{gpu:.2f} GiB on the GPU, {host:.2f} GiB on the host"

    def table(self) -> str:
        """The plan for people."""
        lines = [f"{'component':<38}{'room':<6}{'GiB':>10}   alive"]
        for c in self.components:
            lines.append(f"{c.name:<38}{c.room:<6}{c.bytes / GIB:>10.3f}   {c.phase or 'always'}")
        for room in (GPU, HOST, DISK):
            budget = self.budgets.get(room)
            limit = "" if budget is None else f"   budget {budget / GIB:.2f}"
            name = "disk per checkpoint" if room == DISK else f"{room} peak"
            lines.append(f"{name:<44}{self.peak(room) / GIB:>10.3f}{limit}")
        lines += [self._on_saving(), self._on_sampling()]
        pieces = counted(self.choice.micro_batch, "sequence")
        lines.append(
            f"{self.parameters / 1e6:.1f} M parameters, {self.batch_tokens:,} tokens a step, micro-batches "
            f"of {pieces}, bands of {counted(self.choice.band, 'layer')}"
        )
        if self.crew.ranks > 1:
            lines.append(
                f"the numbers are for each of {self.crew.ranks} ranks, {self.crew.here} on a machine"
            )
        if self.hosted() or not any(c.room == HOST for c in self.components):
            lines.append(f"in host memory between uses: {self.hosted() or 'nothing'}")
        return "\n".join(lines)

    def _on_saving(self) -> str:
        copied, written = self.pauses()
        return (
            f"a save: training waits {copied:.1f} s for a copy in host memory where that has room, else "
            f"{written:.1f} s for the disk (at {COPIED / 1e9:g} and {WRITTEN / 1e9:g} GB/s)"
        )

    def _on_sampling(self) -> str:
        whole = self.kept_of_a_token * self.seq_len
        return (
            f"sampling: keys and values take {self.kept_of_a_token / 1024:,.4g} KiB a token of a text, "
            f"{whole / GIB:.3f} GiB for data.seq_len"
        )

    def pauses(self) -> tuple[float, float]:
        """Seconds for which training waits for a save: beside training, and otherwise."""
        return self.peak(DISK) / COPIED, self.peak(DISK) * (1 / WRITTEN + 1 / WRITTEN)

    def hosted(self) -> str:
        """What is in host memory between its uses, in words."""
        homes = self.choice.homes
        parts = {
            f"weights of {counted(len(homes.weights), 'unit')}": len(homes.weights),
            f"optimizer state of {counted(len(homes.state), 'unit')}": len(homes.state),
            f"the inputs of {counted(homes.stash, 'band')} (stash)": homes.stash,
            "the carry": int(homes.carry),
        }
        return ", ".join(text for text, count in parts.items() if count)


_SMALLER = "lower train.micro_batch or take a smaller model.preset"
_REMEDIES = {
    "keys and values": "sample fewer or shorter texts",
    "stash": "lower train.batch_tokens, raise memory.band or set memory.stash_dtype=int8",
    "carry": "lower train.batch_tokens",
    "gradient buffer": "lower memory.band; if it is auto, raise memory.host_budget_gib or lower "
    "train.batch_tokens, so that the stash fits the host with a smaller one",
    "transfer of layers": "lower memory.band; if it is auto, raise memory.host_budget_gib, so that the stash "
    "fits the host with a smaller one; or set memory.moments=int8",
    "activations inside a layer": "lower train.micro_batch or memory.band",
    "loss chunk": "lower memory.loss_chunk",
    "optimizer state": "set memory.moments=int8, or optim.name=apollo-mini, which needs almost none",
    "master copy": "set memory.master_dtype=bf16 or memory.master=none",
    "accumulated gradients": "set memory.engine=layerwise",
    "model in compute precision": "set memory.engine=layerwise",
}


def _would_fit(names: list[str]) -> str:
    """The smallest change that keeps DeepSpeed, and the smallest that does not."""
    kinds = [[n for n in names if n.startswith("memory.engine") is other] for other in (False, True)]
    least = [kind[0] for kind in kinds if kind]
    return "what fits: " + ", or ".join(least) if least else ""


def require_fit(plan: Plan) -> None:
    """Raise DoesNotFit with one line if the plan exceeds a budget."""
    if plan.problems:
        raise DoesNotFit(plan.problems[0])


def require_machine(plan: Plan, device: torch.device) -> None:
    """Raise DoesNotFit with one line if this machine has less free memory than the plan needs."""
    for room, (need, free) in plan.lacks(device).items():
        fitting = [name for name, p in plan.alternatives if not (p.problems or p.lacks(device))]
        raise DoesNotFit(
            f"the run needs {need / GIB:.2f} GiB of {room} memory, this machine has {free / GIB:.2f} GiB "
            f"free; {_would_fit(fitting) or '`lowres plan` shows what needs it'}"
        )


def device_bytes(device: torch.device) -> int | None:
    """Free memory of the room `gpu`: of the CUDA device, or of the host on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_bytes()


def host_bytes() -> int | None:
    """Host memory that is available without swapping, also in a container; None if the system does not
    report it."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
        return min([available, *_container_bytes()])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _container_bytes() -> list[int]:
    """What is left of the memory limit of this process's control group, if it has one. Cached files count
    as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [limit - used + int(parts["inactive_file"]) + int(parts["active_file"])]
    except (OSError, ValueError, KeyError):  # no such files, or "max"
        return []
