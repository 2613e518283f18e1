"""What a config can name, without the code behind it: names, defaults, limits and texts.

optimizers  the optimizers and their keys; `lowres.rules` has their arithmetic
formats     the number formats of weights; `lowres.storage` has their storage
cards       graphics cards, from their data sheets
planned     what fits them and how fast it is; written by a script
sources     where text comes from, and how it is read; `lowres.text` reads it

Imports no PyTorch, so that help, completion and `lowres config` are there at once.
"""

from lowres.catalogue.cards import CARDS, CONSUMER, Card, find_card, recognise
from lowres.catalogue.formats import WEIGHT_FORMATS, WeightFormat
from lowres.catalogue.optimizers import GROWTH, KEYS, RULES, Betas, Definition, Key
from lowres.catalogue.planned import Everything, Planned
from lowres.catalogue.planned import read as read_planned
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
    "CARDS",
    "CHATS",
    "CONSUMER",
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
    "Card",
    "Definition",
    "Everything",
    "Key",
    "Planned",
    "Source",
    "WeightFormat",
    "find_card",
    "hub_name",
    "is_stream",
    "read_planned",
    "recognise",
]
