"""A run: batch, step, log, evaluate, checkpoint, and all of it again after an interruption.

Everything a run produces lives in its folder (`lowres.runs`). With ReLoRA a run has two parts, and what
computes is built anew between them: the adapters start from the checkpoint that the warm start ends with.

On several ranks (`lowres.ranks`) each goes through the same loop with the same batches, and its engine takes
its share of them. Only the first rank prints and writes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lowres import __version__, checkpoint, memory, metrics, ranks
from lowres.config import Config
from lowres.config_file import changed_keys, follow_batch, load_config, to_toml
from lowres.data import TokenData, open_data
from lowres.data.sources import is_stream
from lowres.engine import Engine, zero
from lowres.errors import CheckFailed, DoesNotFit, UserError
from lowres.evaluate import evaluate
from lowres.meter import Meter
from lowres.model import initialize, unit_specs
from lowres.optim.schedule import factor
from lowres.relora import Relora, start_adapters, tensors_before
from lowres.report import draw_loss
from lowres.rooms import Rooms
from lowres.runs import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    SUMMARY,
    TOKENIZER,
    initialize_from,
    pick_device,
    require_same_shape,
    training_engine,
)
from lowres.sample import sample

# steps in a row without an update after which a run is not worth its electricity
MOST_SKIPPED = 50
# keys that may change with the batch; follow_batch checks them
RATES = ("optim.lr", "optim.embed_lr", "optim.lr_over_batch")


@dataclass
class Parts:
    """What computes: in the warm start of ReLoRA without, then with adapters."""

    plan: memory.Plan
    rooms: Rooms
    engine: Engine
    relora: Relora
    meter: Meter
    adapted: bool


@dataclass
class Run:
    """What a running run is made of."""

    folder: Path
    config: Config
    data: TokenData
    validation: Tensor  # windows of eval_tokens, see TokenData.validation
    token_bytes: Tensor
    offset: int  # sequences seen, less those that all steps so far would have with the batch of now
    start: dict[str, Any]  # the batch and the rates it was started with
    plans: dict[bool, memory.Plan]  # by whether there are adapters
    parts: Parts = field(init=False)

    def sequences_at(self, step: int) -> int:
        """Sequences seen in the first `step` steps, for any step since the batch last changed."""
        return self.offset + step * self.config.batch_sequences

    def tokens_at(self, step: int) -> int:
        return self.sequences_at(step) * self.config.data.seq_len

    def build(self, device: torch.device, adapted: bool) -> None:
        """Make what computes, in the place of what did; weights and state are all zero."""
        self.__dict__.pop("parts", None)  # first, as there may not be room for both
        config, plan, rooms = self.config, self.plans[adapted], Rooms(device)
        engine, relora = training_engine(config, plan, rooms, adapted)
        engine.reserve(config.batch_sequences, config.data.seq_len, training=True)
        self.parts = Parts(plan, rooms, engine, relora, Meter(rooms), adapted)

    def save(self, step: int) -> None:
        """Checkpoint everything that the next step depends on."""
        stored = ((unit.spec.name, unit.tensors()) for unit in self.parts.engine.units())
        state = {"tokens": self.tokens_at(step), "data": self.data.fingerprint, "start": self.start}
        keep = self.config.train.keep_checkpoints
        _write_checkpoint(self.folder / CHECKPOINTS, step, stored, state, keep)

    def load(self, folder: Path) -> int:
        """Read a checkpoint into place; returns its step."""
        for unit in self.parts.engine.units(write=True):
            checkpoint.load_unit(folder, unit.spec.name, unit.tensors())
        return int(checkpoint.load_state(folder)["step"])

    def start_adapters(self, step: int) -> None:
        """Go on with adapters from the end of the warm start, which is a checkpoint in any case."""
        saved = checkpoint.step_folder(self.folder / CHECKPOINTS, step)
        if not saved.exists():
            self.save(step)
        self.build(self.parts.rooms.device, adapted=True)
        for unit in self.parts.engine.units(write=True):
            checkpoint.load_unit(saved, unit.spec.name, tensors_before(unit), all_used=False)
            start_adapters(unit, self.config.run.seed, step)


def _write_checkpoint(
    folder: Path, step: int, stored: Iterable[tuple[str, dict[str, Tensor]]], state: dict[str, Any], keep: int
) -> None:
    """`checkpoint.save` on the first rank; the others give it their parts of the units."""
    if ranks.is_first():
        checkpoint.save(folder, step, stored, state, keep)
    else:
        for _ in stored:
            pass


def train(config: Config, folder: Path, resume: bool) -> None:
    """Train into a folder, or continue there."""
    if resume and _is_finished(config, folder):
        _print(f"{folder} is finished; to go on, raise train.steps")
        return
    began = time.perf_counter()
    run, step = _prepare(config, folder, resume)
    config, resumed_at = run.config, step
    total, sequences = config.train.total_steps, config.batch_sequences
    log = metrics.MetricsLog(folder / METRICS, step or -1)
    silent = not (config.log.progress and ranks.is_first())
    bar = tqdm(total=total, initial=step, unit="step", disable=True if silent else None)
    skipped_in_a_row = 0

    while True:
        # ---- once in a while: evaluate, checkpoint (a resumed run had done so where it stopped)
        if step == 0 or step > resumed_at:
            if _due(step, config.train.eval_every, total):
                with run.parts.meter.watch("evaluation"):
                    scores = evaluate(run.parts.engine, run.validation, run.token_bytes, sequences)
                log.write({"step": step, **scores})
                _say(f"step {step}: validation loss {scores['val_loss']:.4f}")
            if step == total or (step and _due(step, config.train.checkpoint_every, total)):
                run.save(step)
        if step >= total:
            break
        if config.relora.adapted_at(step) and not run.parts.adapted:
            run.start_adapters(step)
            _say(f"step {step}: {_adapters_text(run)}")

        # ---- one step
        before = time.perf_counter()
        schedule = factor(config, step)
        with run.parts.meter.watch("step"):
            report = run.parts.engine.step(run.data.batch(step, sequences, run.offset), step, schedule)
        tokens_per_s = config.train.batch_tokens / (time.perf_counter() - before)
        step += 1

        # ---- log
        lr = (config.optim.lr or 0) * schedule
        merged = run.parts.relora.readings(step) if config.relora.enabled else {}
        log.write(
            {
                "step": step,
                "tokens": run.tokens_at(step),
                "loss": report.loss,
                "lr": lr,
                "lr_over_batch": lr / sequences,
                "grad_norm": report.grad_norm,
                "tokens_per_s": tokens_per_s,
                **run.parts.meter.readings(),
                "skipped": report.skipped,
                **merged,
            }
        )
        bar.update()
        cycle = f"cycle {merged['cycle']}, " if merged else ""
        bar.set_postfix_str(f"{cycle}loss {report.loss:.3f}, lr {lr:.2e}, {tokens_per_s:,.0f} tokens/s")
        if "merge_cosine" in merged:
            _say(f"step {step}: {_merge_text(merged)}")
        skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
        if skipped_in_a_row == MOST_SKIPPED:
            raise CheckFailed(
                f"training: {MOST_SKIPPED} steps in a row had a loss or gradient that is not finite; "
                f"start again with a lower optim.lr than {config.optim.lr}"
            )

    bar.close()
    log.close()
    _finish(run, time.perf_counter() - began)


def _due(step: int, every: int, total: int) -> bool:
    return bool(every) and (step % every == 0 or step == total)


def _merge_text(merged: dict[str, Any]) -> str:
    rank = f"; effective rank so far {merged['effective_rank']:.1f}" if "effective_rank" in merged else ""
    return (
        f"merge {merged['merges']}: {merged['merge_norm']:.1%} of the norm of the change, "
        f"cosine {merged['merge_cosine']:.3f}{rank}"
    )


def _adapters_text(run: Run) -> str:
    relora = run.config.relora
    merging = f"merged every {relora.cycle_steps} steps" if relora.cycle_steps else "never merged"
    specs = [s for unit in unit_specs(run.config.model, relora) for s in unit.adapters.values()]
    return (
        f"adapters of rank {relora.rank} ({sum(s.numel for s in specs) / 1e6:.2f} M parameters) train "
        f"from here, {merging}; the matrices they adapt are frozen"
    )


def _is_finished(config: Config, folder: Path) -> bool:
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        # in tokens, if the run is given in them: its batch may have changed on the way
        if config.train.tokens is not None:
            return bool(summary["tokens"] >= config.train.tokens)
        return bool(summary["step"] >= config.train.total_steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _say(line: str) -> None:
    if ranks.is_first():
        tqdm.write(line, file=sys.stderr)


def _print(line: str) -> None:
    if ranks.is_first():
        print(line)


def _prepare(config: Config, folder: Path, resume: bool) -> tuple[Run, int]:
    """Check everything, then build the run: from its newest valid checkpoint, or from nothing."""
    device = pick_device(config)
    _meet(config, device)
    found, damaged = _find_checkpoint(folder, resume)
    config = _with_origin(config, folder, resume)
    # what cannot fit is refused before anything is read or written
    smallest = config.model.vocab_size or config.data.vocab_size or 260
    _check_room(config.with_vocab(smallest), device, folder)
    data = _open_data(config)
    config = config.with_vocab(config.model.vocab_size or data.vocab_size)
    start, offset = _start_of(config), 0
    notes: list[str] = []
    if resume:
        config, start, offset, notes = _continue(config, folder, data, found)
    plans = _check_room(config, device, folder)
    origin = Path(config.run.init_from) if config.run.init_from and found is None else None
    if origin is not None:
        require_same_shape(config, origin)

    for note in damaged + data.notes + notes:
        _say(f"note: {note}")
    if resume and found is None:
        _say(f"{folder} has no checkpoint yet: starting at step 0")
    ranks.wait()  # until all have seen what was there
    if ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY).unlink(missing_ok=True)
        _write_beside(folder / CONFIG, to_toml(config))
        shutil.copyfile(data.tokenizer.path, folder / TOKENIZER)

    validation = data.validation(config.train.eval_tokens)
    token_bytes = data.tokenizer.token_bytes()
    run = Run(folder, config, data, validation, token_bytes, offset, start, plans)
    step = int(checkpoint.load_state(found)["step"]) if found else 0
    run.build(device, config.relora.stored_at(step))
    if found is None:
        engine = run.parts.engine
        initialize(engine.units(write=True), config.run.seed, device)
        if origin is not None:
            initialize_from(engine.units(write=True), origin)
            _say(f"weights from {origin}")
    else:
        run.load(found)
        _say(f"continuing {folder} at step {step}")
    _announce(run)
    if config.memory.rehearse is True or (config.memory.rehearse == "auto" and device.type == "cuda"):
        _rehearse(run)
    return run, step


def _meet(config: Config, device: torch.device) -> None:
    """Be one of the ranks of the run; refuse what cannot be done on so many, or without DeepSpeed."""
    engine, source = config.memory.engine, config.data.source
    if ranks.size() > 1 and engine != "deepspeed":
        raise UserError(
            f"memory.engine: {engine} runs in one process and {ranks.size()} were started; use deepspeed, or "
            "`lowres train` without a launcher"
        )
    if ranks.size() > 1 and is_stream(source):
        raise UserError(
            f"data.source: {source} is a stream, and several ranks need a prepared folder; make one with "
            f"`lowres data prepare {source} OUT`"
        )
    if engine == "deepspeed":
        zero.require(config, device)
        ranks.join(device)


def _open_data(config: Config) -> TokenData:
    """The data; the first rank of each machine prepares them if need be."""
    if not ranks.is_first_here():
        ranks.wait()
    progress = config.log.progress and ranks.is_first()
    data = open_data(config.data, config.model.vocab_size, config.run.seed, progress)
    if ranks.is_first_here():
        ranks.wait()
    return data


def _with_origin(config: Config, folder: Path, resume: bool) -> Config:
    """With the tokenizer of the run that the weights come from; a resumed run keeps the one it had."""
    saved = load_config(folder / CONFIG)[0] if resume else config
    origin = config.run.init_from or saved.run.init_from
    if origin is None:
        return config
    tokenizer = Path(origin) / TOKENIZER
    if not tokenizer.exists():
        raise UserError(f"run.init_from: {origin} is no run: it has no {TOKENIZER}")
    run = config.run.model_copy(update={"init_from": origin})
    data = config.data.model_copy(update={"tokenizer": config.data.tokenizer or str(tokenizer)})
    return config.model_copy(update={"run": run, "data": data})


def _check_room(config: Config, device: torch.device, folder: Path) -> dict[bool, memory.Plan]:
    """The plans, by whether there are adapters, if the budgets, this machine and its disk have room."""
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


def _rehearse(run: Run) -> None:
    """The largest step of training, of evaluation and of saving, so that what runs once runs always.

    Two micro-batches do: what holds the whole batch is allocated. The step is refused at its end, so
    weights and state stay as they are.
    """
    config, parts = run.config, run.parts
    sequences = min(config.batch_sequences, 2 * parts.plan.micro_batch * ranks.size())
    shape = (sequences, config.data.seq_len + 1)
    batch = torch.zeros(shape, dtype=torch.int64)
    place = run.folder / "rehearsal"
    try:
        with parts.meter.watch("step"):
            parts.engine.step(batch, 0, 0.0, rehearsal=True)
        with parts.meter.watch("evaluation"):
            parts.engine.evaluate(batch)
        # embedding and a block: the others are like these
        some = itertools.islice(parts.engine.units(), 2)
        _write_checkpoint(place, 0, ((unit.spec.name, unit.tensors()) for unit in some), {}, keep=0)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"the rehearsal of a step ran out of GPU memory ({str(error).splitlines()[0]}); "
            "lower memory.budget_gib or train.micro_batch"
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    peak = parts.meter.readings()["peak_mem_gib"]
    _say(f"rehearsed a step: peak {peak:.2f} GiB on the GPU")


def _find_checkpoint(folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run: {folder} is a file; give a folder")
    holds_run = any((folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))
    if resume and not (folder / CONFIG).exists():
        raise UserError(f"--resume: {folder} is no run; start one without --resume")
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


def _start_of(config: Config) -> dict[str, Any]:
    """What the rates of a run follow from when its batch changes."""
    optim = config.optim
    return {"batch_tokens": config.train.batch_tokens, "lr": optim.lr, "embed_lr": optim.embed_lr}


def _continue(
    config: Config, folder: Path, data: TokenData, found: Path | None
) -> tuple[Config, dict[str, Any], int, list[str]]:
    """What to resume with: the config, how the run started, the offset of its sequences, notes.

    Refuses other settings and other data than the run was started with.
    """
    saved, _ = load_config(folder / CONFIG)
    state = checkpoint.load_state(found) if found else {}
    start = state.get("start") or _start_of(saved)
    changed = [key for key in changed_keys(saved, config) if key not in RATES]
    if changed:
        changed.sort(key=lambda key: not key.startswith("relora."))  # which the schedule follows
        section, key = changed[0].split(".")
        before = getattr(getattr(saved, section), key)
        raise UserError(
            f"{changed[0]}: the run in {folder} was started with {before!r}, and this key may not change "
            "on resume; set it back or start a new run"
        )
    config, notes = follow_batch(config, saved, start)
    if not state:
        return config, start, 0, notes
    if state["data"] != data.fingerprint:
        raise UserError(
            f"data.source: {config.data.source} is not what the run in {folder} was trained on; "
            "give the folder or files that it started with"
        )
    train, step = config.train, state["step"]
    if train.tokens is not None:
        # what is left of them, in batches of now
        steps = step + max(0, math.ceil((train.tokens - state["tokens"]) / train.batch_tokens))
        if steps != train.total_steps:
            train = train.model_copy(update={"steps": steps, "tokens": None})
            config = config.model_copy(update={"train": train})
    return config, start, state["tokens"] // config.data.seq_len - step * config.batch_sequences, notes


def _announce(run: Run) -> None:
    config, plan = run.config, run.parts.plan
    lr = config.optim.lr or 0
    _say(
        f"{plan.parameters / 1e6:.2f} M parameters on {run.parts.rooms.device.type}: {config.memory.engine} "
        f"engine, {config.memory.weights} weights, {config.optim.name}"
    )
    _say(
        f"{config.train.total_steps} steps of {config.train.batch_tokens:,} tokens "
        f"({config.batch_sequences} sequences in micro-batches of {plan.micro_batch}), "
        f"warm-up {config.warmup_steps}; lr {lr:.3g}, lr/batch {lr / config.batch_sequences:.3g}; "
        f"plan {plan.peak('gpu') / memory.GIB:.2f} GiB on the GPU, {plan.peak('host') / memory.GIB:.2f} GiB "
        "on the host"
    )


def _finish(run: Run, seconds: float) -> None:
    """Write the summary and the picture, print a sample."""
    asked, text = run.config.log, None
    if asked.sample_tokens:
        seq_len, seed = run.config.data.seq_len, run.config.run.seed
        text = sample(
            run.parts.engine, run.data.tokenizer, asked.sample_prompt, asked.sample_tokens, seq_len, seed=seed
        )
    if not ranks.is_first():
        return
    summary: dict[str, Any] = {}
    first = None
    for record in metrics.read(run.folder / METRICS):
        summary |= record
        first = record.get("val_loss") if first is None else first
    optim, start = run.config.optim, run.start
    summary["batch"] = {
        "tokens": run.config.train.batch_tokens,
        "sequences": run.config.batch_sequences,
        "lr": optim.lr,
        "lr_over_batch": optim.lr_over_batch,
        "policy": optim.batch_policy,
        "started_with": start,
    }
    summary |= {"first_val_loss": first, "wall_seconds": seconds, "versions": _versions()}
    if text is not None:
        summary["sample"] = text
        print(f"--- a sample after {summary['step']} steps ---\n{text}\n---")
    _write_beside(run.folder / SUMMARY, json.dumps(summary, indent=1))
    picture = draw_loss(run.folder)
    if first is not None and summary["val_loss"] is not None:
        print(f"validation loss {first:.4f} -> {summary['val_loss']:.4f} in {seconds:.0f} s")
    print(f"run: {run.folder}" + (f", loss curve: {picture}" if picture else ""))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lowres": __version__}
    for package in (
        "torch",
        "numpy",
        "sentencepiece",
        "safetensors",
        "pydantic",
        "datasets",
        "triton",
        "deepspeed",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_beside(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)
