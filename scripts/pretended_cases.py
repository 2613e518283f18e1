"""The cases of scripts/pretend_gpu.py: what is run on the simulated device, and what counts as wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pretended_cuda
import torch
from pretended_cuda import CARDS, CUDA, GIB, Waits
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as on a machine where lowres is not installed

import gpu_rates  # noqa: E402
import gpu_steps  # noqa: E402

from lowres import checkpoint, memory, rooms  # noqa: E402
from lowres.catalogue import RULES  # noqa: E402
from lowres.config import Config  # noqa: E402
from lowres.config_file import load_config, to_values  # noqa: E402
from lowres.device import pick_device  # noqa: E402
from lowres.engine import common, layerwise, working  # noqa: E402
from lowres.errors import UserError  # noqa: E402
from lowres.exchange import initialize_from, open_model  # noqa: E402
from lowres.kernels import forms  # noqa: E402
from lowres.meter import LiveTensors  # noqa: E402
from lowres.model import initialize, starting_with  # noqa: E402
from lowres.relora import start_adapters, tensors_before  # noqa: E402
from lowres.rooms import GPU  # noqa: E402
from lowres.rules import moments  # noqa: E402
from lowres.runs import CHECKPOINTS, training_engine  # noqa: E402
from lowres.sample import Sampling, sample  # noqa: E402

# real widths, few layers, few tokens: seconds a case
SHALLOW = (
    "model.n_layers=3",
    "train.batch_tokens=16384",
    "train.tokens=163840",
    "data.source=stdlib",
    "schedule.warmup_steps=1",
)
# for what goes to the disk
NARROW = (*SHALLOW, "model.dim=256", "model.n_heads=4", "model.ffn_dim=688", "data.seq_len=256")
CYCLES = ("relora.cycle_steps=2", "relora.rewarmup_steps=1")
VOCABULARY = 32000
PRESETS = ("llama_7b_24gb", "llama_7b_12gb", "llama_7b_8gb")
DEEP = (*PRESETS, "llama_1b_8gb", "llama_13b_24gb")
MOST_ERROR = 0.01  # of planned memory


class WrongError(Exception):
    """What is wrong, as found by a case."""


class SkippedError(Exception):
    """Why a case cannot be run here."""


# ---- access to the internals of lowres


def config_of(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.toml", list(overrides))[0].with_vocab(VOCABULARY)


def replace_internals() -> None:
    """Replace code that needs a card or the content of tensors."""
    inside: Any = working
    inside.adds_wide = lambda: True
    inside = layerwise
    inside.adds_wide = lambda: True
    inside = rooms
    inside._page_locked = lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8)
    inside = common
    inside.lengths_of = lambda starts: [(starts.shape[1] - 9, 8, 1)] * len(starts)
    if importlib.util.find_spec("bitsandbytes"):
        maps = {s: moments.bitsandbytes_functional().create_dynamic_map(signed=s) for s in (True, False)}
        inside = moments
        inside._dynamic_map = lambda signed, device: torch.empty(maps[signed].shape, device=device)


class Trainee:
    """An engine as a run builds it, with its plan. Use it inside `pretended_cuda.pretended`."""

    def __init__(self, config: Config, plan: memory.Plan, waits: Waits, adapted: bool = False) -> None:
        self.config, self.plan, self.waits = config, plan, waits
        self.rooms = rooms.Rooms(CUDA)
        starts = starting_with(1) if config.data.document_mask else None
        self.engine, _ = training_engine(config, plan, self.rooms, adapted, starts)
        self.engine.reserve(config.batch_sequences, config.data.seq_len, training=True)

    def batch(self, micro_batches: int | None = None) -> Tensor:
        sequences = self.config.batch_sequences
        if micro_batches is not None:
            sequences = min(sequences, micro_batches * self.plan.micro_batch)
        return torch.zeros(sequences, self.config.data.seq_len + 1, dtype=torch.int64)

    def step(self, step: int, micro_batches: int | None = None) -> str:
        """Take a step, which may wait only once, where its results are read. Returns that place."""
        self.waits.places.clear()
        self.engine.step(self.batch(micro_batches), step, 1.0)
        return self.only_wait(("step", "_update"))

    def only_wait(self, functions: tuple[str, ...]) -> str:
        """Raise WrongError unless the engine waited once, in one of these functions."""
        places = self.waits.places
        if len(places) != 1 or places[0].function not in functions:
            raise WrongError("waits at " + ", then ".join(map(str, places)) if places else "never waits")
        return f"one wait, {places[0]}"


def plan_of(config: Config, adapted: bool = False) -> memory.Plan:
    return list(memory.make_plans(config, CUDA).values())[-1 if adapted else 0]


@contextmanager
def trainee(config: Config, adapted: bool = False) -> Iterator[Trainee]:
    plan = plan_of(config, adapted)
    compiled = config.memory.kernels != "plain"
    with pretended_cuda.pretended(ROOT / "lowres") as waits, forms.using("cuda", compiled):
        yield Trainee(config, plan, waits, adapted)


def slab_of(component: str) -> str:
    """The name of the slab that contains a component of the plan."""
    if component.startswith(("block matrices", "embedding and head", "norms", "adapters")):
        return "weights"
    return "optimizer state" if component == "master copy" else component


# ---- cases


def train(name: str, *overrides: str, steps: tuple[int, ...] = (1,), adapted: bool = False) -> str:
    """Steps of a config with few layers; each waits once."""
    needs_bitsandbytes(overrides)
    with trainee(config_of(name, *SHALLOW, *overrides), adapted) as trained:
        found = {trained.step(step) for step in steps}
        inside = [f"{count} x {name}, which waits" for name, count in trained.waits.inside.items()]
        return "; ".join([*sorted(found), *inside, attention(trained.waits)])


def attention(waits: Waits) -> str:
    """The attention kernels that PyTorch chose; without a fused one it uses ordinary operations."""
    return f"attention: {'/'.join(sorted(waits.attention)) or 'none of the fused kernels'}"


def needs_bitsandbytes(overrides: tuple[str, ...]) -> None:
    kept = any(o.startswith("memory.moments=") and not o.endswith("int8") for o in overrides)
    if not kept and not importlib.util.find_spec("bitsandbytes"):
        raise SkippedError("bitsandbytes is not installed")


def evaluation(name: str) -> str:
    needs_bitsandbytes(())
    with trainee(config_of(name, *SHALLOW)) as trained:
        trained.engine.evaluate(trained.batch())
        return trained.only_wait(("evaluate",))


class Letters:
    """Replaces a tokenizer."""

    end_id, vocab_size = 2, VOCABULARY

    def prompt(self, text: str) -> list[int]:
        return [0] + [3] * len(text)

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


def sampling(name: str) -> str:
    needs_bitsandbytes(())
    tokenizer: Any = Letters()
    with trainee(config_of(name, *SHALLOW)) as trained:
        text = sample(trained.engine, tokenizer, "abc", Sampling(2, 8))
        if len(text) != 6:
            raise WrongError(f"{len(text) - 4} tokens instead of 2")
        return "2 tokens"


def start() -> str:
    """Initial weights, made as in a run."""
    with trainee(config_of("llama_7b_12gb", *SHALLOW)) as trained:
        initialize(trained.engine.units(write=True), 0, CUDA)
        if trained.waits.places:
            raise WrongError(f"waits at {trained.waits.places[0]}")
        return "never waits"


def save(trained: Trainee, folder: Path, step: int) -> Path:
    """A checkpoint in the folder of a run."""
    units = ((unit.spec.name, unit.tensors()) for unit in trained.engine.units())
    saved = checkpoint.step_folder(folder / CHECKPOINTS, step)
    state = checkpoint.State(
        step=step, tokens=0, data="", start=checkpoint.Start(batch_tokens=1), config=to_values(trained.config)
    )
    checkpoint.write(saved, units, state, {})
    return saved


def saving(*overrides: str) -> str:
    """Write a checkpoint and read it into place; all of its tensors are used."""
    config = config_of("llama_7b_8gb", *NARROW, *overrides)
    with tempfile.TemporaryDirectory() as folder, trainee(config) as trained:
        trained.step(0)
        saved = save(trained, Path(folder), 1)
        problems = checkpoint.verify(saved)
        if problems:
            raise WrongError(problems[0])
        for unit in trained.engine.units(write=True):
            checkpoint.load_unit(saved, unit.spec.name, unit.tensors())
        return f"{len(list(saved.iterdir()))} files"


def warm_start() -> str:
    """Weights of another run, in another number format."""
    with tempfile.TemporaryDirectory() as folder:
        with trainee(config_of("llama_7b_12gb", *NARROW, "memory.weights=bf16")) as other:
            save(other, Path(folder), 1)
        with trainee(config_of("llama_7b_12gb", *NARROW)) as trained:
            initialize_from(trained.engine.units(write=True), open_model(folder))
            return trained.step(0)


def adapters() -> str:
    """The end of ReLoRA's warm start: the second part is built from its checkpoint."""
    config = config_of("relora_7b_24gb", *NARROW, "relora.start_step=2", *CYCLES)
    with tempfile.TemporaryDirectory() as folder:
        with trainee(config) as before:
            before.step(1)
            saved = save(before, Path(folder), 2)
        with trainee(config, adapted=True) as trained:
            for unit in trained.engine.units(write=True):
                checkpoint.load_unit(saved, unit.spec.name, tensors_before(unit), all_used=False)
                start_adapters(unit, 0, 2)
            trained.step(2)
            return f"{trained.step(3)} (with a merge)"


