"""The loop of a run: batch, step, log, evaluate, checkpoint. It also continues an interrupted run.

`lowres.start` decides what a run starts from; its results are in its folder (`lowres.runs`). Whatever ends a
run between two steps first saves it: a signal, a time limit, or a file that cannot be read or written.

With several ranks (`lowres.ranks`), each one runs the same loop with the same batches, and its engine takes
its share of them. Only the first rank prints and writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lowres import checkpoint, disk, lock, ranks
from lowres.checkpoint import Best, Passed
from lowres.config import Config
from lowres.data.ahead import ReadAhead
from lowres.data.batches import IGNORED, inputs_and_targets
from lowres.data.chat.chat_data import padding_of
from lowres.engine import StepReport
from lowres.errors import CheckFailed, DoesNotFit, UserError
from lowres.health import Verdict
from lowres.model import unit_specs
from lowres.optim.schedule import factor
from lowres.outlook import Stopwatch
from lowres.progress import Bar
from lowres.ranks import say
from lowres.resuming import require_same_run
from lowres.rooms import is_out_of_memory
from lowres.running import Batch, Run
from lowres.runs import CHECKPOINTS, CONFIG
from lowres.scores import by_part, in_words, of_tasks, task_in_words
from lowres.speed import RunProfile
from lowres.start import begin, is_finished, require_folder
from lowres.stopping import Stopper
from lowres.summary import finish
from lowres.wording import command, counted

# so often a rollback may pass over a batch at the same step
MOST_ROLLBACKS = 3
# parts, named texts and tasks that are printed with an evaluation
MOST_IN_A_LINE = 6
# characters of a sample in a line
MOST_OF_A_SAMPLE = 100


def train(config: Config, folder: Path, resume: bool, profiled: int = 0, restart: bool = False) -> None:
    """Train into a folder, or continue there. profiled: steps to profile, after the first few. restart: begin
    again, and move aside what is there."""
    if resume and not restart and is_finished(config, folder):
        require_same_run(config, folder)
        if ranks.is_first():
            longer = f"{_again(folder)} --set train.steps=N"
            print(f"{folder} is finished; to train it for longer, up to N steps: {longer}")
        return
    began = time.monotonic()
    profile = RunProfile(profiled if ranks.is_first() else 0, folder)
    if config.train.epochs is None:  # their steps are not known yet
        profile.require(config.train.total_steps)
    require_folder(folder)
    with ExitStack() as stack:
        stack.enter_context(_saying_how_to_go_on(folder))
        if ranks.is_first() and (note := stack.enter_context(lock.held(folder)).note):
            say(f"note: {note}")
        run, step = begin(config, folder, resume, restart)
        stack.callback(run.release)
        stopper = stack.enter_context(Stopper(config.train.max_minutes, began))
        loop = _Loop(run, step, stopper, profile)
        try:
            reason = loop.go()
        except (UserError, OSError) as error:
            loop.leave(error)
        except Exception:  # a bug, or a device that failed: what can be saved is not lost
            loop.save_whatever_happens()
            raise
        if reason:
            run.events.say("stopped", loop.what_is_saved(reason), step=loop.step, saved=loop.saved)
            return
        finish(run, time.monotonic() - began)


@contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    """Add to an interruption what to do next."""
    try:
        yield
    except KeyboardInterrupt as error:
        begun = (folder / CONFIG).exists()
        error.add_note(f"to go on: {_again(folder)}" if begun else "nothing of the run was written")
        raise


def _again(folder: Path) -> str:
    """The command that continues a run."""
    return command("lowres", "train" if ranks.size() == 1 else "launch", folder, "--resume")


class _Loop:
    """The loop, and what it remembers from one step to the next. step: completed steps."""

    def __init__(self, run: Run, step: int, stopper: Stopper, profile: RunProfile) -> None:
        self.run, self.step, self.stopper = run, step, stopper
        self.total, self.resumed_at = run.config.train.total_steps, step
        self.in_step = False  # whether weights are between two steps
        self.good = step  # the last step after which nothing was wrong
        self.skipped_whole = True  # whether no step since then has changed anything
        self.saved = step
        self.saved_at = time.monotonic()
        self.longest, self.longest_save = 0.0, 0.0  # seconds
        self.stopwatch, self.tasks_seconds = Stopwatch(run.config), 0.0
        self.began = time.monotonic() - run.log.wall_s
        try:
            profile.require(self.total - step)
        except UserError as error:  # the run has begun, so it goes on
            say(f"note: {error}")
            profile = RunProfile(0, run.folder)
        self.profile = profile
        self.ahead = self._ahead()
        silent = not (run.config.log.progress and ranks.is_first())
        self.bar = Bar("step", total=self.total, done=step, shown=not silent, leave=True)

    def go(self) -> str:
        """Train to the end, or until something asks to stop; returns what that was, or ""."""
        run, config, total = self.run, self.run.config, self.total
        while True:
            reason = (
                self.stopper.reason(self.longest + self.longest_save) if self.step > self.resumed_at else ""
            )

            # ---- once in a while: evaluate, sample, checkpoint (a resumed run did so before it stopped)
            fresh = self.step == 0 or self.step > self.resumed_at
            scores = self.evaluate() if fresh and _due(self.step, config.train.eval_every, total) else {}
            if self.is_sampled():
                self.sample()
            if fresh and self.step and (self.should_save(scores) or reason):
                self.save(scores.get("val_loss"))
            run.look_after_saves(wait=bool(reason) or self.step >= total)
            if reason and self.step < total:
                self.close()
                return reason
            if self.step >= total:
                break
            if config.relora.adapted_at(self.step) and not run.parts.adapted:
                run.start_adapters(self.step)
                self.stopwatch = Stopwatch(config)  # with adapters a step takes another time
                say(f"step {self.step}: {_adapters_text(run)}")

            # ---- one step
            batch = self.ahead.batch(self.step)
            before, schedule = time.perf_counter(), factor(config, self.step)
            self.in_step = True
            with self.profile.step(run.parts.rooms, self.step), run.parts.meter.watch("step"):
                report = self.take_step(batch, schedule)
            self.in_step = False
            seconds = time.perf_counter() - before
            self.longest = max(self.longest, seconds)
            self.step += 1

            # ---- log
            wall = time.monotonic() - self.began
            record = _record(run, self.step, schedule, report, seconds, wall, batch)
            run.record(record)
            run.require_folder()
            self.bar.update(1, _progress_text(record, run.epochs_at(self.step)))
            if "merge_cosine" in record:
                say(f"step {self.step}: {_merge_text(record)}")
            if not self.profile.running:
                for line in self.stopwatch.after(self.step, seconds, datetime.now()):
                    say(line)
            if text := self.profile.report():
                say(text)
            self.notice_memory()
            self.judge(run.watch.see(self.step, report), report)
        self.close()
        return ""

    # ---- the parts of the loop

    def _ahead(self) -> ReadAhead:
        return ReadAhead(self.run.batch, self.total)

    def take_step(self, batch: Batch, schedule: float) -> StepReport:
        limits = self.run.watch.limits()
        more: dict[str, Any] = {} if batch.pairs is None else {"pairs": batch.pairs}
        with self.enough_memory("a step"):
            return self.run.parts.engine.step(
                batch.windows, self.step, schedule, norm_limit=limits.norm, loss_limit=limits.loss, **more
            )

    @contextmanager
    def enough_memory(self, what: str) -> Iterator[None]:
        """Raise DoesNotFit if the GPU is full; the engine has tried smaller micro-batches before."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"training: {what} after step {self.step} ran out of GPU memory with micro-batches of "
                f"{self.run.parts.engine.micro_batch} ({str(error).splitlines()[0]}); close other programs "
                "on this GPU, or lower memory.budget_gib, and go on with --resume"
            ) from None

    def notice_memory(self) -> None:
        """Remember that the engine had to lower the micro-batch."""
        run, now = self.run, self.run.parts.engine.micro_batch
        if now < (run.micro_batch or run.parts.plan.micro_batch):
            before, run.micro_batch = run.micro_batch or run.parts.plan.micro_batch, now
            text = f"note: step {self.step} ran out of GPU memory; micro-batches are now {now}, not {before}"
            run.events.say("memory", text, step=self.step, micro_batch=now)

    def evaluate(self) -> dict[str, float]:
        run, before = self.run, time.perf_counter()
        with self.enough_memory("the evaluation"), run.parts.meter.watch("evaluation"):
            scores = run.evaluate()
        seconds = time.perf_counter() - before
        mixed = run.mixed(self.step)
        say(f"step {self.step}: validation: {in_words(scores)}{_parts_text(scores | mixed)}")
        before = time.perf_counter()
        tasks = self.score_tasks()
        if tasks:
            self.tasks_seconds = time.perf_counter() - before
        self.stopwatch.evaluation = seconds + self.tasks_seconds / run.config.train.eval_tasks_every
        run.record({"step": self.step, **scores, **mixed, **tasks})
        return scores

    def score_tasks(self) -> dict[str, float]:
        """The scores of the tasks, if they are due. A task that cannot be scored stops a run that has just
        begun; later, the run goes on without tasks."""
        run, train = self.run, self.run.config.train
        if run.tasks is None or not _due(self.step, train.eval_every * train.eval_tasks_every, self.total):
            return {}
        try:
            with self.enough_memory("the tasks"):
                found = run.score_tasks()
        except DoesNotFit:
            raise
        except UserError as error:
            if not self.step:
                raise
            run.tasks = None
            run.events.say("note", f"note: {error}; the run goes on without tasks", step=self.step)
            return {}
        if found.shortened and self.step == self.resumed_at:
            say(f"note: {found.note()}")
        numbers = found.numbers()
        told = [f"{task}: {task_in_words(of)}" for task, of in of_tasks(numbers).items()]
        more = f"; and {len(told) - MOST_IN_A_LINE} more" if len(told) > MOST_IN_A_LINE else ""
        say(f"step {self.step}: tasks: {'; '.join(told[:MOST_IN_A_LINE])}{more}")
        return numbers

    def is_sampled(self) -> bool:
        """Whether samples are due after this step, and not there."""
        config, log = self.run.config, self.run.samples
        due = self.step == self.total or _due(self.step, config.train.sample_every, self.total)
        if log is None or not (due and config.log.sample_tokens):
            return False
        (there,) = ranks.total(log.newest == self.step)
        return not there

    def sample(self) -> None:
        run = self.run
        with self.enough_memory("the samples"):
            found = run.sample(self.step, run.config.log.sample_tokens)
        if run.samples is not None:
            run.samples.write(*found)
        if self.step < self.total:  # the last ones are printed with the summary
            say(f"step {self.step}: wrote {_shortened(found[0]['text'])}")

    def should_save(self, scores: dict[str, float]) -> bool:
        """Whether a checkpoint is due after this step. While the numbers are wrong, none is."""
        run, train = self.run, self.run.config.train
        if self.step == self.total:
            return True
        minutes = (time.monotonic() - self.saved_at) / 60
        (late,) = ranks.total(bool(train.checkpoint_minutes and minutes >= train.checkpoint_minutes))
        due = _due(self.step, train.checkpoint_every, self.total) or bool(late)
        loss = scores.get("val_loss", math.inf)
        if train.keep_best and loss < (run.best.val_loss if run.best else math.inf):
            due = True
        return due and not run.watch.doubtful

    def save(self, val_loss: float | None = None) -> None:
        """Save this step; if the last steps were refused as a whole, the last good one, which is the same."""
        run, step = self.run, self.step
        if run.watch.doubtful and step < self.total:
            if not self.skipped_whole or self.good == self.saved or not self.good:
                return
            step, val_loss = self.good, None
        if step == self.saved:
            return
        before = time.monotonic()
        run.sync_logs()
        if val_loss is not None and val_loss < (run.best.val_loss if run.best else math.inf):
            run.best, run.kept.best_step = Best(step=step, val_loss=val_loss), step
        run.save(step, val_loss)
        self.saved, self.saved_at = step, time.monotonic()
        self.longest_save = max(self.longest_save, self.saved_at - before)

    def judge(self, verdict: Verdict, report: StepReport) -> None:
        """Act on what is wrong with the numbers of the step that has just been done."""
        run = self.run
        if verdict.bad:
            self.skipped_whole &= report.skipped == len(unit_specs(run.config.model))
        else:
            self.good, self.skipped_whole = self.step, True
        if verdict.spike:
            run.events.say("spike", f"step {self.step}: {verdict.spike}", step=self.step)
        elif verdict.bad and run.watch.worth_saying:
            run.events.say("bad", f"step {self.step}: {verdict.bad}", step=self.step)
        if verdict.dead or (self.step == self.total and run.watch.ends_badly(self.total)):
            raise CheckFailed(self.why_dead(verdict, report))
        if verdict.spike and run.config.health.spikes == "rollback":
            self.roll_back(verdict.spike)

    def why_dead(self, verdict: Verdict, report: StepReport) -> str:
        guess = f" (guessing evenly is {math.log(self.run.config.model.vocab):.3f})"
        level = "" if self.run.is_of_pairs else guess
        steps = counted(self.run.watch.seen.bad, "bad step")
        return (
            f"training: the run is dead: {steps} in a row (health.patience is "
            f"{self.run.config.health.patience}); step {self.step}: {verdict.bad}; loss {report.loss:.3f}"
            f"{level}, gradient norm {report.grad_norm:.3g}; {self.run.way_on()}"
        )

    def roll_back(self, spike: str) -> None:
        """Continue from the last checkpoint, and pass over the batch of the step that has just been done."""
        run, at = self.run, self.step - 1
        run.look_after_saves(wait=True)
        steps = [step for step in run.kept.good if step <= at]
        if not steps:
            run.events.say("note", f"step {self.step}: no checkpoint to go back to, so training goes on")
            return
        before = sum(one.step == at for one in run.passed)
        if before >= MOST_ROLLBACKS:
            raise CheckFailed(
                f"training: step {self.step} has a spike with {MOST_ROLLBACKS + 1} different batches "
                f"({spike}), so it is not in the data; the checkpoint of step {max(steps)} is kept; if the "
                "run is sound, go on from it with --resume and a larger health.spike_factor, or with "
                "health.spikes=warn"
            )
        # an older one each time, where there is one: the cause may be in the steps before
        back_to = sorted(steps)[-1 - min(before, len(steps) - 1)]
        found = checkpoint.step_folder(run.folder / CHECKPOINTS, back_to)
        state = checkpoint.load_state(found)
        run.passed.append(Passed(step=at, sequences=run.config.batch_sequences))
        adapted = run.config.relora.stored_at(state.step)
        if run.parts.adapted != adapted:
            run.build(run.parts.rooms.device, adapted)
        self.in_step = True
        run.load(found)
        self.in_step = False
        run.watch.go_back(state.watch)
        self.step = self.resumed_at = self.saved = self.good = state.step
        run.close_logs()
        run.open_log(state)
        self.ahead = self._ahead()
        self.bar.go_back(self.step)
        text = f"went back to step {self.step}; the batch of step {at + 1} is passed over"
        run.events.say("rolled back", text, step=self.step, passed=at + 1, reason=spike)

    # ---- the end

    def what_is_saved(self, reason: str) -> str:
        """The last line of a run that was asked to stop."""
        again = f"to go on: {_again(self.run.folder)}"
        if self.saved == self.step:
            return f"stopped by {reason}: step {self.step} is saved; {again}"
        last = f"step {self.saved} is the last that is saved" if self.saved else "nothing is saved"
        return f"stopped by {reason}: the numbers of step {self.step} were wrong, so {last}; {again}"

    def close(self) -> None:
        self.bar.close()

    def leave(self, error: UserError | OSError) -> None:
        """End because of an error, and save first what would be lost."""
        run = self.run
        self.bar.close()
        if isinstance(error, OSError):
            error = UserError(f"{error}; {disk.remedy(error)}")
        note = ""
        if self.is_unsaved() and (run.watch.doubtful or not isinstance(error, CheckFailed)):
            note = self._save_at_the_end()
        run.events.write("stopped", step=self.step, error=str(error))
        error.args = (f"{error}{note}",)
        raise error

    def save_whatever_happens(self) -> None:
        """Try to save; the error that ends the run is more important than one of this."""
        with suppress(Exception):
            if self.is_unsaved() and not self.run.watch.doubtful:
                self._save_at_the_end()

    def is_unsaved(self) -> bool:
        """Whether there is something to save: between two steps, and not what is on the disk."""
        if ranks.is_first():
            self.saved = max(self.run.kept.good, default=0)  # a save in the background may have failed
        return not self.in_step and self.step != self.saved

    def _save_at_the_end(self) -> str:
        """Save in the folder or elsewhere; returns what to add to the error."""
        run, before = self.run, self.saved
        try:
            run.require_folder()
            self.save()
            run.look_after_saves(wait=True)
            return f". Step {self.saved} is saved" if self.saved != before else ""
        except CheckFailed:
            return ""
        except (UserError, OSError):
            if not ranks.is_first() or run.watch.doubtful:
                return ""
        place = run.rescue(self.step)
        if place is None:
            last = f"the last checkpoint is that of step {before}" if before else "there is no checkpoint"
            return f". Nothing could be saved elsewhere either; {last}"
        saved = checkpoint.step_folder(place / CHECKPOINTS, self.step)
        if place.name.startswith("lowres-rescue"):
            return (
                f". Step {self.step} is saved in {saved}: move this folder into {run.folder / CHECKPOINTS}/ "
                "and go on with --resume"
            )
        return f". Step {self.step} is saved in {place}, where the folder is now; to go on: {_again(place)}"


