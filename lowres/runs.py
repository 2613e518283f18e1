"""The folder of a run, what it needs to compute, and how to use its weights.

config.toml      the resolved config
tokenizer.model  a copy, so that the folder can be moved and still be used for sampling and evaluation; or
                 tokenizer.json, or vocabulary.json
metrics.jsonl    see lowres.metrics
samples.jsonl    see lowres.samples; if there are samples
events.jsonl     see lowres.events
plan.json        the memory plan of this part of the run, what is allocated, and lowres.speed.facts
checkpoints/     see lowres.checkpoint; each also has the config and the tokenizer
summary.json     final values, written last: it exists only if the run is finished
loss.png         if matplotlib is installed
run.lock         see lowres.lock
trackers.json    with the folders tensorboard and wandb, if they were asked for; see lowres.trackers
report.html      see lowres.report, if it was asked for
old-1/           what was there before --restart
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lowres import checkpoint, events, memory
from lowres.checkpoint import State
from lowres.config import Config
from lowres.config_file import load_resolved, parse_config, with_values
from lowres.data import Tokenizer, find_tokenizer, open_tokenizer
from lowres.device import lacks_bf16, pick_device, prepare_cuda, use_kernels
from lowres.engine import Engine, LayerwiseEngine, make_engine
from lowres.engine.common import MARKED
from lowres.engine.zero import ZeroEngine
from lowres.errors import UserError
from lowres.model import Starts, Units, empty_units, starting_with
from lowres.optim import Optimizer, make_optimizer
from lowres.ranks import say
from lowres.records import CHECKPOINTS, CONFIG
from lowres.relora import Relora
from lowres.rooms import Rooms
from lowres.sample import Generation, Part, Sampling, parts, reader_for
from lowres.sealed import Damaged
from lowres.wording import command


def make_units(config: Config, plan: memory.Plan, rooms: Rooms, adapted: bool) -> Units:
    """Storage for the weights of a run, in the homes that the plan chose."""
    kept = config.memory
    adapters = config.relora if adapted else None
    return empty_units(
        config.model, kept.weights, kept.embeddings_kept_in, rooms, plan.choice.homes.weights, adapters
    )


def engine_of(
    config: Config,
    units: Units,
    optimizer: Optimizer | Relora | None,
    plan: memory.Plan,
    rooms: Rooms,
    starts: Starts | None = None,
) -> Engine:
    """The engine of a run, with the choice of the plan."""
    return make_engine(config, units, optimizer, rooms, plan.choice, starts)


def starts_of(config: Config, tokenizer: Tokenizer) -> Starts | None:
    """Where documents start that do not see each other, for the engine of a run."""
    if config.objective.name != "pretrain":
        return MARKED
    if not config.data.document_mask:
        return None
    if tokenizer.bos_id < 0:
        raise UserError(
            f"data.document_mask: {tokenizer.path} has no token with which documents begin; set it to false"
        )
    return starting_with(tokenizer.bos_id, predicted=tokenizer.eos_id is None)


def training_engine(
    config: Config, plan: memory.Plan, rooms: Rooms, adapted: bool, starts: Starts | None = None
) -> tuple[Engine, Relora]:
    """The training engine of a run, with weights and state all zero, and the Relora that does its updates.
    starts: see `starts_of`."""
    optimizer = make_optimizer(config)
    relora = Relora(config.relora, optimizer)
    if config.memory.engine == "deepspeed":
        return ZeroEngine(config, optimizer, plan.micro_batch, rooms, starts), relora
    units = make_units(config, plan, rooms, adapted)
    optimizer.attach(units.values(), rooms, plan.choice.homes.state)
    return engine_of(config, units, relora, plan, rooms, starts), relora


class OpenRun(NamedTuple):
    """A trained model in use. config: of its run. engine: computes with its weights, see
    `lowres.engine.Engine` for `logits`, `reader`, `evaluate` and `log_probabilities`. tokenizer: text as ids,
    and back."""

    config: Config
    engine: LayerwiseEngine
    tokenizer: Tokenizer

    def generate(
        self,
        prompts: str | Sequence[str],
        tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 50,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[Part]:
        """What follows the prompts, part by part as it is written:

            for part in open_run("runs/mine").generate("def ", stop=["\n\n"]):
                print(part.text, end="", flush=True)

        Each prompt is continued as it would be alone. As many as there is memory for go on together, see
        `open_run`. tokens: at most so many of each; the model sees the last data.seq_len at most, see
        `lowres.sample.tokens`. temperature, top_k, seed: see `Sampling`. stop: strings that end a text and
        are not part of it. Raises UserError, or DoesNotFit.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.tokenizer.prompt(prompt) for prompt in asked]
        how = Sampling(tokens, self.config.data.seq_len, temperature, top_k, seed)
        together = self.engine.settings.texts
        for start in range(0, len(ids), together):
            for part in self._generated(ids[start : start + together], how, stop):
                yield replace(part, prompt=start + part.prompt)

    def _generated(self, ids: Sequence[list[int]], how: Sampling, stop: Sequence[str]) -> Iterator[Part]:
        streams = [self.tokenizer.stream() for _ in ids]
        for stream, own in zip(streams, ids, strict=True):
            stream.begin(own)
        reader, tokenizer = reader_for(self.engine, ids, how), self.tokenizer
        generation = Generation(reader, ids, how, tokenizer.vocab_size, {tokenizer.end_id})
        return parts(generation, streams, stop)


