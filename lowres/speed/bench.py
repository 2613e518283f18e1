"""How fast a config trains on this machine: a few steps of its own engine on random tokens, compared with the
fastest matrix products. Nothing is read and nothing is written."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from lowres.config import Config
from lowres.device import pick_device
from lowres.errors import DoesNotFit, UserError
from lowres.meter import Meter
from lowres.probe.rates import device_name
from lowres.probe.work import model_flops_per_token
from lowres.rooms import is_out_of_memory
from lowres.speed.peak import DTYPES, gemm_peak
from lowres.speed.phases import BETWEEN, Clock, following
from lowres.speed.subject import Subject, with_random_tokens
from lowres.wording import counted


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured. Shares of the peak are None if this machine has no such products by themselves."""

    device: str
    notes: list[str]
    parameters: int
    tokens_per_step: int
    micro_batch: int
    products_in: str  # fp32, bf16 or int8
    seconds: list[float]  # of each step
    tokens_per_s: float  # from the median
    gemm_peak_tflops: float | None  # of the fastest large product in the format of the products
    model_flops_per_token: int
    hardware_flops_per_token: int
    model_share_of_peak: float | None
    hardware_share_of_peak: float | None
    peak_mem_gib: float  # as in the metrics of a run
    host_mem_gib: float
    peak_rss_gib: float
    share_by_phase: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For `lowres bench --json`."""
        return asdict(self)

    def table(self, on_gpu: bool) -> str:
        """For people. on_gpu: whether it was measured on one, which has a memory of its own."""
        gpu, host = self.peak_mem_gib, self.host_mem_gib
        peak = f"{gpu:.2f} GiB on the GPU, {host:.2f} GiB on the host" if on_gpu else f"{gpu + host:.2f} GiB"
        low, high = (self.tokens_per_step / time for time in (max(self.seconds), min(self.seconds)))
        lines = [
            *(f"note: {note}" for note in self.notes),
            f"{self.device}: {self.parameters / 1e6:,.2f} M parameters, {self.tokens_per_step:,} tokens "
            f"a step in micro-batches of {self.micro_batch} sequences",
            f"{self.tokens_per_s:,.0f} tokens/s, median of {counted(len(self.seconds), 'step')} "
            f"({low:,.0f} to {high:,.0f})",
        ]
        if self.model_share_of_peak is None or self.hardware_share_of_peak is None:
            lines.append(f"no {self.products_in} product to compare with")
        else:
            lines.append(
                f"{self.model_share_of_peak:.1%} of the fastest {self.products_in} product "
                f"({self.gemm_peak_tflops:.3g} TFLOPS) in model FLOPs, {self.hardware_share_of_peak:.1%} in "
                "hardware FLOPs"
            )
        lines.append(f"peak memory {peak}; resident {self.peak_rss_gib:.2f} GiB")
        lines.append(
            "of a step: " + ", ".join(f"{phase} {share:.1%}" for phase, share in self.share_by_phase.items())
        )
        return "\n".join(lines)


def bench(config: Config, steps: int) -> Bench:
    """Measure this many steps after one that is not timed. Raises UserError for a config that it cannot
    measure, and DoesNotFit as a run does."""
    if config.memory.engine == "deepspeed":
        raise UserError("bench: measures one process; set memory.engine=layerwise or autograd")
    if config.relora.enabled:
        raise UserError(
            "bench: it measures no adapters; add --set relora.enabled=false for the speed of the warm start"
        )
    device = pick_device(config)
    try:
        return _measure(Subject(with_random_tokens(config), device), steps)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"bench: the GPU is full ({str(error).splitlines()[0]}); lower memory.budget_gib or "
            "train.micro_batch, or end other programs that use it"
        ) from None


def _measure(subject: Subject, steps: int) -> Bench:
    device, meter = subject.device, Meter(subject.rooms)
    with meter.watch("step"):
        subject.step(None, 0)
    dtype = DTYPES[subject.products_in]
    peaks = [gemm_peak(dtype, device)]  # before and after: the speed of a machine may change
    seconds: list[float] = []
    phases: dict[str, float] = {}
    for step in range(1, steps + 1):
        clock = Clock(device.type == "cuda")
        with following(subject.rooms, clock.enter):
            seconds.append(subject.step(None, step)[0])
        for phase, ms in clock.ms_by_phase().items():
            phases[phase] = phases.get(phase, 0.0) + ms
    memory = meter.readings()  # before the products, which also take some
    peaks.append(gemm_peak(dtype, device))
    peak = max((rate for rate in peaks if rate), default=None)
    total = sum(seconds) * 1e3
    phases[BETWEEN] = max(0.0, total - sum(ms for phase, ms in phases.items() if phase != BETWEEN))
    largest = sorted(phases, key=lambda phase: -phases[phase])
    config, tokens = subject.config, subject.config.train.batch_tokens
    rate = tokens / statistics.median(seconds)
    flops = model_flops_per_token(config.model, config.data.seq_len), subject.hardware_flops_per_token
    shares = [None if peak is None else rate * own / (peak * 1e12) for own in flops]
    return Bench(
        device=device_name(device),
        notes=subject.notes,
        parameters=subject.plan.parameters,
        tokens_per_step=tokens,
        micro_batch=subject.plan.micro_batch,
        products_in=subject.products_in,
        seconds=seconds,
        tokens_per_s=rate,
        gemm_peak_tflops=peak,
        model_flops_per_token=flops[0],
        hardware_flops_per_token=flops[1],
        model_share_of_peak=shares[0],
        hardware_share_of_peak=shares[1],
        **memory,
        share_by_phase={phase: phases[phase] / total for phase in largest},
    )