def _due(step: int, every: int, total: int) -> bool:
    return bool(every) and (step % every == 0 or step == total)


def _record(
    run: Run, step: int, schedule: float, report: StepReport, seconds: float, wall: float, batch: Batch
) -> dict[str, Any]:
    """The metrics of the step that has just been done; `step` counts it."""
    config = run.config
    lr = (config.optim.lr or 0) * schedule
    tokens, packing = config.train.batch_tokens, dict[str, float]()
    if config.objective.name != "pretrain":
        inputs, targets = inputs_and_targets(batch.windows)
        trained, padding = int((targets != IGNORED).sum()), padding_of(batch.windows)
        tokens = round(inputs.numel() * (1 - padding))
        packing = {"targets": trained, "padding": padding}
    return {
        "step": step,
        "tokens": run.tokens_at(step),
        "loss": report.loss,
        "lr": lr,
        "lr_over_batch": lr / config.batch_sequences,
        "grad_norm": report.grad_norm,
        "tokens_per_s": tokens / seconds,
        "wall_s": round(wall, 3),
        **run.parts.meter.readings(),
        "skipped": report.skipped,
        **packing,
        **report.readings,
        **run.parts.relora.optimizer.readings(step),
        **(run.parts.relora.readings(step) if config.relora.enabled else {}),
    }


