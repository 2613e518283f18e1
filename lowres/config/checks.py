"""Checks across sections. Each raises ValueError with one line that names the key and a remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowres.config import Config


def check(config: Config) -> None:
    """Run all checks, in this order."""
    for one in (_batch, _chats, _samples, _tasks, _cycle, _stash, _deepspeed):
        one(config)


def _batch(config: Config) -> None:
    batch, seq = config.train.batch_tokens, config.data.seq_len
    if batch % seq:
        near = max(seq, round(batch / seq) * seq)
        raise ValueError(
            f"train.batch_tokens: {batch} is not a multiple of data.seq_len {seq}; {near} would be"
        )


def _chats(config: Config) -> None:
    name, data = config.objective.name, config.data
    if name == "pretrain":
        return
    if data.mixture:
        raise ValueError(
            f'data.mixture: chats cannot be mixed, and objective.name is "{name}"; put them into one folder, '
            "and set data.source to it"
        )
    if data.validation and name == "dpo":
        raise ValueError("data.validation: pairs have one validation set; use data.val_source instead")
    if not data.document_mask:
        raise ValueError("data.document_mask: chats never see each other; leave it out")
    if name == "dpo" and data.text_key is not None:
        raise ValueError(
            "data.text_key: pairs have the columns chosen and rejected, and maybe prompt; leave it out"
        )


def _samples(config: Config) -> None:
    if config.train.sample_every and not config.log.sample_tokens:
        raise ValueError(
            "train.sample_every: log.sample_tokens is 0, so there are no samples; set it to 100, say"
        )


def _tasks(config: Config) -> None:
    if config.train.eval_tasks and not config.train.eval_every:
        raise ValueError(
            "train.eval_tasks: train.eval_every is 0, so nothing is evaluated; set it to 200, say, or leave "
            "the tasks out"
        )


def _cycle(config: Config) -> None:
    schedule = config.schedule
    notched = schedule.name == "sawtooth" and not config.relora.enabled  # [relora] checks its own keys
    if notched and schedule.rewarmup_steps >= schedule.cycle_steps:
        raise ValueError(
            f"schedule.rewarmup_steps: {schedule.rewarmup_steps} steps fill the whole cycle of "
            f"{schedule.cycle_steps} steps; lower it or raise schedule.cycle_steps"
        )


def _stash(config: Config) -> None:
    if config.memory.stash_dtype == "int8" and config.model.dim % 32:
        raise ValueError(
            f"memory.stash_dtype: int8 needs groups of 32 numbers, but model.dim {config.model.dim} is not "
            "a multiple of 32; use auto or bf16"
        )


def _deepspeed(config: Config) -> None:
    if config.memory.engine != "deepspeed":
        return
    instead = "or memory.engine=layerwise"
    if config.optim.name != "adamw":
        raise ValueError(
            f"optim.name: {config.optim.name} does not work with DeepSpeed, which flattens weights "
            f"and hides their shapes; use adamw, {instead}"
        )
    if config.optim.limiter:
        raise ValueError(f"optim.limiter: DeepSpeed has no limiter; use 0 with optim.grad_clip, {instead}")
    if config.health.spikes == "skip":
        raise ValueError(
            f"health.spikes: skip does not work with DeepSpeed, which updates before the gradient's norm is "
            f"known; use rollback or warn, {instead}"
        )
    if config.relora.enabled:
        raise ValueError(f"relora.enabled: DeepSpeed cannot merge adapters; use false, {instead}")
