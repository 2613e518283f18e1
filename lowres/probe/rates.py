"""The rates of a machine, measured for a few seconds with the functions that a run uses.

Inputs are random, because a chip may be faster on zeros. On CUDA all shapes are the real ones; on a CPU they
are cut to slices of a layer, so that a 7B model also takes only seconds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowres.config import Config, ModelConfig
from lowres.engine.common import EngineSettings, sum_of_squares
from lowres.engine.fused import DenseMatrix, FusedOperations, Int8Matrix, Operand
from lowres.engine.working import Gradient, WorkingMatrix, cross_entropy
from lowres.errors import DoesNotFit
from lowres.kernels import loss as loss_kernels
from lowres.kernels.product import along_sum
from lowres.kernels.quantise import quantise_rows
from lowres.memory import Plan
from lowres.model import PLAIN, Positions, block, empty_units, initialize, rope_tables, unit_specs
from lowres.optim import make_optimizer
from lowres.rooms import GPU, HOST, Mover, Rooms, is_out_of_memory
from lowres.storage import BIAS, DENSE_DTYPES, MATRIX, TensorSpec, Unit, compute_dtype

# each measurement is repeated this often, or until it has taken this many seconds
REPEATS, ENOUGH_SECONDS = 5, 0.6
WARM_UP_SECONDS = 0.05  # on CUDA, so that the clocks are at full speed
# sizes of slices on a CPU: tokens and operations of a product, elements of the residual stream, logits
CPU_TOKENS, CPU_FLOPS, CPU_ELEMENTS, CPU_LOGITS = 512, 4_000_000_000, 1 << 20, 1 << 23
COPY_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates of a machine. None: the run does no such work."""

    device: str
    compute: str  # number format of the products
    products_tflops: float  # x W^T, with the shapes of a block
    backward_products_tflops: float  # dy W, and dy^T x added to a gradient
    block_forward_us: float  # microseconds per token and block without products: norms, attention, SwiGLU
    block_backward_us: float  # recomputed and differentiated
    loss_us: float  # microseconds per token from logits to their gradient
    to_gpu_gb_s: float  # 10^9 bytes per second
    to_host_gb_s: float
    dequantise_g_s: float | None  # 10^9 elements per second
    update_g_s: float  # the rule without `Rule.product_flops`, and the rounding into the stored format
    update_products_tflops: float | None  # these products; also None if they take no time that is seen


def measure(config: Config, plan: Plan, device: torch.device) -> Rates:
    """Measure for a few seconds. Raises DoesNotFit if a layer does not fit on the GPU."""
    compute = compute_dtype(config.memory.activations_in, device)
    try:
        forward, backward = _products(config, plan, device, compute)
        others = _beside_products(config, plan, device, compute)
        loss = _loss(config, plan, device, compute)
        to_gpu, to_host = _copies(device)
        dequantise, update, update_products = _weights(config, device, compute)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"--probe: the GPU is full ({str(error).splitlines()[0]}); end other programs that use it"
        ) from None
    return Rates(
        device=device_name(device),
        compute="int8" if config.memory.compute == "int8" else str(compute).removeprefix("torch."),
        products_tflops=forward / 1e12,
        backward_products_tflops=backward / 1e12,
        block_forward_us=others[0] * 1e6,
        block_backward_us=others[1] * 1e6,
        loss_us=loss * 1e6,
        to_gpu_gb_s=to_gpu / 1e9,
        to_host_gb_s=to_host / 1e9,
        dequantise_g_s=None if dequantise is None else dequantise / 1e9,
        update_g_s=update / 1e9,
        update_products_tflops=None if update_products is None else update_products / 1e12,
    )


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU the device time only."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after warm-up calls."""
    began = time.perf_counter()
    while True:
        work()
        if device.type != "cuda":
            break
        torch.cuda.synchronize(device)
        if time.perf_counter() - began > WARM_UP_SECONDS:
            break
    found: list[float] = []
    while len(found) < REPEATS and sum(found) < ENOUGH_SECONDS:
        found.append(timed(work, device))
    return statistics.median(found)


