"""Models in and out: weights of a run, and folders and files that other programs read and write.

stored      a model on the disk, whoever wrote it: its shape, its tokenizer, and its weights one by one
families    config.json of Hugging Face models: which of them is a model of ours, and what it says
describing  and one of a model of ours
folder      a folder of safetensors files
own         what an exported folder has for this program alone
scales      and the scales of INT8 weights in it
exporting   `lowres export`: which format, in which numbers
huggingface a folder for Hugging Face's libraries
shards      its safetensors files, written a piece of a tensor at a time
casts       weights in another number format, and what that costs
card        its model card
gguf_file   a GGUF file, for llama.cpp
gguf_weights    its number formats, and what they cost
gguf_tokenizer  its tokenizer
importing   a model as a run that has not begun
using       a model in use, as it is on the disk
target      what is exported appears whole or not at all
"""

from lowres.exchange.exporting import FORMATS, export
from lowres.exchange.importing import Imported, import_model
from lowres.exchange.stored import (
    StoredModel,
    initialize_from,
    open_model,
    require_ids,
    with_model_of,
)
from lowres.exchange.using import find_model

__all__ = [
    "FORMATS",
    "Imported",
    "StoredModel",
    "export",
    "find_model",
    "import_model",
    "initialize_from",
    "open_model",
    "require_ids",
    "with_model_of",
]
