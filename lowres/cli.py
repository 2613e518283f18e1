"""The command line; the only place that parses arguments.

Exit codes: 0 fine (also a run that was asked to stop, and has saved), 1 a check failed, 2 bad input, 3 does
not fit, 128 + n ended by signal n, 141 its output was lost.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowres import __version__, checkpoint, disk, harness, memory, ranks, terminal
from lowres.config import Config
from lowres.config_file import data_config, load_config, source_config, to_toml
from lowres.conversation import Conversation
from lowres.data import (
    inspect,
    overlap,
    prepare,
    refuse_ends,
    source_as_asked,
    source_of,
)
from lowres.data.chat import open_template
from lowres.device import pick_device, prepare_cuda
from lowres.errors import CheckFailed, UserError, first_line
from lowres.exchange import FORMATS, export, import_model, open_model, with_model_of
from lowres.model import unit_specs
from lowres.optim import make_optimizer
from lowres.optim.overview import overview, table
from lowres.probe import probe, step_flops
from lowres.reference import describe
from lowres.report import REPORT, write_report
from lowres.runs import CHECKPOINTS, open_run
from lowres.sample import Sampling, sample
from lowres.scoring import score_run
from lowres.speed import bench, with_random_tokens
from lowres.stopping import Left, loud
from lowres.sweep import sweep
from lowres.text import is_stream, list_files
from lowres.text.words import summary
from lowres.trainer import train
from lowres.watch import watch

Commands = argparse._SubParsersAction  # the type has no public name
LOST = 128 + 13  # as a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    prepare_cuda()
    with terminal.guard() as (out, _), loud():
        parsed = _parser().parse_args(arguments)
        code = _run(parsed)
    if code == 0 and out.lost is not None and parsed.command in _PRINTING:
        if not isinstance(out.lost, BrokenPipeError):
            print(f"lowres: the output could not be written ({first_line(out.lost)})", file=sys.stderr)
        return LOST  # its output was its purpose
    return code


def _run(parsed: argparse.Namespace) -> int:
    try:
        return parsed.command(parsed) or 0
    except UserError as error:
        if not ranks.is_first():
            ranks.let_the_first_speak()
        _complain(str(error))
        return error.exit_code
    except OSError as error:  # of a disk or a permission; the text names the file
        _complain(f"{error}; {disk.remedy(error)}")
        return UserError.exit_code
    except KeyboardInterrupt as error:
        if ranks.is_first():
            remedy = {
                _prepare: "; start it again to go on",
                _sample: "",
                _watch: "",
                _report: "; nothing was written; start it again",
                _export: "; nothing was written; start it again",
                _import: "; nothing is left of it; start it again",
            }.get(parsed.command, "; to continue, give a run --resume, or start a sweep again")
            _complain(f"interrupted{remedy}")
        return 128 + (error.args[0] if isinstance(error, Left) else signal.SIGINT)
    except Exception:  # a bug, or another rank ended during a collective operation
        ranks.let_the_first_speak()
        raise


def _complain(text: str) -> None:
    print(f"lowres: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowres", description="Pretrain LLaMA-style models on one consumer GPU."
    )
    parser.add_argument("--version", action="version", version=f"lowres {__version__}")
    commands: Commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_training(commands)
    _add_plan(commands)
    _add_data(commands)
    _add_exchange(commands)
    _add_use(commands)
    sub = _command(
        commands,
        "config",
        _config,
        "Print a resolved config, or the defaults without CONFIG.",
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(sub, optional=True)
    return parser


def _command(commands: Commands, name: str, function: Any, text: str, **more: Any) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text, **more)
    sub.set_defaults(command=function)
    return sub


def _add_training(commands: Commands) -> None:
    sub = _command(commands, "train", _train, "Train a model, or continue a run.")
    _add_train(sub)
    sub.add_argument(
        "--profile",
        type=_positive,
        default=0,
        metavar="N",
        help="show where the time of N steps goes, and write a trace into the run's folder",
    )

    sub = _command(commands, "launch", _launch, "Train on several GPUs with memory.engine = deepspeed.")
    _add_train(sub)
    sub.add_argument("--gpus", type=_positive, metavar="N", help="processes, one per GPU (default: all GPUs)")
    sub.add_argument(
        "--hostfile",
        type=Path,
        metavar="F",
        help="machines, in DeepSpeed's format: one line `host slots=N` each",
    )

    sub = _command(
        commands, "sweep", _sweep, "Train a grid of runs on the same number of tokens, and compare them."
    )
    _add_config(sub)
    sub.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="section.key=value,value",
        help="an axis of the grid; give several for all combinations",
    )
    length = sub.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--tokens",
        type=_positive,
        metavar="N",
        help="train each run on N tokens; a chat or pair counts as data.seq_len of them",
    )
    length.add_argument(
        "--epochs", type=_positive_float, metavar="X", help="... or on X times the data, which are no stream"
    )
    _add_tasks(sub, "also score each run on tasks of lm-evaluation-harness (needs lm_eval)")
    _add_init_from(sub)
    sub.add_argument(
        "--run", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweep-<run.name>)"
    )


def _add_plan(commands: Commands) -> None:
    sub = _command(
        commands, "plan", _plan, "Print the memory that a run needs, before anything is allocated."
    )
    _add_config(sub)
    _add_init_from(sub)
    sub.add_argument(
        "--gpus", type=_positive, metavar="N", help="plan for one of N ranks on a machine (deepspeed)"
    )
    sub.add_argument(
        "--machines", type=_positive, default=1, metavar="M", help="with --gpus ranks on each of M machines"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--probe", action="store_true", help="measure this machine and predict the speed")
    sub.add_argument("--optimizer", action="store_true", help="show the optimizer and state of every tensor")

    sub = _command(
        commands,
        "bench",
        _bench,
        "Measure how fast a config trains, on random tokens; nothing is read or written.",
    )
    _add_config(sub)
    _add_init_from(sub)
    sub.add_argument("--steps", type=_positive, default=5, metavar="N", help="timed steps; default 5")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_data(commands: Commands) -> None:
    data = commands.add_parser("data", help="Work with training data.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    sub = _command(data, "inspect", _inspect, "Show what a source holds, and what would be left out.")
    sub.add_argument("source", help="stdlib, a path, or hf:<dataset>[:<config>[:<split>]]")
    _add_data_set(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = _command(
        data,
        "overlap",
        _overlap,
        "Say how many evaluation documents share words in a row with a training text.",
    )
    sub.add_argument("train", metavar="TRAIN", help="text, chats or pairs to train on")
    sub.add_argument("evaluation", metavar="EVAL", help="text, chats or pairs to evaluate on")
    sub.add_argument("--ngram", type=_positive, default=13, metavar="N", help="words in a row; default 13")
    _add_data_set(sub, "how to read TRAIN")
    sub.add_argument(
        "--eval-set", action="append", default=[], metavar="section.key=value", help="how to read EVAL"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = _command(data, "prepare", _prepare, "Tokenise a source into a folder of shards.")
    sub.add_argument("source", help="stdlib, a path, or hf:<dataset>[:<config>[:<split>]]")
    sub.add_argument("out", type=Path, help="folder to build")
    sub.add_argument(
        "--tokenizer", metavar="PATH", help="SentencePiece model or tokenizer.json (default: train one)"
    )
    sub.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="pieces of a tokenizer that is trained"
    )
    sub.add_argument("--max-tokens", type=_positive, metavar="N", help="stop after N training tokens")
    _add_data_set(sub)


def _add_data_set(sub: argparse.ArgumentParser, text: str = "how to read the source") -> None:
    sub.add_argument("--set", action="append", default=[], metavar="data.key=value", help=text)


def _add_exchange(commands: Commands) -> None:
    """Commands that take models from other programs, or give them some."""
    sub = _command(
        commands,
        "import",
        _import,
        "Make a run at step 0 of a model that exists, such as a Hugging Face folder; see docs/models.md.",
    )
    sub.add_argument(
        "model", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files"
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run, which must not exist")
    _add_set(sub)


def _add_use(commands: Commands) -> None:
    """Commands that use a run without training it."""
    sub = _command(commands, "sample", _sample, "Print text from a trained model.")
    sub.add_argument("run", type=Path, metavar="RUN_DIR")
    sub.add_argument("--prompt", metavar="TEXT", help="what is continued; with --chat, what is asked")
    sub.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt, or without one every line of the input, with the chat template",
    )
    sub.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    sub.add_argument("--tokens", type=_positive, default=200, metavar="N")
    sub.add_argument(
        "--temperature",
        type=_not_negative_float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest token",
    )
    sub.add_argument(
        "--top-k", type=_not_negative, default=50, metavar="K", help="0 chooses among all tokens"
    )
    sub.add_argument("--seed", type=_not_negative, default=0, metavar="S")

    sub = _command(commands, "eval", _eval, "Loss, perplexity, bits per byte; of pairs also accuracy.")
    sub.add_argument("run", type=Path, metavar="RUN_DIR")
    sub.add_argument("--data", metavar="SOURCE", help="what to evaluate on (default: the validation data)")
    _add_data_set(sub)
    _add_tasks(sub, "tasks of lm-evaluation-harness instead, such as hellaswag,arc_easy (needs lm_eval)")
    sub.add_argument(
        "--num-fewshot", type=_not_negative, metavar="K", help="show K examples before each question"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = _command(
        commands, "export", _export, "Write a model for other programs: a Hugging Face folder or a GGUF file."
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="a run, a checkpoint, or a Hugging Face folder")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder or file to write, which must not exist")
    sub.add_argument("--format", choices=FORMATS, help="default: gguf if OUT ends in .gguf, otherwise hf")
    sub.add_argument(
        "--dtype",
        choices=sorted({dtype for dtypes in FORMATS.values() for dtype in dtypes}),
        help="number format of the weights (q8_0: gguf only); default: as they are stored, bf16 for int8",
    )
    sub.add_argument(
        "--checkpoint", type=_not_negative, metavar="STEP", help="of this step (default: the newest)"
    )
    sub.add_argument("--shard-size", metavar="SIZE", help="most bytes in a file of weights; default 5GB")

    sub = _command(commands, "report", _report, "Write an HTML page about runs; see docs/watching.md.")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of a sweep")
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"default: {REPORT} in the folder of the only run, otherwise in this one",
    )

    sub = _command(commands, "watch", _watch, "Show a run while it trains, in this terminal.")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run, which another process has")
    sub.add_argument(
        "--every", type=_positive_float, default=2.0, metavar="S", help="seconds between looks; default 2"
    )
    sub.add_argument("--once", action="store_true", help="look once, and end")

    checkpoints = commands.add_parser("checkpoint", help="Look at checkpoints.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for name, function, text in (
        ("list", _list, "List the checkpoints of a run."),
        ("verify", _verify, "Check every file against its checksum."),
    ):
        sub = _command(checkpoints, name, function, text)
        sub.add_argument("folder", type=Path, metavar="DIR", help="a run or one checkpoint")


def _add_config(sub: argparse.ArgumentParser, optional: bool = False) -> None:
    sub.add_argument("config", type=Path, metavar="CONFIG", **({"nargs": "?"} if optional else {}))  # type: ignore[arg-type]
    _add_set(sub)


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="section.key=value",
        help="override a key of the config; `lowres config --help` lists them",
    )


def _add_train(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--run", type=Path, metavar="DIR", help="folder of the run (default: runs/<run.name>)")
    sub.add_argument("--resume", action="store_true", help="continue from the newest valid checkpoint")
    sub.add_argument(
        "--restart",
        action="store_true",
        help="begin again at step 0; what the run's folder holds is moved into a folder old-1 in it",
    )
    _add_init_from(sub)


def _add_tasks(sub: argparse.ArgumentParser, about: str) -> None:
    sub.add_argument("--tasks", type=_names, metavar="NAME,NAME", help=about)
    sub.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with more tasks, in YAML")
    sub.add_argument("--limit", type=_positive, metavar="N", help="N questions of each task, at most")


def _add_init_from(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--init-from",
        metavar="MODEL",
        help="take the first weights, the model and the tokenizer from a run, a checkpoint or a Hugging Face "
        "folder (also run.init_from)",
    )


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} has no names")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _not_negative_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def _load(parsed: argparse.Namespace) -> Config:
    if getattr(parsed, "init_from", None):
        parsed.overrides.append(f"run.init_from={json.dumps(parsed.init_from)}")
    config, notes = load_config(parsed.config, parsed.overrides)
    for note in notes:
        ranks.say(f"note: {note}")
    return config


def _load_with_model(parsed: argparse.Namespace) -> Config:
    """The config with the model of `run.init_from`, which a run reads when it starts."""
    config = _load(parsed)
    return with_model_of(config, open_model(config.run.init_from)) if config.run.init_from else config


def _train(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    folder = parsed.run or Path("runs") / config.run.name
    train(config, folder, parsed.resume, parsed.profile, parsed.restart)


def _launch(parsed: argparse.Namespace) -> int:
    config, _ = load_config(parsed.config, parsed.overrides)  # the ranks print its notes
    if config.memory.engine != "deepspeed":
        raise UserError(
            f"memory.engine: {config.memory.engine} uses one GPU; set it to deepspeed, or use `lowres train`"
        )
    arguments = ["train", str(parsed.config.absolute())]
    arguments += [part for override in parsed.overrides for part in ("--set", override)]
    arguments += ["--run", str(parsed.run)] if parsed.run else []
    arguments += ["--init-from", parsed.init_from] if parsed.init_from else []
    arguments += ["--resume"] if parsed.resume else []
    arguments += ["--restart"] if parsed.restart else []
    return ranks.launch(arguments, parsed.gpus, parsed.hostfile)


def _sweep(parsed: argparse.Namespace) -> None:
    if parsed.init_from:
        parsed.overrides.append(f"run.init_from={json.dumps(parsed.init_from)}")
    length = {"tokens": parsed.tokens} if parsed.tokens else {"epochs": parsed.epochs}
    sweep(parsed.config, parsed.grid, length, parsed.run, parsed.overrides, _scoring(parsed))


def _scoring(parsed: argparse.Namespace) -> list[str]:
    """The arguments of `lowres eval` for the tasks of a sweep."""
    if not parsed.tasks:
        _refuse_without_tasks(parsed, "include_path", "limit")
        return []
    found = ["--tasks", ",".join(parsed.tasks)]
    found += ["--include-path", str(parsed.include_path)] if parsed.include_path else []
    return found + (["--limit", str(parsed.limit)] if parsed.limit else [])


def _refuse_without_tasks(parsed: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(parsed, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: says how to use tasks; give it with --tasks")


def _plan(parsed: argparse.Namespace) -> None:
    config = _load_with_model(parsed)
    if parsed.probe and config.memory.engine == "deepspeed":
        raise UserError(
            "--probe: measures the layer-major step; leave it out, or set memory.engine=layerwise"
        )
    # the vocabulary that the data will have, if the config gives it
    config = with_random_tokens(config)
    # a plan for a GPU does not need one
    device = torch.device("cuda") if config.run.device == "cuda" else pick_device(config)
    here = parsed.gpus or 1
    crew = memory.Crew(here * parsed.machines, here)
    if crew.ranks > 1 and config.memory.engine != "deepspeed":
        raise UserError(f"memory.engine: {config.memory.engine} uses one GPU; set it to deepspeed")
    plans = memory.make_plans(config, device, crew=crew)
    if parsed.probe and memory.ADAPTERS in plans:
        raise UserError(
            "--probe: it measures no adapters; add --set relora.enabled=false for the speed of the warm start"
        )
    plan = max(plans.values(), key=lambda plan: (plan.excess, plan.peak("gpu")))
    parts, tables = {}, []
    for part, own in plans.items():
        parts[part] = own.as_dict()
        tables += [f"--- {part} ---"] * (len(plans) > 1) + [own.table()]
        if parsed.optimizer:
            adapters = config.relora if part == memory.ADAPTERS else None
            specs = (spec for unit in unit_specs(config.model, adapters) for spec in unit.tensors)
            parts[part]["optimizer"] = overview(make_optimizer(config), specs)
            tables.append(table(parts[part]["optimizer"], step_flops(config, own)))
    values = plan.as_dict() | ({"parts": parts} if len(parts) > 1 else parts[next(iter(parts))])
    if parsed.probe and not plan.problems:
        found = probe(config, plan)
        values["probe"] = found.as_dict()
        tables.append(found.table())
    print(json.dumps(values, indent=1) if parsed.json else "\n".join(tables))
    memory.require_fit(plan)


def _bench(parsed: argparse.Namespace) -> None:
    found = bench(_load_with_model(parsed), parsed.steps)
    print(json.dumps(found.as_dict(), indent=1) if parsed.json else found.table())


def _inspect(parsed: argparse.Namespace) -> None:
    found = inspect(source_config(parsed.source, parsed.set))
    print(json.dumps(found.to_json()) if parsed.json else "\n".join(found.lines()))


def _overlap(parsed: argparse.Namespace) -> None:
    sources = ((parsed.train, parsed.set), (parsed.evaluation, parsed.eval_set))
    train, evaluation = (source_as_asked(source_config(*given)) for given in sources)
    found = overlap(train, evaluation, parsed.ngram, progress=not parsed.json)
    print(json.dumps(found.to_json()) if parsed.json else "\n".join(found.lines()))


def _prepare(parsed: argparse.Namespace) -> None:
    config = data_config(parsed.source, parsed.set)
    for key in ("val_source", "seq_len", "cache", "document_mask", "mixture"):
        if key in config.model_fields_set:
            raise UserError(
                f"--set data.{key}: data prepare does not use it; leave it to the config of a run"
            )
    if not parsed.tokenizer:
        refuse_ends(config)
    source = source_of(config)
    if not is_stream(source):
        ranks.say(f"data: {summary(list_files(source))}")
    made = prepare(
        source,
        parsed.out,
        tokenizer=parsed.tokenizer or config.tokenizer,
        tokenizer_form=config.tokenizer_form,
        bos=config.bos,
        eos=config.eos,
        vocab_size=parsed.vocab_size or config.vocab_size,
        max_tokens=parsed.max_tokens,
        drop_duplicates=config.drop_duplicates,
        max_overlap=config.max_overlap,
    )
    for note in made["notes"]:
        ranks.say(f"note: {note}")
    print(
        f"{parsed.out}: {made['train_tokens']:,} training tokens, {made['val_tokens']:,} for "
        f"validation, {made['vocab_size']} pieces"
    )


def _import(parsed: argparse.Namespace) -> None:
    print("\n".join(import_model(parsed.model, parsed.run, parsed.overrides).lines()))


def _sample(parsed: argparse.Namespace) -> None:
    if parsed.prompt is None and not parsed.chat:
        raise UserError("--prompt: give the text that is continued, or talk to the model with --chat")
    if parsed.system is not None and not parsed.chat:
        raise UserError("--system: only chats have it; give it with --chat")
    config, engine, tokenizer = open_run(parsed.run)
    how = Sampling(parsed.tokens, config.data.seq_len, parsed.temperature, parsed.top_k, parsed.seed)
    if parsed.chat:
        # what a run was tuned with came along with its tokenizer
        asked = config.data.chat_template if config.objective.name == "pretrain" else None
        if asked is None and tokenizer.has_text and tokenizer.chat_template is None:
            raise UserError(f"--chat: {parsed.run} was not tuned, and has no chat template; leave it out")
        template = open_template(asked, tokenizer)
        for note in template.notes:
            print(f"note: {note}", file=sys.stderr)
        _talk(Conversation(engine, tokenizer, template, how, parsed.system), parsed.prompt)
        return
    if not tokenizer.has_text:
        print(f"note: {parsed.run} has no tokenizer for text; a sample is ids", file=sys.stderr)
    print(sample(engine, tokenizer, parsed.prompt, how))


def _talk(conversation: Conversation, question: str | None) -> None:
    """Print the answer to a question, or to each line of the input."""
    noted = False
    for text in _lines() if question is None else [question]:
        print(conversation.answer(text), flush=True)
        if conversation.cut_off and not noted:
            noted = True
            note = "this is longer than data.seq_len, so the model no longer sees the beginning"
            print(f"note: {note}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """The lines of the input that are not blank."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("the input is not UTF-8; give it as that") from None
        if line.strip():
            yield line


