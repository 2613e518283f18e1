"""The tensors of the whole model: their specifications, number formats, initial values and memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from lowres import rng
from lowres.config import ModelConfig, ReloraConfig
from lowres.model.block import block_table
from lowres.model.lora import adapted, fresh_adapter
from lowres.rooms import GPU, HOST, Rooms
from lowres.storage import (
    ADAPTER,
    BIAS,
    EMBEDDING,
    MATRIX,
    NORM,
    TensorSpec,
    Unit,
    UnitSpec,
    field_bytes,
    weight_fields,
)
from lowres.target import row_chunks

# standard deviation of every matrix at the start, as in the LLaMA, GaLore and APOLLO code
INIT_STD = 0.02
# the names of the tensors outside the blocks
EMBEDDING_NAME, NORM_NAME, HEAD_NAME = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Units = dict[str, Unit]  # by name, in the order of the forward pass


def unit_specs(config: ModelConfig, adapters: ReloraConfig | None = None) -> list[UnitSpec]:
    """Every tensor of the model, including adapters if given, in the order of the forward pass."""
    vocab = (config.vocab, config.dim)
    found = [UnitSpec("embed", (TensorSpec(EMBEDDING_NAME, vocab, "embedding", EMBEDDING),))]
    table = [(row, row.shape(config)) for row in block_table(config)]
    for i in range(config.n_layers):
        tensors: Iterable[TensorSpec] = (
            TensorSpec(f"model.layers.{i}.{row.path}", shape, row.role, row.kind, inner=row.inner)
            for row, shape in table
        )
        if adapters is not None:
            tensors = (own for spec in tensors for own in adapted(spec, adapters))
        found.append(UnitSpec(f"layers.{i}", tuple(tensors)))
    head = [TensorSpec(NORM_NAME, (config.dim,), "norm", NORM)]
    if not config.tie_embeddings:
        head.append(TensorSpec(HEAD_NAME, vocab, "head", EMBEDDING))
    return [*found, UnitSpec("head", tuple(head))]


def count_parameters(config: ModelConfig) -> int:
    """Numbers in the weights of a model."""
    return sum(spec.numel for unit in unit_specs(config) for spec in unit.tensors)


def storage_kind(spec: TensorSpec, matrices: str, embeddings: str) -> str:
    """Number format of a tensor: as given for matrices and embeddings, fp32 for norms, biases, adapters."""
    return {MATRIX: matrices, EMBEDDING: embeddings}.get(spec.kind, "fp32")


def storage_kinds(units: Iterable[UnitSpec], matrices: str, embeddings: str) -> dict[str, str]:
    """Number format of every tensor of the units, by name."""
    specs = (spec for unit in units for spec in unit.tensors)
    return {spec.name: storage_kind(spec, matrices, embeddings) for spec in specs}


def is_adapted(units: Units) -> bool:
    """Whether the model has adapters."""
    return any(unit.spec.adapters for unit in units.values())


def empty_units(
    config: ModelConfig,
    matrices: str,
    embeddings: str,
    rooms: Rooms,
    on_host: Collection[str] = (),
    adapters: ReloraConfig | None = None,
) -> Units:
    """Storage for the whole model; matrices and embeddings are int8, bf16 or fp32. The units named in
    `on_host` keep their weights on the host."""
    found = {}
    for unit in unit_specs(config, adapters):
        own = storage_kinds([unit], matrices, embeddings)
        size = sum(field_bytes(weight_fields(unit, own)).values())
        slab = rooms.slab("weights", HOST if unit.name in on_host else GPU, size)
        found[unit.name] = Unit(unit, own, slab)
    return found


def initialize(units: Iterable[Unit], seed: int, device: torch.device) -> None:
    """Set initial values by the kind of tensor: norms 1, biases 0, A of an adapter Kaiming-uniform and B
    zero, everything else normal with standard deviation INIT_STD."""
    for unit in units:
        for spec in unit.spec.tensors:
            unit.fill(spec.name, _initial_rows(spec, seed, device))


def _initial_rows(spec: TensorSpec, seed: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 rows): the initial values of a tensor, in pieces."""
    if spec.kind in (NORM, BIAS):
        yield 0, torch.full(spec.shape, float(spec.kind == NORM), device=device)
        return
    if spec.kind == ADAPTER:
        yield 0, fresh_adapter(spec, seed, 0, device)
        return
    key = rng.make_key(seed, "initial weight", spec.name)
    length = spec.shape[1]
    for rows in row_chunks(spec.shape, device):
        count = (rows.stop - rows.start) * length
        values = rng.normal(key, rows.start * length, count, device).mul_(INIT_STD)
        yield rows.start, values.view(-1, length)
