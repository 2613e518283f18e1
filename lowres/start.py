"""What a run starts from: nothing, its own checkpoint, or the weights of another run; and what it refuses.

Everything is decided first (`decide`), so a refused run has written nothing. Then the run is built, its
weights are loaded or drawn, and the largest step is rehearsed. A run starts in the same way with and without
adapters, so resuming after the warm start of ReLoRA is not a special case.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lowres import baseline, checkpoint, disk, harness, memory, ranks, trackers
from lowres.baseline import BASELINE
from lowres.checkpoint import Kept, State
from lowres.config import Config, DataConfig
from lowres.config_file import (
    as_begun,
    notes_on_length,
    rates_of,
    to_toml,
    with_places,
    with_values,
)
from lowres.data import (
    FILE_NAMES,
    ChatData,
    Data,
    MixedData,
    cache_bytes,
    find_tokenizer,
    is_prepared,
    open_data,
    open_tokenizer,
    with_tokenizer,
)
from lowres.data.batches import BEGINS, count_targets
from lowres.data.validation import too_few
from lowres.device import pick_device, use_kernels
from lowres.engine import Engine, zero
from lowres.errors import DoesNotFit, UserError
from lowres.events import Events
from lowres.exchange import StoredModel, initialize_from, open_model, require_ids, with_model_of
from lowres.health import Watch
from lowres.model import initialize
from lowres.objective import Pairs, has_reference
from lowres.probe import forecast
from lowres.probe.fastest import choose
from lowres.ranks import say
from lowres.records import CHECKPOINTS, CONFIG, EVENTS, METRICS, PLAN, SAMPLES, SUMMARY
from lowres.resuming import continued, find_checkpoint, sequences_before
from lowres.rooms import is_out_of_memory
from lowres.running import Run
from lowres.runs import config_of
from lowres.speed import facts
from lowres.text import is_stream
from lowres.trackers import TRACKERS
from lowres.trackers.steps import KNOWN
from lowres.wording import command, counted

# what --restart moves aside
HISTORY = (
    *(
        CONFIG,
        *FILE_NAMES,
        BASELINE,
        METRICS,
        EVENTS,
        PLAN,
        SAMPLES,
        CHECKPOINTS,
        SUMMARY,
        "loss.png",
        "profile",
    ),
    *(KNOWN, *(kind.left for kind in TRACKERS.values() if kind.left)),
)
# passes over a text that are nearly as good as new text
WORTHWHILE = 4
# the smallest vocabulary of a tokenizer, used if the config gives none (the minimum of data.vocab_size)
LEAST_VOCABULARY = 260


@dataclass(frozen=True, kw_only=True)
class Start:
    """Everything that is decided before anything is written or built."""

    folder: Path
    config: Config  # with the final vocabulary, rates and number of steps
    device: torch.device
    data: Data
    plans: dict[bool, memory.Plan]  # by whether there are adapters
    found: Path | None  # the checkpoint to continue from
    state: State | None  # its state
    offset: int  # see Run
    started_with: dict[str, Any]  # see Run
    damaged: list[Path]  # newer checkpoints, which are set aside
    changed: dict[str, tuple[Any, Any]]  # settings that change the mathematics from here on: before, after
    restart: bool  # whether to move aside what is there
    identity: str  # of the run, see checkpoint.State
    origin: StoredModel | None  # what provides the first weights
    tasks: harness.Tasks | None  # of train.eval_tasks
    lines: list[str]  # messages to print

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0


def is_finished(config: Config, folder: Path) -> bool:
    """Whether the run in a folder has reached the end that the config gives, and its last checkpoint is as it
    was written. The end of epochs is not known before the data are open."""
    if config.train.epochs is not None:
        return False
    try:
        summary = json.loads(disk.read_whole(folder / SUMMARY))
        # in tokens if the config gives tokens, because the batch may have changed during the run
        if config.train.tokens is not None:
            left = config.train.tokens - summary["tokens"]
            reached = -config.train.batch_tokens < left <= 0
        elif config.train.epochs is not None:
            return False  # how long one is, only the data tell
        else:
            reached = summary["step"] == config.train.total_steps
        return bool(reached) and not checkpoint.verify(
            checkpoint.step_folder(folder / CHECKPOINTS, summary["step"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def begin(config: Config, folder: Path, resume: bool, restart: bool = False) -> tuple[Run, int]:
    """The run, ready for its next step, and the number of steps it has done."""
    start = decide(config, folder, resume, restart)
    for line in start.lines:
        say(line)
    run = _build(start, _write_folder(start))
    _announce(run)
    _foretell(run)
    rehearse = start.config.memory.rehearse
    if rehearse is True or (rehearse == "auto" and start.device.type == "cuda"):
        _rehearse(run)
    run.open_log(start.state)
    return run, start.step


# ---- decide


def decide(config: Config, folder: Path, resume: bool, restart: bool = False) -> Start:
    """Check everything. Nothing is written except prepared data. Raises UserError or DoesNotFit if the run
    is not possible.

    resume: continue from the newest valid checkpoint. restart: begin again, and move aside what is there.
    """
    device = pick_device(config)
    trackers.require(config.log.all_trackers)
    _meet(config, device)
    tasks = loaded_tasks(config)
    require_folder(folder)
    found, state, damaged = find_checkpoint(folder, resume, restart)
    saved = config_of(folder, state) if resume and not restart else None
    asked = config.data.tokenizer
    config, origin = _with_origin(config, saved, begun=state is not None)
    if origin is not None and restart and origin.path.resolve() == folder.resolve():
        raise UserError(
            f"--init-from: {origin.path} is the run that --restart moves aside; copy it, or give another "
            "--run DIR"
        )
    config = with_places(config, saved)
    if has_reference(config.objective) and config.run.init_from is None:
        raise UserError(
            "run.init_from: preferences are compared with the model that a run begins with, and new weights "
            "have none; give one that can answer with --init-from MODEL"
        )
    # refuse what cannot fit before anything is read or written
    _check_room(_least(config), device, folder)
    opened = _with_own_tokenizer(config, asked is None, found, folder if state else None)
    data = _open_data(opened)
    epochs = config.train.epochs
    if tasks and not data.tokenizer.has_text:
        raise UserError("train.eval_tasks: their questions are text, and the run has ids; leave them out")
    config = with_epochs(config.with_vocab(config.model.vocab_size or data.vocab_size), data)
    of_length = [] if epochs is None else notes_on_length(config)

    if saved is None:
        started_with, offset = rates_of(config), 0
        changed: dict[str, tuple[Any, Any]] = {}
        config, notes = choose(config, device)
    else:
        config, started_with, changed, notes = continued(config, saved, state, data, folder)
        trained = state.tokens // config.data.seq_len if state else 0
        offset = trained - state.step * config.batch_sequences if state else 0
    if isinstance(data, MixedData):
        notes += _on_the_mixture(config, data, state)
    elif isinstance(data, ChatData):
        notes += _on_the_chats(config, data)
    notes += _on_the_passes(config, data, state)
    notes += of_length + use_kernels(config, device)
    plans = _check_room(config, device, folder)
    if origin is not None:
        notes += _on_the_origin(origin, config.data, data)
    asides = [
        f"{path} is damaged ({problem}); it is set aside as {path.name}{checkpoint.DAMAGED}"
        for path, problem in damaged
    ]
    lines = [f"note: {note}" for note in asides + data.notes + notes + _on_the_cache(config, opened, data)]
    if resume and not restart and found is None:
        lines.append(f"{folder} has no checkpoint yet: starting at step 0")
    return Start(
        folder=folder,
        config=config,
        device=device,
        data=data,
        plans=plans,
        found=found,
        state=state,
        offset=offset,
        started_with=started_with,
        damaged=[path for path, _ in damaged],
        changed=changed,
        restart=restart,
        identity=(state.run if state else None) or secrets.token_hex(8),
        origin=origin,
        tasks=tasks,
        lines=lines,
    )


def loaded_tasks(config: Config) -> harness.Tasks | None:
    """The tasks of the config with their data, loaded before anything else takes time. Raises UserError."""
    train, folder = config.train, config.train.eval_tasks_folder
    if not train.eval_tasks:
        return None
    if ranks.size() > 1:
        raise UserError(
            "train.eval_tasks: several ranks score no tasks; leave it out, and score checkpoints with "
            f"`lowres eval RUN --tasks {','.join(train.eval_tasks)}`"
        )
    more = Path(folder).expanduser() if folder else None
    return harness.load_tasks(train.eval_tasks, more, harness.SETTINGS)


def _least(config: Config) -> Config:
    """The config with the smallest vocabulary and the fewest steps that the data can make of it."""
    if config.train.epochs is not None:
        config = with_values(config, "train", epochs=None, steps=1)
    return config.with_vocab(config.model.vocab_size or LEAST_VOCABULARY)


def with_epochs(config: Config, data: Data) -> Config:
    """The config with train.epochs in tokens. Raises UserError if the length of the data is not known."""
    if config.train.epochs is None:
        return config
    sequences = data.epoch(0)
    if sequences is None:
        raise UserError(
            "train.epochs: the length of a stream or a mixture is not known; set train.steps or train.tokens"
        )
    tokens = math.ceil(config.train.epochs * sequences) * config.data.seq_len
    return with_values(config, "train", epochs=None, tokens=tokens)


def with_prepared(config: Config) -> tuple[Config, list[str]]:
    """The config of a plan with the vocabulary and the length of its text if that is prepared already, and
    notes. What else a run reads is known when it starts. Raises UserError if a run would refuse the text."""
    if config.data.mixture or config.objective.name != "pretrain" or not is_prepared(config.data.source):
        return config, []
    data = open_data(config.data, config.model.vocab_size, config.run.seed, progress=False)
    config = with_epochs(config.with_vocab(config.model.vocab_size or data.vocab_size), data)
    return config, _on_the_passes(config, data, None)


def _meet(config: Config, device: torch.device) -> None:
    """Join the ranks of the run. Refuse what is not possible with several ranks, or without DeepSpeed."""
    engine, streams = config.memory.engine, list(filter(is_stream, config.data.sources))
    if config.objective.name != "pretrain":
        streams = []  # chats of the hub are prepared before the run
    if ranks.size() > 1 and engine != "deepspeed":
        raise UserError(
            f"memory.engine: {engine} runs in one process and {ranks.size()} were started; use deepspeed, "
            "or `lowres train` without a launcher"
        )
    if ranks.size() > 1 and streams:
        raise UserError(
            f"data.source: {streams[0]} is a stream, and several ranks need a prepared folder; make one with "
            f"`{command('lowres', 'data', 'prepare', streams[0], 'OUT')}`"
        )
    if engine == "deepspeed":
        zero.require(config, device)
        ranks.join(device)


def require_folder(folder: Path) -> None:
    """Raise UserError if there cannot be a folder of this name, or if nothing may be written there."""
    checkpoint.require_outside(folder, "--run")
    there = folder.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if there.is_symlink() and not there.exists():
        raise UserError(f"--run: {there} is a link to something that does not exist; give a folder")
    if not there.is_dir():
        raise UserError(f"--run: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run: {there} may not be written to; make it writable, or give another")


def _with_origin(config: Config, saved: Config | None, begun: bool) -> tuple[Config, StoredModel | None]:
    """The config with model and tokenizer of what provides the first weights, and that; None if the run has
    begun, or begins with new weights. saved: the config of a resumed run, which keeps its own."""
    path = config.run.init_from or (saved.run.init_from if saved else None)
    if path is None:
        return config, None
    path = str(Path(path).expanduser().absolute())  # a resumed run may be started elsewhere
    config = with_values(config, "run", init_from=path)
    if begun and saved is not None:
        return as_begun(config, saved), None
    origin = open_model(path)
    config, data = with_model_of(config, origin), config.data
    if origin.tokenizer is None and data.tokenizer is None:
        raise UserError(f"run.init_from: {path} has no tokenizer; give one with data.tokenizer")
    # weights want the ids that they were trained with
    tokenizer, form = data.tokenizer or str(origin.tokenizer), data.tokenizer_form or "own"
    require_ids(origin, open_tokenizer(tokenizer, form, data.bos, data.eos))
    return with_values(config, "data", tokenizer=tokenizer, tokenizer_form=form), origin


def _on_the_origin(origin: StoredModel, given: DataConfig, data: Data) -> list[str]:
    """Notes on the origin, and whether the weights were trained on other ids than they will be."""
    path = origin.tokenizer
    if path is None:
        return origin.notes
    ends = (given.bos, given.eos) if given.tokenizer == str(path) else ()
    with suppress(UserError):  # one that does not say how documents end is another one
        if open_tokenizer(path, "own", *ends).fingerprint == data.tokenizer.fingerprint:
            return origin.notes
    return [
        *origin.notes,
        f"run.init_from: {origin.path} was trained with another tokenizer, so its weights know other ids; "
        "leave data.tokenizer out to keep its own",
    ]


def _check_room(config: Config, device: torch.device, folder: Path) -> dict[bool, memory.Plan]:
    """The plans, by whether there are adapters. Raises DoesNotFit if the budgets, this machine or its disk
    are too small."""
    plans = {}
    for part, plan in memory.make_plans(config, device, on_this_machine=True).items():
        memory.require_fit(plan)
        memory.require_machine(plan, device)
        plans[part == memory.ADAPTERS] = plan
    train = config.train
    saves = -(-train.total_steps // train.checkpoint_every) if train.checkpoint_every else 1
    kept = min(train.keep_checkpoints, saves - 1)
    largest = max(plan.peak(memory.DISK) for plan in plans.values())
    forever = train.total_steps // train.keep_every if train.keep_every else 0
    checkpoint.require_disk(folder / CHECKPOINTS, largest, kept, forever + train.keep_best)
    return plans


def _on_the_cache(config: Config, opened: Config, data: Data) -> list[str]:
    """A note if the disk may become too small for the tokens of a stream, which are kept."""
    if isinstance(data, ChatData):  # all of them are there
        return []
    tokens = config.train.total_steps * config.train.batch_tokens
    most = cache_bytes(opened.data, data.vocab_size, tokens)
    free = checkpoint.free_bytes(Path(config.data.cache))
    if most <= free:
        return []
    streams = ", ".join(filter(is_stream, config.data.sources))
    return [
        f"data.cache: the tokens of {streams} take up to {most / memory.GIB:.1f} GiB in {config.data.cache}, "
        f"and its disk has {free / memory.GIB:.1f} GiB free; if it is full, the run saves and stops"
    ]


def _on_the_mixture(config: Config, data: MixedData, state: State | None) -> list[str]:
    """Notes on how often the parts of a mixture will be read. Raises UserError if they do not last."""
    step, total, batch = state.step if state else 0, config.train.total_steps, config.batch_sequences
    start = sequences_before(state, config) if state else 0
    end = start + (total - step) * batch
    if data.over is not None and data.over < end:
        last = step + (data.over - start) // batch
        raise UserError(
            f"data.mixture: with their epochs, the parts last {last} of the {total} steps; raise epochs, or "
            f"set train.steps={last}"
        )
    notes = [f"data.mixture: {data.described(end)}"]
    for name, sequence in data.ends():
        if sequence < end:
            at = step + (sequence - start) // batch
            notes.append(f"data.mixture.{name}: is used up after step {at}; the others take its place")
    return notes


def _on_the_passes(config: Config, data: Data, state: State | None) -> list[str]:
    """A note on how often a run reads its data, if that is more than once."""
    length, step = data.length(), state.step if state else 0
    if length is None:
        return []
    used = sequences_before(state, config) if state else 0
    passes = (used + (config.train.total_steps - step) * config.batch_sequences) / length
    if passes <= 1:
        return []
    note = f"the run reads its {data.train_tokens:,} training tokens {_times(passes)} times"
    if passes > WORTHWHILE:
        note += (
            f"; after about {WORTHWHILE} times a text teaches little more (arXiv 2305.16264): give more "
            f"text, or set train.epochs={WORTHWHILE}"
        )
    return [note]


def _times(passes: float) -> str:
    return f"{passes:.3g}" if passes < 100 else f"{passes:,.0f}"


def _on_the_chats(config: Config, data: ChatData) -> list[str]:
    """A note on how long an epoch is, and how the examples of a step are packed."""
    batch = config.batch_sequences
    windows, padding = data.padding(batch)
    return [
        f"an epoch is {data.epoch_examples / batch:,.4g} steps of {batch:,} {config.objective.form}, packed "
        f"into {windows:,.4g} windows of {data.seq_len:,} tokens on average; {padding:.1%} is padding"
    ]


def _with_own_tokenizer(config: Config, instead: bool, *places: Path | None) -> Config:
    """The config with which the data of a run are opened. instead: see `with_tokenizer`. places: folders that
    may have its tokenizer."""
    own = next((path for place in places if place and (path := find_tokenizer(place))), None)
    return config.model_copy(update={"data": with_tokenizer(config.data, own, instead)}) if own else config


def _open_data(config: Config) -> Data:
    """The data; the first rank of each machine prepares them if necessary."""
    if not ranks.is_first_here():
        ranks.wait()
    progress = config.log.progress and ranks.is_first()
    data = open_data(config.data, config.model.vocab_size, config.run.seed, progress, config.objective)
    if ranks.is_first_here():
        ranks.wait()
    return data


# ---- build


def _write_folder(start: Start) -> Events:
    """Make the folder of the run, or bring it up to date. Returns its events, with the start of this
    process."""
    ranks.wait()  # until all ranks have looked at the folder
    folder, log = start.folder, Events(start.folder)
    if not ranks.is_first():
        return log
    kept = Kept(folder / CHECKPOINTS, newest=0)
    with disk.named(folder, "written to"):
        folder.mkdir(parents=True, exist_ok=True)
        if start.restart:
            _move_aside(folder)
        for path in start.damaged:
            if not kept.checkpoints.is_symlink():
                log.write("set aside", path=str(kept.set_aside(path)))
    with disk.named(folder / SUMMARY, "removed"):
        (folder / SUMMARY).unlink(missing_ok=True)
    for name, content in (
        (CONFIG, to_toml(start.config).encode()),
        (start.data.tokenizer.file_name, start.data.tokenizer.content),
    ):
        disk.store(folder / name, content)
    changed = {key: {"before": old, "after": new} for key, (old, new) in start.changed.items()}
    log.started(
        run=start.identity,
        step=start.step,
        device=str(start.device),
        micro_batch=start.plans[start.config.relora.stored_at(start.step)].micro_batch,
        changed=changed,
    )
    return log


def _move_aside(folder: Path) -> None:
    """Move what a run has written into a new folder old-N."""
    there = [folder / name for name in HISTORY if os.path.lexists(folder / name)]
    if not there:
        return
    number = 1
    while os.path.lexists(folder / f"old-{number}"):
        number += 1
    old = folder / f"old-{number}"
    old.mkdir()
    for path in there:
        path.rename(old / path.name)
    say(f"what was in {folder} is in {old}")


def _build(start: Start, log: Events) -> Run:
    """The run with its weights and state: loaded, taken from another run, or new."""
    config, data, state, train = start.config, start.data, start.state, start.config.train
    same_text = state is not None and state.validation in (None, data.validation_fingerprint)
    best = state.best if state and same_text else None
    seen, of_pairs = state.watch if state else None, config.objective.name == "dpo"
    if seen is not None and start.changed:  # a new chance
        seen = seen.model_copy(update={"bad": 0, "spikes": 0})
    run = Run(
        folder=start.folder,
        config=config,
        data=data,
        validation=data.validation_parts(train.eval_tokens),
        beside={text.name: text.windows(train.eval_tokens) for text in data.texts},
        texts=(state.texts if state else {}) | {text.name: text.fingerprint for text in data.texts},
        token_bytes=data.tokenizer.token_bytes(),
        offset=start.offset,
        started_with=start.started_with,
        plans=start.plans,
        passed=list(state.passed) if state else [],
        best=best,
        micro_batch=state.micro_batch if state else None,
        watch=Watch(config.health, None if of_pairs else config.model.vocab, config.warmup_steps, seen),
        events=log,
        identity=start.identity,
        kept=Kept(
            start.folder / CHECKPOINTS,
            train.keep_checkpoints,
            train.keep_every,
            train.keep_best,
            good={state.step} if state else set(),
            best_step=best.step if best else None,
        ),
        facts=facts(config, start.device),
        tasks=start.tasks,
    )
    run.build(start.device, config.relora.stored_at(start.step))
    key = state.baseline if state else None
    if key is not None and isinstance(data, ChatData):
        run.baseline = baseline.read(start.folder / BASELINE, key, data)
    needs_baseline = has_reference(config.objective) and run.baseline is None
    if start.found is None or needs_baseline:
        begin_weights(run.parts.engine, config, start.device, start.origin)
    if needs_baseline:
        run.baseline = _baseline_of(run, state)
    if start.found is not None:
        run.load(start.found)
        say(f"continuing {start.folder} at step {start.step}")
    if ranks.is_first():
        run.hold()
    return run


def begin_weights(
    engine: Engine, config: Config, device: torch.device, origin: StoredModel | None = None
) -> None:
    """Give the engine the weights with which a run begins, or began. origin: config.run.init_from, if it is
    open. Raises UserError."""
    initialize(engine.units(write=True), config.run.seed, device)
    if origin is None and config.run.init_from is not None:
        origin = open_model(config.run.init_from)
    if origin is not None:
        initialize_from(engine.units(write=True), origin)
        say(f"weights from {origin.path}")


def _baseline_of(run: Run, state: State | None) -> baseline.Baseline:
    """The baseline of the present weights: of the run, from data.cache, or computed. state: of a resumed run
    that has lost its baseline. Raises UserError if these are not the weights with which it began."""
    config, data, engine = run.config, run.data, run.parts.engine
    assert isinstance(data, ChatData)
    key = baseline.key_of(config, run.parts.rooms.device, engine.units(), data)
    if state is not None and state.baseline not in (None, key):
        raise UserError(
            f"{run.folder / BASELINE}: is damaged or missing, and {config.run.init_from} is no longer the "
            "model that the run began with; put a copy of one of them back"
        )
    own, cached = run.folder / BASELINE, baseline.in_cache(Path(config.data.cache).expanduser(), key)
    # all ranks compute it, or none
    known = [baseline.read(path, key, data) for path in (own, cached)] if ranks.is_first() else []
    found = next((one for one in known if one is not None), None)
    if not ranks.total(found is not None)[0]:
        found = baseline.compute(engine, data, config.batch_sequences, key, cached, config.log.progress)
    if ranks.is_first():
        assert found is not None
        baseline.write(own, found)
        baseline.write(cached, found)
    ranks.wait()
    if found is None:
        found = baseline.read(own, key, data)
    assert found is not None
    return found


def _announce(run: Run) -> None:
    config, train, plan = run.config, run.config.train, run.parts.plan
    lr = config.optim.lr or 0
    say(
        f"{config.model.size} on {run.parts.rooms.device.type}: {config.memory.engine} "
        f"engine, {config.memory.weights} weights, {config.optim.name}"
    )
    say(
        f"{train.total_steps} steps of {train.batch_tokens:,} tokens "
        f"({counted(config.batch_sequences, 'sequence')} in micro-batches of {plan.micro_batch}), "
        f"warm-up {config.warmup_steps}; lr {lr:.3g}, lr/batch {lr / config.batch_sequences:.3g}; "
        f"plan {plan.in_words(run.parts.rooms.device)}"
    )
    if train.eval_every and not run.is_of_pairs:
        tokens = sum(map(count_targets, run.validation.values()))
        most = " (train.eval_tokens)" * (0 < train.eval_tokens <= tokens)
        named = "".join(f", {name} on {count_targets(own):,}" for name, own in run.beside.items())
        say(f"every {counted(train.eval_every, 'step')}: evaluated on {tokens:,} tokens{most}{named}")
        if warning := too_few(tokens):
            say(warning)
    if train.eval_tasks:
        limit = f", at most {train.eval_tasks_limit:,} questions of each" if train.eval_tasks_limit else ""
        every = counted(train.eval_every * train.eval_tasks_every, "step")
        say(f"every {every}: scored on {', '.join(train.eval_tasks)}{limit}")


def _foretell(run: Run) -> None:
    """Say how long the run may take, if the data sheet of its card is known. The trainer says more once some
    steps are measured."""
    config, card = run.config, forecast.card_here() if run.parts.rooms.device.type == "cuda" else None
    if card and not run.parts.adapted and not forecast.why_not(config):
        for line in forecast.lines(config, forecast.forecast(config, run.parts.plan, card), datetime.now()):
            say(line)


def _rehearse(run: Run) -> None:
    """Run the largest step of training, evaluation and saving, so that no later one runs out of memory.

    Two micro-batches are enough: the memory for the whole batch is already allocated. The update is refused,
    so weights and state do not change.
    """
    config, parts = run.config, run.parts
    sequences = min(config.most_windows, 2 * parts.plan.micro_batch * ranks.size())
    shape = (sequences, config.data.seq_len + 1)
    # not the token with which documents start, because long ones need the most memory
    batch = torch.full(shape, int(run.data.tokenizer.bos_id == 0), dtype=torch.int64)
    pairs = None
    if config.objective.name != "pretrain":  # an example for each sequence
        batch[:, 0] |= BEGINS
        pairs = Pairs(torch.arange(sequences // 2 * 2), torch.zeros(sequences))
    parts.relora.optimizer.rehearsing = True
    try:
        with parts.meter.watch("step"):
            parts.engine.step(batch, 0, 0.0, rehearsal=True, pairs=pairs)
        with parts.meter.watch("evaluation"):
            parts.engine.evaluate(batch)
        if run.tasks:
            parts.engine.log_probabilities(batch)
        if texts := config.texts:
            reader = parts.engine.reader(texts, config.data.seq_len)
            reader.logits(dict.fromkeys(range(texts), batch[0, 1:].tolist()))
        run.rehearse_save()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"the rehearsal of a step ran out of GPU memory ({str(error).splitlines()[0]}); "
            "lower memory.budget_gib or train.micro_batch"
        ) from None
    finally:
        parts.relora.optimizer.rehearsing = False
    peak = parts.meter.readings()["peak_mem_gib"]
    say(f"rehearsed a step: peak {peak:.2f} GiB{' on the GPU' if parts.rooms.device.type == 'cuda' else ''}")
