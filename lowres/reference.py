"""The reference of all config keys, from the code: text for `lowres config --help`, Markdown for the docs,
and the comments of a config.

`python scripts/write_docs.py` writes docs/reference.md; a test fails when that file is out of date.
"""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lowres.catalogue import EVERYTHING, ONLY_MATRICES, RULES, WEIGHT_FORMATS, WITHOUT_NORMS
from lowres.config import (
    PRESET_VOCAB,
    PRESETS,
    SHAPE_KEYS,
    Config,
    DataConfig,
    MixturePart,
    ModelConfig,
    OneOf,
    Section,
    ValidationText,
)
from lowres.config_file import is_list_of_tables, to_values

WIDTH = 100  # of a comment
UPDATED = {ONLY_MATRICES: "matrices", WITHOUT_NORMS: "all but norms and biases", EVERYTHING: "every tensor"}


def describe() -> str:
    """Documentation of every section and key, for the terminal."""
    lines = []
    for name, model in _sections():
        lines.append(f"{_title(name)}  {_about(model)}")
        for key, default, choices, text in _keys(name, model):
            shown = f" = {default}" if default else ""
            allowed = f" ({' | '.join(choices)})" if choices else ""
            lines.append(f"  {key}{shown}{allowed}: {text}")
        lines.append("")
    return "\n".join(lines)


def commented(config: Config) -> str:
    """A config as TOML that reads back as the same config, with the documentation of every key. Keys that
    have their default are comments too."""
    values = to_values(config)
    live = _live(values)
    lines: list[str] = []
    for section, model in _sections():
        if "." in section:
            continue
        lines += [*_comment(_about(model)), f"[{section}]", ""]
        for key, _, found, text in _keys(section, model):
            value = values[section].get(key)
            if is_list_of_tables(value):
                continue
            lines += _comment(f"{text} ({' | '.join(found)})" if found else text)
            shown = f"{key} = {'...' if value is None else json.dumps(value)}"
            lines += [shown if key in live.get(section, ()) else f"# {shown}", ""]
        for key, value in values[section].items():
            if is_list_of_tables(value):
                for row in value:
                    lines += [f"[[{section}.{key}]]", *(f"{k} = {json.dumps(v)}" for k, v in row.items()), ""]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _live(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The keys without which the config would be another one."""
    plain = to_values(Config())
    live = {
        section: {key: value for key, value in keys.items() if plain[section].get(key) != value}
        for section, keys in values.items()
    }
    while True:
        found = to_values(Config.model_validate(copy.deepcopy(live)))
        # what another key implies, but is not so here
        missing = [
            (section, key)
            for section, keys in values.items()
            for key, value in keys.items()
            if found[section].get(key) != value and key not in live[section]
        ]
        if not missing:
            return _without_what_follows(live, values)
        for section, key in missing:
            live[section][key] = values[section][key]


def _without_what_follows(
    live: dict[str, dict[str, Any]], values: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The live keys that others do not imply: whoever edits the file changes a key in one place."""
    tied = values["optim"].get("batch_policy") == "linear"  # the ratio was given
    following = [("optim", "lr" if tied else "lr_over_batch"), ("optim", "batch_policy")]
    if "preset" in values["model"]:
        following += [("model", key) for key in SHAPE_KEYS]
    for section, key in following:
        fewer = copy.deepcopy(live)
        given = fewer.get(section, {}).pop(key, None) is not None
        if given and to_values(Config.model_validate(copy.deepcopy(fewer))) == values:
            live = fewer
    return live


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def keys() -> dict[str, list[str]]:
    """Every `section.key`, with the values that it can have, if they are a fixed list of names."""
    sections = ((name, model) for name, model in _sections() if "." not in name)
    return {
        f"{name}.{key}": choices(info) for name, model in sections for key, info in model.model_fields.items()
    }


def markdown() -> str:
    """The same as tables, plus tables of the optimizers, the number formats and the presets."""
    lines = ["# Reference", "", "Written by `python scripts/write_docs.py` from the code; do not edit.", ""]
    lines += ["- [Optimizers](#optimizers), [number formats](#number-formats), [presets](#presets)"]
    lines += [f"- [`{_title(name)}`](#{name.replace('.', '')})" for name, _ in _sections()]
    lines += ["", "## Optimizers", "", *_optimizers(), "", "## Number formats", "", *_formats()]
    lines += ["", "## Presets", "", *_presets()]
    for name, model in _sections():
        lines += ["", f"## {name}", "", _cell(_about(model)), ""]
        lines += _table(["key", "default", "choices", "meaning"])
        for key, default, choices, text in _keys(name, model):
            cells = [f"`{key}`", f"`{default}`" if default else "", ", ".join(f"`{c}`" for c in choices)]
            lines.append(f"| {' | '.join([*cells, _cell(text)])} |")
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, Section)
        yield name, model
        if model is DataConfig:
            yield "data.mixture", MixturePart
            yield "data.validation", ValidationText


