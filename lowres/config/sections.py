"""Every key of a run's configuration: its type, its limits and its documentation, in one place.

The string under a field is the key's documentation; `lowres config --help` prints it. Keys marked
`resumable` may differ when a run is resumed; any other difference is refused. Checks here concern one
section. Defaults that follow from other keys are in `fill`, checks across sections in `checks`.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lowres.catalogue import CHATS, GROWTH, KEYS, PAIRS, RULES, TEXT, WITHOUT_NORMS, Source
from lowres.config.base import (
    Batch,
    Count,
    Layers,
    Minutes,
    OneOf,
    Positive,
    Rate,
    Section,
    Size,
    adjustable,
    resumable,
)
from lowres.trackers import TRACKERS

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
# keys of the file that `--set model.preset=...` removes
SHAPE_KEYS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "ffn_dim",
    "vocab_size",
    "tie_embeddings",
)


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


class ModelConfig(Section):
    """The shape of the LLaMA model. A preset gives all of it; explicit keys override the preset."""

    preset: Annotated[str, OneOf(PRESETS)] | None = None
    """Name of a shape from the GaLore, ReLoRA and APOLLO papers. The name counts a vocabulary of 32,000: with
    the 4,096 pieces that a small text gets, 9m has 1.85 M parameters (`lowres plan` says both)."""
    dim: Size = 128
    """Width of the residual stream."""
    n_layers: Layers = 4
    """Number of transformer blocks."""
    n_heads: Size = 4
    """Number of query heads; must divide dim unless head_dim is given."""
    n_kv_heads: Size | None = None
    """Number of key and value heads (grouped-query attention); must divide n_heads, which is the default."""
    head_dim: Size | None = None
    """Width of a head, an even number (RoPE); default dim / n_heads."""
    ffn_dim: Size = 352
    """Hidden width of the SwiGLU feed-forward layer."""
    vocab_size: Annotated[Size, Field(ge=2)] | None = None
    """Rows of the embedding; default: as many as the tokenizer of the data has pieces."""
    rope_theta: Rate = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How a model is prepared for longer texts. linear: all positions are divided by rope_factor. llama3: the
    rotations of a wave length above rope_original_length / rope_low_freq_factor are, those below
    rope_original_length / rope_high_freq_factor are not, and between the two it changes gradually, as in
    LLaMA 3.1."""
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    """Factor of rope_scaling."""
    rope_low_freq_factor: Rate = 1.0
    """See rope_scaling = "llama3"."""
    rope_high_freq_factor: Rate = 4.0
    """See rope_scaling = "llama3"; above rope_low_freq_factor."""
    rope_original_length: Size = 8192
    """Tokens in the sequences that the model was first trained on; for rope_scaling = "llama3"."""
    max_positions: Size | None = resumable(None)
    """Longest sequence for which the model is meant, told to other programs at export; default
    data.seq_len."""
    norm_eps: Rate = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    qkv_bias: bool = False
    """Biases on query, key and value, as in Qwen2."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head, as in Qwen3."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str):
            return values
        if preset not in PRESETS:
            raise ValueError(f"preset: {preset!r} is not known; use one of {', '.join(PRESETS)}")
        shape = dict(zip(("dim", "ffn_dim", "n_layers", "n_heads"), PRESETS[preset], strict=True))
        return shape | values

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"n_heads: {self.n_heads} heads do not divide dim {self.dim}; change one of them, or give "
                "head_dim"
            )
        if self.head_width % 2:
            key, given = ("n_heads", "dim / n_heads") if self.head_dim is None else ("head_dim", "it")
            raise ValueError(
                f"{key}: {given} is {self.head_width}, but rotary embedding needs an even number"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}; change one of them"
            )
        if self.rope_scaling == "llama3" and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                f"rope_high_freq_factor: {self.rope_high_freq_factor} is not above rope_low_freq_factor "
                f"{self.rope_low_freq_factor}; raise it"
            )
        return self

    @property
    def head_width(self) -> int:
        """Numbers in a query, key or value of one head."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def parameters(self, vocab: int) -> int:
        """Numbers in the weights, with so many rows of the embedding."""
        dim, queries, kv = self.dim, self.n_heads * self.head_width, self.kv_heads * self.head_width
        block = 2 * dim * queries + 2 * dim * kv + 3 * dim * self.ffn_dim + 2 * dim
        block += (queries + 2 * kv) * self.qkv_bias + 2 * self.head_width * self.qk_norm
        return self.n_layers * block + dim + vocab * dim * (1 if self.tie_embeddings else 2)

    @property
    def size(self) -> str:
        """How many parameters, in words; if a preset is named after another number, that too."""
        found = f"{self.parameters(self.vocab) / 1e6:,.2f} M parameters"
        if self.preset is None or self.vocab == PRESET_VOCAB:
            return found
        named = f"{self.parameters(PRESET_VOCAB) / 1e6:,.2f} M"
        return f"{found} (preset {self.preset} is named for {named} with a vocabulary of {PRESET_VOCAB:,})"

    @property
    def vocab(self) -> int:
        """Rows of the embedding; PRESET_VOCAB until the vocabulary of the data is known."""
        return self.vocab_size or PRESET_VOCAB


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)
    except LookupError:
        raise PydanticCustomError(
            "encoding", "is no encoding of text that Python knows; use one such as cp1252, latin-1 or utf-16"
        ) from None
    return name


