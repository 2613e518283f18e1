"""Models in and out: weights of a run, and folders and files that other programs read and write.

stored      a model on the disk, whoever wrote it: its shape, its tokenizer, and its weights one by one
families    config.json of Hugging Face models: which of them is a model of ours, and what it says
folder      a folder of safetensors files
gguf_file   a GGUF file, for llama.cpp
gguf_weights    its number formats, and what they cost
gguf_tokenizer  its tokenizer
target      what is exported appears whole or not at all
"""

from lowres.exchange.stored import (
    StoredModel,
    filled,
    initialize_from,
    open_model,
    with_model_of,
)

__all__ = [
    "StoredModel",
    "filled",
    "initialize_from",
    "open_model",
    "with_model_of",
]
