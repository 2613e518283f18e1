"""Reading, writing and comparing configs: TOML files with the sections of `lowres.config`, and `--set`
overrides.

An error is one line that names the key. Unusual but valid settings become notes for the user.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowres import disk, rates
from lowres.catalogue import KEYS, RULES, hub_name, is_stream
from lowres.config import (
    RATE_DEFAULTS,
    SCHEDULE_KEYS,
    SHAPE_KEYS,
    Config,
    DataConfig,
    MixturePart,
    ModelConfig,
    Section,
    ValidationText,
    engine_defaults,
    name_of_source,
)
from lowres.errors import UserError

# configs/ of the repository, which an installed package has here
SHIPPED = Path(__file__).parent / "configs"


def load_config(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, list[str]]:
    """Read a TOML file, apply `section.key=value` overrides, check everything.

    Returns the config and notes for the user. Raises UserError with one line that names the key.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        there = SHIPPED / path.name
        known = f"there is {there}" if there.is_file() else f"lowres comes with configs in {SHIPPED}"
        raise UserError(f"config {path}: no such file; {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read as text ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {path}: not valid TOML: {error}") from None
    for section in Config.model_fields:
        if section in values and not isinstance(values[section], dict):
            raise UserError(f"config {path}: {section} must be a section, written [{section}]")
    notes = _leave_to_origin(values, overrides or [], path)
    values, changes = _changed(values, overrides or [], str(path))
    config, more = parse_config(values, str(path))
    return config, notes + changes + more


def changed_config(config: Config, overrides: list[str], origin: str) -> tuple[Config, list[str]]:
    """A resolved config with `section.key=value` overrides, and notes on these. origin: what it is, for
    messages. Raises UserError."""
    values, changes = _changed(to_values(config), overrides, origin)
    found, _ = parse_config(values, origin)
    return found, changes + _notes(found, overridden({}, overrides))


def _changed(values: dict[str, Any], overrides: list[str], origin: str) -> tuple[dict[str, Any], list[str]]:
    """The sections of a config, which are changed by overrides, and notes. Raises UserError."""
    keys = _keys_of(overrides)
    data = values.get("data")
    if isinstance(data, dict) and keys & {"data.source", "data.mixture"}:
        for key in ("source", "mixture", "val_source"):  # they belong together, and one is replaced
            data.pop(key, None)
    file = copy.deepcopy(values)
    values = engine_defaults(overridden(values, overrides))
    try:
        return values, rates.retie(file, values, keys, RATE_DEFAULTS)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def _keys_of(overrides: list[str]) -> set[str]:
    return {override.partition("=")[0].strip() for override in overrides}


def _leave_to_origin(values: dict[str, Any], overrides: list[str], path: Path) -> list[str]:
    """Take what a model that is given with `--init-from` decides out of the config of a run, which has every
    key: they are no wishes of the user. Returns notes."""
    given = values.get("model", {})
    every = {key for key, field in ModelConfig.model_fields.items() if field.default is not None}
    if "run.init_from" not in _keys_of(overrides) or not every <= given.keys():
        return []
    del values["model"]
    if values.get("run", {}).get("init_from"):  # the tokenizer came with the other model
        for key in ("tokenizer", "tokenizer_form"):
            values.get("data", {}).pop(key, None)
    return [f"[model] of {path} has every key, as a run writes it; the model of --init-from takes its place"]


def data_config(source: str, overrides: list[str]) -> DataConfig:
    """The section [data] for a source, with `data.key=value` overrides. Raises UserError."""
    return source_config(source, overrides, ("data",)).data


def source_config(
    source: str, overrides: list[str], sections: Sequence[str] = ("data", "objective")
) -> Config:
    """A config with this source and `section.key=value` overrides in these sections. Raises UserError."""
    for override in overrides:
        if override.strip().partition(".")[0] not in sections:
            listed = " and ".join(f"[{section}]" for section in sections)
            raise UserError(f"--set {override}: only keys of {listed} count here")
    return parse_config(overridden({"data": {"source": source}}, overrides), "--set")[0]


def overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Nested dicts of sections, which are changed, with `section.key=value` overrides. Raises UserError."""
    for override in overrides:
        _apply_override(values, override)
    return values


def load_resolved(path: Path) -> Config:
    """The config that a run has written. Raises UserError."""
    try:
        values = tomllib.loads(disk.read_whole(path).decode())
        missing = [name for name in ("run", "model", "data", "optim", "train") if name not in values]
        reason = f"it has no [{missing[0]}]" if missing else ""
    except OSError as error:
        raise disk.DiskError(path, error, "read") from None
    except ValueError as error:
        reason = str(error)
    if not reason:
        try:
            return parse_config(values)[0]
        except UserError as error:
            reason = str(error)
    raise UserError(f"{path}: is not what a run has written ({reason}); put a copy of the file back")


def with_values(config: Config, section: str, **values: Any) -> Config:
    """The config with values of a section replaced. They are not checked."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


