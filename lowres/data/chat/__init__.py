"""Chats: from the messages of a row to token ids, of which the assistant's are trained.

records      the messages of a row
template     a chat as text, by a template in Jinja
answers      where in that text the assistant's turns are
examination  what a template does, before it is used
pieces       the text in pieces: special tokens, and what stands between them
labels       the ids of a chat, and which of them are trained
encoder      the same as the words of shards, and what of the rows is left out
packing      examples of different lengths in few windows
chat_data    batches of examples
opening      prepares and opens the chats or pairs of a configuration
"""

from lowres.data.chat.labels import Example, encode, encode_batch, prompt
from lowres.data.chat.records import BadRow, Message
from lowres.data.chat.template import Template, open_template

__all__ = ["BadRow", "Example", "Message", "Template", "encode", "encode_batch", "open_template", "prompt"]
