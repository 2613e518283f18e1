"""What users and their scripts rely on, as text for tests/golden: the command line, the keys of a config, and
those of the records that a run leaves."""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lowres.cli.parser import make_parser
from lowres.config import Config, MixturePart, OneOf, ValidationText

# keys that are names of something else
NAMED = {
    r"^(update)/.*": r"\1/UNIT",
    r"^(versions)\..*": r"\1.PACKAGE",
    r"^(changed)\.(?:\w+\.\w+)": r"\1.section.key",
    r"^(val_loss|val_bits_per_byte|tokens|share)/.*": r"\1/PART",
}


def command_line() -> str:
    """Every command with its arguments, in the order of the help."""
    return "\n\n".join("\n".join(lines) for lines in _commands(make_parser())) + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    alternatives = {
        action.dest: ["needed: one of a group" if group.required else "at most one of a group"]
        for group in parser._mutually_exclusive_groups
        for action in group._group_actions
    }
    lines: list[str] = [parser.prog]
    below: list[argparse.ArgumentParser] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below += action.choices.values()
        elif not isinstance(action, argparse._HelpAction):
            more = [*_details(action), *alternatives.get(action.dest, ())]
            lines.append(f"    {_written(action)}{': ' * bool(more)}{'; '.join(more)}")
    yield lines
    for found in below:
        yield from _commands(found)


def _written(action: argparse.Action) -> str:
    """An argument as it is typed."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return " ".join([*action.option_strings, *([str(value)] if action.nargs != 0 else [])])


def _details(action: argparse.Action) -> Iterator[str]:
    if action.nargs not in (None, 0):
        yield {"?": "may be left out", "+": "one or several"}[str(action.nargs)]
    if isinstance(action, argparse._AppendAction):
        yield "may be repeated"
    if action.choices is not None:
        yield " | ".join(map(str, action.choices))
    if action.option_strings and action.required:
        yield "needed"
    if action.default not in (None, [], False, argparse.SUPPRESS):
        yield f"default {json.dumps(action.default)}"
    if action.help == argparse.SUPPRESS:
        yield "not in the help"


def config_keys() -> str:
    """Every key with its type and its default; where another key decides on the default, what that is in an
    empty config. Choices and meanings are in docs/reference.md."""
    lines, filled = [], Config()
    for section, field in Config.model_fields.items():
        values = getattr(filled, section)
        for key, info in type(values).model_fields.items():
            lines.append(f"{section}.{_key(key, info, getattr(values, key))}")
        if section == "data":
            for table, kind in (("mixture", MixturePart), ("validation", ValidationText)):
                own = kind.model_fields.items()
                lines += [f"data.{table}[].{_key(key, info, info.default)}" for key, info in own]
        assert field.annotation is type(values)
    return "\n".join(lines) + "\n"


def _key(name: str, info: FieldInfo, value: Any) -> str:
    text = f"{name}: {_type(info.annotation, info.metadata)}"
    if not info.is_required():
        text += f" = {json.dumps(info.default)}"
        text += f" -> {json.dumps(value)}" if value != info.default else ""
    extra = info.json_schema_extra
    return f"{text}{'  (may change on resume)' if isinstance(extra, dict) and extra.get('resumable') else ''}"


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if any(isinstance(one, OneOf) for one in metadata) or origin is Literal:
        return "name"
    if origin is Annotated:
        return _type(inside[0], inside[1:])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type, inside)))
    if origin is tuple:
        return f"list of {_type(inside[0])}"
    return "null" if annotation is type(None) else annotation.__name__


# ---------------------------------------------------------------- the records of runs


class Records:
    """The keys of records, with the type of their values and the runs that have them."""

    def __init__(self) -> None:
        # kind of record -> key -> types, runs
        self._found: dict[str, dict[str, tuple[set[str], dict[str, None]]]] = defaultdict(dict)
        self._count: dict[tuple[str, str], int] = defaultdict(int)
        self._runs: dict[str, dict[str, None]] = defaultdict(dict)
        self._times: dict[tuple[str, str, str], int] = defaultdict(int)

    def add(self, run: str, kind: str, record: Mapping[str, Any]) -> None:
        self._runs[kind][run] = None
        self._count[kind, run] += 1
        for key, value in dict(_flat(record)).items():
            types, runs = self._found[kind].setdefault(key, (set(), {}))
            types.add(value)
            runs[run] = None
            self._times[kind, run, key] += 1

    def text(self) -> str:
        """A paragraph for each kind of record, a line for each key. In brackets: a key that not all of the
        records have; behind it the runs that have it, if not all of them do."""
        return "\n".join("\n".join([kind, *self._lines(kind), ""]) for kind in sorted(self._found))

    def _lines(self, kind: str) -> Iterator[str]:
        for key, (types, runs) in self._found[kind].items():
            always = all(self._times[kind, run, key] == self._count[kind, run] for run in runs)
            shown = key if always else f"[{key}]"
            yield f"    {shown} {' | '.join(sorted(types))}{_some(runs, self._runs[kind])}"


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Every key with the type of its value; keys inside of others are joined by dots."""
    for name, value in record.items():
        key = before + name
        for pattern, shown in NAMED.items():
            key = re.sub(pattern, shown, key)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.") if value else [(key, "object")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for one in value:
                yield from _flat(one, f"{key}[].")
        else:
            yield key, _kind(value)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "bool"
    return {int: "number", float: "number", str: "text", list: "list"}[type(value)]


def records_of(runs: Mapping[str, Path]) -> str:
    """The files in the folders of runs, and the keys of what stands in them."""
    found = Records()
    files: dict[str, dict[str, None]] = defaultdict(dict)
    for name, run in runs.items():
        for path in run.rglob("*"):
            if path.is_file():
                place = re.sub(r"step_\d+", "step_STEP", str(path.relative_to(run)))
                files[re.sub(r"(embed|head|layers\.\d+)\.", "UNIT.", place)][name] = None
        for record in _lines_of(run / "metrics.jsonl"):
            kind = "an evaluation" if "val_loss" in record else "a step"
            found.add(name, f"metrics.jsonl, {kind}", record)
        for record in _lines_of(run / "events.jsonl"):
            found.add(name, f"events.jsonl, {record['event']}", record)
        for record in _lines_of(run / "samples.jsonl"):
            found.add(name, "samples.jsonl", record)
        for file in ("summary.json", "plan.json"):
            if (run / file).exists():
                found.add(name, file, json.loads((run / file).read_text("utf-8")))
    places = (f"    {place}{_some(has, runs)}" for place, has in sorted(files.items()))
    return "\n".join(["the folder of a run", *places, "", found.text()])


def _some(has: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    """Which runs have something, if not all do."""
    return f": {', '.join(has)}" if has.keys() != of.keys() else ""


def _lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