# names that are no paths: of sources, and of chat templates
BUILT_IN = ("stdlib", "tulu", "chatml")
# how the names of tasks end that are files
YAML = (".yaml", ".yml")


def filled(ours: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """The model `theirs` with the keys that `ours` gives."""
    given = {key: getattr(ours, key) for key in ours.model_fields_set}
    return theirs.model_copy(update={key: value for key, value in given.items() if value is not None})


def as_begun(config: Config, saved: Config) -> Config:
    """The config of a resumed run: what it left to the model that gave its first weights is as the run
    began."""
    if saved.run.init_from is None:
        return config
    config = config.model_copy(update={"model": filled(config.model, saved.model)})
    given, begun = config.data, saved.data
    tokenizer, form = given.tokenizer or begun.tokenizer, given.tokenizer_form or begun.tokenizer_form
    return with_values(config, "data", tokenizer=tokenizer, tokenizer_form=form)


def with_places(config: Config, saved: Config | None) -> Config:
    """The config with absolute paths of what exists, so that the run can be used from any folder. A relative
    path that does not exist here is the one that the run was started with, if that ends so."""
    data, before = config.data, saved.data if saved else None
    changes: dict[str, Any] = {"cache": str(Path(data.cache).expanduser().absolute())}
    for key in ("source", "val_source", "tokenizer", "chat_template"):
        own = getattr(before, key) if before else None
        changes[key] = _place(getattr(data, key), [own] if own else [])
    if data.mixture:
        del changes["source"]
        known = before.sources if before else []
        changes["mixture"] = tuple(
            part.model_copy(update={"source": _place(part.source, known)}) for part in data.mixture
        )
    kept = [text.source for text in before.validation] if before else []
    changes["validation"] = tuple(
        text.model_copy(update={"source": _place(text.source, kept)}) for text in data.validation
    )
    train = config.train
    tasks = tuple(_place(name, []) if name.endswith(YAML) else name for name in train.eval_tasks)
    more = _place(train.eval_tasks_folder, [saved.train.eval_tasks_folder or ""] if saved else [])
    config = with_values(config, "train", eval_tasks=tasks, eval_tasks_folder=more)
    return with_values(config, "data", **changes)


def _place(given: str | None, known: list[str]) -> str | None:
    """See `with_places`. known: what the run was started with."""
    if given is None or given in BUILT_IN:
        return given
    if is_stream(given):
        folder = hub_name(given).dataset
        here = Path(folder).expanduser()
        return given.replace(folder, str(here.absolute()), 1) if here.exists() else given
    path = Path(given).expanduser()
    if path.exists():
        return str(path.absolute())
    same = (one for one in known if Path(one).parts[-len(path.parts) :] == path.parts)
    return given if path.is_absolute() else next(same, given)


def parse_config(values: dict[str, Any], origin: str = "config") -> tuple[Config, list[str]]:
    """Check a nested dict of sections; see `load_config`."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {_one_line(error)}") from None
    return config, _notes(config, values)


# lists of tables in [data]: what is in them, and what that is called
TABLES: dict[str, tuple[type[Section], str]] = {
    "mixture": (MixturePart, "part"),
    "validation": (ValidationText, "text"),
}
# keys of [train] that set the length of a run, one at a time
LENGTHS = ("steps", "tokens", "epochs")
# keys of [memory] that a run chooses when it starts, if they are "auto"
CHOSEN = ("compute", "activations", "kernels")


def chosen_keys(config: Config, saved: Config) -> dict[str, str]:
    """What the config of a run leaves open and the run has chosen, as its saved config says: keys of [memory]
    and their values. A choice belongs together, so if the config asks for other products, nothing is kept."""
    ours, theirs = config.memory, saved.memory
    if ours.compute not in ("auto", theirs.compute):
        return {}
    return {
        key: getattr(theirs, key) for key in CHOSEN if getattr(ours, key) == "auto" != getattr(theirs, key)
    }


def as_chosen(config: Config, saved: Config) -> Config:
    """The config of a resumed run: what it leaves to choose is as the run began."""
    memory = config.memory.model_copy(update=chosen_keys(config, saved))
    return config.model_copy(update={"memory": memory})


def rates_of(config: Config) -> dict[str, Any]:
    """The values from which the rates of a run follow if its batch changes."""
    optim = config.optim
    return {"batch_tokens": config.train.batch_tokens} | {key: getattr(optim, key) for key in rates.RATES}


def follow_batch(
    config: Config, saved: Config, start: dict[str, Any]
) -> tuple[Config, list[str], dict[str, Any]]:
    """The config of a resumed run, with learning rates that follow a batch different from the first one.

    saved: the config of the run so far. start: batch_tokens and the rates with which the run was started.
    Returns the config, notes, and what later rates follow from: the start, or the present rates if the config
    has others than those of the start and those that follow from the batch.
    """
    optim, sequences = config.optim, config.batch_sequences
    policy = optim.batch_policy or "fixed"
    found = rates.follow(optim.model_dump(), start, config.train.batch_tokens, policy)
    if found is None:
        return config, [], rates_of(config)
    now = optim.model_copy(update=found | {"lr_over_batch": found["lr"] / sequences})
    config = config.model_copy(update={"optim": now})
    old, new = (saved.batch_sequences, saved.optim.lr or 0), (sequences, found["lr"])
    return config, [] if old == new else [rates.batch_note(policy, old, new)], start


def toml_value(text: str) -> Any:
    """The text as a TOML value, or as a string if it is not one."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name and section):
        raise UserError(f"--set {override}: write it as section.key=value")
    value = toml_value(text)
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(f"--set {override}: {section} is not a section")
    if section == "data" and (table := name.partition(".")[0]) in TABLES and table != name:
        target, name = _row_of(table, target, name, override)
    if (section, name) == ("model", "preset"):
        for shape_key in SHAPE_KEYS:
            target.pop(shape_key, None)
    if section == "train" and name in LENGTHS:
        for other in LENGTHS:
            target.pop(other, None)
    if section == "schedule" and name.startswith("warmup_"):
        target.pop("warmup_steps" if name == "warmup_ratio" else "warmup_ratio", None)
    target[name] = value


def _row_of(table: str, data: dict[str, Any], key: str, override: str) -> tuple[dict[str, Any], str]:
    """The row of a list of tables in [data] that `<table>.<name or number>.<key>` means, and the key."""
    row, dot, name = key.removeprefix(f"{table}.").rpartition(".")
    found, what = data.get(table), TABLES[table][1]
    if not (isinstance(found, list) and found and all(isinstance(one, dict) for one in found)):
        raise UserError(f"--set {override}: the config has no data.{table}")
    known = [str(one.get("name") or name_of_source(str(one.get("source", "")))) for one in found]
    known += map(str, range(len(found)))
    if not (dot and name and row in known):
        raise UserError(
            f"--set {override}: write it as data.{table}.<{what}>.<key>=value; {what}s are {', '.join(known)}"
        )
    return found[known.index(row) % len(found)], name


def _one_line(error: ValidationError) -> str:
    """The first error, as `section.key: what is wrong and how to correct it`."""
    first = error.errors()[0]
    if first["type"] == "missing":  # maybe it is only spelt wrong
        first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), first)
    table = str(first["loc"][1]) if first["loc"][:1] == ("data",) and len(first["loc"]) > 2 else ""
    location = [str(part) for part in first["loc"][: 4 if table in TABLES else 2]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        section = Config.model_fields.get(location[0])
        names: list[str] = list(Config.model_fields)
        if table in TABLES:
            names = list(TABLES[table][0].model_fields)
        elif len(location) == 2 and section is not None:
            names = list(section.annotation.model_fields)  # type: ignore[union-attr]
        close = difflib.get_close_matches(location[-1], names, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
        return f"{key}: unknown key; {remedy}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}.{message}" if location else message
    kinds = [
        PLAINLY.get(e["type"], e["msg"])
        for e in error.errors()
        if e["loc"][: len(location)] == first["loc"][: len(location)]
    ]
    given = first.get("input")
    remedy = f"; write {meant}" if (meant := _meant(given, first["type"])) else ""
    return f"{key}: {' or '.join(dict.fromkeys(kinds))} (got {given!r}){remedy}"


# errors that Pydantic words for programmers
PLAINLY = {
    "tuple_type": "Input should be a list",
    "string_pattern_mismatch": "Input should be a name of letters, digits, _, - and ., with a letter in it",
}
# how other languages write what TOML writes otherwise
BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def _meant(given: Any, kind: str) -> str | None:
    """How TOML writes what was meant by a value of a wrong type, if that is clear. kind: of the error."""
    if kind == "bool_type" and isinstance(given, str):
        return BOOLEANS.get(given.lower())
    if kind == "bool_type" and given in (0, 1):
        return "true" if given else "false"
    if kind == "tuple_type" and isinstance(given, str):
        return json.dumps([part.strip() for part in given.split(",")], ensure_ascii=False)
    if kind == "int_type" and isinstance(given, str | int | float):
        with suppress(ValueError, OverflowError):
            number = float(given.replace(",", "")) if isinstance(given, str) else float(given)
            return str(int(number)) if number == int(number) else None
    return None


def _notes(config: Config, values: dict[str, Any]) -> list[str]:
    notes = [] if config.train.epochs is not None else notes_on_length(config)
    rule = RULES[config.optim.name]
    used = {*rule.reads, *(key.name for key in rule.keys)}
    for key in ("betas", "eps", *KEYS):
        if key in values.get("optim", {}) and key not in used:
            other = "" if rule.for_all or key in KEYS else f"; optim.adamw_{key} is for the other tensors"
            notes.append(f"optim.{key} is not used by {config.optim.name}{other}")
    for key in ("adamw_betas", "adamw_eps"):
        if key in values.get("optim", {}) and rule.for_all:
            notes.append(
                f"optim.{key} is not used, because {rule.name} updates every tensor; use optim.{key[6:]}"
            )
    if values.get("memory", {}).get("moments", config.memory.moments) != config.memory.moments:
        notes.append(f"memory.moments is int8 with {config.optim.name}")
    for key in ("cycle_steps", "rewarmup_steps"):
        given = values.get("schedule", {}).get(key)
        if config.relora.enabled and given not in (None, getattr(config.schedule, key)):
            notes.append(f"schedule.{key} is not used; relora.{key} replaces it")
    if config.relora.enabled:
        notes += _notes_on_relora(config)
    for name, keys in SCHEDULE_KEYS.items():
        for key in keys:
            if key in values.get("schedule", {}) and name != config.schedule.name:
                notes.append(f"schedule.{key} is not used by {config.schedule.name}")
    return notes


def notes_on_length(config: Config) -> list[str]:
    """What the number of steps means to other keys. With train.epochs it is known when the data are open."""
    relora, steps, asked, notes = config.relora, config.train.total_steps, config.schedule.warmup_steps, []
    if asked is not None and asked > config.warmup_steps:
        notes.append(
            f"schedule.warmup_steps {asked} is more than a tenth of the run; reduced to {config.warmup_steps}"
        )
    if relora.enabled and relora.start_step >= steps:
        notes.append(
            f"relora.start_step {relora.start_step} is not before the end of the run; "
            "the run trains without adapters"
        )
    elif relora.enabled and relora.cycle_steps and not relora.merges_at(steps):
        notes.append(f"relora.cycle_steps {relora.cycle_steps}: the run ends before the first merge")
    return notes


def _notes_on_relora(config: Config) -> list[str]:
    relora, notes = config.relora, list[str]()
    narrowest = min(config.model.dim, config.model.kv_heads * config.model.head_width, config.model.ffn_dim)
    if config.train.epochs is None and relora.start_step >= config.train.total_steps:
        return []  # it has no adapters
    if relora.rank > narrowest:
        notes.append(
            f"relora.rank {relora.rank} is larger than the smaller side of some matrices; their rank is "
            f"{narrowest}"
        )
    if relora.cycle_steps and config.schedule.name != "sawtooth":
        notes.append(f"schedule.name {config.schedule.name} has no warm-up after a merge")
    return notes


def to_values(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as sections of the keys that have a value, in types of JSON."""
    values = config.model_dump(mode="json", exclude_none=True)
    del values["data"]["source" if config.data.mixture else "mixture"]
    if not config.data.validation:
        del values["data"]["validation"]
    return values


def to_toml(config: Config) -> str:
    """The resolved config as TOML, for the run directory."""
    lines = []
    for section, keys in to_values(config).items():
        lines.append(f"[{section}]")
        tables = {key: value for key, value in keys.items() if is_list_of_tables(value)}
        # JSON strings, numbers, booleans and flat lists are TOML too
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key not in tables]
        for key, rows in tables.items():
            for row in rows:
                lines += ["", f"[[{section}.{key}]]"]
                lines += [f"{name} = {json.dumps(value)}" for name, value in row.items()]
        lines.append("")
    return "\n".join(lines)


def is_list_of_tables(value: Any) -> bool:
    """Whether TOML writes a value as [[...]]."""
    return bool(value) and isinstance(value, list) and all(isinstance(row, dict) for row in value)


def changed_keys(old: Config, new: Config) -> list[str]:
    """`section.key` of every setting that differs and may not change when a run is resumed."""
    return [key for key, marks in _differing(old, new) if "resumable" not in marks]


def adjusted_keys(old: Config, new: Config) -> list[str]:
    """`section.key` of every setting that differs, may change, and changes the mathematics of a step."""
    return [key for key, marks in _differing(old, new) if "adjustable" in marks]


def value_of(config: Config, key: str) -> Any:
    """The value of `section.key`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _differing(old: Config, new: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """`section.key` of every setting that differs, and how it is marked."""
    for section, fields in Config.model_fields.items():
        before, after = getattr(old, section), getattr(new, section)
        for key, field in fields.annotation.model_fields.items():  # type: ignore[union-attr]
            if getattr(before, key) != getattr(after, key):
                extra = field.json_schema_extra
                yield f"{section}.{key}", dict(extra) if isinstance(extra, dict) else {}
