"""From the configuration to the chats or pairs of a run: prepare them if needed, and open them."""

from __future__ import annotations

from functools import partial

from lowres.config import DataConfig, ObjectiveConfig
from lowres.data.chat.chat_data import ChatData
from lowres.data.chat.encoder import ChatEncoder
from lowres.data.chat.labels import encode
from lowres.data.chat.template import open_template
from lowres.data.manifest import Chats, read_complete
from lowres.data.opening import (
    check_pieces,
    ensure_prepared,
    given_tokenizer,
    validation_folder,
    validation_notes,
)
from lowres.data.tokenizer import Tokenizer
from lowres.errors import UserError


def open_chats(
    config: DataConfig, objective: ObjectiveConfig, vocab_size: int | None, seed: int, progress: bool
) -> ChatData:
    """The chats or pairs of the config's source, prepared first if needed, also if they are on the hub. See
    `mixing.open_data`."""
    tokenizer = given_tokenizer(config)
    if tokenizer is None or not tokenizer.has_text:
        raise UserError(
            f'data.tokenizer: objective.name = "{objective.name}" needs the tokenizer of the model; give it, '
            "or begin with weights (--init-from), which bring theirs"
        )
    check_pieces(tokenizer.vocab_size, vocab_size)
    chats = chat_encoder(config, objective, tokenizer)
    folder = ensure_prepared(config, vocab_size, progress, chats)
    validation = validation_folder(config, tokenizer, progress, chats)
    data = ChatData(folder, config.seq_len, seed, validation)
    data.notes += validation_notes(config, folder, read_complete(folder).train, validation)
    return data


def chat_encoder(config: DataConfig, objective: ObjectiveConfig, tokenizer: Tokenizer) -> ChatEncoder:
    """How the chats of a config become tokens."""
    template = open_template(config.chat_template, tokenizer)
    label = partial(encode, tokenizer, template, train_on=objective.train_on, max_length=config.seq_len)
    return ChatEncoder(
        label,
        Chats(
            form=objective.form,
            template=template.fingerprint,
            train_on=objective.train_on,
            seq_len=config.seq_len,
            bad_rows=config.bad_rows,
        ),
    )
