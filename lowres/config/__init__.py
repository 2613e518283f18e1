"""The configuration of a run.

base       the base class of sections, and shared types
model, data, optim, memory, sections
           every key: type, limits, documentation
fill       defaults that follow from other keys
checks     checks across sections

The string under a field is the key's documentation; `lowres config --help` prints it. Keys marked
`resumable` may differ when a run is resumed; any other difference is refused. A check of one section is in
its class.

A config is read in one pass: nested dicts of sections -> `fill` -> types and limits -> `checks`. Reading a
file and `--set` is in `lowres.config_file`.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from lowres.config.base import OneOf, Section
from lowres.config.checks import check
from lowres.config.data import DataConfig, MixturePart, ValidationText, name_of_source
from lowres.config.fill import RATE_DEFAULTS, engine_defaults, fill
from lowres.config.memory import DeepspeedConfig, MemoryConfig
from lowres.config.model import PRESET_VOCAB, PRESETS, SHAPE_KEYS, ModelConfig
from lowres.config.optim import SCHEDULE_KEYS, OptimConfig, ScheduleConfig
from lowres.config.sections import (
    HealthConfig,
    LogConfig,
    ObjectiveConfig,
    ReloraConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "PRESET_VOCAB",
    "RATE_DEFAULTS",
    "SCHEDULE_KEYS",
    "SHAPE_KEYS",
    "Config",
    "DataConfig",
    "HealthConfig",
    "MixturePart",
    "ModelConfig",
    "ObjectiveConfig",
    "OneOf",
    "OptimConfig",
    "ReloraConfig",
    "Section",
    "ValidationText",
    "engine_defaults",
    "name_of_source",
]


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    relora: ReloraConfig = ReloraConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    health: HealthConfig = HealthConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return fill(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> Config:
        check(self)
        return self

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.data.seq_len

    @property
    def most_windows(self) -> int:
        """Sequences of data.seq_len tokens that a step has at most: of tuning there are fewer, as examples
        are packed."""
        return self.batch_sequences * (2 if self.objective.name == "dpo" else 1)

    @property
    def texts(self) -> int:
        """Texts that the model writes together on the way: samples, or the answer to a task; 0: none."""
        samples = len(self.log.sample_prompts) if self.log.sample_tokens else 0
        return max(samples, 1 if self.train.eval_tasks else 0)

    @property
    def packed(self) -> bool:
        """Whether a sequence may hold several documents that do not see each other."""
        return self.data.document_mask or self.objective.name != "pretrain"

    @property
    def decay_steps(self) -> int:
        """Steps at whose end the learning rate is lowest."""
        return self.schedule.decay_steps or self.train.total_steps

    @property
    def warmup_steps(self) -> int:
        tenth = self.decay_steps // 10
        if self.schedule.warmup_ratio is not None:
            # its first step has the rate 0, and a run must have others
            return min(math.ceil(self.decay_steps * self.schedule.warmup_ratio), self.decay_steps - 1)
        asked = self.schedule.warmup_steps
        return tenth if asked is None else min(asked, tenth)

    def with_vocab(self, vocab_size: int) -> Config:
        """The same config with the vocabulary size of the data."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})
