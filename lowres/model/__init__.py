"""The model: LLaMA, with options of related models.

block      one block: the table of its tensors, and the arithmetic
documents  attention and positions of documents that share a sequence and do not see each other
cached     and of new tokens, after those whose keys and values are kept
lora       low-rank adapters of its matrices
tensors    every tensor of a whole model: specification, initial values, memory
llama      the whole model as an ordinary `nn.Module`, used as the reference
"""

from lowres.model.block import (
    PLAIN,
    Operations,
    Places,
    Weight,
    attention,
    block,
    block_shapes,
    block_table,
    block_terms,
    linear,
    norm,
    not_recomputed,
    rms_norm,
    rope_frequencies,
    rope_tables,
    rotate,
    split_heads,
)
from lowres.model.cached import CachedPositions, Segment
from lowres.model.documents import Lengths, Positions, Starts, lengths_of, starting_with
from lowres.model.llama import Llama
from lowres.model.lora import Dropout, fresh_adapter
from lowres.model.tensors import (
    EMBEDDING_NAME,
    HEAD_NAME,
    INIT_STD,
    Units,
    count_parameters,
    empty_units,
    initialize,
    is_adapted,
    storage_kind,
    storage_kinds,
    unit_specs,
)

__all__ = [
    "EMBEDDING_NAME",
    "HEAD_NAME",
    "INIT_STD",
    "PLAIN",
    "CachedPositions",
    "Dropout",
    "Lengths",
    "Llama",
    "Operations",
    "Places",
    "Positions",
    "Segment",
    "Starts",
    "Units",
    "Weight",
    "attention",
    "block",
    "block_shapes",
    "block_table",
    "block_terms",
    "count_parameters",
    "empty_units",
    "fresh_adapter",
    "initialize",
    "is_adapted",
    "lengths_of",
    "linear",
    "norm",
    "not_recomputed",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "rotate",
    "split_heads",
    "starting_with",
    "storage_kind",
    "storage_kinds",
    "unit_specs",
]
