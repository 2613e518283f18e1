"""Data, in the order in which a token passes through it:

sources     standard library, files, folders or a stream as a sequence of documents
hub         the rows of a stream, over lost connections
survey      the first pass: a sample for the tokenizer, documents held out for validation
tokenizer   text <-> ids, lossless
prepare     the second pass: documents as bos, tokens, eos, cut into shards
shards      files of token ids, verified and read in pieces
stream      the same shards, written while training reads them
batches     step -> [sequences, seq_len + 1], a pure function of seed and step
turns       whose turn it is: which part of a mixture gives which sequence
mixture     several sources in given proportions, as one
base        what all data have in common
manifest    the records of a folder of prepared data: data.json and progress.json
folder      the folder of prepared data, and which job may write to it
opening     prepares and opens one source
mixing      the data of a configuration: one source or a mixture
"""

from lowres.data.base import Data
from lowres.data.batches import TokenData
from lowres.data.mixing import cache_bytes, open_data, with_tokenizer
from lowres.data.mixture import MixedData, record_of_one
from lowres.data.opening import open_text
from lowres.data.prepare import prepare
from lowres.data.tokenizer import Tokenizer

__all__ = [
    "Data",
    "MixedData",
    "TokenData",
    "Tokenizer",
    "cache_bytes",
    "open_data",
    "open_text",
    "prepare",
    "record_of_one",
    "with_tokenizer",
]
