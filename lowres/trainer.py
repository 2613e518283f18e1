"""The loop of a run: batch, step, log, evaluate, checkpoint. It also continues an interrupted run.

`lowres.start` decides what a run starts from; its results are in its folder (`lowres.runs`).

With several ranks (`lowres.ranks`), each one runs the same loop with the same batches, and its engine takes
its share of them. Only the first rank prints and writes.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lowres import __version__, metrics, ranks
from lowres.config import Config
from lowres.data.ahead import ReadAhead
from lowres.engine import StepReport
from lowres.errors import CheckFailed, UserError
from lowres.evaluate import evaluate
from lowres.model import unit_specs
from lowres.optim.schedule import factor
from lowres.ranks import say
from lowres.report import draw_loss
from lowres.runs import METRICS, SUMMARY, Run, write_beside
from lowres.sample import sample
from lowres.speed import RunProfile
from lowres.start import begin, is_finished

# a run ends after this many steps in a row without an update
MOST_SKIPPED = 50


def train(config: Config, folder: Path, resume: bool, profiled: int = 0) -> None:
    """Train into a folder, or continue there. profiled: steps to profile, after the first few."""
    if resume and is_finished(config, folder):
        if ranks.is_first():
            print(f"{folder} is finished; to continue it, raise train.steps")
        return
    began = time.perf_counter()
    profile = RunProfile(profiled if ranks.is_first() else 0, folder)
    profile.require(config.train.total_steps)
    run, step = begin(config, folder, resume)
    config, resumed_at, total = run.config, step, run.config.train.total_steps
    try:
        profile.require(total - step)
    except UserError as error:  # the run has begun, so it goes on
        say(f"note: {error}")
        profile = RunProfile(0, folder)
    log = metrics.MetricsLog(folder / METRICS, step or -1)
    silent = not (config.log.progress and ranks.is_first())
    bar = tqdm(total=total, initial=step, unit="step", disable=True if silent else None)
    skipped_in_a_row = 0
    ahead = ReadAhead(lambda at: run.data.batch(at, config.batch_sequences, run.offset), total)

    while True:
        # ---- once in a while: evaluate, checkpoint (a resumed run did both before it stopped)
        if step == 0 or step > resumed_at:
            if _due(step, config.train.eval_every, total):
                log.write({"step": step, **_evaluate(run, step)})
            if step == total or (step and _due(step, config.train.checkpoint_every, total)):
                run.save(step)
        if step >= total:
            break
        if config.relora.adapted_at(step) and not run.parts.adapted:
            run.start_adapters(step)
            say(f"step {step}: {_adapters_text(run)}")

        # ---- one step
        before, schedule = time.perf_counter(), factor(config, step)
        with profile.step(run.parts.rooms, step), run.parts.meter.watch("step"):
            batch = ahead.batch(step)
            report = run.parts.engine.step(batch, step, schedule)
        seconds = time.perf_counter() - before
        step += 1

        # ---- log
        record = _record(run, step, schedule, report, seconds)
        log.write(record)
        bar.update()
        bar.set_postfix_str(_progress_text(record))
        if "merge_cosine" in record:
            say(f"step {step}: {_merge_text(record)}")
        if text := profile.report():
            say(text)
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


def _evaluate(run: Run, step: int) -> dict[str, float]:
    with run.parts.meter.watch("evaluation"):
        scores = evaluate(run.parts.engine, run.validation, run.token_bytes, run.config.batch_sequences)
    say(f"step {step}: validation loss {scores['val_loss']:.4f}")
    return scores


def _record(run: Run, step: int, schedule: float, report: StepReport, seconds: float) -> dict[str, Any]:
    """The metrics of the step that has just been done; `step` counts it."""
    config = run.config
    lr = (config.optim.lr or 0) * schedule
    return {
        "step": step,
        "tokens": run.tokens_at(step),
        "loss": report.loss,
        "lr": lr,
        "lr_over_batch": lr / config.batch_sequences,
        "grad_norm": report.grad_norm,
        "tokens_per_s": config.train.batch_tokens / seconds,
        **run.parts.meter.readings(),
        "skipped": report.skipped,
        **(run.parts.relora.readings(step) if config.relora.enabled else {}),
    }


def _progress_text(record: dict[str, Any]) -> str:
    cycle = f"cycle {record['cycle']}, " if "cycle" in record else ""
    return f"{cycle}loss {record['loss']:.3f}, lr {record['lr']:.2e}, {record['tokens_per_s']:,.0f} tokens/s"


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


def _finish(run: Run, seconds: float) -> None:
    """Write the summary and the loss curve; print a sample."""
    asked, text = run.config.log, None
    if asked.sample_tokens:
        text = sample(
            run.parts.engine,
            run.data.tokenizer,
            asked.sample_prompt,
            tokens=asked.sample_tokens,
            seq_len=run.config.data.seq_len,
            seed=run.config.run.seed,
        )
    if not ranks.is_first():
        return
    summary: dict[str, Any] = {}
    first = None
    for record in metrics.read(run.folder / METRICS):
        summary |= record
        first = record.get("val_loss") if first is None else first
    optim = run.config.optim
    summary["batch"] = {
        "tokens": run.config.train.batch_tokens,
        "sequences": run.config.batch_sequences,
        "lr": optim.lr,
        "lr_over_batch": optim.lr_over_batch,
        "policy": optim.batch_policy,
        "started_with": run.started_with,
    }
    summary |= {"first_val_loss": first, "wall_seconds": seconds, "versions": _versions()}
    if text is not None:
        summary["sample"] = text
        print(f"--- a sample after {summary['step']} steps ---\n{text}\n---")
    write_beside(run.folder / SUMMARY, json.dumps(summary, indent=1))
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