def benchmarks() -> str:
    """scripts/bench_gpu.py on this device, without the profiler."""
    overrides = [*NARROW, "memory.moments=fp32", f"model.vocab_size={VOCABULARY}", "memory.stash_on=host"]
    path, device = ROOT / "configs/llama_7b_8gb.toml", torch.device("cuda")
    with pretended_cuda.pretended(ROOT / "lowres"):
        steps: dict[str, Any] = {}
        for part in gpu_steps.measure(path, device, overrides, 8.0, time.perf_counter() + 60):
            steps |= part
        rates = dict(gpu_rates.measure(lambda *more: config_of("llama_7b_8gb", *NARROW, *more), device))
    wrong = [text for text in json.dumps([steps, rates]).split('"') if text.startswith("error: ")]
    if wrong or "whole" not in steps:
        raise WrongError("; ".join(dict.fromkeys(wrong)) or "took no whole step")
    return f"{len(steps)} results of steps, {len(rates)} rates"


def deepspeed() -> str:
    """The start of the engine; DeepSpeed needs more of the CUDA runtime than is simulated here."""
    if not importlib.util.find_spec("deepspeed"):
        raise SkippedError("deepspeed is not installed")
    config = config_of("llama_7b_24gb_deepspeed", *NARROW, "train.micro_batch=1")
    try:
        with trainee(config):
            return "its engine was built"
    except Exception as error:  # it may need any part of CUDA
        raise SkippedError(f"stops at {where(error)}: {first_line(error)}") from None


