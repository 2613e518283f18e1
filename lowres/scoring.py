"""The scores of a model on the validation data of its run or on another source, as a run itself evaluates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lowres import baseline
from lowres.baseline import BASELINE
from lowres.config import Config, DataConfig
from lowres.data import (
    ChatData,
    Data,
    Tokenizer,
    open_data,
    open_other_chats,
    open_text,
    source_of,
    with_tokenizer,
)
from lowres.data.batches import count_targets
from lowres.data.chat.chat_data import Packed
from lowres.data.validation import too_few
from lowres.device import pick_device
from lowres.engine import Engine
from lowres.errors import UserError
from lowres.evaluate import evaluate_pairs, evaluate_parts, sums_of_examples
from lowres.exchange import find_model
from lowres.objective import Preference, make_objective
from lowres.ranks import say
from lowres.runs import load_weights, newest
from lowres.scores import OF
from lowres.start import begin_weights


def score(folder: Path, asked: DataConfig | None) -> dict[str, float]:
    """`evaluate_parts` or, of pairs, `evaluate_pairs`, over all validation data, with val_tokens, how many
    tokens these are, of all and of each part. folder: a run, a checkpoint or a Hugging Face folder. asked:
    another source, and how to read it; None for the data of the run. Prints notes. Raises UserError."""
    model = find_model(folder)
    if asked is None and not model.has_data:
        raise UserError(f"--data: {folder} was not trained here, so it has no data; give a SOURCE")
    config, engine, tokenizer = model.open()
    objective = make_objective(config.objective)
    if not isinstance(objective, Preference):
        parts, beside = _windows(asked, config, tokenizer)
        scores = evaluate_parts(engine, parts, tokenizer.token_bytes(), config.batch_sequences, beside)
        scores["val_tokens"] = tokens = sum(map(count_targets, parts.values()))
        named = (parts if len(parts) > 1 else {}) | beside
        scores |= {f"val_tokens{OF}{name}": count_targets(own) for name, own in named.items()}
        for note in _on_the_size(tokens, config, own=asked is None):
            say(note)
        return scores
    reference: Tensor | None = None
    if asked is None:
        data = _own_data(config, tokenizer)
        assert isinstance(data, ChatData)
        packed = data.of_validation(data.validation_documents(0))
        key = newest(folder)[2].baseline
        found = baseline.read(folder / BASELINE, key, data) if key is not None else None
        reference = None if found is None else found.validation[packed.examples]
    else:
        packed = open_other_chats(asked, config.data, config.objective, tokenizer)
    if objective.has_reference and reference is None:
        reference = _before_tuning(engine, config, folder, packed)
    return evaluate_pairs(engine, packed, objective, reference, config.most_windows)


def _on_the_size(tokens: int, config: Config, own: bool) -> list[str]:
    """Lines on how many tokens were evaluated. own: those of the run."""
    notes, limit = [too_few(tokens)], config.train.eval_tokens
    if own and 0 < limit < tokens:
        notes.append(
            f"note: these are all {tokens:,} validation tokens; in training train.eval_tokens = {limit:,} "
            "limited them, so its losses differ a little"
        )
    return [note for note in notes if note]


def _windows(
    asked: DataConfig | None, config: Config, tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By part, see `Data.validation_parts`; and of the texts with names."""
    if asked is None:
        data = _own_data(config, tokenizer)
        return data.validation_parts(0), {text.name: text.windows(0) for text in data.texts}
    if config.objective.name != "pretrain":
        return {"": open_other_chats(asked, config.data, config.objective, tokenizer).windows}, {}
    source = source_of(asked)
    if source.token_dtype is None:
        source = replace(source, token_dtype=config.data.token_dtype)
    return {"": open_text(source, tokenizer, config.data.seq_len, Path(config.data.cache))}, {}


def _own_data(config: Config, tokenizer: Tokenizer) -> Data:
    data = with_tokenizer(config.data, tokenizer.path, instead=True)
    return open_data(data, config.model.vocab_size, config.run.seed, False, config.objective)


def _before_tuning(engine: Engine, config: Config, folder: Path, packed: Packed) -> Tensor:
    """The sums of `packed` under the weights with which the run began; then the engine has its own again.
    Raises UserError."""
    try:
        begin_weights(engine, config, pick_device(config))
    except UserError as error:
        raise UserError(
            f"run.init_from: {folder} is compared with the model that it began with "
            f"({str(error).partition(';')[0]}); put it back"
        ) from None
    sums = sums_of_examples(engine, packed.windows, config.most_windows)
    load_weights(engine, newest(folder)[1])
    return sums
