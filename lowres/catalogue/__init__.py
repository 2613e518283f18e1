"""What a config can name, without the code behind it: names, defaults, limits and texts.

optimizers  the optimizers and their keys; `lowres.rules` has their arithmetic
formats     the number formats of weights; `lowres.storage` has their storage
sources     where text comes from, and how it is read; `lowres.text` reads it

Imports no PyTorch, so that help, completion and `lowres config` are there at once.
"""

from lowres.catalogue.formats import WEIGHT_FORMATS, WeightFormat
from lowres.catalogue.optimizers import GROWTH, KEYS, RULES, Betas, Definition, Key
from lowres.catalogue.sources import CHATS, PAIRS, TEXT, Source, hub_name, is_stream
from lowres.catalogue.tensors import (
    ADAPTER,
    BIAS,
    EMBEDDING,
    EVERYTHING,
    MATRIX,
    NORM,
    ONLY_MATRICES,
    WITHOUT_NORMS,
)

__all__ = [
    "ADAPTER",
    "BIAS",
    "CHATS",
    "EMBEDDING",
    "EVERYTHING",
    "GROWTH",
    "KEYS",
    "MATRIX",
    "NORM",
    "ONLY_MATRICES",
    "PAIRS",
    "RULES",
    "TEXT",
    "WEIGHT_FORMATS",
    "WITHOUT_NORMS",
    "Betas",
    "Definition",
    "Key",
    "Source",
    "WeightFormat",
    "hub_name",
    "is_stream",
]
