"""Text as token ids, and back, whatever kind of tokenizer a user has.

base                  what every tokenizer does; encoding on all cores in bounded memory
streaming             text of ids that come one by one
sentencepiece_model   tokenizer.model: SentencePiece, lossless or in the model's own form
sentencepiece_file    what its file says
huggingface           tokenizer.json of the `tokenizers` library
ends                  which of its tokens begin and end a document
vocabulary            vocabulary.json: ids without text
companions            what stands beside a tokenizer, and comes along in its file
conversion            a SentencePiece model as a tokenizer.json
exporting             the files of a tokenizer in a folder of a Hugging Face model
opening               which kind a file is, and where the tokenizer of a folder is
training              a new SentencePiece model
"""

from lowres.data.tokenizer.base import Special, Tokenizer
from lowres.data.tokenizer.exporting import Exported, exported
from lowres.data.tokenizer.opening import FILE_NAMES, find_tokenizer, open_tokenizer, with_chat_template
from lowres.data.tokenizer.streaming import Stream
from lowres.data.tokenizer.training import LEAST_VOCAB, check_enough_pieces, check_vocab_size, train
from lowres.data.tokenizer.vocabulary import Vocabulary

__all__ = [
    "FILE_NAMES",
    "LEAST_VOCAB",
    "Exported",
    "Special",
    "Stream",
    "Tokenizer",
    "Vocabulary",
    "check_enough_pieces",
    "check_vocab_size",
    "exported",
    "find_tokenizer",
    "open_tokenizer",
    "train",
    "with_chat_template",
]
