"""Data: from the documents of a source (`lowres.text`) to batches of tokens.

survey      the first pass: a sample for the tokenizer, documents held out for validation
tokenizer   text <-> ids, lossless
prepare     the second pass: documents as bos, tokens, eos, cut into shards
shards      files of token ids, verified and read in pieces
tokenised   sources of token ids, read where they are
stream      the same shards, written while training reads them
batches     step -> [sequences, seq_len + 1], a pure function of seed and step
manifest    the records of a folder of prepared data: data.json and progress.json
folder      the folder of prepared data, and which job may write to it
inspection  what a source holds, before anything is written
opening     prepares and opens the data of a configuration
"""

from lowres.data.batches import TokenData
from lowres.data.inspection import inspect
from lowres.data.opening import cache_bytes, open_data, open_text
from lowres.data.prepare import prepare
from lowres.data.tokenizer import Tokenizer

__all__ = ["TokenData", "Tokenizer", "cache_bytes", "inspect", "open_data", "open_text", "prepare"]
