"""A run without data: the engine of a config, its plan and first weights, and random tokens.

For tuning, each window is one example as long as it: the most work that a step can have.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lowres import memory
from lowres.config import Config
from lowres.config_file import with_values
from lowres.data.batches import BEGINS
from lowres.device import use_kernels
from lowres.engine import LayerwiseEngine
from lowres.engine.common import MARKED, one_example_each
from lowres.model import initialize
from lowres.optim.schedule import factor
from lowres.probe.fastest import choose
from lowres.probe.work import step_flops
from lowres.rooms import Rooms
from lowres.runs import training_engine
from lowres.storage import compute_dtype


class Subject:
    """What is measured. Nothing is read and nothing is written. `rooms` may have more methods than Rooms."""

    def __init__(self, config: Config, device: torch.device, rooms: Rooms | None = None) -> None:
        """config: with a vocabulary. `notes`: on what was chosen. Raises DoesNotFit, as a run does."""
        config, self.notes = choose(config, device)
        self.notes += use_kernels(config, device)
        tuned = config.objective.name != "pretrain"
        if config.data.document_mask and not tuned:
            config = with_values(config, "data", document_mask=False)
            self.notes.append("data.document_mask: random tokens have no documents, so this is without")
        if tuned:
            self.notes.append(
                "objective.name: random tokens are no chats, so every window is one example without padding"
            )
        self.config, self.device = config, device
        self.plan = memory.make_plan(config, device, on_this_machine=True)
        memory.require_fit(self.plan)
        # a stash larger than the host's memory would crash the machine
        memory.require_machine(self.plan, device)
        self.rooms = rooms or Rooms(device)
        starts = MARKED if tuned else None
        self.engine, _ = training_engine(config, self.plan, self.rooms, adapted=False, starts=starts)
        if isinstance(self.engine, LayerwiseEngine):
            self.engine.shrinks = False  # what is measured is the plan
        self.engine.reserve(config.most_windows, config.data.seq_len, training=True)
        initialize(self.engine.units(write=True), config.run.seed, device)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a whole step."""
        return -(-self.config.most_windows // self.plan.micro_batch)

    @property
    def products_in(self) -> str:
        """Number format of the matrix products of the blocks: fp32, bf16 or int8."""
        return products_in(self.config, self.device)

    @property
    def hardware_flops_per_token(self) -> int:
        """Floating-point operations of a step per token, with what is computed again."""
        return step_flops(self.config, self.plan) // (self.config.most_windows * self.config.data.seq_len)

    def sequences(self, micro_batches: int | None = None) -> int:
        """Sequences of a step of so many micro-batches; default: of a whole one."""
        whole = self.config.most_windows
        if micro_batches is None:
            return whole
        some = min(whole, micro_batches * self.plan.micro_batch)
        return some + some % 2 if self.config.objective.name == "dpo" else some

    def batch(self, micro_batches: int | None, seed: int) -> Tensor:
        shape = self.sequences(micro_batches), self.config.data.seq_len + 1
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.config.model.vocab, shape, generator=generator)
        if self.config.objective.name != "pretrain":
            tokens[:, 0] |= BEGINS
        return tokens

    def step(self, micro_batches: int | None, step: int) -> tuple[float, float]:
        """Seconds and loss of a step, until the device is done."""
        batch, schedule = self.batch(micro_batches, step + 1), factor(self.config, step)
        pairs = one_example_each(batch).pairs
        began = time.perf_counter()
        report = self.engine.step(batch, step, schedule, pairs=pairs)
        return time.perf_counter() - began, report.loss


def products_in(config: Config, device: torch.device) -> str:
    """Number format of the matrix products of the blocks: fp32, bf16 or int8."""
    kept = config.memory
    if kept.compute == "int8":
        return "int8"
    return "bf16" if compute_dtype(kept.activations_in, device) == torch.bfloat16 else "fp32"


def with_random_tokens(config: Config) -> Config:
    """The config with a vocabulary, although there is no tokenizer: the one it gives, or its model's."""
    return config.with_vocab(config.model.vocab_size or config.data.vocab_size or config.model.vocab)