def _products(config: Config, plan: Plan, device: torch.device, compute: torch.dtype) -> tuple[float, float]:
    """Operations per second of the products of a block, forward and backward, over all its matrices."""
    tokens = plan.micro_batch * config.data.seq_len
    if device.type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    settings = EngineSettings.of(config, plan.choice, device, adapted=False)
    shapes = Counter(s.padded(settings.pad) for s in _block(config.model) if len(s.shape) == 2)
    operations = forward = backward = 0.0
    for (rows, columns), count in shapes.items():
        part = rows
        if device.type == "cpu":
            part = min(rows, max(1, CPU_FLOPS // (2 * tokens * columns)))
        x, dy = _random((tokens, columns), compute, device), _random((tokens, part), compute, device)
        grad = torch.zeros(part, columns, dtype=torch.promote_types(compute, torch.float32), device=device)
        values = _random((part, columns), compute, device)
        with torch.no_grad():
            ahead, back = _product(settings, values, grad, x, dy)
            times = count * rows / part
            forward += times * _seconds(ahead, device)
            backward += times * _seconds(back, device)
        operations += 2 * tokens * rows * columns * count
    return operations / forward, 2 * operations / backward


def _product(
    settings: EngineSettings, values: Tensor, grad: Tensor, x: Tensor, dy: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A product of a matrix as the run computes it, forward and backward. INT8 includes the quantisation of
    gradients; that of activations is done with the norm or SwiGLU before the product."""
    gradient = Gradient(grad)
    if not settings.fused:
        plain = WorkingMatrix(values, gradient)
        return partial(plain, x), partial(plain.backward, dy, x)
    matrix: DenseMatrix | Int8Matrix = DenseMatrix(values, gradient)
    if settings.int8:
        weight = quantise_rows(values)
        matrix = Int8Matrix(weight, along_sum(weight.codes), gradient, settings.wide_gradients)
    operand = Operand(x, quantise_rows(x) if settings.int8 else None, (len(x),))
    return partial(matrix.product, operand, torch.empty_like(dy)), partial(matrix.backward, dy, operand, None)


def _block(model: ModelConfig) -> tuple[TensorSpec, ...]:
    return unit_specs(model)[1].tensors


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).mul_(0.02).to(dtype)


class _ReadyMatrix:
    """`engine.fused.Matrix` whose result and the gradient of its input exist already."""

    def __init__(self, y: Tensor, dx: Tensor, codes: bool) -> None:
        self.codes, self.dense, self.rows = codes, not codes, y.shape[-1]
        self._dx = dx.flatten(0, -2)

    def product(self, x: Operand, out: Tensor) -> Tensor:
        return out

    def backward(self, dy: Tensor, x: Operand, dx: Tensor | None) -> Tensor:
        return self._dx


class _Ready(torch.autograd.Function):
    """Replaces a product: its result and the gradient of its input exist already."""

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
    """Seconds per token of everything in a block except its matrix products: in the forward pass, and in
    recomputation with backward. On a CPU some heads are measured, and the time is scaled to all."""
    length, sequences = config.data.seq_len, plan.micro_batch
    model = _slice(config.model, length, device)
    if device.type == "cpu":
        sequences = max(1, min(sequences, CPU_ELEMENTS // (length * model.dim)))
    settings = EngineSettings.of(config, plan.choice, device, adapted=False)
    operations = FusedOperations() if settings.fused else PLAIN
    streams = {
        width: _random((sequences, length, width), compute, device)
        for width in {size for spec in _block(model) if len(spec.shape) == 2 for size in spec.shape}
    }
    weights: dict[str, Any] = {}
    for spec in _block(model):
        if len(spec.shape) == 2:
            y, dx = streams[spec.shape[0]], streams[spec.shape[1]]
            if settings.fused:
                weights[spec.role] = _ReadyMatrix(y, dx, settings.int8)
            else:
                weights[spec.role] = lambda x, y=y, dx=dx: _Ready.apply(x, y, dx)
        elif (
            spec.kind != BIAS
        ):  # no biases: they are added in place to a product, and here products share memory
            weights[spec.role] = torch.ones(spec.shape, device=device, requires_grad=True)
    positions = Positions(*rope_tables(model, length, device))
    x, dy = _random((sequences, length, model.dim), compute, device), streams[model.dim]

    def forward() -> None:
        with torch.no_grad():
            block(x, weights, positions, model, operations)

    def backward() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.backward(block(leaf, weights, positions, model, operations), dy)

    scale = config.model.n_heads / model.n_heads / (sequences * length)
    return _seconds(forward, device) * scale, _seconds(backward, device) * scale


def _slice(model: ModelConfig, length: int, device: torch.device) -> ModelConfig:
    """One layer and almost no vocabulary; on a CPU also fewer heads, and the other widths in proportion."""
    group = model.n_heads // model.kv_heads
    heads = model.n_heads
    if device.type == "cpu":
        heads = min(heads, max(group, CPU_ELEMENTS // (length * model.head_width) // group * group))
    return model.model_copy(
        update={
            "n_layers": 1,
            "vocab_size": 2,
            "dim": max(1, model.dim * heads // model.n_heads),
            "n_heads": heads,
            "head_dim": model.head_width,
            "n_kv_heads": heads // group,
            "ffn_dim": max(1, model.ffn_dim * heads // model.n_heads),
        }
    )


def _loss(config: Config, plan: Plan, device: torch.device, compute: torch.dtype) -> float:
    """Seconds per token from logits to the loss and their gradient."""
    vocab = config.model.vocab
    chunk = min(config.memory.loss_chunk, plan.micro_batch * config.data.seq_len)
    if device.type == "cpu":
        chunk = min(chunk, max(1, CPU_LOGITS // vocab))
    fused = EngineSettings.of(config, plan.choice, device, adapted=False).fused
    # on a CPU the fused loss reads logits in the format of activations
    wide = compute if fused and device.type == "cpu" else torch.promote_types(compute, torch.float32)
    logits = _random((chunk, vocab), wide, device)
    targets = torch.arange(chunk, device=device) % vocab

    def loss() -> None:
        (loss_kernels.cross_entropy if fused else cross_entropy)(logits, targets, 1.0)
        logits.to(compute)

    with torch.no_grad():
        return _seconds(loss, device) / chunk


def _copies(device: torch.device) -> tuple[float, float]:
    """Bytes per second from host memory to the GPU and back, copied as in the engine."""
    rooms, mover, size = Rooms(device), Mover(device), COPY_BYTES[device.type]
    on_gpu, on_host = (rooms.slab("probe", room, size) for room in (GPU, HOST))
    for slab in (on_gpu, on_host):
        slab.fill_(1)  # memory that was never written may be one shared page of zeros
    to_gpu = _seconds(lambda: mover.wait(mover.fetch([(on_gpu, on_host)])), device)
    to_host = _seconds(lambda: mover.wait(mover.store([(on_host, on_gpu)])), device)
    mover.finish()
    return size / to_gpu, size / to_host


def _weights(
    config: Config, device: torch.device, compute: torch.dtype
) -> tuple[float | None, float, float | None]:
    """Elements of a block per second: dequantised (None if they are used as stored), and updated without the
    rule's products; and operations per second of these."""
    rooms, kept = Rooms(device), config.memory
    config = config.model_copy(update={"model": _slice(config.model, config.data.seq_len, device)})
    unit = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms)["layers.0"]
    optimizer = make_optimizer(config)
    optimizer.attach([unit], rooms)
    initialize([unit], config.run.seed, device)
    dequantise = None
    if DENSE_DTYPES.get(kept.weights) != compute and kept.compute != "int8":
        dequantise = _dequantise(unit, device, compute)
    grads = {s.name: _random(s.shape, torch.float32, device) for s in unit.spec.tensors}
    accepted = torch.ones((), dtype=torch.bool, device=device)

    def update() -> None:
        sum_of_squares(grads)
        optimizer.update(unit, grads, 0, 1.0, accepted)

    flops = sum(optimizer.product_flops(spec) for spec in unit.spec.tensors)
    with torch.no_grad():
        optimizer.rehearsing = flops > 0  # after the first update, a rehearsal leaves the products out
        without = _seconds(update, device)
        optimizer.rehearsing = False
        products = _seconds(update, device) - without if flops else 0.0
    numel = sum(spec.numel for spec in unit.spec.tensors)
    return dequantise, numel / without, flops / products if products > 0 else None


def _dequantise(unit: Unit, device: torch.device, compute: torch.dtype) -> float:
    specs = [spec for spec in unit.spec.tensors if spec.kind == MATRIX]
    out = torch.empty(max(spec.numel for spec in specs), dtype=compute, device=device)

    def dequantise() -> None:
        for spec in specs:
            unit.weights[spec.name].dense(compute, out[: spec.numel].view(spec.shape))

    return sum(spec.numel for spec in specs) / _seconds(dequantise, device)
