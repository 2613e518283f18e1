"""What a run starts from: nothing, its own checkpoint, or the weights of another run; and what it refuses.

Everything is decided first (`decide`), so a refused run has written nothing. Then the run is built, its
weights are loaded or drawn, and the largest step is rehearsed. A run starts in the same way with and without
adapters, so resuming after the warm start of ReLoRA is not a special case.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowres import checkpoint, memory, ranks, rates
from lowres.config import Config
from lowres.config_file import as_chosen, changed_keys, follow_batch, load_config, to_toml
from lowres.data import TokenData, open_data
from lowres.data.sources import is_stream
from lowres.device import is_out_of_memory, pick_device, use_kernels
from lowres.engine import zero
from lowres.errors import DoesNotFit, UserError
from lowres.model import initialize
from lowres.probe.fastest import choose
from lowres.ranks import say
from lowres.runs import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    SUMMARY,
    TOKENIZER,
    Run,
    initialize_from,
    require_same_shape,
    write_beside,
    write_checkpoint,
)

# keys that may change with the batch; follow_batch checks them
RATES = (*(f"optim.{key}" for key in rates.RATES), "optim.lr_over_batch")
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
    step: int  # its step
    offset: int  # see Run
    started_with: dict[str, Any]  # see Run
    origin: Path | None  # the run that provides the first weights
    lines: list[str]  # messages to print


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


def begin(config: Config, folder: Path, resume: bool) -> tuple[Run, int]:
    """The run, ready for its next step, and the number of steps it has done."""
    start = decide(config, folder, resume)
    for line in start.lines:
        say(line)
    _write_folder(start)
    run = _build(start)
    _announce(run)
    rehearse = start.config.memory.rehearse
    if rehearse is True or (rehearse == "auto" and start.device.type == "cuda"):
        _rehearse(run)
    return run, start.step


# ---- decide


def decide(config: Config, folder: Path, resume: bool) -> Start:
    """Check everything. Nothing is written except prepared data. Raises UserError or DoesNotFit if the run
    is not possible."""
    device = pick_device(config)
    _meet(config, device)
    found, damaged = _find_checkpoint(folder, resume)
    saved = load_config(folder / CONFIG)[0] if resume else None
    config = _with_origin(config, saved)
    # refuse what cannot fit before anything is read or written
    least = config.model.vocab_size or config.data.vocab_size or LEAST_VOCABULARY
    _check_room(config.with_vocab(least), device, folder)
    data = _open_data(config)
    config = config.with_vocab(config.model.vocab_size or data.vocab_size)

    state = checkpoint.load_state(found) if found else {}
    step, offset = int(state.get("step", 0)), 0
    notes: list[str] = []
    started_with = state.get("start") or _rates(saved or config)
    if saved is not None:
        config = as_chosen(config, saved)
        _require_same_settings(config, saved, folder)
        config, notes = follow_batch(config, saved, started_with)
    if state:
        _require_same_data(config, data, state, folder)
        config = _with_tokens_left(config, state)
        offset = state["tokens"] // config.data.seq_len - step * config.batch_sequences

    config, chosen = choose(config, device) if saved is None else (config, [])
    chosen += use_kernels(config, device)
    plans = _check_room(config, device, folder)
    origin = Path(config.run.init_from) if config.run.init_from and found is None else None
    if origin is not None:
        require_same_shape(config, origin)
    lines = [f"note: {note}" for note in damaged + data.notes + notes + chosen]
    if resume and found is None:
        lines.append(f"{folder} has no checkpoint yet: starting at step 0")
    return Start(
        folder=folder,
        config=config,
        device=device,
        data=data,
        plans=plans,
        found=found,
        step=step,
        offset=offset,
        started_with=started_with,
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


def _find_checkpoint(folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint of a resumed run, the same on all ranks; notes on damaged ones."""
    _require_folder(folder)
    holds_run = any((folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))
    if resume and not (folder / CONFIG).exists():
        raise UserError(f"--resume: {folder} is not a run; start one without --resume")
    if not resume and holds_run:
        raise UserError(
            f"{folder} already holds a run; continue it with --resume or choose another --run DIR"
        )
    if not resume:
        return None, []
    checkpoints = folder / CHECKPOINTS
    found, notes = checkpoint.newest_valid(checkpoints) if ranks.is_first() else (None, [])
    own = checkpoint.step_of(found) if found else -1
    (step,) = ranks.total(own if ranks.is_first() else 0)
    return (None if step < 0 else checkpoint.step_folder(checkpoints, int(step))), notes


