"""Text: what a source holds, as documents in a fixed order.

source       what to read, and how: the keys of [data] that determine the documents
walk         the files of a folder or a glob
archives     what is in a tar or zip file
kinds/       the kinds of file, one file each: how they are recognised and read
columns      which column of a table is the text
opening      the bytes of a file, decompressed
compression  how they are compressed
recognition  what kind of file a file is
descriptions files that describe or make the data beside them
splits       which names are for training, validation and test
card         what a data set's card says of its files
parts        the part of each file, by card or name
left_out     what is not read, and why
listing      the files of a source, and what is left out
words        the same in lines for people
connection   lost connections: how long they are waited for
remote       the bytes of a remote file, over lost connections
hub          data sets on the Hugging Face hub
documents    the documents of a source, by row
forms        whether they are text, chats or pairs
"""

from lowres.text.documents import (
    Marks,
    documents,
    fingerprint,
    numbered_documents,
    pinned,
    without_surrogates,
)
from lowres.text.forms import with_form
from lowres.text.listing import Listing, list_files
from lowres.text.source import TEST, TRAIN, VALIDATION, Source, hub_name, is_stream

__all__ = [
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Listing",
    "Marks",
    "Source",
    "documents",
    "fingerprint",
    "hub_name",
    "is_stream",
    "list_files",
    "numbered_documents",
    "pinned",
    "with_form",
    "without_surrogates",
]