def _title(name: str) -> str:
    """How TOML writes the section."""
    return f"[[{name}]]" if "." in name else f"[{name}]"


def _about(model: type[Section]) -> str:
    return " ".join((model.__doc__ or "").split())


def _keys(section: str, model: type[Section]) -> Iterator[tuple[str, str, list[str], str]]:
    """For each key of a section: name, default ("" if there is none), choices and documentation."""
    defaults = getattr(Config(), section, None)
    for key, info in model.model_fields.items():
        extra = info.json_schema_extra
        mark = " (may change on resume)" if isinstance(extra, dict) and extra.get("resumable") else ""
        default = getattr(defaults, key) if defaults else None
        text = " ".join((info.description or "").split())
        yield key, "" if default is None else json.dumps(default), choices(info), text + mark


def choices(info: FieldInfo) -> list[str]:
    """The values that a key can have, if they are a fixed list of names."""
    named = [m for m in info.metadata if isinstance(m, OneOf)]
    return list(named[0].names) if named else list(dict.fromkeys(_named(info.annotation)))


def _named(annotation: Any) -> Iterator[str]:
    """The names in a type: the values of a Literal, also inside unions and lists."""
    if get_origin(annotation) is Literal:
        yield from (str(value) for value in get_args(annotation))
    elif annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for part in get_args(annotation):
            yield from _named(part)
    else:
        for part in getattr(annotation, "__metadata__", ()):
            if isinstance(part, OneOf):
                yield from part.names


def _optimizers() -> Iterator[str]:
    yield from _table(
        ["`optim.name`", "what it is", "lr", "eps", "limiter", "its own keys", "updates", "class"]
    )
    for rule in RULES.values():
        own = [(f"`{key.name}`", "" if v is None else f" {json.dumps(v)}") for key, v in rule.keys.items()]
        cells = [
            f"`{rule.name}`",
            rule.about,
            f"{rule.lr:g}",
            f"{rule.eps:g}" if "eps" in rule.reads else "",
            f"{rule.limiter:g}" if rule.limiter else "",
            ", ".join(name + value for name, value in own),
            UPDATED[rule.kinds],
            f"`{rule.class_name}`" if rule.class_name else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _formats() -> Iterator[str]:
    yield from _table(["`memory.weights`", "what it is", "also `memory.embeddings`"])
    for found in WEIGHT_FORMATS.values():
        yield f"| `{found.name}` | {found.about} | {'yes' if found.any_shape else 'no'} |"


def _presets() -> Iterator[str]:
    vocabularies = (PRESET_VOCAB, 4096, 0)
    heads = [f"M parameters with a vocabulary of {size:,}" for size in vocabularies[:2]]
    heads.append("without embedding and head")
    yield from _table(["`model.preset`", "dim", "ffn_dim", "n_layers", "n_heads", *heads])
    for name, shape in PRESETS.items():
        model = ModelConfig(preset=name)
        sizes = [f"{model.parameters(size) / 1e6:,.2f}" for size in vocabularies]
        yield f"| `{name}` | {' | '.join([*map(str, shape), *sizes])} |"


def _table(head: list[str]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
