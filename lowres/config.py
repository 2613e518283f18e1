"""The configuration of a run: every key, its type, its limits and its default, in one place.

A string under a field is that key's documentation; `lowres config --help` prints it. Keys marked
`resumable` may differ when a run is resumed; any other difference is refused. How a config is read and
written is in `lowres.config_file`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lowres import rates

# dim, ffn_dim, n_layers, n_heads: the sizes of the GaLore, ReLoRA and APOLLO papers
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
PRESET_VOCAB = 32000
# what `--set model.preset=...` takes out of the file
SHAPE_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tie_embeddings")

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


def resumable(default: Any, **limits: Any) -> Any:
    """A field that may change when a run is resumed, because it changes no mathematics of a step."""
    return Field(default, json_schema_extra={"resumable": True}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class RunConfig(Section):
    """The run itself."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")] = resumable("run")
    """Name of the run; its folder is runs/<name> unless --run says otherwise."""
    seed: Count = 0
    """Seed of everything random: initial weights, data order, rounding, projections."""
    init_from: str | None = resumable(None)
    """Run whose newest checkpoint gives the first weights (`--init-from RUN`); its tokenizer is used too."""
    device: Literal["auto", "cpu", "cuda"] = resumable("auto")
    """Where to compute; auto takes CUDA if there is one."""


