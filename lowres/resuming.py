"""What a resumed run goes on from, and what it may not be asked for.

It goes on from its newest valid checkpoint. It is never started over without being asked, and never becomes
another run: settings that may not change are compared, and the data by their fingerprints.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from lowres import checkpoint, events, metrics, ranks
from lowres.checkpoint import State
from lowres.config import Config
from lowres.config_file import (
    adjusted_keys,
    as_begun,
    as_chosen,
    changed_keys,
    follow_batch,
    rates_of,
    value_of,
    with_values,
)
from lowres.data import Data, MixedData, record_of_one
from lowres.errors import UserError
from lowres.optim.schedule import factor
from lowres.records import CHECKPOINTS, CONFIG, METRICS, SUMMARY
from lowres.runs import config_in, config_of, identities
from lowres.text import is_stream
from lowres.wording import command

# keys that say where the data are; their fingerprints say what they are
DATA_KEYS = (
    "data.source",
    "data.val_source",
    "data.tokenizer",
    "data.tokenizer_form",
    "data.bos",
    "data.eos",
    "data.vocab_size",
    "data.shuffle_blocks",
    "data.chat_template",
)


# by this factor the next step's learning rate may change because a run has become longer
MOST_CHANGE = 1.1


def find_checkpoint(
    folder: Path, resume: bool, restart: bool
) -> tuple[Path | None, State | None, list[tuple[Path, str]]]:
    """The newest valid checkpoint of a resumed run, the same on all ranks, and its state; newer ones that are
    damaged, with what is wrong."""
    if (place := folder / CHECKPOINTS).is_symlink() or place.exists():
        link = f" (a link to {os.readlink(place)})" if place.is_symlink() else ""
        if not place.is_dir() and not restart:
            raise UserError(
                f"--run: {place}{link} is not a folder; is its disk mounted? Otherwise move it away"
            )
    holds_run = any((folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))
    if restart:
        return None, None, []
    if resume and not holds_run:
        raise UserError(f"--resume: {folder} is not a run; start one without --resume")
    if not resume and holds_run:
        raise UserError(
            f"{folder} already holds a run; continue it with --resume or choose another --run DIR"
        )
    if not resume:
        return None, None, []
    checkpoints = folder / CHECKPOINTS
    found, damaged = (
        checkpoint.newest_state(checkpoints, identities(folder)) if ranks.is_first() else (None, [])
    )
    own = found[1].step if found else -1
    (step,) = ranks.total(own if ranks.is_first() else 0)
    if step < 0:
        if ranks.is_first():
            _require_no_progress(folder, damaged)
        return None, None, []
    path = checkpoint.step_folder(checkpoints, int(step))
    state = found[1] if found else checkpoint.load_state(path)
    if not state.data:
        raise UserError(
            f"--resume: {folder} holds an imported model, which has no data and no optimizer state; start a "
            f"run from it: {command('lowres', 'train', 'CONFIG', '--init-from', folder, '--run', 'DIR')}"
        )
    return path, state, damaged


def _require_no_progress(folder: Path, damaged: list[tuple[Path, str]]) -> None:
    """Raise UserError if a run without a usable checkpoint has had one: it is never started over without
    being asked."""
    records, known = metrics.read(folder / METRICS), events.read(folder)
    reached = max((record["step"] for record in records), default=0)
    saved = [one["step"] for one in known if one.get("event") == "saved"]
    try:
        every = config_of(folder, None).train.checkpoint_every
    except UserError:
        if not (damaged or saved or reached):
            raise
        every = 1  # there is progress, and the config cannot tell how much was saved
    aside = sorted((folder / CHECKPOINTS).glob(f"*{checkpoint.DAMAGED}*"))
    # a save in the background may not have ended; without events, steps are what tells
    silent = not any(one.get("event") == "started" for one in known)
    should_have = silent and every and reached > every
    if not (damaged or saved or aside or (folder / SUMMARY).exists() or should_have):
        return
    found = [f"{path.name} is damaged ({problem})" for path, problem in damaged]
    found += [f"{path.name} was set aside" for path in aside]
    raise UserError(
        f"--resume: {folder} was trained to step {max([reached, *saved])}, but has no checkpoint that can be "
        f"used: {'; '.join(found) or f'{CHECKPOINTS}/ is empty'}. Put a copy of one back, or start over "
        "with --restart, which moves what is there aside"
    )


def continued(
    config: Config, saved: Config, state: State | None, data: Data, folder: Path
) -> tuple[Config, dict[str, Any], dict[str, tuple[Any, Any]], list[str]]:
    """The config of a resumed run; what its rates follow from; the settings that change the mathematics, with
    their values before and after; and notes. Raises UserError if it asks for another run."""
    config = as_chosen(config, saved)
    config = _with_schedule_of(config, saved)
    config, notes, started_with = follow_batch(
        config, saved, state.start.model_dump() if state else rates_of(saved)
    )
    _require_same_settings(config, saved, folder, DATA_KEYS if state else ())
    changed = _changes(config, saved, notes)
    if state is not None:
        _require_same_data(config, data, state, folder)
        _require_same_texts(data, state, folder)
        if isinstance(data, MixedData):
            if mixed := _go_on(data, state, config):
                changed["data.mixture"] = mixed
            if state.validation not in (None, data.validation_fingerprint):
                notes.append("the validation text is not that of before, so validation losses do not compare")
        config = _with_tokens_left(config, state)
        config, longer = _with_end_of_schedule(config, saved, state)
        notes += longer
        _require_not_passed(config, state, folder)
        config, lowered = _with_micro_batch(config, state)
        at = f"from step {state.step} on"
        notes += [f"{key}: {before} -> {after} {at}" for key, (before, after) in changed.items()] + lowered
    return config, started_with, changed, notes


def require_same_run(config: Config, folder: Path) -> None:
    """Raise UserError if a config asks a finished run for a setting that may not change on resume."""
    saved = config_in(folder)
    config = as_begun(config, saved) if saved.run.init_from else config
    config = config.with_vocab(config.model.vocab_size or saved.model.vocab)
    config = _with_schedule_of(as_chosen(config, saved), saved)
    config, _, _ = follow_batch(config, saved, rates_of(saved))
    _require_same_settings(config, saved, folder, DATA_KEYS)


def _require_same_settings(config: Config, saved: Config, folder: Path, free: tuple[str, ...]) -> None:
    """Raise UserError if a setting has changed that may not change on resume. free: keys that do not count;
    where the data are may change if their fingerprint is compared."""
    changed = [key for key in changed_keys(saved, config) if key not in free]
    if changed:
        changed.sort(
            key=lambda key: not key.startswith("relora.")
        )  # first, as the schedule follows from these
        raise UserError(
            f"{changed[0]}: the run in {folder} was started with {value_of(saved, changed[0])!r}, and this "
            "key may not change on resume; set it back or start a new run"
        )


def _changes(config: Config, saved: Config, notes: list[str]) -> dict[str, tuple[Any, Any]]:
    """Settings that change the mathematics of the next steps: before and after. notes: on rates that follow
    the batch, which are no changes."""
    rates = ("optim.lr", "optim.lr_over_batch", "optim.embed_lr", "optim.norm_lr")
    keys = [key for key in adjusted_keys(saved, config) if not (notes and key in rates)]
    if "optim.lr" in keys and "optim.lr_over_batch" in keys:
        keys.remove("optim.lr_over_batch")  # says the same
    return {key: (value_of(saved, key), value_of(config, key)) for key in keys}


def _require_same_data(config: Config, data: Data, state: State, folder: Path) -> None:
    """Raise UserError if the data are not those of the run. What was mixed may be mixed otherwise: `_go_on`
    looks at the parts, and their validation text belongs to them."""
    if isinstance(data, MixedData) and config.data.val_source is None:
        return
    if state.mixture is not None and not isinstance(data, MixedData):
        raise UserError(
            f"data.source: the run in {folder} was trained on a mixture; give data.mixture, where a part may "
            "have weight = 0"
        )
    if not isinstance(data, MixedData) and state.data != data.fingerprint:
        raise UserError(
            f"data.source: {config.data.source} is not what the run in {folder} was trained on; "
            "give the folder or files that it started with"
            + (", and its data.chat_template" if config.objective.name != "pretrain" else "")
            + (", and its data.shuffle_blocks" if is_stream(config.data.source) else "")
        )
    if state.validation not in (None, data.validation_fingerprint):
        raise UserError(
            f"data.val_source: {config.data.val_source} is not the validation text of the run in {folder}; "
            "give the one that it started with"
        )


def _require_same_texts(data: Data, state: State, folder: Path) -> None:
    """Raise UserError if a name now stands for another validation text: its scores would not compare."""
    for text in data.texts:
        if state.texts.get(text.name, text.fingerprint) != text.fingerprint:
            raise UserError(
                f"data.validation.{text.name}: is not the text of this name in the run in {folder}; give the "
                "one that it had, or another name, under which it is a new text"
            )


def sequences_before(state: State, config: Config) -> int:
    """How many sequences of its data a run has used, with those that rollbacks passed over."""
    return state.tokens // config.data.seq_len + checkpoint.passed_before(state.step, state.passed)


def _go_on(data: MixedData, state: State, config: Config) -> tuple[str, str] | None:
    """Let a mixture go on from a state. Returns what it was and what it is, if it has changed."""
    sequence = sequences_before(state, config)
    record = state.mixture.model_dump() if state.mixture else record_of_one(state.data, sequence)
    return data.go_on(record, sequence)


def _with_tokens_left(config: Config, state: State) -> Config:
    """The config with as many steps as the rest of train.tokens needs with the present batch."""
    train = config.train
    if train.tokens is None:
        return config
    steps = state.step + math.ceil((train.tokens - state.tokens) / train.batch_tokens)
    if steps == train.total_steps:
        return config
    return with_values(config, "train", steps=max(0, steps), tokens=None)


def _with_schedule_of(config: Config, saved: Config) -> Config:
    """The config with what earlier resumes have decided on the schedule, and it leaves open."""
    ours, before = config.schedule, saved.schedule
    if ours.decay_steps is None:
        config = with_values(config, "schedule", decay_steps=before.decay_steps)
    if ours.warmup_steps is None and ours.warmup_ratio is None and before.warmup_ratio is None:
        config = with_values(config, "schedule", warmup_steps=before.warmup_steps)
    return config


def _with_end_of_schedule(config: Config, saved: Config, state: State) -> tuple[Config, list[str]]:
    """The config of a run that may have become longer, and a note. Its learning rate goes on to the end that
    it had, so that it does not jump, unless the config asks for another schedule. Raises UserError if the
    rate is 0 after that end."""
    ours, before = config.schedule, saved.schedule
    asked = (ours.decay_steps, ours.cooldown_steps) != (before.decay_steps, before.cooldown_steps)
    if ours.name == "constant":
        return config, []
    # in tokens, as the batch may have changed
    left = max(0, saved.decay_steps - state.step) * saved.train.batch_tokens
    end = max(1, state.step + math.ceil(left / config.train.batch_tokens))
    kept = with_values(config, "schedule", decay_steps=end)
    if before.decay_steps is not None and not asked:
        return (kept if saved.decay_steps > state.step else config), []
    if config.decay_steps <= end:
        return config, []
    peak, total = config.optim.lr or 0, config.train.total_steps
    if ours.warmup_steps is None and ours.warmup_ratio is None and state.step >= saved.warmup_steps:
        config = with_values(config, "schedule", warmup_steps=saved.warmup_steps)  # it is over
    now, stretched = (peak * factor(one, state.step) for one in (saved if asked else kept, config))
    if now / MOST_CHANGE <= stretched <= now * MOST_CHANGE:
        return config, []
    if asked:
        return config, [f"the learning rate goes from {now:.3g} to {stretched:.3g} at once"]
    another = f"schedule.decay_steps={total} takes it from {now:.3g} to {stretched:.3g} at once"
    if not ours.min_ratio:
        raise UserError(
            f"train.steps: the learning rate of this run is 0 from step {end} on, so more steps change "
            f"nothing; {another}; docs/resuming.md has more ways"
        )
    return kept, [
        f"the run is longer than it was; its learning rate goes on to the end that it had, step {end}, and "
        f"stays at {peak * ours.min_ratio:.3g} from there; {another}; docs/resuming.md has more ways"
    ]


def _require_not_passed(config: Config, state: State, folder: Path) -> None:
    """Raise UserError if the run is already longer than it should become."""
    total = config.train.total_steps
    if total < state.step:
        raise UserError(
            f"train.steps: the run in {folder} has done {state.step} steps ({state.tokens:,} tokens), more "
            f"than the {total} that the config asks for; raise it"
        )


def _with_micro_batch(config: Config, state: State) -> tuple[Config, list[str]]:
    """The config with the micro-batch to which the run was lowered when memory ran out, and a note."""
    if state.micro_batch is None or config.train.micro_batch != "auto":
        return config, []
    note = f"train.micro_batch: {state.micro_batch}, because memory ran out with more"
    return with_values(config, "train", micro_batch=state.micro_batch), [note]