def _eval(parsed: argparse.Namespace) -> None:
    if parsed.tasks:
        _eval_tasks(parsed)
        return
    _refuse_without_tasks(parsed, "include_path", "limit", "num_fewshot")
    if parsed.set and not parsed.data:
        raise UserError("--set: says how to read a source; give it with --data")
    asked = data_config(parsed.data, parsed.set) if parsed.data else None
    scores = score_run(parsed.run, asked)
    print(json.dumps(scores) if parsed.json else _scores_text(scores))


def _scores_text(scores: dict[str, float]) -> str:
    if "val_accuracy" in scores:
        told = ("margin", "reward_chosen", "reward_rejected", "drift")
        shown = (f"{name.replace('_', ' ')} {scores[f'val_{name}']:.4f}" for name in told)
        return f"loss {scores['val_loss']:.4f}, accuracy {scores['val_accuracy']:.1%}, {', '.join(shown)}"
    bits = scores.get("val_bits_per_byte")
    return f"loss {scores['val_loss']:.4f}, perplexity {scores['val_ppl']:.3f} per token, " + (
        "no text, so no bits per byte" if bits is None else f"{bits:.4f} bits per byte"
    )


def _eval_tasks(parsed: argparse.Namespace) -> None:
    for option in ("data", "set"):
        if getattr(parsed, option):
            raise UserError(f"--{option}: tasks have data of their own; leave it out, or leave --tasks out")
    tasks = harness.load_tasks(parsed.tasks, parsed.include_path)
    config, engine, tokenizer = open_run(parsed.run, packed=False)
    found = harness.score(tasks, config, engine, tokenizer, parsed.limit, parsed.num_fewshot)
    if found.shortened:
        ranks.say(
            f"note: {found.shortened:,} requests are longer than the context of the model, which saw their "
            f"last {found.context:,} tokens"
        )
    print(json.dumps(found.as_dict()) if parsed.json else found.table())


