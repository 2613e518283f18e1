"""A run in progress: its parts, its place in the data, and how it is saved.

With ReLoRA a run has two parts. Engine and optimizer are built again between them: the adapters start from
the checkpoint at the end of the warm start.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowres import checkpoint, disk, harness, memory, ranks
from lowres.baseline import Baseline
from lowres.checkpoint import Best, Kept, Mixture, NotFinite, Passed, Saver, Start, State
from lowres.config import Config
from lowres.config_file import to_toml, to_values
from lowres.conversation import Conversation
from lowres.data import ChatData, Data, MixedData
from lowres.data.chat import open_template
from lowres.engine import Engine
from lowres.errors import CheckFailed
from lowres.evaluate import evaluate_pairs, evaluate_parts
from lowres.events import Events
from lowres.health import Watch
from lowres.meter import Meter
from lowres.metrics import MetricsLog, Record
from lowres.objective import Pairs, Preference, make_objective
from lowres.records import CHECKPOINTS, CONFIG, METRICS, PLAN, SAMPLES
from lowres.relora import Relora, start_adapters, tensors_before
from lowres.rooms import Rooms
from lowres.rules.base import UPDATE_NORM
from lowres.runs import starts_of, training_engine
from lowres.sample import Sampling, samples
from lowres.samples import SampleLog
from lowres.trackers import Opening, Trackers

# host memory that stays free beside a snapshot
SPARE = 2 << 30
# seconds that training waited for a save
WORTH_SAYING = 1.0
# the limiter's state: it may be switched on or off when a run is resumed
LIMITER = f".{UPDATE_NORM}"


class Batch(NamedTuple):
    """windows: int64 [sequences, seq_len + 1]. pairs: what is what in them, if they are pairs."""

    windows: Tensor
    pairs: Pairs | None = None


@dataclass
class Parts:
    """Everything that computes: without adapters in the warm start of ReLoRA, then with them."""

    plan: memory.Plan
    rooms: Rooms
    engine: Engine
    relora: Relora
    meter: Meter
    adapted: bool


@dataclass(kw_only=True)
class Run:
    """A run in progress."""

    folder: Path
    config: Config
    data: Data
    validation: dict[str, Tensor]  # windows of eval_tokens, see Data.validation_parts
    beside: dict[str, Tensor]  # the same of each validation text with a name
    texts: dict[str, str]  # see State
    token_bytes: Tensor
    offset: int  # sequences trained on minus steps so far times the present batch; 0 if it never changed
    started_with: dict[str, Any]  # what rates follow from, see config_file.follow_batch
    plans: dict[bool, memory.Plan]  # by whether there are adapters
    passed: list[Passed]  # batches that rollbacks left out
    best: Best | None
    micro_batch: int | None  # if it was lowered because memory ran out
    watch: Watch
    events: Events
    identity: str  # see State
    kept: Kept
    facts: dict[str, Any] = field(default_factory=dict)  # for plan.json, see `lowres.speed.facts`
    baseline: Baseline | None = None  # of pairs, if the objective has a reference
    tasks: harness.Tasks | None = None  # that the model is scored on along the way
    parts: Parts = field(init=False)
    saver: Saver = field(init=False)
    log: MetricsLog = field(init=False)
    trackers: Trackers = field(init=False)
    samples: SampleLog | None = field(default=None, init=False)  # if there are any
    _folder: int | None = None  # an open handle of the folder, which tells if it was moved

    def __post_init__(self) -> None:
        self.saver = Saver(self.kept, self._has_room, again=ranks.size() == 1)
        asked = self.config.log.all_trackers if ranks.is_first() else []
        self.trackers = Trackers(asked, lambda text: self.events.say("note", text))

    def sequences_at(self, step: int) -> int:
        """Sequences trained on in the first `step` steps, for any step since the batch last changed."""
        return self.offset + step * self.config.batch_sequences

    def tokens_at(self, step: int) -> int:
        return self.sequences_at(step) * self.config.data.seq_len

    def batch(self, step: int) -> Batch:
        """The batch of the update after `step` completed ones."""
        offset = self.offset + checkpoint.passed_before(step, self.passed)
        if not self.is_of_pairs:
            return Batch(self.data.batch(step, self.config.batch_sequences, offset))
        assert isinstance(self.data, ChatData)
        packed = self.data.packed(step, self.config.batch_sequences, offset)
        reference = None if self.baseline is None else self.baseline.training[packed.examples]
        return Batch(packed.windows, Pairs(packed.order, reference))

    @property
    def is_of_pairs(self) -> bool:
        return self.config.objective.name == "dpo"

    def evaluate(self) -> dict[str, float]:
        """The scores of the validation data."""
        engine, config = self.parts.engine, self.config
        if not self.is_of_pairs:
            sequences = config.batch_sequences
            return evaluate_parts(engine, self.validation, self.token_bytes, sequences, self.beside)
        assert isinstance(self.data, ChatData)
        packed = self.data.of_validation(self.data.validation_documents(config.train.eval_tokens))
        objective = make_objective(config.objective)
        assert isinstance(objective, Preference)
        reference = None if self.baseline is None else self.baseline.validation[packed.examples]
        return evaluate_pairs(engine, packed, objective, reference, config.most_windows)

    def score_tasks(self) -> harness.Scores:
        """The scores of the tasks. Raises UserError if one of them cannot be scored."""
        assert self.tasks is not None
        return harness.score_in_training(self.tasks, self.config, self.parts.engine, self.data.tokenizer)

    def used_at(self, step: int) -> int:
        """Sequences of the data that were used in the first `step` steps, or passed over by rollbacks."""
        return self.sequences_at(step) + checkpoint.passed_before(step, self.passed)

    def epochs_at(self, step: int) -> float | None:
        """Passes over the training data in the first `step` steps; None if their length is not known."""
        length = self.data.length()
        return None if length is None else self.used_at(step) / length

    def mixed(self, step: int) -> dict[str, float]:
        """For the metrics of a mixture: the share of each part in what was used since the weights were last
        changed, and its tokens since the start."""
        if not isinstance(self.data, MixedData):
            return {}
        read = self.data.read(self.used_at(step))
        shares = {f"share/{name}": share for name, (_, share) in read.items() if share is not None}
        return shares | {f"tokens/{name}": n * self.config.data.seq_len for name, (n, _) in read.items()}

    def build(self, device: torch.device, adapted: bool) -> None:
        """Make the parts and replace earlier ones; weights and state are all zero."""
        self.__dict__.pop("parts", None)  # first, because both may not fit
        config, plan, rooms = self.config, self.plans[adapted], Rooms(device)
        starts = starts_of(config, self.data.tokenizer)
        engine, relora = training_engine(config, plan, rooms, adapted, starts)
        engine.reserve(config.most_windows, config.data.seq_len, training=True)
        self.parts = Parts(plan, rooms, engine, relora, Meter(rooms), adapted)
        self._tell_plan()

    def _tell_plan(self) -> None:
        """Write the plan, and what is allocated, for those who look at the run; the run needs neither."""
        if not ranks.is_first():
            return
        held = self.parts.rooms.held()
        slabs = [{"name": name, "room": room, "bytes": size} for (name, room), size in held.items()]
        content = self.facts | self.parts.plan.as_dict() | {"adapted": self.parts.adapted, "held": slabs}
        with suppress(OSError):
            disk.write_whole(self.folder / PLAN, json.dumps(content, indent=1).encode())

    def load(self, folder: Path) -> None:
        """Read a checkpoint into place."""
        for unit in self.parts.engine.units(write=True):
            checkpoint.load_unit(folder, unit.spec.name, unit.tensors(), new=LIMITER)

    def start_adapters(self, step: int) -> None:
        """Continue with adapters from the end of the warm start; always goes through a checkpoint."""
        saved = checkpoint.step_folder(self.folder / CHECKPOINTS, step)
        if not saved.exists():
            self.save(step)
        self.saver.finish()
        self.build(self.parts.rooms.device, adapted=True)
        for unit in self.parts.engine.units(write=True):
            checkpoint.load_unit(saved, unit.spec.name, tensors_before(unit), all_used=False, new=LIMITER)
            start_adapters(unit, self.config.run.seed, step)

    def open_log(self, state: State | None) -> None:
        """Continue the metrics from a checkpoint, or begin them."""
        step, found = (state.step, state) if state else (-1, None)
        pending, digest = (found.pending, found.metrics) if found else ([], None)
        of_samples = [record for record in pending if SampleLog.is_record(record)]
        pending = [record for record in pending if record not in of_samples]
        self.log, notes = MetricsLog(self.folder / METRICS, step, pending, digest), list[str]()
        if self.config.log.sample_tokens or of_samples or (self.folder / SAMPLES).exists():
            self.samples = SampleLog(self.folder / SAMPLES, step, of_samples)
            notes = self.samples.notes
        for note in self.log.notes + notes:
            self.events.say("note", f"note: {note}")
        run, project = self.config.run, self.config.log.project
        values = to_values(self.config)
        opening = Opening(self.folder, run.name, self.identity, project, step, again=False, config=values)
        self.trackers.begin(opening, self.log.before)

    def record(self, record: dict[str, Any]) -> None:
        """Write a record of the metrics. Raises DiskError."""
        self.log.write(record)
        self.trackers.write(record)

    def close_logs(self) -> None:
        self.log.close()
        if self.samples is not None:
            self.samples.close()

    def sync_logs(self) -> None:
        """Wait until the disk has all records. Raises DiskError."""
        self.log.sync()
        if self.samples is not None:
            self.samples.sync()

    def sample(self, step: int, tokens: int) -> list[Record]:
        """Samples of all prompts with the present weights, of so many tokens at most."""
        config, engine, tokenizer = self.config, self.parts.engine, self.data.tokenizer
        prompts = config.log.sample_prompts
        how = Sampling(tokens, config.data.seq_len, seed=config.run.seed)
        if config.objective.name != "pretrain":
            template = open_template(config.data.chat_template, tokenizer)
            texts = [Conversation(engine, tokenizer, template, how).answer(prompt) for prompt in prompts]
        else:
            given = prompts if tokenizer.has_text else [""] * len(prompts)
            # one seed for all would give similar texts, as the same random numbers choose their tokens
            texts = samples(engine, tokenizer, given, how, [how.seed + i for i in range(len(prompts))])
        return [{"step": step, "prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)]

    # saving

    def state(self, step: int, val_loss: float | None = None) -> State:
        """Everything that the next step depends on besides weights and optimizer state."""
        return State(
            step=step,
            tokens=self.tokens_at(step),
            data=self.data.fingerprint,
            start=Start(**self.started_with),
            config=to_values(self.config),
            validation=self.data.validation_fingerprint,
            texts=self.texts,
            mixture=self._mixture(step),
            passed=self.passed,
            watch=self.watch.seen,
            micro_batch=self.micro_batch,
            val_loss=val_loss,
            best=self.best,
            run=self.identity,
            baseline=None if self.baseline is None else self.baseline.key,
            metrics=self.log.digest if self.log.last == step else None,
            pending=self.log.pending + (self.samples.pending if self.samples else []),
        )

    def _mixture(self, step: int) -> Mixture | None:
        if not isinstance(self.data, MixedData):
            return None
        return Mixture.model_validate(self.data.record(self.used_at(step)))

    def save(self, step: int, val_loss: float | None = None) -> None:
        """Write a checkpoint, or begin to. val_loss: of an evaluation at this step. Raises DiskError, and
        CheckFailed if there is a number that is not finite."""
        place = checkpoint.step_folder(self.kept.checkpoints, step)
        if not ranks.is_first():
            for _ in self._units():
                pass
            return
        try:
            self.saver.save(self._units, self.state(step, val_loss), self._tokenizer())
        except OSError as error:
            raise disk.DiskError(place, error, "written") from None
        except NotFinite as error:
            raise self._not_finite(step, error) from None

    def look_after_saves(self, wait: bool = False) -> None:
        """Report what was saved in the background. wait: until everything is. Raises as `save` does."""
        try:
            if wait:
                self.saver.finish()
            saved = self.saver.done()
        except OSError as error:
            raise disk.DiskError(self.kept.checkpoints, error, "written") from None
        except NotFinite as error:
            raise self._not_finite(None, error) from None
        for one in saved:
            text = f"saved step {one.step}: {one.bytes / memory.GIB:.3f} GiB"
            text += f" in {one.seconds:.1f} s, training waited {one.paused:.1f} s"
            tell = self.events.say if one.paused >= WORTH_SAYING else self.events.write
            tell("saved", text=text, **vars(one))

    def _not_finite(self, step: int | None, error: NotFinite) -> CheckFailed:
        at = "" if step is None else f" at step {step}"
        return CheckFailed(
            f"training: {error}{at} holds a number that is not finite, so it is not saved; {self.way_on()}"
        )

    def way_on(self) -> str:
        """What to do after the numbers went wrong."""
        last, lower = max(self.kept.good, default=None), f"a lower optim.lr than {self.config.optim.lr:g}"
        if last is None or not self.watch.seen.learnt:
            return f"it has learnt nothing that is worth keeping; start again with --restart and {lower}"
        return (
            f"the checkpoint of step {last} is kept; go on from it with --resume and {lower}, or, if it is "
            "ruined already, start again with --restart"
        )

    def _units(self) -> Iterable[tuple[str, Mapping[str, Tensor]]]:
        return ((unit.spec.name, unit.tensors()) for unit in self.parts.engine.units())

    def _tokenizer(self) -> dict[str, bytes]:
        return {self.data.tokenizer.file_name: self.data.tokenizer.content}

    def _has_room(self, nbytes: int) -> bool:
        """Whether a snapshot of so many bytes may be taken."""
        asked = self.config.train.save_beside
        if asked == "no" or ranks.size() > 1:
            return False
        free = memory.host_bytes()
        fits = free is not None and free >= nbytes + SPARE
        return fits and (asked == "yes" or self.parts.rooms.device.type == "cuda")

    def rehearse_save(self) -> None:
        """Write and read back the embedding and one block: all others are like these."""
        place = self.folder / "rehearsal"
        some = itertools.islice(self._units(), 2)
        try:
            if ranks.is_first():
                start = Start(**self.started_with)
                state = State(step=0, tokens=0, data=self.data.fingerprint, start=start)
                checkpoint.write(checkpoint.step_folder(place, 0), some, state, {})
            else:
                for _ in some:
                    pass
        finally:
            shutil.rmtree(place, ignore_errors=True)

    # when the folder fails

    def hold(self) -> None:
        """Remember which folder this is."""
        with suppress(OSError):  # Windows opens no folders
            self._folder = os.open(self.folder, os.O_RDONLY)

    def release(self) -> None:
        """Close what is open."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None
        self.close_logs()
        self.trackers.close()

    def require_folder(self) -> None:
        """Raise DiskError if the folder was deleted or moved."""
        if self._folder is None:
            return
        try:
            if os.path.samestat(self.folder.stat(), os.fstat(self._folder)):
                return
            raise FileNotFoundError(2, "another folder is there now")
        except OSError as error:
            raise disk.DiskError(self.folder, error, "used") from None

    def rescue(self, step: int) -> Path | None:
        """Save elsewhere what can no longer be saved in the run's folder; returns the new folder of the run,
        or None if that fails too."""
        for place in self._elsewhere():
            kept = Kept(place / CHECKPOINTS, newest=0)
            try:
                place.mkdir(parents=True, exist_ok=True)
                checkpoint.write(kept.make_way(step), self._units(), self.state(step), self._tokenizer())
                disk.write_whole(place / CONFIG, to_toml(self.config).encode())
                for name, content in self._tokenizer().items():
                    disk.write_whole(place / name, content)
                for name in (METRICS, SAMPLES):
                    if (self.folder / name).exists() and not (place / name).exists():
                        shutil.copyfile(self.folder / name, place / name)
                return place
            except (OSError, NotFinite):
                continue
        return None

    def _elsewhere(self) -> Iterable[Path]:
        """Where else a run could be saved."""
        if ranks.size() > 1:  # the units are on several ranks
            return
        if moved := self._moved_to():
            yield moved
        asked = self.config.run.rescue
        if asked:
            root = Path(tempfile.gettempdir() if asked == "auto" else asked).expanduser()
            yield root / f"lowres-rescue-{self.folder.absolute().name}-{os.getpid()}"

    def _moved_to(self) -> Path | None:
        """The present place of a folder that was moved, where the system tells."""
        try:
            here = Path(os.readlink(f"/proc/self/fd/{self._folder}"))
            return here if here != self.folder.resolve() and here.is_dir() else None
        except OSError:
            return None