class ModelConfig(Section):
    """The shape of the LLaMA model. A preset gives all of it; explicit keys override the preset."""

    preset: str | None = None
    """One of 9m, 20m, 60m, 130m, 350m, 1b, 3b, 7b, 13b."""
    dim: Positive = 128
    """Width of the residual stream."""
    n_layers: Positive = 4
    """Number of transformer blocks."""
    n_heads: Positive = 4
    """Number of query heads; must divide dim, and dim / n_heads must be even (RoPE)."""
    n_kv_heads: Positive | None = None
    """Number of key and value heads (grouped-query attention); default n_heads, which it must divide."""
    ffn_dim: Positive = 352
    """Hidden width of the SwiGLU feed-forward layer."""
    vocab_size: Annotated[int, Field(ge=2)] | None = None
    """Rows of the embedding; default: as many as the tokenizer of the data has pieces."""
    rope_theta: Rate = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: Rate = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head too."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if preset is None:
            return values
        if preset not in PRESETS:
            raise ValueError(f"preset: {preset!r} is not known; use one of {', '.join(PRESETS)}")
        shape = dict(zip(("dim", "ffn_dim", "n_layers", "n_heads"), PRESETS[preset], strict=True))
        return shape | values

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.dim % self.n_heads:
            raise ValueError(
                f"n_heads: {self.n_heads} heads do not divide dim {self.dim}; change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"n_heads: dim / n_heads is {self.head_dim}, but rotary embedding needs an even number"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}; change one of them"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def vocab(self) -> int:
        """Rows of the embedding; PRESET_VOCAB until the data has said how many pieces there are."""
        return self.vocab_size or PRESET_VOCAB


class DataConfig(Section):
    """What to train on. A source is stdlib, a folder made by `lowres data prepare`, a path (file,
    folder or glob of .txt, .md, .py, .jsonl, .parquet, also .gz, .xz, .zst) or
    hf:<dataset>[:<config>[:<split>]]."""

    source: Annotated[str, Field(min_length=1)] = "stdlib"
    """Training text. stdlib is the source code of the running Python's standard library."""
    val_source: str | None = None
    """Validation text; default (and if empty): documents held out from the source."""
    tokenizer: str | None = None
    """Path of a SentencePiece model; default: one is trained on the source."""
    vocab_size: Annotated[int, Field(ge=260)] | None = None
    """Pieces of a tokenizer that is trained; default model.vocab_size, else by the size of the text."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    """Tokens in a sequence."""
    cache: Annotated[str, Field(min_length=1)] = resumable("data")
    """Folder that keeps the tokenised form of sources that are not yet a prepared folder."""

    @field_validator("val_source")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None


_LOW_RANK = {"lr": 1e-2, "eps": 1e-6, "refresh_every": 200}
_APOLLO = _LOW_RANK | {"scale_front": False, "projection": "random", "limiter": 1.01}
# name -> defaults of the keys that depend on the optimizer
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "eps": 1e-8},
    "adamw8bit": {"lr": 1e-3, "eps": 1e-8},
    "adam-mini": {"lr": 1e-3, "eps": 1e-8},
    "apollo": _APOLLO | {"scale": 1.0},
    "apollo-mini": _APOLLO | {"rank": 1, "scale": 128.0},
    "galore": _LOW_RANK | {"scale": 0.25},
    "fira": _LOW_RANK | {"scale": 0.25, "limiter": 1.01},
    "sgd": {"lr": 0.1, "eps": 1e-8},
}
# keys that only these optimizers read
OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    "eps": tuple(name for name in OPTIMIZER_DEFAULTS if name != "sgd"),
    **dict.fromkeys(("rank", "scale", "refresh_every"), ("apollo", "apollo-mini", "galore", "fira")),
    **dict.fromkeys(("scale_front", "projection"), ("apollo", "apollo-mini")),
}


class OptimConfig(Section):
    """The optimizer. Defaults that depend on it are filled in when the config is read."""

    name: str = "apollo-mini"
    """adamw, adamw8bit (AdamW with memory.moments = int8), adam-mini, sgd (momentum is betas[0]; 0 = none,
    and no state), apollo, apollo-mini, galore or fira; beside the last four, embedding, head and norms take
    AdamW."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; default lr_over_batch times the batch, else 1e-3 for adamw, adamw8bit and
    adam-mini, 0.1 for sgd, else 1e-2."""
    lr_over_batch: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate over the batch in sequences, train.batch_tokens / data.seq_len (arXiv 2412.08347).
    Two of lr, train.batch_tokens and lr_over_batch determine the third."""
    batch_policy: Literal["fixed", "linear", "sqrt"] | None = resumable(None)
    """How lr (and embed_lr) follow when --set changes the batch of the file, or a resumed run has another
    batch than it was started with. fixed: not. linear: in proportion to the batch in sequences, so that
    lr_over_batch stays. sqrt: with its square root. Default linear where lr_over_batch is given instead of
    lr, else fixed."""
    embed_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of embedding and head; default lr."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Rate | None = None
    """Added to the denominator; default 1e-8 for adamw, adamw8bit and adam-mini, else 1e-6."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the matrices (norms have none)."""
    decay_embeddings: bool = True
    """Whether weight_decay holds for embedding and head too."""
    grad_clip: Annotated[float, Field(ge=0)] = 0.0
    """Clip the global gradient norm to this; 0 = off. The layerwise engine takes a second backward pass for
    it, as it has no global norm before its first update."""
    limiter: float = 0.0
    """Most that the norm of a tensor's update may grow by, as a factor on that of the last step (Fira's
    norm-growth limiter; the learning rate does not count); 0 = off. It holds for every tensor that the
    optimizer of that name updates, so not for what takes AdamW beside it; with fira for what its projection
    leaves over. Default 1.01 for apollo, apollo-mini and fira, else 0."""
    rank: Positive | None = None
    """apollo, galore, fira: rank of the projected gradient, at most the smaller dimension of a matrix;
    default dim / 4, or 1 for apollo-mini."""
    scale: Rate | None = None
    """apollo: the update is multiplied by its square root; default 1, or 128 for apollo-mini. galore, fira:
    factor on what comes back from the projection; default 0.25."""
    refresh_every: Positive | None = None
    """apollo, galore, fira: steps between two choices of the projection; default 200."""
    scale_front: bool | None = None
    """apollo, apollo-mini: scale before the norm-growth limiter instead of after it; default false."""
    projection: Literal["random", "svd"] | None = None
    """apollo, apollo-mini: random numbers, which are no state, or the first singular vectors of the
    gradient, as galore and fira have them; default random."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("name", "apollo-mini")
        if isinstance(name, str) and name not in OPTIMIZER_DEFAULTS:
            raise ValueError(f"name: {name!r} is not known; use one of {', '.join(OPTIMIZER_DEFAULTS)}")
        betas = values.get("betas", (0.9, 0.999))
        if not (isinstance(betas, list | tuple) and len(betas) == 2):
            raise ValueError(f"betas: must be two numbers, such as [0.9, 0.95] (got {betas!r})")
        return OPTIMIZER_DEFAULTS.get(name, {}) | values

    @model_validator(mode="after")
    def _check_limiter(self) -> OptimConfig:
        if self.limiter != 0 and self.limiter < 1:
            raise ValueError(
                f"limiter: {self.limiter:g} is no growth; use a factor of at least 1, or 0 for no limiter"
            )
        return self


# schedule -> the keys that only it reads
SCHEDULE_KEYS = {
    "cosine": (),
    "constant": (),
    "wsd": ("cooldown_steps",),
    "sawtooth": ("cycle_steps", "rewarmup_steps"),
}


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor on the peak rates."""

    name: Literal["cosine", "sawtooth", "wsd", "constant"] = "cosine"
    """cosine: to min_ratio. sawtooth: that, re-warmed in every cycle. wsd: constant, then linear cooldown."""
    warmup_steps: Count | None = None
    """Linear warm-up; default, and at most, a tenth of the run."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Floor of the decay, as a part of the peak."""
    cycle_steps: Positive = 1000
    """sawtooth: steps between two notches."""
    rewarmup_steps: Positive = 50
    """sawtooth: steps of warm-up after a notch."""
    cooldown_steps: Count | None = resumable(None)
    """wsd: steps of the final cooldown; default a fifth of the run."""


class ReloraConfig(Section):
    """ReLoRA (arXiv 2307.05695): after a warm start the matrices of the blocks are frozen and low-rank
    adapters train, W + (alpha / rank) B A; every cycle they are merged and begin anew, with most of their
    optimizer state forgotten and the learning rate re-warmed. Embedding, head and norms train in full."""

    enabled: bool = False
    """Train so."""
    rank: Positive = 128
    """Rank of the adapters, at most the smaller dimension of a matrix."""
    alpha: Rate = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    start_step: Count = 0
    """Steps of full-rank training before the adapters: the warm start, which supplies most of the quality."""
    cycle_steps: Count = 1000
    """Steps from one merge to the next, counted from start_step; 0 = never merge, which is LoRA."""
    rewarmup_steps: Positive = 50
    """Steps of warm-up after a merge, and after the warm start."""
    lr_factor: Rate = 1.0
    """Peak learning rate of the adapters over optim.lr; the paper takes about 2."""
    reset: Literal["zero", "magnitude", "random"] = "zero"
    """What a merge does to the adapters' optimizer state. zero: forget all, and count updates anew.
    magnitude: keep the moments whose first is largest. random: keep some by chance."""
    reset_keep: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """reset = magnitude, random: part of the moments that is kept."""
    targets: Annotated[tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], Field(strict=False)] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )
    """Matrices with an adapter; the others go on training in full."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that an input of an adapter is dropped in training."""
    log_rank: bool = False
    """Log the effective rank of what the merges have changed so far, of the matrices of the middle layer.
    Takes an fp32 copy of them, with the optimizer state, and a singular value decomposition a merge."""

    @model_validator(mode="after")
    def _check(self) -> ReloraConfig:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError("targets: name at least one matrix, and none twice")
        if self.cycle_steps and self.rewarmup_steps >= self.cycle_steps:
            raise ValueError(
                f"rewarmup_steps: {self.rewarmup_steps} leave nothing of a cycle of {self.cycle_steps} "
                "steps; lower it or raise cycle_steps"
            )
        return self

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def adapted_at(self, step: int) -> bool:
        """Whether the update after `step` completed ones is one of adapters."""
        return self.enabled and step >= self.start_step

    def stored_at(self, step: int) -> bool:
        """Whether a checkpoint after `step` steps has adapters. One from where they start has not yet."""
        return self.enabled and (step > self.start_step or self.start_step == 0)

    def merges_at(self, step: int) -> int:
        """How many merges there have been after `step` steps."""
        return max(0, step - self.start_step) // self.cycle_steps if self.enabled and self.cycle_steps else 0