Encoding = Annotated[str, AfterValidator(_known_encoding)]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Patterns = Annotated[tuple[str, ...], Field(strict=False)]
# data.source of a config with a mixture
MIXTURE = "mixture"
# what determines the documents of a source, besides its name
SOURCE_KEYS = tuple(field.name for field in fields(Source) if field.name not in ("name", "commit", "form"))


class DataConfig(Section):
    """What to train on. A source is one of: stdlib; a folder made by `lowres data prepare`; a path (file,
    folder or glob, see docs/data.md); or
    hf:<dataset>[:<config>[:<split>]]. Several of them are a mixture."""

    source: Annotated[str, Field(min_length=1)] = "stdlib"
    """Training text. stdlib is the source code of the running Python's standard library."""
    val_source: str | None = None
    """Validation text; default (also if empty): documents held out from the source."""
    tokenizer: str | None = None
    """Path of a SentencePiece model or of a tokenizer.json, or of a folder with one; default: one is trained
    on the source."""
    tokenizer_form: Literal["exact", "own"] | None = None
    """Of a SentencePiece model: exact never changes a text; own has the model's own dummy prefix and
    normaliser, as LLaMA-2 was trained. Default: own with weights of another run (run.init_from), otherwise
    exact."""
    bos: str | int | None = None
    """Token or id that begins every document, if nothing beside a tokenizer.json says it; or its id in a
    source of token ids without data.tokenizer."""
    eos: str | int | None = None
    """Token or id that ends every document, as bos."""
    vocab_size: Size | None = None
    """Vocabulary size of a tokenizer that is trained; default model.vocab_size, or else it depends on the
    size of the text. Of a source of token ids without data.tokenizer: the vocabulary of the ids."""
    token_dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """Type of the ids in files without a header; nanoGPT writes uint16."""
    seq_len: Annotated[Size, Field(ge=2)] = 256
    """Tokens in a sequence."""
    text_key: Annotated[str, Field(min_length=1)] | None = None
    """Column with the text in tables and JSON; with dots, a path of keys into nested objects. Default: the
    first of text, content, raw_content, markdown, document, body, article, story, passage, code. Of chats:
    the column with the messages; default messages, conversations, or prompt with completion."""
    separator: str | None = None
    """What stands between the documents of a text file; default: lines that are <|endoftext|>, where a file
    has some. Empty: a text file is one document."""
    encoding: Encoding | None = None
    """How text files are encoded that are not UTF-8, such as cp1252, latin-1 or utf-16, and lines of CSV, TSV
    and JSON lines; default: they are damaged, see there."""
    include: Patterns = ()
    """Only read files whose path below the source matches one of these globs, in any case; a glob without /
    is for the file's name."""
    exclude: Patterns = ()
    """Do not read files that match one of these globs."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """How a chat becomes a text: tulu, chatml, or a file with a Jinja template; default: the tokenizer's own.
    See docs/tuning.md."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do about rows that are no chats or pairs, or that the template refuses: stop, or leave them out
    and count them."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """What to do about a file that cannot be read to its end, or is not UTF-8: stop, or leave out the rest of
    it, and say so."""
    max_left_out: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest share of the source's bytes that looks like data and is not read; more is an error."""
    shuffle_blocks: Annotated[Size, Field(ge=1, le=1024)] = 4
    """Streams only: over how many neighbouring blocks of 8,388,608 tokens the sequences of a block are
    spread at random. 1: blocks are not mixed, only what is in each."""
    document_mask: bool = False
    """Whether the documents in a sequence do not see each other: attention and positions begin anew with each
    document, and its first token is not predicted. Otherwise all tokens before are context."""
    drop_duplicates: bool = False
    """Train on the first of several documents with the same text only."""
    max_overlap: Annotated[float, Field(ge=0, le=1)] = resumable(0.01)
    """Largest share of the validation documents that may also be in the training text, where the source has a
    validation split of its own or val_source is given; more is an error. Training never sees a document of
    the split; those of val_source are only counted."""
    cache: Annotated[str, Field(min_length=1)] = resumable("data")
    """Folder for the tokenised form of sources that are not a prepared folder."""
    mixture: Annotated[tuple[MixturePart, ...], Field(strict=False)] = resumable(())
    """Several sources instead of one: a list of parts, each written as [[data.mixture]]. When it changes on
    resume, the new weights count from the next step on, and each part goes on where it was."""
    validation: Annotated[tuple[ValidationText, ...], Field(strict=False)] = resumable(())
    """Validation texts with names, beside the validation data: a list, each written as [[data.validation]].
    Each has val_bits_per_byte/<name> and val_loss/<name>; they do not count in val_loss."""

    @model_validator(mode="before")
    @classmethod
    def _one_kind_of_source(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("mixture"):
            return values
        if "source" in values:
            raise ValueError("source: data.mixture takes its place; leave one of the two out")
        return values | {"source": MIXTURE}

    @field_validator("val_source")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [part.name for part in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"mixture: {names.count(name)} parts are called {name}; give them other names"
                )
        names += [text.name for text in self.validation]
        for text in self.validation:
            if names.count(text.name) > 1:
                raise ValueError(
                    f"validation: {names.count(text.name)} texts or parts are called {text.name}; give them "
                    "other names"
                )
        if self.mixture and not any(part.weight for part in self.mixture):
            raise ValueError("mixture: every weight is 0; give a part a weight above 0")
        return self

    @property
    def sources(self) -> list[str]:
        """The source, or those of the parts of a mixture."""
        return [part.source for part in self.mixture] or [self.source]

    def of_part(self, number: int) -> DataConfig:
        """What the config would be with this part of the mixture as its only source."""
        part = self.mixture[number]
        return self.model_copy(update={"mixture": (), "source": part.source} | part.reading())

    def of_text(self, number: int) -> DataConfig:
        """What the config would be with this validation text as its val_source."""
        text = self.validation[number]
        return self.model_copy(update={"validation": (), "val_source": text.source} | text.reading())


class NamedSource(Section):
    source: Annotated[str, Field(min_length=1)]
    """As data.source, for this one."""
    name: Annotated[str, Field(pattern=r"^[\w.-]*[A-Za-z_][\w.-]*$")] = ""
    """What it is called in messages, metrics and --set; default: it follows from the source."""

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, values: Any) -> Any:
        source = values.get("source") if isinstance(values, dict) else None
        return {"name": name_of_source(source)} | values if isinstance(source, str) else values

    def reading(self) -> dict[str, Any]:
        """The keys that it gives of those that say how a source is read."""
        return {key: value for key in SOURCE_KEYS if (value := getattr(self, key)) is not None}


