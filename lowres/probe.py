"""How fast a run will be: a few seconds of measuring give rates, and the work of a planned step is
divided by them.

The work is counted exactly: floating-point operations of the matrix products, elements that are
dequantised and updated, bytes that pass between the rooms. The rates are those of the run's own
functions, on random numbers, since a chip may be faster on zeros. On CUDA all shapes are the real ones;
on a CPU they are cut to slices of a layer, so that a 7B model takes seconds too.

What is in no rate: reading the batch, the embedding's lookup, evaluation and checkpoints.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowres.config import Config, ModelConfig
from lowres.engine.common import EngineSettings, sum_of_squares
from lowres.engine.layout import Layout, UnitBytes
from lowres.engine.working import WorkingMatrix, cross_entropy
from lowres.errors import DoesNotFit, UserError
from lowres.memory import Plan
from lowres.model import block, block_shapes, empty_units, initialize, rope_tables, storage_kinds, unit_specs
from lowres.optim import make_optimizer
from lowres.rooms import GPU, HOST, Mover, Rooms
from lowres.storage import (
    DENSE_DTYPES,
    MATRIX_ROLES,
    Unit,
    compute_dtype,
    field_bytes,
    state_fields,
)

SECONDS_A_DAY = 86400
# a measurement is repeated so often, or fewer times once it has taken so many seconds
REPEATS, ENOUGH_SECONDS = 5, 0.6
WARM_UP_SECONDS = 0.05  # on CUDA, so that clocks are up
# slices on a CPU: tokens and operations of a product, elements of the residual stream, and logits
CPU_TOKENS, CPU_FLOPS, CPU_ELEMENTS, CPU_LOGITS = 512, 4_000_000_000, 1 << 20, 1 << 23
COPY_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
# causal attention: its backward computes the scores once more, so 5 products where the forward has 2
ATTENTION_BACKWARD = 2.5


# ---- work


def flops_per_token(model: ModelConfig, seq_len: int, band: int, engine: str = "layerwise") -> dict[str, int]:
    """Floating-point operations that the hardware does for a token of a step, by part.

    forward, recomputation, backward: products of the blocks. The layer-major recomputation stops before
    the down projection of a band's last layer; that of autograd does not, and repeats the head. head,
    attention: in all directions; attention counts half of the square of positions.
    """
    shapes = block_shapes(model)
    matrices = sum(s[0] * s[1] for s in shapes.values() if len(s) == 2)
    layers, head = model.n_layers, model.vocab * model.dim
    skipped = -(-layers // band) * shapes["down"][0] * shapes["down"][1] if engine == "layerwise" else 0
    attention = 2 * seq_len * model.dim  # scores and values, 2 operations each, half of the positions
    return {
        "forward": 2 * layers * matrices,
        "recomputation": 2 * (layers * matrices - skipped),
        "backward": 4 * layers * matrices,
        "head": (6 if engine == "layerwise" else 8) * head,
        "attention": int((2 + ATTENTION_BACKWARD) * attention * layers),
    }


def step_bytes(config: Config, plan: Plan, compute: torch.dtype) -> tuple[int, int]:
    """Bytes that a step moves from host memory to the GPU, and back. compute: number format of the
    activations."""
    if config.memory.engine == "autograd":
        return 0, 0
    model, kept, optimizer = config.model, config.memory, make_optimizer(config)
    kinds = storage_kinds(unit_specs(model), kept.weights, kept.embeddings_kept_in)
    units = {}
    for unit in unit_specs(model):
        state = sum(field_bytes(state_fields(optimizer.unit_fields(unit))).values())
        units[unit.name] = UnitBytes.of(unit, kinds, state, compute)
    choice = plan.choice
    settings = EngineSettings(
        choice.micro_batch,
        compute,
        band=choice.band,
        stash_dtype=kept.stash_dtype,
        exact_forward=kept.exact_forward,
    )
    layout = Layout(model, units, settings)
    return layout.traffic(choice.homes, config.batch_sequences, config.data.seq_len)


def dequantised_elements(config: Config, compute: torch.dtype) -> int:
    """Elements of matrices that a step turns into the number format of the computation."""
    model, kept = config.model, config.memory
    kinds = storage_kinds(unit_specs(model), kept.weights, kept.embeddings_kept_in)
    found = 0
    for unit in unit_specs(model):
        for spec in unit.tensors:
            if len(spec.shape) == 2 and DENSE_DTYPES.get(kinds[spec.name]) != compute:
                if kept.engine == "autograd":
                    visits = 1
                elif spec.role == "embedding":
                    visits = int(model.tie_embeddings)  # rows are looked up; as the head it is a matrix
                else:
                    visits = 1 if spec.role == "head" else 2
                found += visits * spec.numel
    return found


# ---- rates


@dataclass(frozen=True)
class Rates:
    """What a machine does. None: the run has nothing of the kind."""

    device: str
    compute: str  # number format of the products
    products_tflops: float  # x W^T, with the shapes of a block
    backward_products_tflops: float  # dy W, and dy^T x added to a gradient
    block_forward_us: float  # microseconds a token and block beside the products: norms, attention, SwiGLU
    block_backward_us: float  # recomputed and differentiated
    loss_us: float  # microseconds a token from logits to their gradient
    to_gpu_gb_s: float  # 10^9 bytes a second
    to_host_gb_s: float
    dequantise_g_s: float | None  # 10^9 elements a second
    update_g_s: float  # the rule and the rounding into the stored format


def measure(config: Config, plan: Plan, device: torch.device) -> Rates:
    """Measure for a few seconds. Raises DoesNotFit if the GPU has no room for a layer."""
    compute = compute_dtype(config.memory.compute, device)
    try:
        forward, backward = _products(config, plan, device, compute)
        beside = _beside_products(config, plan, device, compute)
        loss = _loss(config, plan, device, compute)
        to_gpu, to_host = _copies(device)
        dequantise, update = _weights(config, device, compute)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"--probe: no room on the GPU ({str(error).splitlines()[0]}); end what else uses it"
        ) from None
    return Rates(
        device=_device_name(device),
        compute=str(compute).removeprefix("torch."),
        products_tflops=forward / 1e12,
        backward_products_tflops=backward / 1e12,
        block_forward_us=beside[0] * 1e6,
        block_backward_us=beside[1] * 1e6,
        loss_us=loss * 1e6,
        to_gpu_gb_s=to_gpu / 1e9,
        to_host_gb_s=to_host / 1e9,
        dequantise_g_s=None if dequantise is None else dequantise / 1e9,
        update_g_s=update / 1e9,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after warm-up calls."""
    cuda = device.type == "cuda"
    began = time.perf_counter()
    while True:
        work()
        if not cuda:
            break
        torch.cuda.synchronize(device)
        if time.perf_counter() - began > WARM_UP_SECONDS:
            break
    found: list[float] = []
    while len(found) < REPEATS and sum(found) < ENOUGH_SECONDS:
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _products(config: Config, plan: Plan, device: torch.device, compute: torch.dtype) -> tuple[float, float]:
    """Operations a second of the products of a block, forward and backward, over all its matrices."""
    tokens = plan.micro_batch * config.data.seq_len
    if device.type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    shapes = Counter(shape for shape in block_shapes(config.model).values() if len(shape) == 2)
    operations = forward = backward = 0.0
    for (rows, columns), count in shapes.items():
        part = rows
        if device.type == "cpu":
            part = min(rows, max(1, CPU_FLOPS // (2 * tokens * columns)))
        x, dy = _random((tokens, columns), compute, device), _random((tokens, part), compute, device)
        grad = torch.zeros(part, columns, dtype=torch.promote_types(compute, torch.float32), device=device)
        matrix = WorkingMatrix(_random((part, columns), compute, device), grad)
        with torch.no_grad():
            times = count * rows / part
            forward += times * _seconds(partial(matrix, x), device)
            backward += times * _seconds(partial(matrix.backward, dy, x), device)
        operations += 2 * tokens * rows * columns * count
    return operations / forward, 2 * operations / backward


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).mul_(0.02).to(dtype)


class _Ready(torch.autograd.Function):
    """In the place of a product: its result and the gradient of its input are there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        ctx.dx = dx
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dx, None, None


def _beside_products(
    config: Config, plan: Plan, device: torch.device, compute: torch.dtype
) -> tuple[float, float]:
    """Seconds a token that a block takes beside its matrix products: in the forward pass, and in
    recomputation with backward. On a CPU some heads are measured and counted for all."""
    length, sequences = config.data.seq_len, plan.micro_batch
    model = _slice(config.model, length, device)
    if device.type == "cpu":
        sequences = max(1, min(sequences, CPU_ELEMENTS // (length * model.dim)))
    streams = {
        width: _random((sequences, length, width), compute, device)
        for width in (model.dim, model.kv_heads * model.head_dim, model.ffn_dim)
    }
    weights: dict[str, Any] = {}
    for role, shape in block_shapes(model).items():
        if len(shape) == 2:
            y, dx = streams[shape[0]], streams[shape[1]]
            weights[role] = lambda x, y=y, dx=dx: _Ready.apply(x, y, dx)
        else:
            weights[role] = torch.ones(shape, device=device, requires_grad=True)
    rope = rope_tables(model, length, device)
    x, dy = _random((sequences, length, model.dim), compute, device), streams[model.dim]

    def forward() -> None:
        with torch.no_grad():
            block(x, weights, rope, model)

    def backward() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.backward(block(leaf, weights, rope, model), dy)

    scale = config.model.n_heads / model.n_heads / (sequences * length)
    return _seconds(forward, device) * scale, _seconds(backward, device) * scale


def _slice(model: ModelConfig, length: int, device: torch.device) -> ModelConfig:
    """One layer and next to no vocabulary; on a CPU also fewer heads, with as much less of the rest."""
    group = model.n_heads // model.kv_heads
    heads = model.n_heads
    if device.type == "cpu":
        heads = min(heads, max(group, CPU_ELEMENTS // (length * model.head_dim) // group * group))
    return model.model_copy(
        update={
            "n_layers": 1,
            "vocab_size": 2,
            "dim": heads * model.head_dim,
            "n_heads": heads,
            "n_kv_heads": heads // group,
            "ffn_dim": max(1, model.ffn_dim * heads // model.n_heads),
        }
    )


def _loss(config: Config, plan: Plan, device: torch.device, compute: torch.dtype) -> float:
    """Seconds a token from logits to the loss and their gradient."""
    vocab = config.model.vocab
    chunk = min(config.memory.loss_chunk, plan.micro_batch * config.data.seq_len)
    if device.type == "cpu":
        chunk = min(chunk, max(1, CPU_LOGITS // vocab))
    logits = _random((chunk, vocab), torch.promote_types(compute, torch.float32), device)
    targets = torch.arange(chunk, device=device) % vocab

    def loss() -> None:
        cross_entropy(logits, targets, 1.0)
        logits.to(compute)

    with torch.no_grad():
        return _seconds(loss, device) / chunk


def _copies(device: torch.device) -> tuple[float, float]:
    """Bytes a second from host memory to the GPU, and back, as the engine copies."""
    rooms, mover, size = Rooms(device), Mover(device), COPY_BYTES[device.type]
    on_gpu, on_host = (rooms.slab("probe", room, size) for room in (GPU, HOST))
    for slab in (on_gpu, on_host):
        slab.fill_(1)  # untouched memory may be one page of zeros
    to_gpu = _seconds(lambda: mover.wait(mover.fetch([(on_gpu, on_host)])), device)
    to_host = _seconds(lambda: mover.wait(mover.store([(on_host, on_gpu)])), device)
    return size / to_gpu, size / to_host


def _weights(config: Config, device: torch.device, compute: torch.dtype) -> tuple[float | None, float]:
    """Elements of a block that are dequantised a second (None if they are used as stored), and updated."""
    rooms, kept = Rooms(device), config.memory
    config = config.model_copy(update={"model": _slice(config.model, config.data.seq_len, device)})
    unit = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms)["layers.0"]
    optimizer = make_optimizer(config)
    optimizer.attach([unit], rooms)
    initialize([unit], config.run.seed, device)
    dequantise = None
    if DENSE_DTYPES.get(kept.weights) != compute:
        dequantise = _dequantise(unit, device, compute)
    grads = {s.name: _random(s.shape, torch.float32, device) for s in unit.spec.tensors}
    accepted = torch.ones((), dtype=torch.bool, device=device)

    def update() -> None:
        sum_of_squares(grads)
        optimizer.update(unit, grads, 0, 1.0, accepted)

    with torch.no_grad():
        return dequantise, sum(s.numel for s in unit.spec.tensors) / _seconds(update, device)


def _dequantise(unit: Unit, device: torch.device, compute: torch.dtype) -> float:
    specs = [spec for spec in unit.spec.tensors if spec.role in MATRIX_ROLES]
    out = torch.empty(max(spec.numel for spec in specs), dtype=compute, device=device)

    def dequantise() -> None:
        for spec in specs:
            unit.weights[spec.name].dense(compute, out)

    return sum(spec.numel for spec in specs) / _seconds(dequantise, device)


# ---- prediction


@dataclass(frozen=True)
class Prediction:
    """A planned step at measured rates."""

    gflops_per_token: float
    to_gpu_gb: float  # moved in a step, 10^9 bytes
    to_host_gb: float
    products_s: float  # seconds of a step; these four are compute_s
    beside_products_s: float
    dequantise_s: float
    update_s: float
    compute_s: float
    transfer_s: float
    step_s: float
    limit: str  # compute or transfers
    tokens_per_s: float
    days_to_target: float
    days_per_billion_tokens: float


def predict(config: Config, plan: Plan, rates: Rates, device: torch.device) -> Prediction:
    """Seconds of a step. On CUDA transfers run beside the computation and each other, in both directions;
    on a CPU they are copies in its own time."""
    tokens, model = config.train.batch_tokens, config.model
    engine = config.memory.engine
    compute = compute_dtype(config.memory.compute, device)
    flops = flops_per_token(model, config.data.seq_len, plan.choice.band, engine)
    head_backward = 4 * model.vocab * model.dim
    forward = flops["forward"] + flops["recomputation"] + flops["head"] - head_backward
    backward = flops["backward"] + head_backward
    products = tokens * (
        forward / (rates.products_tflops * 1e12) + backward / (rates.backward_products_tflops * 1e12)
    )
    block_us = rates.block_forward_us + rates.block_backward_us
    beside = tokens * (model.n_layers * block_us + rates.loss_us) / 1e6
    dequantise = (
        dequantised_elements(config, compute) / (rates.dequantise_g_s * 1e9) if rates.dequantise_g_s else 0.0
    )
    update = plan.parameters / (rates.update_g_s * 1e9)
    compute_s = products + beside + dequantise + update

    # the plan's boundaries have the format of the device that the plan is for, which may not be here
    planned_for = torch.device("cuda" if config.run.device == "cuda" else device.type)
    fetched, stored = step_bytes(config, plan, compute_dtype(config.memory.compute, planned_for))
    directions = fetched / (rates.to_gpu_gb_s * 1e9), stored / (rates.to_host_gb_s * 1e9)
    transfer_s = max(directions) if device.type == "cuda" else sum(directions)
    step_s = max(compute_s, transfer_s) if device.type == "cuda" else compute_s + transfer_s
    return Prediction(
        gflops_per_token=sum(flops.values()) / 1e9,
        to_gpu_gb=fetched / 1e9,
        to_host_gb=stored / 1e9,
        products_s=products,
        beside_products_s=beside,
        dequantise_s=dequantise,
        update_s=update,
        compute_s=compute_s,
        transfer_s=transfer_s,
        step_s=step_s,
        limit="compute" if compute_s >= transfer_s else "transfers",
        tokens_per_s=tokens / step_s,
        days_to_target=config.train.total_steps * step_s / SECONDS_A_DAY,
        days_per_billion_tokens=1e9 / tokens * step_s / SECONDS_A_DAY,
    )


@dataclass(frozen=True)
class Probe:
    """Rates, what they mean for a run, and a note on where they are from."""

    rates: Rates
    prediction: Prediction
    target_tokens: int
    note: str

    def as_dict(self) -> dict[str, Any]:
        """For `lowres plan --probe --json`."""
        return {
            **asdict(self.rates),
            **asdict(self.prediction),
            "target_tokens": self.target_tokens,
            "note": self.note,
        }

    def table(self) -> str:
        """For people."""
        r, p = self.rates, self.prediction
        dequantised = f"{r.dequantise_g_s:.3g}" if r.dequantise_g_s else "no"
        return "\n".join(
            [
                *([f"note: {self.note}"] if self.note else []),
                f"{r.device}: {r.compute} products {r.products_tflops:.3g} TFLOPS, backward "
                f"{r.backward_products_tflops:.3g}; beside them {r.block_forward_us:.3g} and "
                f"{r.block_backward_us:.3g} us a token and block, loss {r.loss_us:.3g} us a token",
                f"copies to the GPU {r.to_gpu_gb_s:.3g} GB/s, to the host {r.to_host_gb_s:.3g} GB/s; "
                f"{dequantised} G elements/s dequantised, {r.update_g_s:.3g} updated",
                f"a step: {p.gflops_per_token:.3g} GFLOPs a token; products {p.products_s:.3g} s, beside "
                f"them {p.beside_products_s:.3g} s, dequantising {p.dequantise_s:.3g} s, updates "
                f"{p.update_s:.3g} s: compute {p.compute_s:.3g} s",
                f"transfers {p.to_gpu_gb:.3g} GB to the GPU, {p.to_host_gb:.3g} GB to the host: "
                f"{p.transfer_s:.3g} s; {p.limit} {'limits' if p.limit == 'compute' else 'limit'} the step",
                f"predicted: {p.tokens_per_s:,.4g} tokens/s, {p.days_to_target:,.3g} days for "
                f"{self.target_tokens:,} tokens, {p.days_per_billion_tokens:,.3g} days a billion tokens",
            ]
        )


def probe(config: Config, plan: Plan) -> Probe:
    """Measure the device that the run would use, or the CPU if it has none, and predict."""
    if config.memory.engine == "deepspeed":
        raise UserError("--probe: knows nothing of DeepSpeed's steps; leave it out, or use engine=layerwise")
    cuda = torch.cuda.is_available() and config.run.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    note = ""
    if config.run.device == "cuda" and not cuda:
        note = "there is no CUDA device here: rates and prediction are those of this CPU"
    rates = measure(config, plan, device)
    target = config.train.total_steps * config.train.batch_tokens
    return Probe(rates, predict(config, plan, rates, device), target, note)
