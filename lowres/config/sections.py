"""The keys of a run's other sections: [run], [objective], [relora], [train], [health] and [log]."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowres.catalogue import CHATS, PAIRS, TEXT
from lowres.config.base import Batch, Count, Minutes, Names, OneOf, Positive, Rate, Section, Size, resumable
from lowres.trackers import TRACKERS


class RunConfig(Section):
    """General keys of the run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]*[\w-][\w.-]*$")] = resumable("run")
    """Name of the run; its folder is runs/<name> unless --run says otherwise."""
    seed: Count = 0
    """Seed of everything random: initial weights, data order, rounding, projections."""
    rescue: str = resumable("auto")
    """Folder for the checkpoint of a run that can no longer be saved in its own folder; auto: the system's
    folder for temporary files; empty: nowhere."""
    init_from: str | None = resumable(None)
    """A run, a checkpoint or a Hugging Face folder that gives the initial weights, the tokenizer, and the
    keys of [model] that are not set (`--init-from MODEL`)."""
    device: Literal["auto", "cpu", "cuda"] = resumable("auto")
    """Where to compute; auto uses CUDA if available."""


class ObjectiveConfig(Section):
    """What is trained, and on what."""

    name: Literal["pretrain", "sft", "dpo"] = "pretrain"
    """pretrain: text. sft: chats, supervised tuning. dpo: pairs of a better and a worse answer, preference
    tuning (arXiv 2305.18290)."""
    train_on: Literal["assistant", "all"] = "assistant"
    """sft, dpo: which tokens of a chat are targets: those of the assistant's turns, or all."""
    reduction: Literal["tokens", "sequences"] = "tokens"
    """sft: the loss of a step is the mean over all its trained tokens, or the mean over its chats of the mean
    of each."""
    loss: Literal["sigmoid_norm", "sigmoid", "ipo", "simpo"] = "sigmoid_norm"
    """dpo: sigmoid_norm: -log sigmoid of beta times the difference between the two answers in how much the
    mean log-probability of their tokens has grown (Tulu 3, SmolTulu). sigmoid: of the sum, as in the paper
    on DPO. ipo: the square of this difference of means less 1 / (2 beta) (arXiv 2310.12036). simpo: the mean
    log-probability itself, without a reference, less gamma (arXiv 2405.14734)."""
    beta: Rate = 5.0
    """dpo: how strongly the model is held to where it began; about 0.1 with sigmoid, which takes sums."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """dpo with simpo: the margin that a pair should have."""

    @property
    def form(self) -> str:
        """What the rows of the data are; see `text.Source`."""
        return {"pretrain": TEXT, "sft": CHATS, "dpo": PAIRS}[self.name]


class ReloraConfig(Section):
    """ReLoRA (arXiv 2307.05695): after a warm start, the matrices of the blocks are frozen and low-rank
    adapters are trained, W + (alpha / rank) B A. At the end of every cycle the adapters are merged into the
    matrices and start again; most of their optimizer state is reset, and the learning rate warms up again.
    Embedding, head and norms are trained at full rank."""

    enabled: bool = False
    """Train with ReLoRA."""
    rank: Positive = 128
    """Rank of the adapters, limited to the smaller dimension of each matrix."""
    alpha: Rate = 32.0
    """The product B A of an adapter is multiplied by alpha / rank."""
    start_step: Count = 0
    """Steps of full-rank training before the adapters: the warm start, which gives most of the quality."""
    cycle_steps: Count = 1000
    """Steps from one merge to the next, counted from start_step; 0 = never merge, which is LoRA."""
    rewarmup_steps: Positive = 50
    """Steps of learning-rate warm-up after a merge, and after the warm start."""
    lr_factor: Rate = 1.0
    """Peak learning rate of the adapters divided by optim.lr; the paper uses about 2."""
    reset: Literal["zero", "magnitude", "random"] = "zero"
    """What a merge does to the adapters' optimizer state. zero: reset all of it, and count updates from 0
    again. magnitude: keep the moments with the largest first moment. random: keep a random part."""
    reset_keep: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """reset = magnitude, random: fraction of the moments that is kept."""
    targets: Annotated[tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], Field(strict=False)] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )
    """Matrices with an adapter; the others are trained at full rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an input of an adapter is dropped in training."""
    log_rank: bool = False
    """Log the effective rank of the sum of all merges, for the matrices of the middle layer. This needs an
    fp32 copy of these matrices (in the optimizer state) and a singular value decomposition per merge."""

    @model_validator(mode="after")
    def _check(self) -> ReloraConfig:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError("targets: name at least one matrix, and none twice")
        if self.cycle_steps and self.rewarmup_steps >= self.cycle_steps:
            raise ValueError(
                f"rewarmup_steps: {self.rewarmup_steps} steps fill the whole cycle of {self.cycle_steps} "
                "steps; lower it or raise cycle_steps"
            )
        return self

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def adapted_at(self, step: int) -> bool:
        """Whether the update after `step` completed ones updates adapters."""
        return self.enabled and step >= self.start_step

    def stored_at(self, step: int) -> bool:
        """Whether a checkpoint after `step` steps has adapters. A checkpoint at start_step has none yet,
        unless that is 0."""
        return self.enabled and (step > self.start_step or self.start_step == 0)

    def merges_at(self, step: int) -> int:
        """How many merges there have been after `step` steps."""
        return max(0, step - self.start_step) // self.cycle_steps if self.enabled and self.cycle_steps else 0


class TrainConfig(Section):
    """Length of the run, batch sizes, and how often to evaluate and save."""

    steps: Positive | None = resumable(None)
    """Optimizer steps of the run; default 1000 (give steps or tokens, not both)."""
    tokens: Positive | None = resumable(None)
    """Length of the run in tokens instead of steps; rounded up to whole steps."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = resumable(None)
    """Length of the run in passes over the data instead of steps; rounded up to whole steps. Not for streams
    and mixtures."""
    batch_tokens: Batch = resumable(8192)
    """Tokens per optimizer step; a multiple of data.seq_len. When it changes, optim.batch_policy decides how
    the learning rate changes."""
    micro_batch: Size | Literal["auto"] = resumable("auto")
    """Sequences in a micro-batch, which pass a layer together; auto: the largest useful number within
    memory.budget_gib."""
    eval_every: Count = resumable(200)
    """Steps between evaluations (also before the first and after the last step); 0 = never."""
    eval_tokens: Count = resumable(131072)
    """Validation tokens per evaluation; 0 = all of them."""
    eval_tasks: Names = resumable(())
    """Tasks of lm-evaluation-harness (`pip install lowres[harness]`) that the model is scored on while it is
    trained, such as ["hellaswag", "arc_easy"]; see docs/evaluating.md."""
    eval_tasks_every: Positive = resumable(10)
    """Evaluations from one scoring of the tasks to the next (also with the first and the last evaluation)."""
    eval_tasks_limit: Count = resumable(500)
    """Questions of each task, at most; 0 = all of them."""
    eval_tasks_folder: str | None = resumable(None)
    """Folder with more tasks, in YAML."""
    sample_every: Count = resumable(0)
    """Steps between samples of what the model writes (also before the first and after the last step); 0 =
    only after the last, if log.sample_tokens asks for it."""
    checkpoint_every: Count = resumable(500)
    """Steps between checkpoints; 0 = only one at the end."""
    keep_checkpoints: Count = resumable(2)
    """How many of the newest checkpoints to keep; 0 = keep all."""
    checkpoint_minutes: Minutes = resumable(0.0)
    """Minutes after which a checkpoint is written, whatever the step; 0 = only by checkpoint_every."""
    keep_every: Count = resumable(0)
    """Checkpoints at multiples of this step are kept for ever; 0 = none."""
    keep_best: bool = resumable(False)
    """Write a checkpoint after every evaluation with the lowest validation loss so far, and keep it."""
    save_beside: Literal["auto", "yes", "no"] = resumable("auto")
    """Copy the weights to host memory and write them from there while training goes on; otherwise training
    waits until a checkpoint is written. auto: on CUDA, if the host has memory for a copy at that moment."""
    max_minutes: Minutes = resumable(0.0)
    """Stop in time to have saved after so many minutes, as a signal does; 0 = no limit."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [key for key in ("epochs", "tokens", "steps") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]}: {given[1]} and {given[0]} both set the length of the run; give one of them"
            )
        return self

    @property
    def total_steps(self) -> int:
        if self.tokens is not None:
            return math.ceil(self.tokens / self.batch_tokens)
        return self.steps or 1000


class HealthConfig(Section):
    """What happens when the numbers of a run go wrong. Gradient norms and losses are compared with those of
    the last steps that were accepted."""

    spikes: Literal["off", "warn", "skip", "rollback"] = resumable("warn")
    """What to do about a spike. warn: say it. skip: refuse the update; in a layer-major step from the layer
    on (from the head down) at which the norm so far is too large, or as a whole if optim.grad_clip is used or
    the loss is too high. rollback: go back to the last checkpoint, and pass over the batch."""
    spike_factor: Annotated[float, Field(gt=1)] = resumable(5.0)
    """A gradient norm above this many times the largest of the window is a spike."""
    window: Annotated[int, Field(ge=16, le=10_000)] = resumable(128)
    """Accepted steps to compare with; with fewer than 16 nothing is a spike."""
    patience: Positive = resumable(50)
    """Bad steps in a row after which the run stops with exit code 1: steps that are skipped, have no
    gradient, or, after the warm-up, a loss that is ruined. The last good checkpoint is kept."""


class LogConfig(Section):
    """What the run prints and records."""

    progress: bool = resumable(True)
    """Show a progress bar."""
    sample_prompt: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = resumable("")
    """Prompt of the samples, or a list of several prompts. They are continued after the last step, and every
    train.sample_every steps; the run keeps them in samples.jsonl. In tuning they are what a user says."""
    sample_tokens: Count = resumable(0)
    """Tokens of a sample, at most; 0 = no samples."""
    update_every: Count = resumable(10)
    """Steps between readings of the size of the updates, update/... in the metrics: the RMS of the update of
    the embedding, of each block and of the head, divided by the RMS of its weights; 0 = none. It changes no
    result. DeepSpeed does not tell its updates."""
    tensorboard: bool = resumable(False)
    """Write the metrics for TensorBoard too, into the folder tensorboard of the run."""
    trackers: Annotated[tuple[Annotated[str, OneOf(TRACKERS)], ...], Field(strict=False)] = resumable(())
    """Where the metrics go besides the run's folder; see docs/watching.md. tensorboard is the same as
    log.tensorboard = true."""
    project: Annotated[str, Field(pattern=r"^[\w.-]*[A-Za-z0-9_][\w.-]*$", max_length=100)] = resumable(
        "lowres"
    )
    """Name of the project in these trackers."""

    @property
    def all_trackers(self) -> list[str]:
        """The trackers that are asked for, each once."""
        return list(dict.fromkeys([*["tensorboard"] * self.tensorboard, *self.trackers]))

    @property
    def sample_prompts(self) -> tuple[str, ...]:
        return (self.sample_prompt,) if isinstance(self.sample_prompt, str) else self.sample_prompt