def _export(parsed: argparse.Namespace) -> None:
    found = export(
        *(parsed.run, parsed.out, parsed.format, parsed.dtype, parsed.checkpoint, parsed.shard_size)
    )
    print("\n".join(found))


def _report(parsed: argparse.Namespace) -> None:
    print(f"report: {write_report(parsed.runs, parsed.out)}")


def _watch(parsed: argparse.Namespace) -> None:
    watch(parsed.run, parsed.every, parsed.once)


def _folders(path: Path) -> list[Path]:
    """The checkpoints that a path means: itself, or those of a run."""
    if (path / checkpoint.MANIFEST).exists() or path.name.startswith(checkpoint.PREFIX):
        return [path]
    found = checkpoint.find(path / CHECKPOINTS)
    if not found:
        raise UserError(f"{path} is neither a checkpoint nor a run that has one")
    return found


def _list(parsed: argparse.Namespace) -> None:
    for folder in _folders(parsed.folder):
        size = sum(f.lstat().st_size for f in folder.iterdir()) / memory.GIB
        print(f"{folder}  {size:.3f} GiB")


def _verify(parsed: argparse.Namespace) -> None:
    damaged = 0
    for folder in _folders(parsed.folder):
        problems = checkpoint.verify(folder)
        damaged += bool(problems)
        print(f"{folder}: {'; '.join(problems) or 'ok'}")
    if damaged:
        raise CheckFailed(
            f"damaged checkpoints in {parsed.folder}: {damaged}; --resume uses the newest valid one"
        )


def _config(parsed: argparse.Namespace) -> None:
    print(to_toml(_load(parsed) if parsed.config else Config()), end="")


# commands whose result is what they print
_PRINTING = (_plan, _bench, _sample, _eval, _list, _verify, _config, _watch)