def live_memory(name: str, *overrides: str) -> str:
    """Memory in a step of two micro-batches at real depth, with slabs for the whole batch, compared with the
    plan by component and by phase."""
    needs_bitsandbytes(())
    config = config_of(name, *overrides)
    with trainee(config) as trained:
        plan, live = trained.plan, LiveTensors(trained.rooms)
        with live:
            trained.step(0, micro_batches=2)
        held = trained.rooms.held()
    planned: dict[tuple[str, str], int] = {}
    for part in plan.components:
        if not part.phase:
            key = slab_of(part.name), part.room
            planned[key] = planned.get(key, 0) + part.bytes
    lines, worst = [], 0.0
    for key in sorted(planned.keys() | held.keys()):
        if key[0] in ("cuBLAS workspace", "checkpoint", "rotary tables", "projections"):
            continue  # not a slab: counted in the phases below
        wanted, there = planned.get(key, 0), held.get(key, 0)
        worst = max(worst, abs(wanted - there) / max(wanted, there, 1))
        lines.append(row(f"{key[0]}, {key[1]}", wanted, there))
    always = sum(c.bytes for c in plan.components if c.room == GPU and not c.phase)
    unseen = plan.size("cuBLAS workspace", GPU)
    for phase in dict.fromkeys(c.phase for c in plan.components if c.room == GPU and c.phase):
        own = sum(c.bytes for c in plan.components if c.room == GPU and c.phase == phase)
        lines.append(row(f"{phase}, all", always - unseen + own, live.phases.get(phase, 0)))
    peak = plan.peak(GPU) - unseen, live.peak[GPU]
    lines.append(row("peak, gpu", *peak))
    worst = max(worst, abs(peak[0] - peak[1]) / peak[1])
    text = "\n".join(lines)
    if worst > MOST_ERROR:
        raise WrongError(f"{worst:.2%} from the plan\n{text}")
    return f"at most {worst:.2%} from the plan\n{text}"


