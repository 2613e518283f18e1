"""Data, in the way of a token:

sources     a library, files, folders or a stream as a sequence of documents
survey      the first pass: a sample for the tokenizer, documents held out for validation
tokenizer   text <-> ids, without ever losing a byte
prepare     the second pass: documents as bos, tokens, eos, cut into shards
shards      files of token ids, read through a memory map
stream      the same shards, written while training reads them
batches     step -> [sequences, seq_len + 1], a pure function of the seed
opening     all of it, from the configuration
"""

from lowres.data.batches import TokenData
from lowres.data.opening import open_data, open_text
from lowres.data.prepare import prepare
from lowres.data.tokenizer import Tokenizer

__all__ = ["TokenData", "Tokenizer", "open_data", "open_text", "prepare"]
