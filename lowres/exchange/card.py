"""The model card of an exported folder: README.md, in the form that the Hugging Face hub reads.

It says what a reader of the model asks first: trained on what, how, how far, with which loss. Nothing in it
names a folder of the machine that made it. The licence is the user's to give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from lowres import __version__, disk, events, metrics
from lowres.config import Config, DataConfig
from lowres.config_file import load_resolved, with_values
from lowres.errors import UserError
from lowres.exchange.families import Family
from lowres.exchange.stored import StoredModel, TrainedModel, is_tuned
from lowres.model import count_parameters
from lowres.records import CONFIG, METRICS
from lowres.scores import BITS, LOSS, PERPLEXITY, number_in_words, of_tasks
from lowres.text import is_stream
from lowres.text.source import PAIRS, hub_name
from lowres.wording import command

README, PICTURE = "README.md", "loss.png"
_ROWS, _COLUMNS = 10, 60  # of the table of losses; of the curve
_BLOCKS = "▁▂▃▄▅▆▇█"
_CACHED = re.compile("models--(.+)")  # a folder in the cache of the hub's library
_MOST_PARENTS = 16
_OF_TEXT = 'tokenizer("Once", return_tensors="pt")'
_OF_CHATS = """\
tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = TOKENS
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=100)[0], skip_special_tokens=True))
```
"""


class Base(NamedTuple):
    """The model from which another one began. name: its id on the hub, or that of its folder. known: whether
    it is the id."""

    name: str
    known: bool


def files(model: StoredModel, family: Family, dtype: str) -> dict[str, bytes]:
    """The model card, and the picture of its loss if there is one, by name. family: that it is written as."""
    if not isinstance(model, TrainedModel) or not model.state.tokens:
        imported = model.config.run.init_from if isinstance(model, TrainedModel) else None
        origin = base_of(imported or str(model.path))
        about = f"Converted to {dtype} from {_code(origin.name)}; see there for data, training and licence."
        return {README: _card(model, family, origin.name, origin, [], [about]).encode()}
    records = metrics.read(model.run / METRICS)
    until = [record for record in records if record["step"] <= model.state.step]
    config, found = model.config, {}
    sections = [
        f"{_how(config)} with lowres on {model.state.tokens:,} tokens.",
        "## Training",
        _table(("", ""), _settings(model, dtype)),
        *_losses(until, config.objective.form),
    ]
    sections += _tasks(until)
    picture = model.run / PICTURE
    if len(until) == len(records) and picture.is_file():
        with disk.named(picture, "read"):
            found[PICTURE] = disk.read_whole(picture)
        sections.append(f"![loss]({PICTURE})")
    base = base_of(config.run.init_from) if config.run.init_from else None
    sections += _versions(model, dtype)
    text = _card(model, family, config.run.name, base, config.data.sources, sections)
    return {README: text.encode(), **found}


def _how(config: Config) -> str:
    """The verb for what a run has done."""
    if config.objective.name != "pretrain":
        return f"Tuned on {config.objective.form} ({config.objective.name})"
    return "Trained further" if config.run.init_from else "Pretrained"


def without_places(config: Config) -> Config:
    """The config with names instead of paths, to be given away."""
    data = with_values(
        config,
        "data",
        cache=DataConfig.model_fields["cache"].default,
        tokenizer=_name(config.data.tokenizer),
        source=_name(config.data.source),
        val_source=_name(config.data.val_source),
        mixture=tuple(part.model_copy(update={"source": _name(part.source)}) for part in config.data.mixture),
        validation=tuple(
            text.model_copy(update={"source": _name(text.source)}) for text in config.data.validation
        ),
    )
    origin = config.run.init_from and base_of(config.run.init_from).name
    train = config.train
    tasks, folder = tuple(map(str, map(_name, train.eval_tasks))), _name(train.eval_tasks_folder)
    data = with_values(data, "train", eval_tasks=tasks, eval_tasks_folder=folder)
    return with_values(data, "run", rescue="auto", init_from=origin)


def base_of(path: str) -> Base:
    """The model at the beginning: runs that began with a run of ours are followed as far as they exist."""
    found = Path(path).expanduser().absolute()
    for _ in range(_MOST_PARENTS):
        run = found if (found / CONFIG).is_file() else found.parent.parent
        try:
            before = load_resolved(run / CONFIG).run.init_from
        except UserError:
            break
        if before is None:
            break
        found = Path(before).expanduser().absolute()
    cached = [match[1] for part in found.parts if (match := _CACHED.fullmatch(part))]
    return Base(cached[-1].replace("--", "/"), True) if cached else Base(found.name, False)


def _card(
    model: StoredModel,
    family: Family,
    name: str,
    base: Base | None,
    sources: Sequence[str],
    sections: Iterable[str],
) -> str:
    datasets = [hub_name(source).dataset for source in sources if is_stream(source)]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if datasets := [dataset for dataset in datasets if not Path(dataset).is_absolute()]:
        front["datasets"] = sorted(set(datasets))
    lines = [yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()]
    if base is not None:
        line = yaml.safe_dump({"base_model": base.name}, allow_unicode=True, width=1 << 20).rstrip()
        lines.append(line if base.known else f"# {line}  (give its id on the hub)")
    lines.append("# license: (say how others may use this model, for example: apache-2.0)")
    shape = model.model
    head = (
        f"{family.architecture}, {count_parameters(shape) / 1e6:,.1f} M parameters: "
        f"{shape.n_layers} layers, {shape.dim} wide, {shape.n_heads} heads, {shape.vocab:,} tokens in the "
        "vocabulary."
    )
    use = _USE.replace("TOKENS", _OF_CHATS if is_tuned(model) else _OF_TEXT)
    parts = ["\n".join(("---", *lines, "---")), f"# {name}", head, *sections, "## Use", use]
    return "\n\n".join(parts)


def _settings(model: TrainedModel, dtype: str) -> list[tuple[str, str]]:
    config = model.config
    optim, train, relora = config.optim, config.train, config.relora
    rows = [("data", ", ".join(_of_sources(config.data)))]
    if config.run.init_from:
        rows.append(("first weights", _code(base_of(config.run.init_from).name)))
    rows += [
        ("tokens", f"{model.state.tokens:,}"),
        ("steps", f"{model.state.step:,} of {train.total_steps:,}"),
        ("tokens in a step", f"{train.batch_tokens:,}"),
        ("tokens in a sequence", f"{config.data.seq_len:,}"),
        ("optimizer", f"{optim.name}, weight decay {optim.weight_decay:g}"),
        ("learning rate", f"{optim.lr or 0:g}, {config.schedule.name}, warm-up {config.warmup_steps} steps"),
    ]
    if relora.enabled:
        often = f"every {relora.cycle_steps} steps" if relora.cycle_steps else "never"
        rows.append(("adapters", f"rank {relora.rank}, from step {relora.start_step} on, merged {often}"))
    rows += [("weights", f"{model.kind} in training, {dtype} here"), ("seed", f"{config.run.seed}")]
    return rows


def _of_sources(data: DataConfig) -> list[str]:
    """The sources, with their shares."""
    if not data.mixture:
        return [_code(str(_name(data.source)))]
    total = sum(part.weight for part in data.mixture)
    return [f"{part.weight / total:.1%} {_code(str(_name(part.source)))}" for part in data.mixture]


def _losses(records: list[dict[str, Any]], form: str) -> list[str]:
    """Sections with a table and a curve of the losses. form: of what was trained on, see `Source`."""
    steps = [r for r in records if r.get("loss") is not None]
    evaluations = {r["step"]: r for r in records if r.get("val_loss") is not None}
    if not steps:
        return []
    losses = {r["step"]: r for r in steps}
    shown = _spread(sorted(evaluations) or sorted(losses), _ROWS)
    rows = []
    for step in shown:
        of_step, of_evaluation = losses.get(step, {}), evaluations.get(step, {})
        values = (
            of_step.get("loss"),
            *(of_evaluation.get(key) for key in (BITS, LOSS, PERPLEXITY)),
        )
        rows.append((f"{step:,}", *("" if value is None else f"{value:.4f}" for value in values)))
    names = ("step", "training loss", "bits per byte", "validation loss", "perplexity")
    found = [
        "## Loss",
        f"Losses are in nats per {'pair' if form == PAIRS else 'token'}; that of training is of one step, "
        "all else of validation text.",
        _table(names, rows),
    ]
    if len(steps) > 1:
        found.append(f"Training loss, from the first step to the last:\n\n    {_curve(steps)}")
    return found


def _tasks(records: list[dict[str, Any]]) -> list[str]:
    """A section with the newest scores of tasks."""
    scored = [record for record in records if of_tasks(record)]
    if not scored:
        return []
    rows = [
        (_code(task), metric, number_in_words(score))
        for task, found in of_tasks(scored[-1]).items()
        for metric, score in found.items()
    ]
    head = f"By lm-evaluation-harness at step {scored[-1]['step']:,}, with standard errors"
    return ["## Tasks", f"{head}.", _table(("task", "metric", "score"), rows)]


def _curve(steps: list[dict[str, Any]]) -> str:
    """A line of blocks whose heights are the means of neighbouring losses."""
    width = min(_COLUMNS, len(steps))
    cuts = [len(steps) * i // width for i in range(width + 1)]
    means = [sum(r["loss"] for r in steps[a:b]) / (b - a) for a, b in pairwise(cuts)]
    least, most = min(means), max(means)
    heights = (round((mean - least) / ((most - least) or 1) * (len(_BLOCKS) - 1)) for mean in means)
    return f"{means[0]:.3f} {''.join(_BLOCKS[height] for height in heights)} {means[-1]:.3f}"


def _spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[i * (len(values) - 1) // (count - 1)] for i in range(count)]


def _versions(model: TrainedModel, dtype: str) -> list[str]:
    step = model.state.step
    started = [event for event in events.read(model.run) if event.get("event") == "started"]
    trained = started[-1] if started else {}
    return [
        "## Versions",
        f"Trained with lowres {trained.get('lowres', __version__)} and PyTorch "
        f"{trained.get('torch', torch.__version__)}; exported by lowres {__version__} with "
        f"`{command('lowres', 'export', model.run.name, 'OUT', '--dtype', dtype, '--checkpoint', step)}`.",
    ]


def _name(source: str | None) -> str | None:
    """A source or a path without the folders that it is in."""
    if source is None:
        return None
    if not is_stream(source):
        return Path(source).name or source
    name = hub_name(source)
    place = Path(name.dataset)
    return source.replace(name.dataset, place.name) if place.is_absolute() else source


def _code(text: str) -> str:
    """The text as code in a cell of a table."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