def row(name: str, planned: int, there: int) -> str:
    return f"    {name:<36}{planned / GIB:>9.3f} planned{there / GIB:>9.3f} alive{there / planned - 1:>+9.2%}"


def keys_of(error: UserError) -> str:
    """The settings that a message recommends."""
    return ", ".join(word for word in str(error).replace(",", "").split() if "=" in word)


def card(key: str) -> str:
    """Another card: does the preset for its memory size run, and with which attention kernel?"""
    here = CARDS[key]
    size = next((gib for gib in (24, 12, 8) if gib <= here.gib), 8)
    config = config_of(f"llama_7b_{size}gb", "data.source=stdlib")
    keys: tuple[str, ...] = ()
    refused = ""
    try:
        pick_device(config)
    except UserError as error:  # too old for bf16; it names the key that helps
        keys, refused = ("memory.compute=fp32",), f"; refused without {keys_of(error)}"
        config = config_of(f"llama_7b_{size}gb", "data.source=stdlib", *keys)
    plan = memory.make_plan(config, CUDA, on_this_machine=True)
    if plan.problems and refused:  # fp32 takes more than the preset is made for
        return f"{here.name}, {here.gib} GB, with the {size} GB preset{refused}, with it: {plan.problems[0]}"
    if plan.problems:
        raise WrongError(f"{size} GB preset refused: {plan.problems[0]}")
    lacking = plan.lacks(CUDA).get(GPU)
    if lacking:
        raise WrongError(f"{size} GB preset: {lacking[0] / GIB:.2f} GiB needed, {lacking[1] / GIB:.2f} free")
    with trainee(config_of(f"llama_7b_{size}gb", *SHALLOW, *keys)) as trained:
        live = LiveTensors(trained.rooms)
        with live:
            trained.step(0)
        planned, there = trained.plan.peak(GPU) - trained.plan.size("cuBLAS workspace", GPU), live.peak[GPU]
        text = f"{here.name}, {here.gib} GB, with the {size} GB preset: {attention(trained.waits)}{refused}"
    if there > planned * (1 + MOST_ERROR):
        raise WrongError(f"{text}; {there / GIB:.2f} GiB alive, {planned / GIB:.2f} planned")
    return text