class GeneralText(NamedSource):
    """A validation text with a name. The keys that say how a source is read have the values of [data] by
    default."""


class GeneralPart(NamedSource):
    """A part of a mixture. The keys that say how a source is read have the values of [data] by default."""

    weight: Annotated[float, Field(ge=0)]
    """Share of the tokens of each batch, relative to the weights of the other parts; 0: the part is evaluated
    and not trained on."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """How often the part is read at most; after that the others take its place, in proportion to their
    weights. Default: without limit."""


def name_of_source(source: str) -> str:
    """What a part of a mixture or a validation text is called if its config does not say it."""
    path = PurePath(source.removeprefix("hf:"))
    while glob.has_magic(path.name):
        path = path.parent
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name.split(".")[0]).strip("-")
    return name if re.search("[A-Za-z_]", name) else f"part-{name}".strip("-")


if TYPE_CHECKING:

    class MixturePart(GeneralPart):
        def __getattr__(self, key: str) -> Any: ...

    class ValidationText(GeneralText):
        def __getattr__(self, key: str) -> Any: ...

else:
    _HINTS = get_type_hints(
        DataConfig, localns={"MixturePart": Any, "ValidationText": Any}, include_extras=True
    )

    def _with_reading_keys(name: str, base: type[NamedSource], what: str) -> type[NamedSource]:
        keys = {
            key: (_HINTS[key] | None, Field(None, description=f"As data.{key}, for this {what}."))
            for key in SOURCE_KEYS
        }
        return create_model(name, __base__=base, __doc__=base.__doc__, **keys)

    MixturePart = _with_reading_keys("MixturePart", GeneralPart, "part")
    ValidationText = _with_reading_keys("ValidationText", GeneralText, "text")
    DataConfig.model_rebuild()


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


Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


def _listed(names: Iterable[str], word: str = "or") -> str:
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


def _except(key: str, usual: object = None) -> str:
    """Which optimizers have another default of a key of [optim] than the usual one, as part of a sentence."""
    found: dict[object, list[str]] = {}
    for rule in RULES.values():
        if getattr(rule, key) != usual:
            found.setdefault(getattr(rule, key), []).append(rule.name)
    parts = [f"{value} for {_listed(names, 'and')}" for value, names in found.items()]
    return f", but {' and '.join(parts)}" if parts else ""


class GeneralOptim(Section):
    """The optimizer. Defaults that depend on its name are filled in when the config is read."""

    name: Annotated[str, OneOf(RULES)] = Field(
        default="apollo-mini",
        description="Updates the matrices of the blocks, and every other tensor too if it is "
        f"{_listed(rule.name for rule in RULES.values() if rule.for_all)}, or embedding and head if it is "
        f"{_listed(rule.name for rule in RULES.values() if rule.kinds == WITHOUT_NORMS)}; AdamW updates the "
        "rest.",
    )
    lr: Annotated[float, Field(gt=0)] | None = adjustable(None)
    """Peak learning rate; default lr_over_batch times the batch if that is given, otherwise the optimizer's
    default."""
    lr_over_batch: Annotated[float, Field(gt=0)] | None = adjustable(None)
    """Peak learning rate divided by the batch in sequences, train.batch_tokens / data.seq_len (arXiv
    2412.08347). Two of lr, train.batch_tokens and lr_over_batch determine the third."""
    batch_policy: Literal["fixed", "linear", "sqrt"] | None = resumable(None)
    """What happens to lr, embed_lr and norm_lr when --set changes the batch of the file, or a resumed run has
    another batch than at its start. fixed: nothing. linear: they change in proportion to the batch in
    sequences, so lr_over_batch stays the same. sqrt: in proportion to its square root. Default linear if
    lr_over_batch is given instead of lr, otherwise fixed."""
    embed_lr: Annotated[float, Field(gt=0)] | None = adjustable(None)
    """Peak learning rate of embedding and head; default lr."""
    norm_lr: Annotated[float, Field(gt=0)] | None = adjustable(
        None, description=f"Peak learning rate of norms and biases; default lr{_except('norm_lr')}."
    )
    betas: Betas | None = Field(
        default=None,
        description="Decay of the first and second moment; default (0.9, 0.999)"
        f"{_except('betas', (0.9, 0.999))}.",
    )
    eps: Rate | None = None
    """Added to the denominator, or its least value; the default depends on the optimizer."""
    adamw_betas: Betas | None = Field(
        default=None,
        description="betas of the AdamW that updates embedding, head, norms and biases if the optimizer does "
        f"not; default betas{_except('adamw_betas')}.",
    )
    adamw_eps: Rate | None = Field(
        default=None,
        description=f"Added to the denominator in that AdamW; default eps{_except('adamw_eps')}.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = adjustable(0.0)
    """Decoupled weight decay of the matrices (norms and biases have none)."""
    decay_embeddings: bool = True
    """Whether weight_decay also applies to embedding and head."""
    grad_clip: Annotated[float, Field(ge=0)] = adjustable(0.0)
    """Clip the global gradient norm to this; 0 = off. The layerwise engine needs a second backward pass for
    it, because it does not know the global norm before its first update."""
    limiter: float | None = adjustable(
        None,
        description="Fira's norm-growth limiter: the largest factor by which the norm of a tensor's update "
        "may grow from one step to the next (without the learning rate); 0 = off. It applies to every tensor "
        "that the named optimizer updates, not to those that AdamW updates instead; with fira, to the part "
        "of the gradient outside the projection. Default 0, but 1.01 for "
        f"{_listed(rule.name for rule in RULES.values() if rule.limiter == GROWTH)}.",
    )

    @model_validator(mode="after")
    def _check_limiter(self) -> GeneralOptim:
        if self.limiter and self.limiter < 1:
            raise ValueError(
                f"limiter: {self.limiter:g} is too small; use a factor of at least 1, or 0 for no limiter"
            )
        return self


def describe_key(name: str) -> str:
    """Documentation of a key of [optim] that only some rules read, with the rules and their defaults."""
    defaults: dict[str, list[str]] = {}
    for rule in RULES.values():
        for key, value in rule.keys.items():
            if key.name == name:
                text = json.dumps(value) if value is not None else "none"
                defaults.setdefault(text, []).append(rule.name)
    texts = (f"{text} for {_listed(names, 'and')}" for text, names in defaults.items())
    return f"{KEYS[name].about} Default {', '.join(texts)}."


if TYPE_CHECKING:

    class OptimConfig(GeneralOptim):
        def __getattr__(self, key: str) -> Any: ...

else:  # add the keys that the rules declare
    OptimConfig = create_model(
        "OptimConfig",
        __base__=GeneralOptim,
        __doc__=GeneralOptim.__doc__,
        **{
            key.name: (key.type | None, Field(None, description=describe_key(key.name)))
            for key in KEYS.values()
        },
    )


# schedule -> the keys that only this schedule reads
SCHEDULE_KEYS = {
    "cosine": (),
    "constant": (),
    "wsd": ("cooldown_steps",),
    "sawtooth": ("cycle_steps", "rewarmup_steps"),
}


class ScheduleConfig(Section):
    """The learning rate during the run, as a factor on the peak rates."""

    name: Literal["cosine", "linear", "sawtooth", "wsd", "constant"] = "cosine"
    """cosine, linear: decays to min_ratio. sawtooth: as cosine, but every cycle starts with a new warm-up.
    wsd: constant, then a linear cooldown."""
    warmup_steps: Count | None = None
    """Steps of linear learning-rate warm-up; at most a tenth of decay_steps, which is the default."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a fraction of decay_steps; at least one step is at the peak."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Lowest learning rate of the decay, as a fraction of the peak."""
    decay_steps: Positive | None = adjustable(None)
    """Steps at whose end the rate is lowest; it stays there. Default: the whole run. A run that is resumed to
    train for longer keeps the end that it had, see docs/resuming.md. Not for constant."""
    cycle_steps: Positive = 1000
    """sawtooth: steps in a cycle."""
    rewarmup_steps: Positive = 50
    """sawtooth: steps of warm-up at the start of a cycle."""
    cooldown_steps: Count | None = resumable(None)
    """wsd: steps of the final cooldown; default a fifth of decay_steps."""


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
