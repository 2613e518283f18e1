"""Data: from the documents of a source (`lowres.text`) to batches of tokens.

survey      the first pass: a sample for the tokenizer, and what is left out of the source
validation  which text is the validation data
tokenizer/  text <-> ids, whatever kind of tokenizer
chat/       chats -> ids, and which of them are trained
prepare     the second pass: documents as bos, tokens, eos, cut into shards
encoders    documents as the words of shards
chat/       chats and pairs of answers as examples, and as batches
hashes      documents by a hash of their text, to find copies
shards      files of token ids, verified and read in pieces
stored      the shards of a prepared folder
tokenised   sources of token ids, read where they are
stream      the same shards, written while training reads them
batches     step -> [sequences, seq_len + 1], a pure function of seed and step
turns       whose turn it is: which part of a mixture gives which sequence
mixture     several sources in given proportions, as one
base        what all data have in common
manifest    the records of a folder of prepared data: data.json and progress.json
folder      the folder of prepared data, and which job may write to it
inspection  what a source holds, before anything is written
overlap     how much of an evaluation is in the training text
opening     prepares and opens one source
named       validation texts with names
mixing      the data of a configuration: one source or a mixture
"""

from lowres.data.base import Data, NamedText
from lowres.data.batches import TokenData
from lowres.data.chat.chat_data import ChatData
from lowres.data.chat.opening import open_other_chats
from lowres.data.inspection import inspect
from lowres.data.mixing import cache_bytes, open_data, with_tokenizer
from lowres.data.mixture import MixedData, record_of_one
from lowres.data.opening import is_prepared, open_text, refuse_ends, source_as_asked, source_of
from lowres.data.overlap import overlap
from lowres.data.prepare import prepare
from lowres.data.tokenizer import FILE_NAMES, Tokenizer, find_tokenizer, open_tokenizer

__all__ = [
    "FILE_NAMES",
    "ChatData",
    "Data",
    "MixedData",
    "NamedText",
    "TokenData",
    "Tokenizer",
    "cache_bytes",
    "find_tokenizer",
    "inspect",
    "is_prepared",
    "open_data",
    "open_other_chats",
    "open_text",
    "open_tokenizer",
    "overlap",
    "prepare",
    "record_of_one",
    "refuse_ends",
    "source_as_asked",
    "source_of",
    "with_tokenizer",
]