def cases() -> dict[str, Callable[[], str]]:
    """Every case by name."""
    fp32, bf16, seven = "memory.moments=fp32", "memory.moments=bf16", "llama_7b_12gb"
    found: dict[str, Callable[[], str]] = {}
    for preset in PRESETS:
        short = preset.removeprefix("llama_")
        found[f"{short} step"] = partial(train, preset)
        found[f"{short} evaluation"] = partial(evaluation, preset)
        found[f"{short} sampling"] = partial(sampling, preset)
    for name in RULES:
        chosen = (bf16, f"optim.name={name}", "optim.lr=0.001")
        found[name] = partial(train, seven, *chosen, steps=(0, 1))
    for name in ("muon", "scale"):
        found[f"{name}, int8 momentum"] = partial(train, seven, f"optim.name={name}", steps=(0, 1))
    found["apollo svd"] = partial(
        train, seven, bf16, "optim.name=apollo", "optim.projection=svd", "optim.rank=256", steps=(0, 1)
    )
    int8 = "memory.compute=int8"
    found["int8 products"] = partial(train, seven, fp32, int8)
    found["int8 products, padded"] = partial(train, "llama_1b_8gb", fp32, int8)
    found["int8 products, bf16 for weight gradients"] = partial(
        train, seven, fp32, int8, "memory.compute_wgrad=dense"
    )
    found["int8 products under adapters"] = partial(
        train, "relora_7b_24gb", fp32, int8, "relora.start_step=0", *CYCLES, steps=(0, 1), adapted=True
    )
    found["plain kernels"] = partial(train, seven, fp32, "memory.kernels=plain")
    apart = "data.document_mask=true"
    found["documents apart"] = partial(train, seven, fp32, apart)
    found["documents apart, plain kernels"] = partial(train, seven, fp32, apart, "memory.kernels=plain")
    found["documents apart, grouped, autograd"] = partial(
        train,
        "llama_1b_8gb",
        *(fp32, apart, "model.n_kv_heads=8", "memory.engine=autograd", "memory.budget_gib=60"),
    )
    found["clip"] = partial(train, seven, fp32, "optim.grad_clip=1.0")
    found["int8 stash"] = partial(train, seven, fp32, "memory.stash_dtype=int8")
    found["exact forward"] = partial(
        train, seven, fp32, "memory.stash_dtype=int8", "memory.exact_forward=true"
    )
    found["master"] = partial(train, seven, fp32, "memory.master=host", "memory.host_budget_gib=64")
    found["tied, grouped"] = partial(train, seven, fp32, "model.tie_embeddings=true", "model.n_kv_heads=8")
    found["bf16 weights"] = partial(train, "llama_7b_24gb", fp32, "memory.weights=bf16")
    found["fp32 weights"] = partial(
        train, "llama_7b_24gb", fp32, "memory.weights=fp32", "memory.budget_gib=60"
    )
    found["autograd engine"] = partial(train, seven, fp32, "memory.engine=autograd", "memory.budget_gib=60")
    found["1b"] = partial(train, "llama_1b_8gb", fp32)
    found["13b"] = partial(train, "llama_13b_24gb", fp32)
    relora = ("relora.start_step=0", *CYCLES)
    for reset in ("zero", "random", "magnitude"):
        found[f"relora merge, {reset}"] = partial(
            train, "relora_7b_24gb", fp32, *relora, f"relora.reset={reset}", steps=(0, 1), adapted=True
        )
    found["relora merge, int8 moments"] = partial(
        train,
        "relora_7b_24gb",
        "memory.moments=int8",
        *relora,
        "optim.name=adamw",
        steps=(0, 1),
        adapted=True,
    )
    found["relora dropout"] = partial(
        train, "relora_7b_24gb", fp32, "relora.start_step=0", "relora.dropout=0.1", adapted=True
    )
    found["first weights"] = start
    found["saving"] = partial(saving, fp32)
    found["saving, int8 moments"] = partial(saving, "memory.moments=int8", "optim.name=adamw")
    found["warm start"] = warm_start
    found["adapters after a warm start"] = adapters
    found["benchmarks"] = benchmarks
    found["deepspeed"] = deepspeed
    for preset in DEEP:
        short = preset.removeprefix("llama_")
        found[f"memory {short}"] = partial(live_memory, preset)
        found[f"memory {short}, int8 products"] = partial(live_memory, preset, int8)
    for name in ("muon", "scale"):
        found[f"memory 7b_24gb, {name}"] = partial(live_memory, "llama_7b_24gb", f"optim.name={name}")
    found["memory 1b_8gb, documents apart"] = partial(live_memory, "llama_1b_8gb", apart)
    for key in CARDS:
        found[f"card {key}"] = partial(card, key)
    return found


def where(error: Exception) -> str:
    """The innermost line of the project in an error's traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/lowres/" in f.filename]
    if not frames:
        return "no line of lowres"
    return f"{frames[-1].filename.rsplit('/lowres/', 1)[-1]}:{frames[-1].lineno} `{frames[-1].line}`"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