def _require_folder(folder: Path) -> None:
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
    checkpoint.require_disk(folder / CHECKPOINTS, largest, kept)
    return plans


def _open_data(config: Config) -> TokenData:
    """The data; the first rank of each machine prepares them if necessary."""
    if not ranks.is_first_here():
        ranks.wait()
    progress = config.log.progress and ranks.is_first()
    data = open_data(config.data, config.model.vocab_size, config.run.seed, progress)
    if ranks.is_first_here():
        ranks.wait()
    return data


def _rates(config: Config) -> dict[str, Any]:
    """The values from which the rates of a run follow if its batch changes."""
    optim = config.optim
    return {"batch_tokens": config.train.batch_tokens} | {key: getattr(optim, key) for key in rates.RATES}


def _require_same_settings(config: Config, saved: Config, folder: Path) -> None:
    """Raise UserError if a setting has changed that may not change on resume."""
    changed = [key for key in changed_keys(saved, config) if key not in RATES]
    if changed:
        changed.sort(
            key=lambda key: not key.startswith("relora.")
        )  # first, as the schedule follows from these
        section, key = changed[0].split(".")
        before = getattr(getattr(saved, section), key)
        raise UserError(
            f"{changed[0]}: the run in {folder} was started with {before!r}, and this key may not change "
            "on resume; set it back or start a new run"
        )


def _require_same_data(config: Config, data: TokenData, state: dict[str, Any], folder: Path) -> None:
    """Raise UserError if the data are not those of the run."""
    if state["data"] != data.fingerprint:
        raise UserError(
            f"data.source: {config.data.source} is not what the run in {folder} was trained on; "
            "give the folder or files that it started with"
        )


def _with_tokens_left(config: Config, state: dict[str, Any]) -> Config:
    """The config with as many steps as the rest of train.tokens needs with the present batch."""
    train = config.train
    if train.tokens is None:
        return config
    steps = state["step"] + max(0, math.ceil((train.tokens - state["tokens"]) / train.batch_tokens))
    if steps == train.total_steps:
        return config
    return config.model_copy(update={"train": train.model_copy(update={"steps": steps, "tokens": None})})


# ---- build


def _write_folder(start: Start) -> None:
    """Make the folder of the run, or bring it up to date."""
    ranks.wait()  # until all ranks have looked at the folder
    if ranks.is_first():
        start.folder.mkdir(parents=True, exist_ok=True)
        (start.folder / SUMMARY).unlink(missing_ok=True)
        write_beside(start.folder / CONFIG, to_toml(start.config))
        shutil.copyfile(start.data.tokenizer.path, start.folder / TOKENIZER)


def _build(start: Start) -> Run:
    """The run with its weights and state: loaded, taken from another run, or new."""
    config, data = start.config, start.data
    run = Run(
        folder=start.folder,
        config=config,
        data=data,
        validation=data.validation(config.train.eval_tokens),
        token_bytes=data.tokenizer.token_bytes(),
        offset=start.offset,
        started_with=start.started_with,
        plans=start.plans,
    )
    run.build(start.device, config.relora.stored_at(start.step))
    engine = run.parts.engine
    if start.found is not None:
        run.load(start.found)
        say(f"continuing {start.folder} at step {start.step}")
        return run
    initialize(engine.units(write=True), config.run.seed, start.device)
    if start.origin is not None:
        initialize_from(engine.units(write=True), start.origin)
        say(f"weights from {start.origin}")
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
    place = run.folder / "rehearsal"
    parts.relora.optimizer.rehearsing = True
    try:
        with parts.meter.watch("step"):
            parts.engine.step(batch, 0, 0.0, rehearsal=True)
        with parts.meter.watch("evaluation"):
            parts.engine.evaluate(batch)
        # embedding and one block: all others are like these
        some = itertools.islice(parts.engine.units(), 2)
        write_checkpoint(place, 0, ((unit.spec.name, unit.tensors()) for unit in some), {}, keep=0)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"the rehearsal of a step ran out of GPU memory ({str(error).splitlines()[0]}); "
            "lower memory.budget_gib or train.micro_batch"
        ) from None
    finally:
        parts.relora.optimizer.rehearsing = False
        shutil.rmtree(place, ignore_errors=True)
    peak = parts.meter.readings()["peak_mem_gib"]
    say(f"rehearsed a step: peak {peak:.2f} GiB on the GPU")
