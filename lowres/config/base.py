"""The base class of config sections, and the types that they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import core_schema

# Upper limits are beyond any use. They keep products of sizes, in bytes, within 63 bits, which is as far as
# PyTorch counts, and a plan of all layers within seconds.
Positive = Annotated[int, Field(ge=1, le=1 << 53)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Batch = Annotated[int, Field(ge=1, le=1 << 32)]
Rate = Annotated[float, Field(gt=0)]
Minutes = Annotated[float, Field(ge=0, le=1e9)]
Gib = Annotated[float, Field(gt=0, le=1e6)]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


def resumable(default: Any, **limits: Any) -> Any:
    """A field that may change when a run is resumed, because it does not change the mathematics of a step."""
    return Field(default, json_schema_extra={"resumable": True}, **limits)


def adjustable(default: Any, **limits: Any) -> Any:
    """A field that may change when a run is resumed although it changes the mathematics: the new value counts
    from the next step on, which the run says and records."""
    return Field(default, json_schema_extra={"resumable": True, "adjustable": True}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class OneOf:
    """A choice between names that are known only at run time, because they are registered elsewhere."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.names))