class TrainConfig(Section):
    """How long, in which portions, and what happens on the way."""

    steps: Positive | None = resumable(None)
    """Optimizer steps of the run; default 1000 (give steps or tokens, not both)."""
    tokens: Positive | None = resumable(None)
    """Length of the run in tokens instead of steps; rounded up to whole steps."""
    batch_tokens: Positive = resumable(8192)
    """Tokens an optimizer step; a multiple of data.seq_len. When it changes, optim.batch_policy decides what
    the learning rate does."""
    micro_batch: Positive | Literal["auto"] = resumable("auto")
    """Sequences that pass a layer together; auto takes the largest useful one within memory.budget_gib."""
    eval_every: Count = resumable(200)
    """Steps between evaluations (also before the first and after the last step); 0 = never."""
    eval_tokens: Count = resumable(131072)
    """Tokens of the validation data that an evaluation reads; 0 = all of them."""
    checkpoint_every: Count = resumable(500)
    """Steps between checkpoints; 0 = only the last."""
    keep_checkpoints: Count = resumable(2)
    """How many checkpoints to keep; 0 = never delete one."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("tokens: steps and tokens both say how long the run is; give one of them")
        return self

    @property
    def total_steps(self) -> int:
        if self.tokens is not None:
            return math.ceil(self.tokens / self.batch_tokens)
        return self.steps or 1000


class MemoryConfig(Section):
    """What is kept where, and in which number format."""

    engine: Literal["layerwise", "autograd", "deepspeed"] = "layerwise"
    """layerwise: all micro-batches pass one layer before the next. autograd: the reference, whole model.
    deepspeed: AdamW with ZeRO and offload, on one or many GPUs; see [deepspeed]."""
    weights: Literal["int8", "bf16", "fp32"] = "int8"
    """Storage of the matrices in the blocks; norms are fp32. Default with deepspeed fp32: master
    weights, beside which compute may be bf16. bf16 (with moments = bf16) has none and rounds to nearest
    there."""
    embeddings: Literal["auto", "bf16", "fp32"] = "auto"
    """Storage of embedding and head; auto: fp32 beside fp32 weights, else bf16."""
    compute: Literal["auto", "int8", "bf16", "fp32"] = "auto"
    """Number format of activations and products; auto: bf16 on CUDA, fp32 on CPU."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """Optimizer moments with a number for every element of a matrix (AdamW's two, Adam-mini's first; also
    of embedding and head beside apollo). int8: in blocks of 256, with bitsandbytes."""
    master: Literal["none", "host"] = "none"
    """host: a more precise copy of the block matrices there takes the updates, so that the weights on the
    GPU are rounded to nearest from it and no update is lost."""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the master copy; bf16 is rounded stochastically."""
    weights_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where weights live between visits; auto: as many units on the host as memory.budget_gib asks."""
    state_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where optimizer state lives between visits; with a master copy, host."""
    stash_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where the inputs of the layers wait for the backward pass."""
    carry_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where the boundary that moves lives: the last layer's output, then the gradient on its way down."""
    stash_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Number format of the stash; auto: that of compute, without loss. int8: groups of 32 with a scale."""
    exact_forward: bool = False
    """With a lossy stash, go on from the exact values in the forward pass instead of the stored ones: the
    carry makes a round trip more for every band, and the recomputation sees other values than the forward."""
    band: Positive | Literal["auto"] = resumable("auto")
    """Layers that are recomputed together: the stash is divided by it, gradient buffer and activations are
    multiplied. auto: 1 if that fits, else 2, 4 or 8."""
    loss_chunk: Positive = resumable(1024)
    """Tokens whose logits exist at one time."""
    budget_gib: Rate | None = resumable(None)
    """GPU memory that the run may take; default: what the device has."""
    host_budget_gib: Rate | None = resumable(None)
    """Host memory that the run may take; default: what the machine has."""
    rehearse: bool | Literal["auto"] = resumable("auto")
    """Rehearse the largest training, evaluation and saving step before the first; auto: on CUDA."""

    @model_validator(mode="after")
    def _built(self) -> MemoryConfig:
        if self.compute == "int8":
            raise ValueError("compute: 'int8' is not built yet; use auto, bf16 or fp32")
        if self.engine == "deepspeed":
            self._check_formats_of_deepspeed()
        if self.engine != "layerwise":
            instead = "use gpu or engine=layerwise"
            if self.engine == "deepspeed":
                instead = "use auto and deepspeed.offload_optimizer or offload_param, or engine=layerwise"
            for key in ("weights_on", "state_on", "stash_on", "carry_on"):
                if getattr(self, key) == "host":
                    raise ValueError(f"{key}: the {self.engine} engine does not move units; {instead}")
            if self.master != "none" or self.stash_dtype != "auto":
                key = "master" if self.master != "none" else "stash_dtype"
                raise ValueError(f"{key}: only the layerwise engine has one; leave it out or change engine")
        if self.master != "none" and self.state_on == "gpu":
            raise ValueError("state_on: a master copy lives in host memory; use host or auto, or master=none")
        if self.master != "none" and self.weights == "fp32":
            raise ValueError("master: fp32 weights need no master copy; use weights=int8 or bf16")
        return self

    def _check_formats_of_deepspeed(self) -> None:
        """DeepSpeed has one format for all weights, and either fp32 or bf16 for what its optimizer keeps."""
        if self.weights == "int8":
            raise ValueError("weights: DeepSpeed has no INT8 weights; use fp32 or bf16, or engine=layerwise")
        if self.embeddings_kept_in != self.weights:
            raise ValueError(
                f"embeddings: DeepSpeed keeps all weights in one format; use auto or {self.weights}"
            )
        if self.moments != self.weights:
            raise ValueError(
                f"moments: DeepSpeed keeps moments in the format of the weights; use {self.weights}, "
                "or engine=layerwise"
            )
        if self.weights == "bf16" and self.compute == "fp32":
            raise ValueError("compute: bf16 weights without a master copy compute in bf16; use auto or bf16")

    @property
    def embeddings_kept_in(self) -> str:
        if self.embeddings == "auto":
            return "fp32" if self.weights == "fp32" else "bf16"
        return self.embeddings


class DeepspeedConfig(Section):
    """memory.engine = "deepspeed": AdamW with ZeRO (arXiv 1910.02054). Optimizer state (stage 1), gradients
    (2) and weights (3) are divided over the GPUs of the run, and may live in host memory or on a disk.
    `lowres launch CONFIG --gpus N` uses several GPUs."""

    stage: Literal[1, 2, 3] = resumable(2)
    """What is divided: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = resumable("cpu")
    """Where master weights and moments live, and are updated by the CPU; none: on the GPU."""
    offload_param: Literal["none", "cpu", "nvme"] = resumable("none")
    """Where weights live between uses, with stage 3 and an offloaded optimizer; none: on the GPU."""
    nvme_path: str | None = resumable(None)
    """Folder on a fast local disk for what is offloaded to nvme, once that is built."""
    pin_memory: bool | Literal["auto"] = resumable("auto")
    """Page-lock what is offloaded to the CPU, for copies beside the computation; auto: on CUDA."""
    overlap: bool = resumable(True)
    """Communicate gradients while the backward pass goes on."""
    config_file: str | None = resumable(None)
    """DeepSpeed configuration (JSON) of one's own, for keys that nothing here decides; it goes before our
    choices of sizes. Batch sizes, optimizer, scheduler, number formats, clipping, stage and offload are
    refused there."""

    @model_validator(mode="after")
    def _check_offload(self) -> DeepspeedConfig:
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(f"offload_param: stage {self.stage} keeps whole weights on the GPU; use stage=3")
        if self.offload_param != "none" and self.offload_optimizer == "none":
            raise ValueError("offload_param: needs an offloaded optimizer too; set offload_optimizer=cpu")
        for key in ("offload_optimizer", "offload_param"):
            if getattr(self, key) == "nvme":
                raise ValueError(f"{key}: 'nvme' is not built yet; use cpu or none")
        return self


