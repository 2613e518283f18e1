"""From the configuration to the chats or pairs of a run: prepare them if needed, and open them."""

from __future__ import annotations

from lowres.config import DataConfig, ObjectiveConfig
from lowres.data.chat.chat_data import ChatData, Packed, all_packed
from lowres.data.chat.encoder import ChatEncoder
from lowres.data.chat.template import Template, open_template
from lowres.data.folder import left_out_notes
from lowres.data.manifest import read_complete
from lowres.data.opening import (
    check_pieces,
    ensure_prepared,
    given_tokenizer,
    validation_folder,
    validation_notes,
)
from lowres.data.tokenizer import Tokenizer, with_chat_template
from lowres.errors import UserError
from lowres.ranks import say


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
    template = open_template(config.chat_template, tokenizer)
    chats = chat_encoder(config, objective, tokenizer, template)
    folder = ensure_prepared(config, vocab_size, progress, chats)
    validation = validation_folder(config, tokenizer, progress, chats)
    data = ChatData(folder, config.seq_len, seed, validation)
    data.tokenizer = with_chat_template(tokenizer, template.source)  # for all who use the model
    entries, answers = read_complete(folder).train, data.validation_answers
    data.notes += [*chats.notes, *validation_notes(config, folder, entries, validation, answers)]
    return data


def open_other_chats(
    asked: DataConfig, config: DataConfig, objective: ObjectiveConfig, tokenizer: Tokenizer
) -> Packed:
    """The chats or pairs of another source than a run was trained on. asked: says which, and how to read it.
    config, tokenizer: of the run."""
    own = {"seq_len": config.seq_len, "cache": config.cache, "val_source": asked.source}
    asked = asked.model_copy(update=own)
    chats = chat_encoder(asked, objective, tokenizer, open_template(asked.chat_template, tokenizer))
    folder = validation_folder(asked, tokenizer, False, chats)
    assert folder is not None
    packed = all_packed(folder, asked.seq_len)
    for note in left_out_notes(read_complete(folder)):
        say(f"note: {asked.source}: {note}")
    return packed


def chat_encoder(
    config: DataConfig, objective: ObjectiveConfig, tokenizer: Tokenizer, template: Template
) -> ChatEncoder:
    """How the chats of a config become tokens."""
    return ChatEncoder(
        tokenizer, template, objective.form, config.seq_len, objective.train_on, config.bad_rows
    )
