"""The work of a planned step, counted exactly: floating-point operations of the matrix products, elements
that are dequantised, bytes that pass between the rooms.
"""

from __future__ import annotations

import torch

from lowres.config import Config, ModelConfig
from lowres.engine.boundaries import boundary_bytes, make_encoding
from lowres.memory import Plan
from lowres.model import block_shapes, storage_kinds, unit_specs
from lowres.optim import make_optimizer
from lowres.storage import DENSE_DTYPES, field_bytes, state_fields, weight_fields

# causal attention: its backward computes the scores once more, so 5 products where the forward has 2
ATTENTION_BACKWARD = 2.5


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
    """Bytes that a step moves from host memory to the GPU, and back.

    compute: number format of the activations. Weights on the host are fetched in both directions, but
    those of the head once; state once; both are written back. A boundary of the stash is written once
    and read in the forward and in the backward. The carry passes once a band in the backward, and
    around the loss.
    """
    if config.memory.engine == "autograd":
        return 0, 0
    model, homes = config.model, plan.choice.homes
    fetched = stored = 0
    for name, (weights, state) in _unit_bytes(config).items():
        if name in homes.weights:
            fetched += (1 if name == "head" else 2) * weights
            stored += weights
        if name in homes.state:
            fetched += state
            stored += state

    def boundary(kind: str) -> int:
        encoding = make_encoding(kind, compute)
        return boundary_bytes(
            encoding, model.dim, config.batch_sequences, plan.micro_batch, config.data.seq_len
        )

    bands = -(-model.n_layers // plan.choice.band)
    stash = min(homes.stash, bands) * boundary(config.memory.stash_dtype)
    carry = boundary("auto") if homes.carry else 0
    exact = config.memory.exact_forward  # then the forward reads and writes the carry, not the stash
    fetched += (1 if exact else 2) * stash + (bands + 2 + (bands if exact else 0)) * carry
    stored += stash + (bands + 2 + (bands if exact else 0)) * carry
    return fetched, stored


def _unit_bytes(config: Config) -> dict[str, tuple[int, int]]:
    """Bytes of weights and state by unit."""
    model, kept = config.model, config.memory
    kinds, optimizer = (
        storage_kinds(unit_specs(model), kept.weights, kept.embeddings_kept_in),
        make_optimizer(config),
    )
    found = {}
    for unit in unit_specs(model):
        weights = weight_fields(unit, {s.name: kinds[s.name] for s in unit.tensors})
        state = state_fields(optimizer.unit_fields(unit))
        found[unit.name] = sum(field_bytes(weights).values()), sum(field_bytes(state).values())
    return found


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