def _progress_text(record: dict[str, Any], epochs: float | None) -> str:
    """epochs: passes over the data so far, where their length is known."""
    cycle = f"cycle {record['cycle']}, " if "cycle" in record else ""
    epoch = "" if epochs is None else f"epoch {epochs:.2f}, "
    speed = f"{record['tokens_per_s']:,.0f} tokens/s"
    return f"{epoch}{cycle}loss {record['loss']:.3f}, lr {record['lr']:.2e}, {speed}"


def _shortened(text: str) -> str:
    """A text in one line, as far as it fits."""
    shown = repr(text)
    return shown if len(shown) <= MOST_OF_A_SAMPLE else f"{shown[:MOST_OF_A_SAMPLE]}..."


def _parts_text(record: dict[str, float]) -> str:
    """Scores of the parts of a mixture and of the texts with names, and the shares of the parts, if they fit
    on a line."""
    parts = by_part(record)
    shares = {key.removeprefix("share/"): x for key, x in record.items() if key.startswith("share/")}
    names = dict.fromkeys([*parts, *shares])
    if not 0 < len(names) <= MOST_IN_A_LINE:
        return ""
    told = []
    for name in names:
        numbers = [in_words(parts[name])] if name in parts else []
        numbers += [f"{shares[name]:.1%}"] if name in shares else []
        told.append(f"{name}: {', '.join(numbers)}")
    return f" ({'; '.join(told)})"


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