@dataclass(frozen=True)
class Trained:
    """A trained model on the disk. config: of its run, as it is used here. load: gives its weights to an
    engine. has_data: whether the config says what it was trained on."""

    config: Config
    tokenizer: Tokenizer
    adapted: bool
    load: Callable[[Engine], None]
    has_data: bool = False

    def open(self, texts: int = 1, length: int | None = None, evaluates: bool = True) -> OpenRun:
        """Plan its use, and read its weights. texts, length, evaluates: see `memory.plan_use`. Raises
        DoesNotFit if there is no way to sample."""
        config, device = self.config, pick_device(self.config)
        for note in use_kernels(config, device):
            say(f"note: {note}")
        rooms = Rooms(device)
        plan = memory.plan_use(config, device, self.adapted, texts, length, evaluates)
        if not evaluates:
            memory.require_fit(plan)
        units = make_units(config, plan, rooms, self.adapted)
        engine = engine_of(config, units, None, plan, rooms, starts_of(config, self.tokenizer))
        assert isinstance(engine, LayerwiseEngine)
        self.load(engine)
        return OpenRun(config, engine, self.tokenizer)


def open_run(folder: str | Path, device: str | None = None, packed: bool = True, texts: int = 1) -> OpenRun:
    """A trained model for sampling and evaluation: the weights of the newest valid checkpoint of a run, or of
    the checkpoint that is given, no optimizer. Whichever engine has trained it, the layer-major one uses it.

    device: instead of run.device. packed: whether a sequence may hold several documents, which
    data.document_mask then keeps apart. texts: as many as `generate` shall continue together, if there is
    memory for their keys and values. Raises UserError.
    """
    return find_run(folder, device, packed).open(texts)


def find_run(folder: str | Path, device: str | None = None, packed: bool = True) -> Trained:
    """The model that `open_run` opens."""
    prepare_cuda()
    folder, only = Path(folder), None
    if (folder / checkpoint.MANIFEST).exists():
        folder, only = folder.absolute().parent.parent, folder
    config, found, state = newest(folder, only)
    if device:
        config = with_values(config, "run", device=device)
    config = as_used(config)
    if not packed:
        config = with_values(config, "data", document_mask=False)
    tokenizer = open_tokenizer(tokenizer_of(folder, found), form="own")
    adapted = config.relora.stored_at(state.step)
    return Trained(config, tokenizer, adapted, lambda engine: load_weights(engine, found), bool(state.data))


def load_weights(engine: Engine, found: Path) -> None:
    """Read the weights of a checkpoint into place, and nothing else of it."""
    for unit in engine.units(write=True):
        checkpoint.load_unit(found, unit.spec.name, unit.weight_tensors(), all_used=False)


def as_used(config: Config) -> Config:
    """The config of a trained run, changed for the device on which it is used."""
    changes = {"engine": "layerwise"} if config.memory.engine != "layerwise" else {}
    if config.run.device != "cpu" and lacks_bf16():
        changes["compute"] = "fp32"
    return with_values(config, "memory", **changes)


def newest(folder: Path, only: Path | None = None) -> tuple[Config, Path, State]:
    """The config of a run, its newest valid checkpoint, and its state. only: the checkpoint to use. Raises
    UserError."""
    if only is not None:
        try:
            state = checkpoint.load(only)
        except Damaged as error:
            known = [f"{checkpoint.step_of(path)}" for path in checkpoint.find(only.parent)]
            if not only.exists() and known:
                raise UserError(
                    f"--checkpoint: {folder} has none of this step, but {', '.join(known)}"
                ) from None
            raise UserError(f"checkpoint {only}: is damaged ({error}); use another one") from None
        return config_of(folder, state), only, state
    found, damaged = checkpoint.newest_state(folder / CHECKPOINTS, identities(folder))
    if found is not None:
        for path, problem in damaged:
            say(f"note: {path} is damaged ({problem}); using an older one")
        return config_of(folder, found[1]), *found
    if damaged:
        path, problem = damaged[0]
        more = f", and {len(damaged) - 1} more" if damaged[1:] else ""
        raise UserError(f"{folder} has no checkpoint that can be used: {path} is damaged ({problem}){more}")
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} is a Hugging Face folder; make a run of it with `lowres import {folder} RUN`"
        )
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a run: it has no {CONFIG}")
    raise UserError(
        f"{folder} has no valid checkpoint yet; go on: {command('lowres', 'train', folder, '--resume')}"
    )


def identities(folder: Path) -> set[str]:
    """The identities under which a run was started, as far as its events tell."""
    return {str(event["run"]) for event in events.read(folder) if event.get("run")}


def config_of(folder: Path, state: State | None) -> Config:
    """The config of a run: that of its checkpoint, whose checksum holds, or else config.toml."""
    if state is None or state.config is None:
        return load_resolved(folder / CONFIG)
    # what has no value is left to its default, as in a file
    given = {s: {k: v for k, v in keys.items() if v is not None} for s, keys in state.config.items()}
    return parse_config(given, f"{folder}: the config in its checkpoint")[0]


def config_in(folder: Path) -> Config:
    """The config that a run wrote last: config.toml, or if that is lost that of its newest checkpoint."""
    try:
        return load_resolved(folder / CONFIG)
    except UserError:
        for found in reversed(checkpoint.find(folder / CHECKPOINTS)):
            with suppress(OSError, Damaged):
                if (state := checkpoint.load_state(found)).config is not None:
                    return config_of(folder, state)
        raise


def tokenizer_of(folder: Path, found: Path) -> Path:
    """The tokenizer of a run: that of its checkpoint, if it has one. Raises UserError."""
    path = find_tokenizer(found) or find_tokenizer(folder)
    if path is None:
        raise UserError(f"{folder} has no tokenizer; put it back")
    return path
