"""What a run starts from: nothing, its own checkpoint, or the weights of another run; and what it refuses.

Everything is decided first (`decide`), so a refused run has written nothing. Then the run is built, its
weights are loaded or drawn, and the largest step is rehearsed. A run starts in the same way with and without
adapters, so resuming after the warm start of ReLoRA is not a special case.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowres import checkpoint, disk, events, memory, metrics, ranks
from lowres.checkpoint import Kept, State
from lowres.config import Config
from lowres.config_file import (
    adjusted_keys,
    as_chosen,
    changed_keys,
    follow_batch,
    rates_of,
    to_toml,
    value_of,
    with_values,
)
from lowres.data import TokenData, cache_bytes, open_data
from lowres.data.sources import is_stream
from lowres.device import is_out_of_memory, pick_device, use_kernels
from lowres.engine import zero
from lowres.errors import DoesNotFit, UserError
from lowres.events import EVENTS, Events
from lowres.health import Watch
from lowres.model import initialize
from lowres.probe.fastest import choose
from lowres.ranks import say
from lowres.running import Run
from lowres.runs import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    SUMMARY,
    TOKENIZER,
    config_of,
    initialize_from,
    require_same_shape,
)

# keys that say where the data are; their fingerprints say what they are
DATA_KEYS = ("data.source", "data.val_source", "data.tokenizer", "data.vocab_size")
# what --restart moves aside
HISTORY = (CONFIG, TOKENIZER, METRICS, EVENTS, CHECKPOINTS, SUMMARY, "loss.png", "profile")
# the smallest vocabulary of a tokenizer, used if the config gives none (the minimum of data.vocab_size)
LEAST_VOCABULARY = 260


@dataclass(frozen=True, kw_only=True)
class Start:
    """Everything that is decided before anything is written or built."""

    folder: Path
    config: Config  # with the final vocabulary, rates and number of steps
    device: torch.device
    data: TokenData
    plans: dict[bool, memory.Plan]  # by whether there are adapters
    found: Path | None  # the checkpoint to continue from
    state: State | None  # its state
    offset: int  # see Run
    started_with: dict[str, Any]  # see Run
    damaged: list[Path]  # newer checkpoints, which are set aside
    changed: dict[str, tuple[Any, Any]]  # settings that change the mathematics from here on: before, after
    restart: bool  # whether to move aside what is there
    origin: Path | None  # the run that provides the first weights
    lines: list[str]  # messages to print

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0


def is_finished(config: Config, folder: Path) -> bool:
    """Whether the run in a folder has reached the end that the config gives."""
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        # in tokens if the config gives tokens, because the batch may have changed during the run
        if config.train.tokens is not None:
            return bool(summary["tokens"] >= config.train.tokens)
        return bool(summary["step"] >= config.train.total_steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def begin(config: Config, folder: Path, resume: bool, restart: bool = False) -> tuple[Run, int]:
    """The run, ready for its next step, and the number of steps it has done."""
    start = decide(config, folder, resume, restart)
    for line in start.lines:
        say(line)
    run = _build(start, _write_folder(start))
    _announce(run)
    rehearse = start.config.memory.rehearse
    if rehearse is True or (rehearse == "auto" and start.device.type == "cuda"):
        _rehearse(run)
    return run, start.step


# ---- decide


def decide(config: Config, folder: Path, resume: bool, restart: bool = False) -> Start:
    """Check everything. Nothing is written except prepared data. Raises UserError or DoesNotFit if the run
    is not possible.

    resume: continue from the newest valid checkpoint. restart: begin again, and move aside what is there.
    """
    device = pick_device(config)
    _meet(config, device)
    found, state, damaged = _find_checkpoint(folder, resume, restart)
    saved = config_of(folder, state) if resume and not restart else None
    config = _with_places(_with_origin(config, saved), saved)
    # refuse what cannot fit before anything is read or written
    _check_room(config.with_vocab(config.model.vocab_size or LEAST_VOCABULARY), device, folder)
    data = _open_data(config)
    config = config.with_vocab(config.model.vocab_size or data.vocab_size)

    if saved is None:
        started_with, offset = rates_of(config), 0
        changed: dict[str, tuple[Any, Any]] = {}
        config, notes = choose(config, device)
    else:
        config, started_with, changed, notes = _continued(config, saved, state, data, folder)
        trained = state.tokens // config.data.seq_len if state else 0
        offset = trained - state.step * config.batch_sequences if state else 0
    notes += use_kernels(config, device)
    plans = _check_room(config, device, folder)
    origin = Path(config.run.init_from) if config.run.init_from and found is None else None
    if origin is not None:
        require_same_shape(config, origin)
    asides = [
        f"{path} is damaged ({problem}); it is set aside as {path.name}{checkpoint.DAMAGED}"
        for path, problem in damaged
    ]
    lines = [f"note: {note}" for note in asides + data.notes + notes + _on_the_cache(config, data)]
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
        origin=origin,
        lines=lines,
    )


def _meet(config: Config, device: torch.device) -> None:
    """Join the ranks of the run. Refuse what is not possible with several ranks, or without DeepSpeed."""
    engine, source = config.memory.engine, config.data.source
    if ranks.size() > 1 and engine != "deepspeed":
        raise UserError(
            f"memory.engine: {engine} runs in one process and {ranks.size()} were started; use deepspeed, "
            "or `lowres train` without a launcher"
        )
    if ranks.size() > 1 and is_stream(source):
        raise UserError(
            f"data.source: {source} is a stream, and several ranks need a prepared folder; make one with "
            f"`lowres data prepare {source} OUT`"
        )
    if engine == "deepspeed":
        zero.require(config, device)
        ranks.join(device)


def _find_checkpoint(
    folder: Path, resume: bool, restart: bool
) -> tuple[Path | None, State | None, list[tuple[Path, str]]]:
    """The newest valid checkpoint of a resumed run, the same on all ranks, and its state; newer ones that are
    damaged, with what is wrong."""
    require_folder(folder)
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
    found, damaged = checkpoint.newest_state(checkpoints) if ranks.is_first() else (None, [])
    own = found[1].step if found else -1
    (step,) = ranks.total(own if ranks.is_first() else 0)
    if step < 0:
        if ranks.is_first():
            _require_no_progress(folder, damaged)
        return None, None, []
    path = checkpoint.step_folder(checkpoints, int(step))
    return path, found[1] if found else checkpoint.load_state(path), damaged


def _require_no_progress(folder: Path, damaged: list[tuple[Path, str]]) -> None:
    """Raise UserError if a run without a usable checkpoint has had one: it is never started over without
    being asked."""
    records = metrics.read(folder / METRICS)
    reached = max((record["step"] for record in records), default=0)
    saved = [one["step"] for one in events.read(folder) if one.get("event") == "saved"]
    try:
        every = config_of(folder, None).train.checkpoint_every
    except UserError:
        if not (damaged or saved or reached):
            raise
        every = 1  # there is progress, and the config cannot tell how much was saved
    aside = sorted((folder / CHECKPOINTS).glob(f"*{checkpoint.DAMAGED}*"))
    if not (damaged or saved or aside or (folder / SUMMARY).exists() or (every and reached > every)):
        return
    found = [f"{path.name} is damaged ({problem})" for path, problem in damaged]
    found += [f"{path.name} was set aside" for path in aside]
    raise UserError(
        f"--resume: {folder} was trained to step {max([reached, *saved])}, but has no checkpoint that can be "
        f"used: {'; '.join(found) or f'{CHECKPOINTS}/ is empty'}. Put a copy of one back, or start over "
        "with --restart, which moves what is there aside"
    )


def require_folder(folder: Path) -> None:
    """Raise UserError if there cannot be a folder of this name, or if nothing may be written there."""
    there = folder.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if there.is_symlink() and not there.exists():
        raise UserError(f"--run: {there} is a link to something that does not exist; give a folder")
    if not there.is_dir():
        raise UserError(f"--run: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run: {there} may not be written to; give another folder")


def _with_origin(config: Config, saved: Config | None) -> Config:
    """The config with the tokenizer of the run that provides the weights; a resumed run keeps its own."""
    origin = config.run.init_from or (saved or config).run.init_from
    if origin is None:
        return config
    tokenizer = Path(origin) / TOKENIZER
    if not tokenizer.exists():
        raise UserError(f"run.init_from: {origin} is not a run: it has no {TOKENIZER}")
    run = config.run.model_copy(update={"init_from": origin})
    data = config.data.model_copy(update={"tokenizer": config.data.tokenizer or str(tokenizer)})
    return config.model_copy(update={"run": run, "data": data})


def _with_places(config: Config, saved: Config | None) -> Config:
    """The config with absolute paths of what exists, so that the run can be used from any folder. A relative
    path that does not exist here is the one that the run was started with, if that ends so."""
    data, before = config.data, saved.data if saved else None
    changes = {}
    for key in ("source", "val_source", "tokenizer", "cache"):
        given = getattr(data, key)
        if given is None or given == "stdlib" or is_stream(given):
            continue
        path = Path(given).expanduser()
        kept = getattr(before, key) if before else None
        if path.exists() or key == "cache":
            changes[key] = str(path.absolute())
        elif kept and not path.is_absolute() and Path(kept).parts[-len(path.parts) :] == path.parts:
            changes[key] = kept
    return with_values(config, "data", **changes)


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


def _on_the_cache(config: Config, data: TokenData) -> list[str]:
    """A note if the disk may become too small for the tokens of a stream, which are kept."""
    tokens = config.train.total_steps * config.train.batch_tokens
    most = cache_bytes(config.data, data.vocab_size, tokens)
    free = checkpoint.free_bytes(Path(config.data.cache))
    if most <= free:
        return []
    return [
        f"data.cache: the tokens of {config.data.source} take up to {most / memory.GIB:.1f} GiB in "
        f"{config.data.cache}, and its disk has {free / memory.GIB:.1f} GiB free; if it is full, the run "
        "saves and stops"
    ]


def _open_data(config: Config) -> TokenData:
    """The data; the first rank of each machine prepares them if necessary."""
    if not ranks.is_first_here():
        ranks.wait()
    progress = config.log.progress and ranks.is_first()
    data = open_data(config.data, config.model.vocab_size, config.run.seed, progress)
    if ranks.is_first_here():
        ranks.wait()
    return data


def _continued(
    config: Config, saved: Config, state: State | None, data: TokenData, folder: Path
) -> tuple[Config, dict[str, Any], dict[str, tuple[Any, Any]], list[str]]:
    """The config of a resumed run; what its rates follow from; the settings that change the mathematics, with
    their values before and after; and notes. Raises UserError if it asks for another run."""
    config = as_chosen(config, saved)
    config, notes, started_with = follow_batch(
        config, saved, state.start.model_dump() if state else rates_of(saved)
    )
    _require_same_settings(config, saved, folder, state)
    changed = _changes(config, saved, notes)
    if state is not None:
        _require_same_data(config, data, state, folder)
        config = _with_tokens_left(config, state)
        _require_not_passed(config, state, folder)
        config, lowered = _with_micro_batch(config, state)
        at = f"from step {state.step} on"
        notes += [f"{key}: {before} -> {after} {at}" for key, (before, after) in changed.items()] + lowered
    return config, started_with, changed, notes


def _require_same_settings(config: Config, saved: Config, folder: Path, state: State | None) -> None:
    """Raise UserError if a setting has changed that may not change on resume. Where the data are may change,
    as their fingerprint is compared."""
    free = DATA_KEYS if state else ()
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


def _require_same_data(config: Config, data: TokenData, state: State, folder: Path) -> None:
    """Raise UserError if the data are not those of the run."""
    if state.data != data.fingerprint:
        raise UserError(
            f"data.source: {config.data.source} is not what the run in {folder} was trained on; "
            "give the folder or files that it started with"
        )
    if state.validation not in (None, data.validation_fingerprint):
        raise UserError(
            f"data.val_source: {config.data.val_source} is not the validation text of the run in {folder}; "
            "give the one that it started with"
        )


def _with_tokens_left(config: Config, state: State) -> Config:
    """The config with as many steps as the rest of train.tokens needs with the present batch."""
    train = config.train
    if train.tokens is None:
        return config
    steps = state.step + math.ceil((train.tokens - state.tokens) / train.batch_tokens)
    if steps == train.total_steps:
        return config
    return with_values(config, "train", steps=max(0, steps), tokens=None)


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


# ---- build


def _write_folder(start: Start) -> Events:
    """Make the folder of the run, or bring it up to date. Returns its events, with the start of this
    process."""
    ranks.wait()  # until all ranks have looked at the folder
    folder, log = start.folder, Events(start.folder)
    if not ranks.is_first():
        return log
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if start.restart:
            _move_aside(folder)
        kept = Kept(folder / CHECKPOINTS, newest=0)
        for path in start.damaged:
            if not kept.checkpoints.is_symlink():
                log.write("set aside", path=str(kept.set_aside(path)))
        (folder / SUMMARY).unlink(missing_ok=True)
        disk.write_whole(folder / CONFIG, to_toml(start.config).encode())
        disk.write_whole(folder / TOKENIZER, start.data.tokenizer.path.read_bytes())
    except OSError as error:
        raise disk.DiskError(folder, error, "written to") from None
    changed = {key: {"before": old, "after": new} for key, (old, new) in start.changed.items()}
    log.started(
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
    best = state.best if state else None
    run = Run(
        folder=start.folder,
        config=config,
        data=data,
        validation=data.validation(train.eval_tokens),
        token_bytes=data.tokenizer.token_bytes(),
        offset=start.offset,
        started_with=start.started_with,
        plans=start.plans,
        passed=list(state.passed) if state else [],
        best=best,
        micro_batch=state.micro_batch if state else None,
        unlogged=list(state.unlogged) if state else [],
        watch=Watch(config.health, config.model.vocab, config.warmup_steps, state.watch if state else None),
        events=log,
        kept=Kept(
            start.folder / CHECKPOINTS,
            train.keep_checkpoints,
            train.keep_every,
            train.keep_best,
            good={state.step} if state else set(),
            best_step=best.step if best else None,
        ),
    )
    run.build(start.device, config.relora.stored_at(start.step))
    engine = run.parts.engine
    if start.found is not None:
        run.load(start.found)
        say(f"continuing {start.folder} at step {start.step}")
    else:
        initialize(engine.units(write=True), config.run.seed, start.device)
        if start.origin is not None:
            initialize_from(engine.units(write=True), start.origin)
            say(f"weights from {start.origin}")
    if ranks.is_first():
        run.hold()
    return run


def _announce(run: Run) -> None:
    config, plan = run.config, run.parts.plan
    lr = config.optim.lr or 0
    say(
        f"{plan.parameters / 1e6:.2f} M parameters on {run.parts.rooms.device.type}: {config.memory.engine} "
        f"engine, {config.memory.weights} weights, {config.optim.name}"
    )
    say(
        f"{config.train.total_steps} steps of {config.train.batch_tokens:,} tokens "
        f"({config.batch_sequences} sequences in micro-batches of {plan.micro_batch}), "
        f"warm-up {config.warmup_steps}; lr {lr:.3g}, lr/batch {lr / config.batch_sequences:.3g}; "
        f"plan {plan.peak('gpu') / memory.GIB:.2f} GiB on the GPU, {plan.peak('host') / memory.GIB:.2f} GiB "
        "on the host"
    )


def _rehearse(run: Run) -> None:
    """Run the largest step of training, evaluation and saving, so that no later one runs out of memory.

    Two micro-batches are enough: the memory for the whole batch is already allocated. The update is refused,
    so weights and state do not change.
    """
    config, parts = run.config, run.parts
    sequences = min(config.batch_sequences, 2 * parts.plan.micro_batch * ranks.size())
    shape = (sequences, config.data.seq_len + 1)
    batch = torch.zeros(shape, dtype=torch.int64)
    parts.relora.optimizer.rehearsing = True
    try:
        with parts.meter.watch("step"):
            parts.engine.step(batch, 0, 0.0, rehearsal=True)
        with parts.meter.watch("evaluation"):
            parts.engine.evaluate(batch)
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
    say(f"rehearsed a step: peak {peak:.2f} GiB on the GPU")
