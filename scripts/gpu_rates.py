"""The rates of a device for the operations of a step, each measured alone. They limit the speed of a step.

On a GPU the shapes are those of LLaMA-7B. On a CPU they are small and only show that the code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lowres.config import Config
from lowres.kernels import forms
from lowres.kernels.product import along_sum, multiply
from lowres.kernels.quantise import quantise_columns, quantise_rows
from lowres.model import empty_units, initialize
from lowres.optim import make_optimizer
from lowres.rooms import GPU, HOST, Mover, Rooms
from lowres.speed import peak
from lowres.speed.peak import random, seconds
from lowres.storage import MATRIX, Unit, compute_dtype

Load = Callable[..., Config]  # a config with the given overrides


@dataclass(frozen=True)
class Shapes:
    """tokens: rows of a product. square: side of the product whose rate counts as the peak."""

    tokens: int
    dim: int
    ffn: int
    heads: int
    sequences: int
    length: int
    square: int
    copied: int


SHAPES = {
    "cuda": Shapes(8192, 4096, 11008, 32, 4, 2048, 8192, 1 << 29),
    "cpu": Shapes(64, 64, 128, 2, 1, 64, 128, 1 << 20),
}


def gemm_peak(device: torch.device) -> float:
    """TFLOPS of a large square product in the precision of training."""
    found = peak.gemm_peak(compute_dtype("auto", device), device, SHAPES[device.type].square)
    if found is None:
        raise RuntimeError(f"{device.type} has no products in the precision of training")
    return found


def products(device: torch.device) -> dict[str, Any]:
    """TFLOPS of the products of a block, in the precision of training and with INT8 codes."""
    sizes, dtype = SHAPES[device.type], compute_dtype("auto", device)
    found: dict[str, Any] = {"square": {str(dtype): tried(lambda: round(gemm_peak(device), 2))}}
    for rows, columns in ((sizes.dim, sizes.dim), (sizes.ffn, sizes.dim), (sizes.dim, sizes.ffn)):
        operations = 2 * sizes.tokens * rows * columns

        def rate(work: Callable[[], object], operations: int = operations) -> float:
            return round(operations / seconds(work, device) / 1e12, 2)

        own: dict[str, Any] = {}
        for kind in (dtype, torch.int8):
            x, w = random((sizes.tokens, columns), kind, device), random((rows, columns), kind, device)
            dy = random((sizes.tokens, rows), kind, device)
            if kind == torch.int8:
                works = {
                    "x w^T, second by columns": partial(torch._int_mm, x, w.T),
                    "dy w, second by rows": partial(torch._int_mm, dy, w),
                    "dy^T x, both by the other": partial(torch._int_mm, dy.T, x),
                }
            else:
                works = {"x w^T": partial(torch.mm, x, w.T), "dy w": partial(torch.mm, dy, w)}
                wide = {"out_dtype": torch.float32} if device.type == "cuda" else {}
                works["dy^T x, to fp32"] = partial(torch.mm, dy.T, x, **wide)
            own[str(kind)] = {name: tried(partial(rate, work)) for name, work in works.items()}
        own["int8, as the step computes"] = {
            name: tried(partial(rate, work)) for name, work in _int8_works(device, rows, columns).items()
        }
        found[f"{rows} x {columns}"] = own
    return found


def _int8_works(device: torch.device, rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """The three products of a matrix with all that belongs to them, on `lowres.kernels`."""
    sizes, dtype = SHAPES[device.type], compute_dtype("auto", device)
    x, dy = random((sizes.tokens, columns), dtype, device), random((sizes.tokens, rows), dtype, device)
    weight, a = quantise_rows(random((rows, columns), dtype, device)), quantise_rows(x)
    transposed, grad = along_sum(weight.codes), torch.zeros(rows, columns, device=device)
    y, dx, along = torch.empty_like(dy), torch.empty_like(x), along_sum(a.codes)
    return {
        "quantise x, x w^T": lambda: multiply(quantise_rows(x), *weight, y),
        "x w^T": lambda: multiply(a, *weight, y),
        "quantise dy, dy w": lambda: multiply(quantise_rows(dy, weight.scales), transposed, None, dx),
        "quantise dy, dy^T x added to fp32": lambda: multiply(
            quantise_columns(dy, a.scales), along, None, grad, add=True
        ),
    }


def tried(measure: Callable[[], Any]) -> Any:
    """The result of a measurement, or why it failed."""
    try:
        return measure()
    except (RuntimeError, NotImplementedError) as error:
        return f"error: {str(error).splitlines()[0]}"


def copies(device: torch.device) -> dict[str, Any]:
    """GB/s within the device (read plus written), and between the rooms, copied as in the engine."""
    size, rooms = SHAPES[device.type].copied, Rooms(device)
    gpu = [rooms.slab("bench", GPU, size) for _ in range(2)]
    host = [rooms.slab("bench", HOST, size) for _ in range(2)]
    for slab in (*gpu, *host):
        slab.fill_(1)  # memory that was never written may be one shared page of zeros
    within = seconds(lambda: gpu[0].copy_(gpu[1]), device)
    one, two = Mover(device), Mover(device)

    def to_gpu() -> None:
        one.wait(one.fetch([(gpu[0], host[0])]))

    def to_host() -> None:
        two.wait(two.store([(host[1], gpu[1])]))

    def both() -> None:
        events = one.fetch([(gpu[0], host[0])]), two.store([(host[1], gpu[1])])
        one.wait(events[0])
        two.wait(events[1])

    times = {"to gpu": to_gpu, "to host": to_host, "both, each way": both}
    found = {name: round(size / seconds(work, device) / 1e9, 2) for name, work in times.items()}
    one.finish()
    two.finish()
    return {"within, read and written": round(2 * size / within / 1e9, 2), **found}


def layer(load: Load, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Updating and dequantising a block: elements and bytes per second, compared with a device copy."""
    bandwidth = copies(device)["within, read and written"]
    for name, kind in (("apollo-mini", "fp32"), ("adamw", "bf16")):
        keys = f"optim.name={name}", "optim.lr=0.001", f"memory.moments={kind}"
        config = load(*keys, "memory.weights=int8", "model.n_layers=1", "model.vocab_size=300")
        unit, update = _updated(config, device)
        numel = sum(spec.numel for spec in unit.spec.tensors)
        assert unit.state_slab is not None
        least = 4 * numel + 2 * (unit.weights_slab.numel() + unit.state_slab.numel())
        yield f"update, {name}", _rate(numel, least, seconds(update, device), bandwidth)
    compute = compute_dtype(config.memory.activations_in, device)
    specs = [spec for spec in unit.spec.tensors if spec.kind == MATRIX]
    out = torch.empty(max(spec.numel for spec in specs), dtype=compute, device=device)

    def dequantise() -> None:
        for spec in specs:
            unit.weights[spec.name].dense(compute, out[: spec.numel].view(spec.shape))

    numel = sum(spec.numel for spec in specs)
    least = numel * (1 + compute.itemsize)
    yield "dequantise", _rate(numel, least, seconds(dequantise, device), bandwidth)


