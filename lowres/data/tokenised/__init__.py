"""Corpora that are tokenised already, read where they are.

files        ids in a file, read in pieces, and where its documents begin
raw          nothing but ids: nanoGPT, llama2.c, OLMo
llm_c        a header of 1,024 bytes: llm.c, modded-nanogpt
megatron     a .bin with its .idx: Megatron-LM, GPT-NeoX; also written here, for `columns`
npy          an array of numpy
columns      a column of Arrow or parquet
documents    how the documents of a corpus are separated
corpus       training and validation ids of a source, with all checks
"""

from lowres.data.tokenised.corpus import Corpus, count_ids, ids_of, open_corpus
from lowres.data.tokenised.files import Part

__all__ = ["Corpus", "Part", "count_ids", "ids_of", "open_corpus"]
