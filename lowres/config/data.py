"""The keys of [data]: one source, the parts of a mixture, named validation texts."""

from __future__ import annotations

import glob
import re
from dataclasses import fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lowres.catalogue import Source
from lowres.config.base import Section, Size, resumable


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)
    except LookupError:
        raise PydanticCustomError(
            "encoding", "is no encoding of text that Python knows; use one such as cp1252, latin-1 or utf-16"
        ) from None
    return name


Encoding = Annotated[str, AfterValidator(_known_encoding)]
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