def _rate(numel: int, least: int, time_s: float, bandwidth: float) -> dict[str, float]:
    """least: the minimum of bytes that must be read and written."""
    return {
        "elements_g_s": round(numel / time_s / 1e9, 3),
        "least_gb_s": round(least / time_s / 1e9, 2),
        "share_of_copy": round(least / time_s / 1e9 / bandwidth, 4),
    }


def _updated(config: Config, device: torch.device) -> tuple[Unit, Callable[[], None]]:
    """A block with INT8 weights, and a call that updates it."""
    rooms = Rooms(device)
    unit = empty_units(config.model, "int8", "fp32", rooms)["layers.0"]
    optimizer = make_optimizer(config)
    optimizer.attach([unit], rooms)
    initialize([unit], 0, device)
    grads = {s.name: random(s.shape, torch.float32, device) for s in unit.spec.tensors}
    accepted = torch.ones((), dtype=torch.bool, device=device)

    def update() -> None:
        with torch.no_grad():
            optimizer.update(unit, grads, 0, 1.0, accepted)

    return unit, update


class _Chosen(TorchDispatchMode):
    """The fused attention kernels that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name and "backward" not in name:
            self.names.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


def attention(device: torch.device) -> dict[str, Any]:
    """Causal attention: TFLOPS (counting half of the square of positions) and the chosen kernel."""
    sizes, dtype = SHAPES[device.type], compute_dtype("auto", device)
    shape = (sizes.sequences, sizes.heads, sizes.length, sizes.dim // sizes.heads)
    q, k, v, dy = (random(shape, dtype, device).requires_grad_() for _ in range(4))
    operations = (
        2 * sizes.sequences * sizes.length**2 * sizes.dim
    )  # 2 products, 2 operations each, half of the square

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    with _Chosen() as chosen:
        forward()
    with torch.no_grad():
        ahead = seconds(forward, device)
    both = seconds(lambda: torch.autograd.grad(forward(), (q, k, v), dy), device)
    return {
        "kernel": sorted(chosen.names) or "none of the fused ones",
        "forward_tflops": round(operations / ahead / 1e12, 2),
        "forward_and_backward_tflops": round(3.5 * operations / both / 1e12, 2),
    }


def measure(load: Load, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Every rate by name, as soon as it is measured."""
    forms.enable(device.type)
    yield "copies_gb_s", copies(device)
    yield from layer(load, device)
    yield "products_tflops", products(device)
    yield "attention", tried(partial(attention, device))