class LogConfig(Section):
    """What the run prints."""

    progress: bool = resumable(True)
    """Show a progress bar."""
    sample_prompt: str = resumable("")
    """Prompt of the sample that is printed after the last step; none if sample_tokens is 0."""
    sample_tokens: Count = resumable(0)
    """Tokens of that sample."""


RATE_DEFAULTS = rates.Defaults(
    optimizer=OptimConfig.model_fields["name"].default,
    lr={name: own["lr"] for name, own in OPTIMIZER_DEFAULTS.items()},
    batch_tokens=TrainConfig.model_fields["batch_tokens"].default,
    seq_len=DataConfig.model_fields["seq_len"].default,
)


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig.model_validate({}))
    schedule: ScheduleConfig = ScheduleConfig()
    relora: ReloraConfig = ReloraConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _moments_of_adamw8bit(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optim, memory = values.get("optim"), values.get("memory", {})
        if not isinstance(optim, dict) or not isinstance(memory, dict):
            return values
        if optim.get("name") == "adamw8bit" and memory.get("engine") != "deepspeed":  # that refuses it
            return values | {"memory": memory | {"moments": "int8"}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _tie(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optim, train = values.get("optim", {}), values.get("train", {})
        if not (isinstance(optim, dict) and isinstance(train, dict)):
            return values
        lr, batch, ratio = rates.tied(values, RATE_DEFAULTS)
        filled = {"lr": lr, "lr_over_batch": ratio, "batch_policy": rates.default_policy(values)}
        return values | {"optim": filled | optim, "train": {"batch_tokens": batch} | train}

    @model_validator(mode="before")
    @classmethod
    def _schedule_of_relora(cls, values: Any) -> Any:
        """Notches of the learning rate fall on the merges."""
        if not isinstance(values, dict):
            return values
        relora, schedule = values.get("relora", {}), values.get("schedule", {})
        if not (isinstance(relora, dict) and isinstance(schedule, dict) and relora.get("enabled") is True):
            return values
        default = ReloraConfig()
        own = {key: relora.get(key, getattr(default, key)) for key in ("cycle_steps", "rewarmup_steps")}
        # 0 cycles are LoRA's, and what is wrong is for [relora] to say
        own = {key: steps for key, steps in own.items() if isinstance(steps, int) and steps > 0}
        kept = {key: value for key, value in schedule.items() if key not in ("cycle_steps", "rewarmup_steps")}
        return values | {"schedule": {"name": "sawtooth"} | kept | own}

    @model_validator(mode="before")
    @classmethod
    def _engine_defaults(cls, values: Any) -> Any:  # the last of these, as pydantic calls it first
        return of_engine(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_batch(self) -> Config:
        batch, seq = self.train.batch_tokens, self.data.seq_len
        if batch % seq:
            near = max(seq, round(batch / seq) * seq)
            raise ValueError(
                f"train.batch_tokens: {batch} is not a multiple of data.seq_len {seq}; {near} would be"
            )
        return self

    @model_validator(mode="after")
    def _check_cycle(self) -> Config:
        schedule = self.schedule
        notched = schedule.name == "sawtooth" and not self.relora.enabled  # relora checks its own
        if notched and schedule.rewarmup_steps >= schedule.cycle_steps:
            raise ValueError(
                f"schedule.rewarmup_steps: {schedule.rewarmup_steps} leave nothing of a cycle of "
                f"{schedule.cycle_steps} steps; lower it or raise schedule.cycle_steps"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Config:
        if self.memory.stash_dtype == "int8" and self.model.dim % 32:
            raise ValueError(
                f"memory.stash_dtype: int8 groups 32 neighbours, but model.dim {self.model.dim} is not a "
                "multiple of 32; use auto or bf16"
            )
        if self.memory.engine == "deepspeed":
            instead = "or memory.engine=layerwise"
            if self.optim.name != "adamw":
                raise ValueError(
                    f"optim.name: {self.optim.name} is not to be had with DeepSpeed, which flattens weights "
                    f"and hides their shapes; use adamw, {instead}"
                )
            if self.optim.limiter:
                raise ValueError(f"optim.limiter: DeepSpeed has none; use 0 with optim.grad_clip, {instead}")
            if self.relora.enabled:
                raise ValueError(f"relora.enabled: DeepSpeed cannot merge adapters; use false, {instead}")
        return self

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.data.seq_len

    @property
    def warmup_steps(self) -> int:
        tenth = self.train.total_steps // 10
        asked = self.schedule.warmup_steps
        return tenth if asked is None else min(asked, tenth)

    def with_vocab(self, vocab_size: int) -> Config:
        """The same config with the vocabulary that the data has."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})


def of_engine(values: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of the deepspeed engine, if that is the engine: it has AdamW and no INT8."""
    memory, optim = values.get("memory", {}), values.get("optim", {})
    if not (isinstance(memory, dict) and isinstance(optim, dict) and memory.get("engine") == "deepspeed"):
        return values
    return values | {"memory": {"weights": "fp32"} | memory, "optim": {"name": "adamw"} | optim}
