"""Models in and out: weights of a run, and folders and files that other programs read and write.

stored      a model on the disk, whoever wrote it: its shape, its tokenizer, and its weights one by one
families    config.json of Hugging Face models: which of them is a model of ours, and what it says
folder      a folder of safetensors files
importing   a model as a run that has not begun
target      what is exported appears whole or not at all
"""

from lowres.exchange.importing import Imported, import_model
from lowres.exchange.stored import (
    StoredModel,
    initialize_from,
    open_model,
    require_ids,
    with_model_of,
)

__all__ = [
    "Imported",
    "StoredModel",
    "import_model",
    "initialize_from",
    "open_model",
    "require_ids",
    "with_model_of",
]
