"""The work of a planned step, counted exactly: floating-point operations of the matrix products, dequantised
elements, and bytes that are copied between the rooms.
"""

from __future__ import annotations

import math

import torch

from lowres.config import Config, ModelConfig
from lowres.engine import EngineSettings
from lowres.engine.layout import Layout, UnitBytes
from lowres.memory import Plan
from lowres.model import block_shapes, not_recomputed, storage_kinds, unit_specs
from lowres.optim import make_optimizer
from lowres.storage import DENSE_DTYPES, MATRIX, field_bytes, state_fields

# causal attention: its backward computes the scores again, so it has 5 products; the forward has 2
ATTENTION_BACKWARD = 2.5


def backward_passes(config: Config) -> int:
    """How many a step has: to clip, the layer-major engine takes one for the norm and one for the updates."""
    return 2 if config.optim.grad_clip and config.memory.engine == "layerwise" else 1


def flops_per_token(
    model: ModelConfig, seq_len: int, band: int, engine: str = "layerwise", passes: int = 1
) -> dict[str, int]:
    """Floating-point operations of the hardware per token of a step, by part.

    forward, recomputation, backward: products of the blocks. The layer-major recomputation stops before
    the down projection of a band's last layer; the recomputation of autograd does not, and it also repeats
    the head. head, attention: in all directions; attention counts half of the square of positions. passes:
    backward passes.
    """
    shapes = block_shapes(model)
    matrices = sum(s[0] * s[1] for s in shapes.values() if len(s) == 2)
    layers, head = model.n_layers, model.vocab * model.dim
    left_out = sum(math.prod(shapes[role]) for role in not_recomputed(model))
    skipped = -(-layers // band) * left_out if engine == "layerwise" else 0
    attention = (
        2 * seq_len * model.n_heads * model.head_width
    )  # scores and values, 2 operations each, half of the positions
    return {
        "forward": 2 * layers * matrices,
        "recomputation": passes * 2 * (layers * matrices - skipped),
        "backward": passes * 4 * layers * matrices,
        "head": passes * (6 if engine == "layerwise" else 8) * head,
        "attention": int((1 + passes * (1 + ATTENTION_BACKWARD)) * attention * layers),
    }


def update_flops(config: Config) -> int:
    """Floating-point operations of the matrix products of a step's updates (`Rule.product_flops`)."""
    optimizer = make_optimizer(config)
    return sum(optimizer.product_flops(spec) for unit in unit_specs(config.model) for spec in unit.tensors)


def step_flops(config: Config, plan: Plan) -> int:
    """Floating-point operations of the hardware in a step, with as many windows as it can have."""
    length, passes = config.data.seq_len, backward_passes(config)
    parts = flops_per_token(config.model, length, plan.choice.band, config.memory.engine, passes)
    return config.most_windows * length * sum(parts.values()) + update_flops(config)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Floating-point operations per token that the mathematics of a step needs: 6 for each parameter of a
    matrix product, and causal attention three times (forward, and two gradients). Without what is computed
    again, so it is the same for every trainer of a model."""
    matrices = sum(s[0] * s[1] for s in block_shapes(model).values() if len(s) == 2)
    products = model.n_layers * matrices + model.vocab * model.dim
    return 6 * products + 3 * model.n_layers * 2 * seq_len * model.n_heads * model.head_width


def step_bytes(config: Config, plan: Plan, compute: torch.dtype) -> tuple[int, int]:
    """Bytes that a step moves from host memory to the GPU, and back. compute: number format of the
    activations."""
    if config.memory.engine == "autograd":
        return 0, 0
    model, kept, optimizer = config.model, config.memory, make_optimizer(config)
    kinds = storage_kinds(unit_specs(model), kept.weights, kept.embeddings_kept_in)
    choice, units = plan.choice, {}
    settings = EngineSettings(
        choice.micro_batch,
        compute,
        band=choice.band,
        stash_dtype=kept.stash_dtype,
        exact_forward=kept.exact_forward,
        grad_clip=config.optim.grad_clip,
    )
    for unit in unit_specs(model):
        state = sum(field_bytes(state_fields(optimizer.unit_fields(unit))).values())
        units[unit.name] = UnitBytes.of(unit, kinds, state, settings)
    layout = Layout(model, units, settings)
    return layout.traffic(choice.homes, config.most_windows, config.data.seq_len)


def dequantised_elements(config: Config, compute: torch.dtype) -> int:
    """Elements of matrices that a step converts to the compute format."""
    model, kept = config.model, config.memory
    kinds = storage_kinds(unit_specs(model), kept.weights, kept.embeddings_kept_in)
    found, passes = 0, backward_passes(config)
    for unit in unit_specs(model):
        for spec in unit.tensors:
            multiplied = kept.compute == "int8" and spec.kind == MATRIX  # as stored
            if len(spec.shape) == 2 and DENSE_DTYPES.get(kinds[spec.name]) != compute and not multiplied:
                if kept.engine == "autograd":
                    visits = 1
                elif spec.role == "embedding":
                    visits = passes * int(model.tie_embeddings)  # it looks up rows; tied, it is also the head
                else:
                    visits = passes + (spec.role != "head")
                found += visits * spec.numel
    return found
